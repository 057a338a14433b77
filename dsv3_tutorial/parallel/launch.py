"""Ranks from a notebook: a function on N processes, results in their order, nothing left over.

A fork server imports torch once and forks a rank in milliseconds. Ranks find each other through a
file, so no port can be busy; they are killed with the caller, however it ends. No Windows.
"""

import pickle
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from dsv3_tutorial.parallel import launch_report, launch_server
from dsv3_tutorial.parallel.launch_client import Client, ServerLost
from dsv3_tutorial.parallel.launch_errors import ParallelError, RankFailed, RankTimeout
from dsv3_tutorial.parallel.launch_pickle import job_bytes, visible_gpus

__all__ = ["ParallelError", "RankFailed", "RankTimeout", "launch", "stop"]

MOST_RANKS = 64
_GRACE = 0.5  # seconds in which the other ranks may say that they failed too
_one_at_a_time = threading.Lock()
_client: Client | None = None


def launch(
    fn: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 60.0,
    echo: bool = True,
    backend: str = "gloo",
) -> list[Any]:
    """Run fn(*args) on `world` ranks of this machine; what each returned, in rank order.

    torch.distributed is up in every rank, on one thread; fn may come from a notebook cell. Results
    and arguments are copies, tensors on the CPU and without their .grad. What the ranks print is
    printed after their end, rank by rank, unless echo is False. A rank sees a GPU only where each
    has its own. The first call takes seconds, to import torch; later ones about 0.1 s.

    Rank r begins with seed r for torch, random and numpy, whatever the caller's: random numbers
    differ between ranks and repeat at each launch. Weights that ranks are to share need a seed
    that fn sets itself, the same on all, as under torchrun.
    Raises RankFailed with a rank's own traceback, RankTimeout with the place where ranks hang after
    `timeout` seconds, ParallelError for what cannot start. The other ranks are ended either way.
    """
    _check(world, timeout)
    job = job_bytes(fn, args, world, timeout, backend, visible_gpus(world, backend))
    with _one_at_a_time:
        reports = _run(job, world, timeout)
    if echo:
        _echo(reports)
    problem = launch_report.problem(reports, timeout)
    if problem is not None:
        raise problem
    return [_result(report) for report in reports]


def stop() -> None:
    """End the fork server, if one runs; the next launch starts another. Exit does this anyway."""
    global _client
    client, _client = _client, None
    if client is not None:
        client.close()


def _check(world: int, timeout: float) -> None:
    if launch_server.inside is not None:
        raise ParallelError(
            f"launch was called inside rank {launch_server.inside}. Ranks that start ranks would "
            "outlive a time limit. Call it outside, with the larger world."
        )
    if type(world) is not int or not 1 <= world <= MOST_RANKS:
        raise ParallelError(
            f"{world!r} ranks cannot be started. Each is a process of about 100 MB on this one "
            f"machine. Give a whole number from 1 to {MOST_RANKS}."
        )
    if type(timeout) not in (int, float) or not 0 < timeout < float("inf"):
        raise ParallelError(
            f"timeout={timeout!r} is no time limit. Ranks that wait for each other would wait "
            "for ever. Give seconds above 0."
        )
    if not launch_server.supported():
        raise ParallelError(
            "Ranks are forked, which this system cannot do. Use Linux, macOS or Windows' WSL."
        )


def _run(job: bytes, world: int, timeout: float) -> list[launch_report.Report]:
    """The ranks' reports. However this is left, no rank runs on."""
    global _client
    if _client is None or not _client.usable():
        stop()
        _client = Client()
    try:
        _client.start(job, world)
        _wait(_client, time.monotonic() + timeout)
        return _client.end()
    except ServerLost as lost:
        stop()
        raise ParallelError(str(lost)) from None
    except BaseException:  # an interrupt above all: the server sees its end close, and kills
        stop()
        raise


def _wait(client: Client, deadline: float) -> None:
    """Until every rank has reported, or one failed and `_GRACE` is over, or the deadline."""
    while client.waiting():
        left = deadline - time.monotonic()
        if left <= 0:
            if not client.failed():
                client.ask_for_stacks()
            return
        if client.listen(left) and client.failed():
            deadline = min(deadline, time.monotonic() + _GRACE)


def _echo(reports: list[launch_report.Report]) -> None:
    for report in reports:
        sys.stdout.write(report.out)
    for report in reports:
        sys.stderr.write(report.err)


def _result(report: launch_report.Report) -> Any:
    try:
        return pickle.loads(report.result)
    except Exception as error:
        raise ParallelError(
            f"What rank {report.rank} returned cannot be read here ({type(error).__name__}: "
            f"{error}). It was made by code that only the rank has. Return tensors and plain "
            "objects."
        ) from error
