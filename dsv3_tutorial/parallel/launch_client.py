"""The caller's end of the fork server: starts it, gives it a job, hears its ranks report."""

import atexit
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair
from typing import Any

from dsv3_tutorial.parallel import launch_report

_READY = 120.0  # seconds to import torch on a slow disk
_ANSWER = 20.0  # seconds to kill and reap ranks
_MODULE = "dsv3_tutorial.parallel.launch_server"
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # a process with threads must not fork
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # to ask for GPUs must not start CUDA before the fork
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


class ServerLost(Exception):
    """The fork server did not start, or has ended."""


class Client:
    """One fork server, of which this process is the only user; `close` leaves nothing behind."""

    def __init__(self) -> None:
        self.owner, self.folder = os.getpid(), None
        self.states: list[str] = []
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the server)
        ours, theirs = socketpair()
        with theirs:
            self.process = _spawn(theirs.fileno(), self.errors)
        self.connection = Connection(ours.detach())
        atexit.register(self.close)
        try:
            self.folder = Path(self._receive(_READY, "start"))
        except BaseException:
            self.close()
            raise

    def usable(self) -> bool:
        """Whether the server still runs and is this process's own, not its parent's."""
        return self.owner == os.getpid() and self.process.poll() is None

    def start(self, job: bytes, world: int) -> None:
        """Have the ranks forked; their time begins when this returns."""
        self.states = ["runs"] * world
        self._send(("start", job, world))
        self._receive(_READY, "start ranks")

    def waiting(self) -> bool:
        return "runs" in self.states

    def failed(self) -> bool:
        return any(state not in ("runs", "done") for state in self.states)

    def listen(self, seconds: float) -> bool:
        """Hear one rank's report; False when none came in time."""
        with self._lost("while ranks ran"):
            if not self.connection.poll(seconds):
                return False
            rank, state = self.connection.recv()
            self.states[rank] = state
            return True

    def ask_for_stacks(self) -> None:
        """Let the ranks that still run write down where they stand."""
        self._send(("stacks",))
        time.sleep(0.3)

    def end(self) -> list[launch_report.Report]:
        """Kill what still runs, and read what every rank left."""
        self._send(("kill",))
        while (message := self._receive(_ANSWER, "end its ranks")) != "killed":
            rank, state = message  # reports that came too late to count, but for their words
            self.states[rank] = state if self.states[rank] == "runs" else self.states[rank]
        found = [launch_report.read(self.folder, *it) for it in enumerate(self.states)]
        self._send(("clear",))
        return found

    def close(self) -> None:
        """End the server and with it all ranks; it removes its temporary folder."""
        atexit.unregister(self.close)
        self.connection.close()
        self.errors.close()
        if self.owner != os.getpid():
            return
        try:
            self.process.wait(timeout=_ANSWER)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)  # a server that was killed leaves it

    def _send(self, message: Any) -> None:
        with self._lost("while it was asked to run ranks"):
            self.connection.send(message)

    def _receive(self, seconds: float, what: str) -> Any:
        with self._lost(f"and did not {what}"):
            if not self.connection.poll(seconds):
                raise EOFError(f"no answer in {seconds:.0f} s")
            return self.connection.recv()

    @contextlib.contextmanager
    def _lost(self, when: str):
        try:
            yield
        except (EOFError, OSError) as error:
            self.errors.seek(0)
            said = self.errors.read().strip()[-2000:]
            raise ServerLost(
                f"The process that starts ranks ended {when} ({error or 'it was killed'}). Without "
                f"it no rank runs. Call launch again; it starts another. It said: {said or '-'}"
            ) from None


def _spawn(fd: int, errors: Any) -> subprocess.Popen:
    """A Python that imports torch and waits for jobs, in a session that no Ctrl-C reaches."""
    code = f"import sys; sys.path[:] = {[*map(str, sys.path)]!r}; import {_MODULE} as s; "
    return subprocess.Popen(
        [sys.executable, "-c", f"{code}s.main({fd}, {os.getpid()})"],
        stdin=subprocess.DEVNULL,
        stdout=errors,
        stderr=errors,
        pass_fds=(fd,),
        start_new_session=True,
        env={**os.environ, **_ENVIRONMENT},
    )
