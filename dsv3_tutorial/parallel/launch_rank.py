"""What a forked process does to be a rank: die with its parent, join the others, run, report, wait.

A rank that is done stays until it is killed: its peers may still read what it has sent.
"""

import ctypes
import faulthandler
import linecache
import os
import pickle
import random
import signal
import socket
import sys
import threading
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from dsv3_tutorial.parallel import launch_pickle
from dsv3_tutorial.parallel.launch_report import Failure, place


class _NoWarning(Warning):
    """Nobody's."""


_LATER = 30.0  # seconds by which a collective's own limit is longer: launch's comes first
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def run(rank: int, job: dict, folder: Path, pipe: int, server: int) -> None:
    """The life of a rank, from the fork to the kill."""
    die_with(server)
    torch.set_num_threads(1)  # before anything else: a forked rank would wait for lost threads
    _be_like_the_caller(job, rank)
    _redirect(folder, rank)
    stacks = open(place(folder, "stack", rank), "w")  # noqa: SIM115 (open until the kill)
    faulthandler.register(signal.SIGUSR1, file=stacks)
    here = set(sys.modules)
    try:
        _join(rank, job, folder)
        fn, args = pickle.loads(job["call"])
        _seed(rank)
        returned = fn(*args)
        said, left = "done", _result(returned)
    except BaseException as error:
        said, left = "failed", pickle.dumps(_failure(error))
    place(folder, "result", rank).write_bytes(left)
    missed = [name for name in launch_pickle.preloaded() if name not in here]
    place(folder, "modules", rank).write_text("\n".join(missed))
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(pipe, said.encode())
    while True:
        signal.pause()


def die_with(parent: int) -> None:
    """End this process when `parent` ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        threading.Event().wait(0.5)
    os._exit(1)


def _be_like_the_caller(job: dict, rank: int) -> None:
    os.environ.clear()
    os.environ.update(job["environment"])
    os.environ["CUDA_VISIBLE_DEVICES"] = job["gpus"][rank] if job["gpus"] else ""
    loop = "lo0" if sys.platform == "darwin" else "lo"
    if loop in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loop)  # a host name may lead nowhere
    os.chdir(job["folder"])
    sys.path[:] = job["path"]
    linecache.cache.update(job["sources"])
    warnings.filters[:] = job["filters"]
    warnings.simplefilter("default", _NoWarning)  # lets the interpreter see the new list


def _redirect(folder: Path, rank: int) -> None:
    """Send what is printed, by Python or by a library, to this rank's two files."""
    for fd, name in ((1, "out"), (2, "err")):
        file = os.open(place(folder, name, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, fd)
        os.close(file)
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream = open(fd, "w", encoding="utf-8", errors="replace", buffering=1, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)


def _join(rank: int, job: dict, folder: Path) -> None:
    dist.init_process_group(
        job["backend"],
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=job["world"],
        timeout=timedelta(seconds=job["timeout"] + _LATER),
    )


def _seed(rank: int) -> None:
    """Other random numbers on each rank, the same in every launch: a fork copies the server's."""
    torch.manual_seed(rank)
    random.seed(rank)
    np.random.seed(rank)


def _result(returned: object) -> bytes:
    try:
        return launch_pickle.dumps(returned)
    except Exception as error:
        raise TypeError(
            f"What this rank returned cannot be sent back ({type(error).__name__}: {error}). The "
            "caller shares no memory with it. Return tensors, numbers and plain objects."
        ) from None


def _failure(error: BaseException) -> Failure:
    """The error as text, without the frames of this module."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    error.__traceback__ = frames
    text = "".join(traceback.format_exception(error))
    return Failure(f"{type(error).__name__}: {error}".strip(), text, _from_a_peer(error))


def _from_a_peer(error: BaseException | None) -> bool:
    """Whether a collective failed, here or under what was raised because of it."""
    while error is not None:
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
