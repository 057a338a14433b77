"""A step of expert-parallel training with the field's bugs in what the ranks tell each other."""

import torch
from torch import Tensor

from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.exercises.parallel.gradient_bugs import (
    BUGS,
    HALF,
    NORMS,
    REPLICATED,
    Steps,
    compare,
    counted,
)
from dsv3_tutorial.learn.exercises.parallel.lockstep import add_up, together
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant

ANY = 1e6  # a limit that no gradient reaches


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


def _case(seed: int, world: int, size: float, experts: int = 8, max_norm: float = 1.0, dtype=None):
    """Every rank's gradients and counts, stacked; size: their gradients' standard deviation."""

    def make() -> tuple:
        drawn = randn(seed, (world, 5), (world, 7), (experts,), dtype=dtype or torch.float64)
        draw = torch.Generator().manual_seed(seed)
        counts = torch.randint(0, 40, (world, experts), generator=draw)
        return drawn[0] * size, drawn[1] * size, counts, drawn[2] / 9, 0.05, max_norm

    return make


def _ranks(function, replicated, expert, counts, bias, gamma, max_norm) -> Steps:
    """The function on len(counts) ranks, clipped and not: one row of each tensor for each rank."""

    def make(rank: int, collective, limit: float) -> tuple:
        own = (each[rank].clone() for each in (replicated, expert, counts))
        return *own, bias.clone(), gamma, limit, len(counts), collective("all_reduce")

    def run(limit: float):
        return together(
            function,
            lambda rank, collective: make(rank, collective, limit),
            len(counts),
            {"all_reduce": add_up},
        )

    return Steps(run(ANY), run(max_norm), max_norm)


def _counted_by_each(shared: Tensor, own: Tensor, all_reduce) -> Tensor:
    return all_reduce(shared + own)


def _norms_added(shared: Tensor, own: Tensor, all_reduce) -> Tensor:
    return (shared.sqrt() + all_reduce(own.sqrt())).square()


def _whole_norms_added(shared: Tensor, own: Tensor, all_reduce) -> Tensor:
    return all_reduce((shared + own).sqrt()).square()


def _averaged(shared: Tensor, own: Tensor, all_reduce) -> Tensor:
    ranks = all_reduce(torch.ones_like(own))
    return all_reduce(shared + own) / ranks


def _experts_forgotten(shared: Tensor, own: Tensor, all_reduce) -> Tensor:
    return shared


def _left(kept: tuple[str, ...]) -> Mutant:
    return Mutant(" and ".join(kept), buggy(*kept), counted(kept, {}))


def _half_mended(kept: tuple[str, ...], name: str, part: str, said: str, **how) -> Mutant:
    """One bug mended in part, beside those that are as they were."""
    message = counted((*kept, part), {part: said})
    return Mutant(f"{name}, {len(kept)} more", buggy(*kept, **how), message)


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
        _left(("counts", "expert", "norm")),
        _left(("counts", "expert")),
        _left(("counts", "norm")),
        _left(("expert", "norm")),
        *(_left((bug,)) for bug in BUGS),
        _half_mended((), "experts not averaged", "expert", HALF, expert_mean=False),
        _half_mended(("norm",), "experts not averaged", "expert", HALF, expert_mean=False),
        _half_mended(("counts", "norm"), "experts not averaged", "expert", HALF, expert_mean=False),
        *(
            _half_mended(kept, name, "norm", NORMS[name], squares=squares)
            for name, squares in {
                "replicated by each": _counted_by_each,
                "norms added": _norms_added,
                "whole norms added": _whole_norms_added,
                "averaged": _averaged,
                "experts forgotten": _experts_forgotten,
            }.items()
            for kept in ((), ("counts",))
        ),
        _half_mended((), "never clipped", "norm", NORMS["never clipped"], shrink=torch.ones_like),
        Mutant("replicated not averaged", buggy(shared_mean=False), REPLICATED["summed"]),
        Mutant("replicated not summed", buggy(shared=lambda g, all_reduce: g), REPLICATED["own"]),
        Mutant(
            "always scaled",
            buggy(shrink=lambda scale: scale),
            "Small gradients are made larger: the factor is 1 at most.",
        ),
        Mutant("wrong way", buggy(sign=-1.0), "The busy experts are lifted: lower them."),
    ],
    compare=compare,
    run=_ranks,
)
