"""All-reduce by messages to the next rank, with as few bytes as can be."""

from dataclasses import replace

import torch
from torch import Tensor

from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.exercises.parallel.lockstep import Together, compared, pass_on, together
from dsv3_tutorial.learn.exercises.parallel.ring_trace import (
    ADDED,
    ONE_PHASE,
    STALE,
    TURNED,
    given_away,
)
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def inputs(seed: int, world: int, n: int, dtype: torch.dtype = torch.float64):
    """Every rank's x, as one tensor (world, n). Whole numbers where the sum must be exact."""
    if dtype in (torch.int64, torch.bfloat16):
        draw = torch.Generator().manual_seed(seed)
        return lambda: (
            torch.randint(-9, 10, (world, n), generator=draw.manual_seed(seed)).to(dtype),
        )
    return lambda: randn(seed, (world, n), dtype=dtype)


def _ring(function, xs: Tensor) -> Together:
    """The function on len(xs) ranks in a ring."""

    def make(rank: int, collective) -> tuple:
        return xs[rank].clone(), rank, len(xs), collective("exchange")

    ran = together(function, make, len(xs), {"exchange": pass_on})
    return ran if ran.trouble else replace(ran, said=given_away(function))


def _too_many_bytes(got: Together, expected: Together) -> str | None:
    if expected.said and got.said != expected.said:
        return "the messages differ"  # from those of a known mistake with the same sums
    sent, least = got.bytes(), expected.bytes()
    if sent == least:
        return None
    if sent < least:
        return f"the sums are right, but a rank sent {sent:,} bytes, which cannot carry them"
    return f"the sums are right, but a rank sends {sent:,} bytes, the budget is {least:,}"


def _whole(x, rank, world, exchange):
    total, passed = x.clone(), x
    for _ in range(world - 1):
        passed = exchange(passed)
        total = total + passed
    return total


def _phases(
    first=lambda rank, step: rank - step,
    second=lambda rank, step: rank + 1 - step,
    steps=(0, 0),
    keep=lambda old, new: new,
    accumulated=True,
):
    """`ring_all_reduce` with its parts open to be got wrong."""

    def ring(x, rank, world, exchange):
        own, chunks = x.chunk(world), list(x.chunk(world))
        for step in range(world - 1 + steps[0]):
            held = first(rank, step) % world
            got = exchange((chunks if accumulated else own)[held])
            chunks[(held - 1) % world] = chunks[(held - 1) % world] + got
        for step in range(max(0, world - 1 + steps[1])):
            held = second(rank, step) % world
            chunks[(held - 1) % world] = keep(chunks[(held - 1) % world], exchange(chunks[held]))
        return torch.cat(chunks)

    return ring


def _turned(x, rank, world, exchange):
    chunks = list(x.chunk(world))
    for step in range(world - 1):
        at = (rank + step + 1) % world
        chunks[at] = chunks[at] + exchange(chunks[(rank + step) % world])
    for step in range(world - 1):
        at = (rank + step) % world
        chunks[at] = exchange(chunks[(rank + step - 1) % world])
    return torch.cat(chunks)


def _one_long_phase(x, rank, world, exchange):
    return _phases(steps=(1, -world))(x, rank, world, exchange)


def _no_gather(x, rank, world, exchange):
    return _phases(steps=(0, -world))(x, rank, world, exchange)


def _in_place(x, rank, world, exchange):
    chunks = x.chunk(world)
    for step in range(world - 1):
        chunks[(rank - step - 1) % world].add_(exchange(chunks[(rank - step) % world]))
    for step in range(world - 1):
        chunks[(rank - step) % world].copy_(exchange(chunks[(rank + 1 - step) % world]))
    return x


def _mean(x, rank, world, exchange):
    return _phases()(x, rank, world, exchange) / world


def _first_rank_only_sends(x, rank, world, exchange):
    steps = (0, 0) if rank else (0, -1)
    return _phases(steps=steps)(x, rank, world, exchange)


