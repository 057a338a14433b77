"""A step of expert-parallel training with the field's bugs in what the ranks tell each other."""

import torch
from torch import Tensor

from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.exercises.parallel.lockstep import Together, add_up, compared, together
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant

BUGS = {
    "counts": "each rank moves the bias by its own tokens' counts; the load is that of all ranks",
    "expert": "an expert's gradient, which holds all ranks' tokens already, is added to that of "
    "other experts on other ranks",
    "norm": "each rank clips by a norm of its own, with its own experts only; the model has one",
}


def buggy(
    *kept: str,
    expert_mean: bool = True,
    shared_mean: bool = True,
    squares=None,
    shared=None,
    shrink=lambda scale: scale.clamp(max=1.0),
    sign: float = 1.0,
):
    """`synchronised` with some of BUGS left in."""

    def step(replicated, expert, counts, bias, gamma, max_norm, world, all_reduce):
        replicated = (shared or (lambda g, all_reduce: all_reduce(g)))(replicated, all_reduce)
        replicated = replicated / world if shared_mean else replicated
        expert = all_reduce(expert) if "expert" in kept else expert
        expert = expert / world if expert_mean else expert
        own = expert.square().sum()
        if squares:
            total = squares(replicated.square().sum(), own, all_reduce)
        else:
            total = replicated.square().sum() + (own if "norm" in kept else all_reduce(own))
        scale = shrink(max_norm / total.sqrt())
        counts = (counts if "counts" in kept else all_reduce(counts)).to(bias.dtype)
        bias = bias + sign * gamma * torch.sign(counts.mean() - counts)
        return replicated * scale, expert * scale, bias

    return step


def _remaining(kept: tuple[str, ...]) -> Mutant:
    left = {3: "All three bugs are left.", 2: "Two bugs are left."}
    message = left.get(len(kept)) or f"One bug is left: {BUGS[kept[0]]}."
    return Mutant(" and ".join(kept), buggy(*kept), message)


def _case(seed: int, world: int, size: float, experts: int = 8, max_norm: float = 1.0, dtype=None):
    """Every rank's gradients and counts, stacked; size: their gradients' standard deviation."""

    def make() -> tuple:
        drawn = randn(seed, (world, 5), (world, 7), (experts,), dtype=dtype or torch.float64)
        draw = torch.Generator().manual_seed(seed)
        counts = torch.randint(0, 40, (world, experts), generator=draw)
        return drawn[0] * size, drawn[1] * size, counts, drawn[2] / 9, 0.05, max_norm

    return make


def _ranks(function, replicated, expert, counts, bias, gamma, max_norm) -> Together:
    """The function on len(counts) ranks: one row of each tensor for each rank, one bias for all."""

    def make(rank: int, collective) -> tuple:
        own = (each[rank].clone() for each in (replicated, expert, counts))
        return *own, bias.clone(), gamma, max_norm, len(counts), collective("all_reduce")

    return together(function, make, len(counts), {"all_reduce": add_up})


def _counted_by_each(shared: Tensor, own: Tensor, all_reduce) -> Tensor:
    return all_reduce(shared + own)


def _norms_added(shared: Tensor, own: Tensor, all_reduce) -> Tensor:
    return (shared.sqrt() + all_reduce(own.sqrt())).square()


def _experts_forgotten(shared: Tensor, own: Tensor, all_reduce) -> Tensor:
    return shared


FIND_THE_BUG = Exercise(
    name="parallel.find_the_bug",
    reference="dsv3_tutorial.parallel.gradients:synchronised",
    cases=[
        Case("2 ranks, large gradients", _case(0, 2, 3.0)),
        Case("4 ranks, gradients too small to clip", _case(1, 4, 0.05)),
        Case("4 ranks, clipped a little", _case(2, 4, 0.6, 16)),
        Case("3 ranks, another limit", _case(3, 3, 2.0, 6, 0.25), hidden=True),
        Case("8 ranks, float32", _case(4, 8, 1.0, dtype=torch.float32), hidden=True),
        Case("one rank", _case(5, 1, 2.0, 4), hidden=True),
    ],
    hints=[
        "Ask of each of the three: whose tokens are in it already, and who else holds the same?",
        "The dispatch's backward has brought the tokens of all ranks to the expert. What would "
        "adding the gradient of another expert mean?",
        "Two ranks that clip by different factors, or move the bias differently, do not hold one "
        "model any more: what must be equal on all ranks has to be summed over them.",
    ],
    difficulty=4,
    importance=5,
    minutes=10,
    lines=3,
    mutants=[
        _remaining(("counts", "expert", "norm")),
        _remaining(("counts", "expert")),
        _remaining(("counts", "norm")),
        _remaining(("expert", "norm")),
        *(_remaining((bug,)) for bug in BUGS),
        Mutant(
            "experts not averaged",
            buggy(expert_mean=False),
            "The loss is the mean over the ranks: an expert's gradient is divided by world too.",
        ),
        Mutant(
            "replicated not averaged",
            buggy(shared_mean=False),
            "The replicated gradients are summed, not averaged: the loss is the mean.",
        ),
        Mutant(
            "replicated not summed",
            buggy(shared=lambda g, all_reduce: g),
            "The replicated gradients hold one rank's tokens only.",
        ),
        Mutant(
            "replicated counted by each",
            buggy(squares=_counted_by_each),
            "The replicated gradients are in the norm once for every rank; they are one tensor.",
        ),
        Mutant(
            "norms added",
            buggy(squares=_norms_added),
            "Norms are added: add the squares, then take the root.",
        ),
        Mutant(
            "experts forgotten",
            buggy(squares=_experts_forgotten),
            "The experts are not in the norm any more.",
        ),
        Mutant(
            "never clipped",
            buggy(shrink=torch.ones_like),
            "Nothing is clipped any more.",
        ),
        Mutant(
            "always scaled",
            buggy(shrink=lambda scale: scale),
            "Small gradients are made larger: the factor is 1 at most.",
        ),
        Mutant("wrong way", buggy(sign=-1.0), "The busy experts are lifted: lower them."),
    ],
    compare=compared(lambda got, expected: None, tolerance=1e-5),  # some add 1e-6 to a norm
    run=_ranks,
)
