"""The fork server: one process with torch imported and no threads, that forks ranks and ends them.

It ends, and kills every rank, when its only user closes the connection or is gone. Ranks die with
it: by the kernel's parent-death signal on Linux, by a thread that watches a pipe elsewhere.
"""

import contextlib
import importlib
import os
import pickle
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path

inside: int | None = None  # the rank that this process is
PRELOAD = (
    "cloudpickle",
    "torch.distributed",
    "torch.distributed.tensor.parallel",
    "torch.distributed.fsdp",
    "torch.distributed.nn.functional",
    "dsv3_tutorial.parallel.launch_rank",
)
_LOOK = 1.0  # seconds between looks at whether the user is still there


def supported() -> bool:
    """Whether this system can fork."""
    return hasattr(os, "fork")


@dataclass
class Ranks:
    """The ranks of one job: their pids, and the pipes on which they report."""

    pids: dict[int, int] = field(default_factory=dict)  # by rank, while they live
    pipes: dict[int, int] = field(default_factory=dict)  # file descriptor to rank

    def kill(self) -> None:
        """End every rank and what it started, and wait until they are gone."""
        for pid in self.pids.values():
            for end in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    end(pid, signal.SIGKILL)
        for pid in self.pids.values():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        for pipe in self.pipes:
            os.close(pipe)
        self.pids, self.pipes = {}, {}


def main(fd: int, user: int) -> None:
    """Serve the process `user` on the socket `fd` until it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    folder = Path(tempfile.mkdtemp(prefix="dsv3_ranks_"))
    ranks, connection = Ranks(), Connection(fd)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _load(PRELOAD)
            connection.send(str(folder))
            _serve(connection, user, folder, ranks)
    except (EOFError, OSError) as error:  # the user is gone, or the system grants no process
        print(error, file=sys.stderr)
    finally:
        ranks.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _serve(connection: Connection, user: int, folder: Path, ranks: Ranks) -> None:
    while os.getppid() == user:
        for ready in wait([connection, *ranks.pipes], _LOOK):
            if ready is connection:
                _obey(connection, connection.recv(), folder, ranks)
            elif ready in ranks.pipes:
                connection.send(_report(ready, ranks))


def _obey(connection: Connection, message: tuple, folder: Path, ranks: Ranks) -> None:
    match message:
        case ("start", job, world):
            _start(connection, pickle.loads(job), world, folder, ranks)
        case ("stacks",):
            for rank, pid in ranks.pids.items():
                if rank in ranks.pipes.values():
                    os.kill(pid, signal.SIGUSR1)
        case ("kill",):
            ranks.kill()
            connection.send("killed")
            if (missed := folder / "modules.0").exists():
                _load(missed.read_text().split())  # the next ranks find them imported
        case ("clear",):
            for left in folder.iterdir():
                left.unlink()


def _start(connection: Connection, job: dict, world: int, folder: Path, ranks: Ranks) -> None:
    sys.path[:] = job["path"]
    _load(job["modules"])
    for rank in range(world):
        mine, theirs = os.pipe()
        server = os.getpid()
        pid = os.fork()
        if not pid:
            _become(rank, job, folder, theirs, server, [connection.fileno(), mine, *ranks.pipes])
        os.close(theirs)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        ranks.pids[rank], ranks.pipes[mine] = pid, rank
    connection.send("started")


def _become(rank: int, job: dict, folder: Path, pipe: int, server: int, foreign: list[int]) -> None:
    """Be a rank, and never come back: `foreign` are descriptors that only the server may hold."""
    global inside
    inside = rank
    try:
        os.setpgid(0, 0)
        for fd in foreign:
            os.close(fd)
        warnings.resetwarnings()
        from dsv3_tutorial.parallel import launch_rank

        launch_rank.run(rank, job, folder, pipe, server)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)


def _report(pipe: int, ranks: Ranks) -> tuple[int, str]:
    """What a rank says: "done", "failed", or how it ended without a word."""
    rank = ranks.pipes.pop(pipe)
    said = os.read(pipe, 16).decode()
    os.close(pipe)
    if said:
        return rank, said
    code = os.waitstatus_to_exitcode(os.waitpid(ranks.pids.pop(rank), 0)[1])
    return rank, f"exit {code}" if code >= 0 else signal.Signals(-code).name


def _load(modules) -> None:
    for name in modules:
        with contextlib.suppress(Exception):  # the rank that needs it will say what is wrong
            importlib.import_module(name)
