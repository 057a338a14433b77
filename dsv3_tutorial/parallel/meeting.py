"""How the ranks that torchrun has started find each other, in each of their lives."""

import os
import time
import uuid

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from dsv3_tutorial.parallel.mesh import TIMEOUT


class RankLost(RuntimeError):
    """Another rank has died or hangs, so this one cannot go on either."""


def world_size() -> int:
    """How many ranks there are: those that run already, or that torchrun has started; else 1."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1


def under_torchrun() -> bool:
    """Whether this process was started as one of several ranks."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def meet(backend: str) -> None:
    """Bring up torch.distributed among the ranks of torchrun.

    torchrun keeps its store when it starts ranks again, with the addresses of the dead in it, and
    what it tells a rank of restarts is its own node's count. So each start has a part of its own.
    """
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    own = dist.PrefixStore(life(store, rank, size), store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=TIMEOUT)


def life(store: dist.Store, rank: int, size: int) -> str:
    """A name that the ranks of this start share, and none of an earlier one on the same store.

    Each rank signs in with a word that nobody knew, beside the first rank's, until the first one's
    list holds it; old words are on the store too, and fit nothing. Raises RankLost when a rank does
    not come.
    """
    mine, until = uuid.uuid4().hex, time.monotonic() + TIMEOUT.total_seconds()
    if rank == 0:
        store.set("first", mine)
        words = [_answer(store, other, mine, until) for other in range(1, size)]
        store.set("all", " ".join([mine, *words]))
        return mine
    while True:
        if store.check(["first"]):
            store.set(f"rank {rank}", f"{store.get('first').decode()} {mine}")
        if store.check(["all"]) and mine in (words := store.get("all").decode().split()):
            return words[0]
        _wait(f"rank {rank}", "the first rank", until)


def _answer(store: dist.Store, rank: int, mine: str, until: float) -> str:
    """The word of a rank that has read this start's first word."""
    while True:
        if store.check([f"rank {rank}"]):
            heard, _, word = store.get(f"rank {rank}").decode().partition(" ")
            if heard == mine:
                return word
        _wait("the first rank", f"rank {rank}", until)


def _wait(who: str, whom: str, until: float) -> None:
    if time.monotonic() > until:
        raise RankLost(
            f"{who} has waited {TIMEOUT.total_seconds():.0f} seconds for {whom} to start. A step "
            "needs all of them. Look for the first failure in torchrun's report, then start again."
        )
    time.sleep(0.01)
