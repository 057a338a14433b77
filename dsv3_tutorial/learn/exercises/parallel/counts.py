"""How many rows a dispatcher sends to each rank."""

import torch
from torch import Tensor

from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def chosen(seed: int, m: int, k: int, first: int, last: int) -> Tensor:
    """Every token's k different experts, from `first` up to `last`."""
    draw = torch.Generator().manual_seed(seed)
    return first + torch.rand(m, last - first, generator=draw).topk(k, dim=-1).indices


def _sent(seed: int, m: int, k: int, size: int, world: int, first: int = 0, last: int = 0):
    last = last or size * world
    return lambda: (chosen(seed, m, k, first, last), size, world)


def _no_empty(indices, experts_per_rank, world):
    return torch.bincount((indices // experts_per_rank).flatten())


def _interleaved(indices, experts_per_rank, world):
    return torch.bincount((indices % world).flatten(), minlength=world)


def _by_world(indices, experts_per_rank, world):
    return torch.bincount((indices // world).flatten(), minlength=world)[:world]


def _by_expert(indices, experts_per_rank, world):
    return torch.bincount(indices.flatten(), minlength=world * experts_per_rank)


def _by_rank_once(indices, experts_per_rank, world):
    ranks = torch.zeros(len(indices), world, dtype=torch.int64)
    return ranks.scatter(1, indices // experts_per_rank, 1).sum(dim=0)


def _first_choice(indices, experts_per_rank, world):
    return torch.bincount(indices[:, 0] // experts_per_rank, minlength=world)


def _ends(indices, experts_per_rank, world):
    return destination_counts(indices, experts_per_rank, world).cumsum(dim=0)


def _weights(indices, experts_per_rank, world):
    return destination_counts(indices, experts_per_rank, world) / indices.numel()


def destination_counts(indices, experts_per_rank, world):
    return torch.bincount((indices // experts_per_rank).flatten(), minlength=world)


DESTINATION_COUNTS = Exercise(
    name="parallel.destination_counts",
    reference="dsv3_tutorial.parallel.counts:destination_counts",
    cases=[
        Case("6 tokens, 2 of 8 on 4 ranks", _sent(0, 6, 2, 2, 4)),
        Case("nobody chose the last rank's", _sent(1, 5, 2, 3, 4, 0, 8)),
        Case("V3: 8 of 256 on 64 ranks", _sent(2, 32, 8, 4, 64)),
        Case("one expert a rank", _sent(3, 9, 3, 1, 5), hidden=True),
        Case("no tokens", _sent(4, 0, 2, 4, 4), hidden=True),
        Case("all on the last rank", _sent(5, 7, 3, 6, 3, 12, 18), hidden=True),
        Case("more experts than ranks squared", _sent(6, 20, 4, 16, 2), hidden=True),
    ],
    hints=[
        "Expert e lives on rank e // experts_per_rank; that works on all of indices at once.",
        "torch.bincount counts how often each number stands in a flat tensor.",
        "A rank to which nothing goes needs a 0: minlength=world.",
    ],
    difficulty=2,
    importance=4,
    minutes=5,
    lines=1,
    mutants=[
        Mutant("no empty ones", _no_empty, "A rank that gets nothing has a count too: minlength."),
        Mutant(
            "interleaved",
            _interleaved,
            "This deals experts out like cards; here neighbours share a rank.",
        ),
        Mutant(
            "divided by world",
            _by_world,
            "Expert e is on rank e // experts_per_rank, not e // world.",
        ),
        Mutant("by expert", _by_expert, "These are rows for each expert; add up those of a rank."),
        Mutant(
            "once a rank",
            _by_rank_once,
            "A token with two experts on a rank is counted once; here each pair is a row.",
        ),
        Mutant("first choice", _first_choice, "Only each token's first expert counts; all K do."),
        Mutant("running ends", _ends, "These are running sums; return each rank's own count."),
        Mutant("shares", _weights, "These are shares; return the numbers of rows, int64."),
    ],
)
