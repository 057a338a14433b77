"""Which of the bugs in a step's exchanges are left, read off what the ranks return."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3_tutorial.learn.compare import difference
from dsv3_tutorial.learn.exercises.parallel.lockstep import Together, compared

TOLERANCE = 1e-5  # some add 1e-6 to a norm
NAMES = ("replicated", "expert", "bias")
BUGS = {
    "counts": "each rank moves the bias by its own tokens' counts; the load is that of all ranks",
    "expert": "an expert's gradient, which holds all ranks' tokens already, is added to that of "
    "other experts on other ranks",
    "norm": "each rank clips by a norm of its own, with its own experts only; the model has one",
}
HALF = "an expert's gradient is no longer added up, but the loss is a mean: it is divided by world"
NORMS = {
    "replicated by each": "the replicated gradients are in the norm once for every rank, and they "
    "are one tensor",
    "norms added": "norms are added: add the squares, then take the root",
    "whole norms added": "whole norms are added: add squares, those of the experts only",
    "averaged": "the squares of all ranks are averaged: those of the experts belong in the norm "
    "in full",
    "norms averaged": "the ranks' norms are averaged: add squares, those of the experts only",
    "experts forgotten": "the experts are not in the norm any more",
    "replicated forgotten": "the replicated gradients are not in the norm any more",
    "the other way round": "the replicated squares are summed over ranks, the experts' are not: "
    "it is the other way round",
    "before the mean": "the norm holds the experts' gradients from before the mean",
    "never clipped": "nothing is clipped any more",
}
RIGHT, AS_IT_WAS = "right", "as it was"
OTHER_EXPERT = "an expert's gradient comes with all ranks' tokens in it, and needs only the mean"
OTHER_NORM = "the factor is not max_norm over the whole model's norm, and 1 at most"
REPLICATED = {
    "summed": "The replicated gradients are summed, not averaged: the loss is the mean.",
    "own": "The replicated gradients hold one rank's tokens only.",
    "other": "The replicated gradients were right as they came.",
}


@dataclass(frozen=True, eq=False)
class Steps:
    """One step of all ranks with a limit that nothing reaches, and one with the case's own."""

    free: Together
    clipped: Together
    max_norm: float


def counted(left: Sequence[str], half: dict[str, str]) -> str:
    """How many bugs are left; about the last one, or what is half mended, what is wrong."""
    count = ("One bug is left", "Two bugs are left", "Three bugs are left")[len(left) - 1]
    if len(left) == 1:
        return f"{count}: {half.get(left[0]) or BUGS[left[0]]}."
    if half:
        return f"{count}; half mended: {', and '.join(half.values())}."
    return "All three bugs are left." if len(left) == 3 else f"{count}."


def compare(got: Steps, expected: Steps) -> str | None:
    """What differs, first where nothing is clipped, with the count of the bugs as its hint."""
    for title, one, other in (
        ("with a max_norm that nothing reaches", got.free, expected.free),
        (f"with max_norm {got.max_norm:g}", got.clipped, expected.clipped),
    ):
        if wrong := _RESULTS(one, other):
            if one.trouble:
                return wrong
            return f"{title}, {wrong}. Hint: {what_is_left(got, expected).removesuffix('.')}"
    return None


_RESULTS = compared(lambda got, expected: None, TOLERANCE, NAMES)


def what_is_left(got: Steps, expected: Steps) -> str:
    """The bugs that are left, each judged by itself: a wrong expert's gradient spoils no count."""
    ran = got.free.results + got.clipped.results
    if got.clipped.trouble or any(_malformed(one, expected.free.results[0]) for one in ran):
        return "Return the replicated gradient, the expert's, and the bias."
    free, right, clipped = (
        list(zip(*one.results, strict=True)) for one in (got.free, expected.free, got.clipped)
    )
    if not _all_same(free[0], right[0]):
        return _replicated(free[0], right[0])
    found = {
        "counts": _counts(free[2], right[2]),
        "expert": _expert(free[1], right[1]),
        "norm": _norm(free, clipped, got.max_norm),
    }
    left = [name for name, said in found.items() if said != RIGHT]
    half = {name: found[name] for name in left if found[name] != AS_IT_WAS}
    return counted(left, half) if left else "The three bugs are gone: leave the rest as it was."


def _counts(mine: Sequence[Tensor], right: Sequence[Tensor]) -> str:
    if _all_same(mine, right):
        return RIGHT
    return (
        "the bias moves alike on all ranks, but not by gamma * sign(mean - counts)"
        if (_all_same(mine[1:], mine[:-1]))
        else AS_IT_WAS
    )


def _expert(mine: Sequence[Tensor], right: Sequence[Tensor]) -> str:
    if _all_same(mine, right):
        return RIGHT
    if _all_same(mine, [g * len(mine) for g in right]):
        return HALF
    return AS_IT_WAS if _all_same(mine[1:], mine[:-1]) else OTHER_EXPERT


def _malformed(one: object, other: tuple) -> bool:
    if not isinstance(one, tuple | list) or len(one) != len(other):
        return True
    same = (isinstance(a, Tensor) and a.shape == b.shape for a, b in zip(one, other, strict=True))
    return not all(same)


def _all_same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return not any(
        difference(one, other, TOLERANCE) for one, other in zip(some, others, strict=True)
    )


def _replicated(mine: Sequence[Tensor], right: Sequence[Tensor]) -> str:
    world = len(mine)
    if _all_same(mine, [g * world for g in right]):
        return REPLICATED["summed"]
    return REPLICATED["own" if _all_same([sum(mine) / world], right[:1]) else "other"]


def _norm(free: list, clipped: list, max_norm: float) -> str:
    """By which norm the ranks clip what they have: right, as it was, or what is wrong with it."""
    shared, own = (torch.stack([g.square().sum() for g in each]) for each in free[:2])
    whole, world = (shared + own).sqrt(), len(own)
    squares = {
        RIGHT: shared + own.sum(),
        AS_IT_WAS: shared + own,
        NORMS["replicated by each"]: shared.sum() + own.sum(),
        NORMS["norms added"]: (shared.sqrt() + own.sqrt().sum()).square(),
        NORMS["whole norms added"]: whole.sum().square(),
        NORMS["averaged"]: shared + own.sum() / world,
        NORMS["norms averaged"]: (whole.sum() / world).square(),
        NORMS["experts forgotten"]: shared,
        NORMS["replicated forgotten"]: own.sum(),
        NORMS["the other way round"]: shared.sum() + own,
        NORMS["before the mean"]: shared + own.sum() * world**2,
        NORMS["never clipped"]: torch.zeros(()),
    }
    for said, total in squares.items():
        scale = (max_norm / total.sqrt()).clamp(max=1.0).expand(world)
        if all(
            _all_same(after, [g * by for g, by in zip(before, scale, strict=True)])
            for before, after in zip(free[:2], clipped[:2], strict=True)
        ):
            return said
    return OTHER_NORM
