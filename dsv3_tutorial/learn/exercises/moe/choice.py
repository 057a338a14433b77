"""Who is asked: the best experts of the best groups."""

import torch
from torch import Tensor

from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant

FLOAT64 = torch.float64


def _choice_case(seed: int, m: int, e: int, groups: int, kept: int, k: int, *best, shift=0.0):
    def make() -> tuple:
        scores = randn(seed, (m, e), dtype=FLOAT64)[0].sigmoid() + shift
        return (scores, groups, kept, k, *best)

    return make


def choose(
    biased: Tensor,
    n_group: int,
    topk_group: int,
    top_k: int,
    best: int = 2,
    fill: float = -float("inf"),
    worth=None,
) -> Tensor:
    """`choose_experts` with its parts open to be got wrong."""
    grouped = biased.unflatten(-1, (n_group, -1))
    best = min(best, grouped.shape[-1])
    worth = worth or (lambda each: each.topk(best, dim=-1).values.sum(dim=-1))
    kept = torch.zeros(grouped.shape[:-1], dtype=torch.bool)
    kept = kept.scatter(-1, worth(grouped).topk(topk_group, dim=-1).indices, True)
    limited = grouped.masked_fill(~kept[..., None], fill).flatten(-2)
    return limited.topk(top_k, dim=-1).indices


def _zero_mask(biased, n_group, topk_group, top_k, best=2):
    return choose(biased, n_group, topk_group, top_k, best, fill=0.0)


def _group_max(biased, n_group, topk_group, top_k, best=2):
    return choose(biased, n_group, topk_group, top_k, 1)


def _group_sum(biased, n_group, topk_group, top_k, best=2):
    return choose(biased, n_group, topk_group, top_k, worth=lambda each: each.sum(dim=-1))


def _two_always(biased, n_group, topk_group, top_k, best=2):
    return choose(biased, n_group, topk_group, top_k, 2)


def _unlimited(biased, n_group, topk_group, top_k, best=2):
    return biased.topk(top_k, dim=-1).indices


def _interleaved(biased, n_group, topk_group, top_k, best=2):
    size = biased.shape[-1] // n_group
    order = torch.arange(biased.shape[-1]).view(size, n_group).T.flatten()
    return order[choose(biased[:, order], n_group, topk_group, top_k, best)]


def _batch_groups(biased, n_group, topk_group, top_k, best=2):
    grouped = biased.unflatten(-1, (n_group, -1))
    worth = grouped.topk(min(best, grouped.shape[-1]), dim=-1).values.sum(dim=-1).sum(dim=0)
    kept = torch.zeros(n_group, dtype=torch.bool).scatter(0, worth.topk(topk_group).indices, True)
    limited = grouped.masked_fill(~kept[None, :, None], -float("inf")).flatten(-2)
    return limited.topk(top_k, dim=-1).indices


def _by_number(biased, n_group, topk_group, top_k, best=2):
    return choose(biased, n_group, topk_group, top_k, best).sort(dim=-1).values


def _values(biased, n_group, topk_group, top_k, best=2):
    return biased.topk(top_k, dim=-1).values


CHOOSE_EXPERTS = Exercise(
    name="moe.choose_experts",
    reference="dsv3_tutorial.moe.gate:choose_experts",
    cases=[
        Case("16 experts in 4 groups, 2 kept", _choice_case(0, 40, 16, 4, 2, 4)),
        Case("all scores below zero", _choice_case(1, 40, 16, 4, 2, 4, shift=-1.5)),
        Case("V3: 8 of 256 in 4 of 8 groups", _choice_case(2, 20, 256, 8, 4, 8)),
        Case("groups by their best alone, as V2", _choice_case(3, 40, 24, 4, 2, 4, 1)),
        Case("many groups", _choice_case(4, 60, 32, 16, 4, 6, 2, shift=-0.3), hidden=True),
        Case("far below zero", _choice_case(7, 30, 16, 4, 2, 4, shift=-20.0), hidden=True),
        Case("a group of one", _choice_case(5, 30, 6, 6, 3, 2), hidden=True),
        Case("three of a group", _choice_case(6, 30, 24, 3, 1, 4, 3), hidden=True),
    ],
    hints=[
        "biased.unflatten(-1, (n_group, -1)) is (M, G, E / G).",
        "A group's worth: its `best` largest scores, .topk(...).values.sum(-1); a group may be "
        "smaller than `best`. The topk_group worthiest groups stay.",
        "Make a bool (M, G) of zeros, .scatter_(-1, chosen, True), and masked_fill the experts of "
        "the others with -math.inf; flatten(-2), and top_k.",
    ],
    difficulty=3,
    importance=5,
    minutes=10,
    lines=6,
    mutants=[
        Mutant(
            "masked with 0",
            _zero_mask,
            "Other groups are masked with 0, which beats a negative score: use -inf.",
        ),
        Mutant("group maximum", _group_max, "A group counts by its single best; take `best`."),
        Mutant("group sum", _group_sum, "A group counts by all its scores; only its `best` do."),
        Mutant("two always", _two_always, "best is not used: V2 takes one, V3 two."),
        Mutant("no limit", _unlimited, "The groups are not limited: this is the plain top-k."),
        Mutant(
            "interleaved", _interleaved, "Groups are neighbours: expert e is in group e // (E / G)."
        ),
        Mutant("groups of the batch", _batch_groups, "Each token has its own best groups."),
        Mutant("by number", _by_number, "Highest score first: these are in the order of numbers."),
        Mutant("values", _values, "These are scores: return the experts' indices."),
    ],
    needs=("torch", "math"),
)

EXERCISES = [CHOOSE_EXPERTS]
