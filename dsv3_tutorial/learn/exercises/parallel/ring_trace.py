"""What the messages of a wrong ring give away: which chunk each holds, and summed over whom.

Rank r's chunk c is one number, 8 ** (4 r + c): a message's digits then say how often each rank's
chunk is in it, whatever its sender thought it was.
"""

from collections.abc import Callable
from contextlib import redirect_stdout

import torch
from torch import Tensor

from dsv3_tutorial.learn.compare import difference
from dsv3_tutorial.learn.exercises.parallel.lockstep import pass_on, together
from dsv3_tutorial.learn.limits import Printed

RANKS = 4
TURNED = "Your parts walk against the messages: step s sends chunk rank - s."
STALE = "Each step sends a chunk as it was at first: send the sum that the step before has made."
MIXED = "Different chunks are added up: what arrives in step s is chunk rank - s - 1, add that one."
ONE_PHASE = (
    "After world - 1 steps each rank has one whole chunk: stop adding. world - 1 more steps pass "
    "the whole ones round, and there what arrives replaces."
)
ADDED = "In the second phase what arrives is whole: it replaces the chunk, nothing is added."
EARLY = (
    "The second phase begins with a chunk that is not whole: whole is the one to which the last "
    "step of the first phase added."
)
PLACED = "In step s of the second phase chunk rank - s arrives: it belongs in that place."
STEPS = "Each phase takes world - 1 steps, so each rank sends 2 (world - 1) messages in all."


def given_away(function: Callable) -> str | None:
    """The mistake of a `ring_all_reduce` that its messages show; None where it is right."""
    numbers = 8.0 ** torch.arange(RANKS * RANKS, dtype=torch.float64).view(RANKS, RANKS)

    def make(rank: int, collective) -> tuple:
        return numbers[rank].clone(), rank, RANKS, collective("exchange")

    try:
        with redirect_stdout(Printed()):
            ran = together(function, make, RANKS, {"exchange": pass_on})
        if ran.trouble or not any(difference(each, numbers.sum(dim=0)) for each in ran.results):
            return None
    except Exception:  # it fails on four ranks only: the case that fails says more
        return None
    sent = [[message.tensor for message in messages] for messages in ran.sent]
    plain = all(t.shape == (1,) and t.dtype == torch.float64 for each in sent for t in each)
    if not plain or not sent[0]:
        return None
    held = torch.stack([torch.stack([_summed(t) for t in messages]) for messages in sent])
    return _mistake(held)


def _summed(message: Tensor) -> Tensor:
    """(ranks, chunks) int64: how often each is in a message of one number."""
    places = 3 * torch.arange(RANKS * RANKS).view(RANKS, RANKS)
    return message.long() >> places & 7


def _mistake(held: Tensor) -> str | None:
    """held (ranks, calls, ranks, chunks): how often each rank's chunk is in each message."""
    calls, first = held.shape[1], held[:, : RANKS - 1]
    if calls < RANKS - 1:
        return STEPS
    steps = torch.arange(1, RANKS)
    whole = first.sum(dim=(2, 3)).eq(steps) & first.amax(dim=3).sum(dim=2).eq(steps)
    alone = (first > 0).any(dim=2).sum(dim=2).eq(1)  # (ranks, calls): one chunk in the message
    if not (whole & alone).all():
        return _first_phase(first, alone)
    if calls in (RANKS - 1, RANKS):
        return ONE_PHASE
    if calls != 2 * (RANKS - 1):
        return STEPS
    if not held[:, RANKS - 1].sum(dim=(1, 2)).eq(RANKS).all():
        return EARLY
    return ADDED if (held > 1).any() else PLACED


def _first_phase(first: Tensor, alone: Tensor) -> str | None:
    own = torch.stack([first[rank, :, rank] for rank in range(RANKS)])  # (ranks, calls, chunks)
    at = own.argmax(dim=2)  # the rank's own chunk in each message
    upwards = ((at - at[:, :1]) % RANKS).eq(torch.arange(RANKS - 1)).all()
    if upwards and own.gt(0).sum(dim=2).eq(1).all():
        return TURNED
    if first.sum(dim=(2, 3)).eq(1).all():
        return STALE
    return None if alone.all() else MIXED