def _scattered(x, rank, world, exchange):
    return _no_gather(x, rank, world, exchange).chunk(world)[(rank + 1) % world]


def _widened(x, rank, world, exchange):
    return _phases()(x.double(), rank, world, exchange).to(x.dtype)


RING_ALL_REDUCE = Exercise(
    name="parallel.ring_all_reduce",
    reference="dsv3_tutorial.parallel.rings:ring_all_reduce",
    cases=[
        Case("4 ranks, 8 numbers", inputs(1, 4, 8)),  # on two, many mistakes look alike
        Case("2 ranks, 6 numbers", inputs(0, 2, 6)),
        Case("3 ranks, float32", inputs(2, 3, 12, torch.float32)),
        Case("8 ranks", inputs(3, 8, 16), hidden=True),
        Case("5 ranks, whole numbers", inputs(4, 5, 15, torch.int64), hidden=True),
        Case("4 ranks, BF16", inputs(5, 4, 32, torch.bfloat16), hidden=True),
        Case("one rank", inputs(6, 1, 4), hidden=True),
    ],
    hints=[
        "chunks = list(x.chunk(world)). First phase, steps s = 0 to world - 2: send "
        "chunks[(rank - s) % world]; what arrives is the other ranks' sum of chunk rank - s - 1: "
        "add it to yours, chunks[(rank - s - 1) % world].",
        "So each step sends what the step before has just added to. After world - 1 steps chunk "
        "(rank + 1) % world is whole on this rank, and no other is: the second phase begins there.",
        "Second phase, world - 1 steps: send chunks[(rank + 1 - s) % world], and what arrives "
        "replaces chunks[(rank - s) % world]. torch.cat(chunks) at the end.",
    ],
    difficulty=4,
    importance=5,
    minutes=8,
    lines=8,
    mutants=[
        Mutant(
            "whole",
            _whole,
            "All of x goes round, so every rank sends (world - 1) n: cut it into world chunks, and "
            "let each chunk be summed on its way.",
        ),
        Mutant(
            "no second phase",
            _no_gather,
            "Each rank has one whole chunk now, and the others hold parts of the sum: let the "
            "whole ones go round once more.",
        ),
        Mutant("only its chunk", _scattered, "This is one chunk; return all n sums on every rank."),
        Mutant(
            "added twice",
            _phases(keep=lambda old, new: old + new),
            ADDED,
        ),
        Mutant(
            "first values",
            _phases(accumulated=False),
            STALE,
        ),
        Mutant(
            "same chunk",
            _phases(first=lambda rank, step: rank),
            "The first phase sends the same chunk in every step: step s sends chunk rank - s.",
        ),
        Mutant(
            "other way",
            _phases(first=lambda rank, step: rank + step),
            TURNED,
        ),
        Mutant("all turned", _turned, TURNED),
        Mutant("one long phase", _one_long_phase, ONE_PHASE),
        Mutant(
            "second phase late",
            _phases(second=lambda rank, step: rank - step),
            "After the first phase the whole chunk is number rank + 1: start the second with it.",
        ),
        Mutant(
            "a step short",
            _phases(steps=(-1, -1)),
            "Each phase is a step short: a chunk passes world - 1 others.",
        ),
        Mutant(
            "a step too many",
            _phases(steps=(1, 0)),
            "The first phase makes a step too many and adds some values twice: world - 1 steps.",
        ),
        Mutant(
            "rank 0 ends early",
            _first_rank_only_sends,
            "Rank 0 makes fewer exchanges than the others.",
        ),
        Mutant(
            "in place",
            _in_place,
            "The chunks of x are views of it, and += or copy_ writes into x: make new ones with +.",
        ),
        Mutant("mean", _mean, "This is the mean; return the sum."),
        Mutant(
            "in float64",
            _widened,
            "The messages are in float64, which doubles float32's bytes: send x's own dtype.",
        ),
    ],
    compare=compared(_too_many_bytes),
    run=_ring,
)
