"""Gradients of many micro-batches in a sum that is too narrow."""

import torch
from torch import Tensor

from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _parts(seed: int, n: int, *shape: int, dtype=torch.bfloat16, mean: float = 0.0, own=None):
    """The gradients of n micro-batches, of one mean, and the format of their sum."""

    def make() -> tuple[list[Tensor], torch.dtype]:
        (noise,) = randn(seed, (n, *shape))
        return [part.to(own or torch.float32) for part in noise + mean], dtype

    return make


def _ones(n: int, dtype: torch.dtype, first: float = 1.0):
    return lambda: ([torch.full((3,), first), *(torch.ones(3) for _ in range(n - 1))], dtype)


def added(parts, dtype, first=None, after=None, before=None) -> Tensor:
    """`accumulate` with its parts open to be got wrong."""
    total = torch.zeros_like(parts[0], dtype=dtype)
    for part in parts:
        part = before(part) if before else part
        total = (total.float() + part.float()).to(dtype)
    return after(total) if after else total


def _in_place(parts, dtype):
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total.to(dtype)


def _halves(parts, dtype):
    if len(parts) == 1:
        return parts[0].to(dtype)
    middle = len(parts) // 2
    left, right = _halves(parts[:middle], dtype), _halves(parts[middle:], dtype)
    return (left.float() + right.float()).to(dtype)


MICRO_BATCHES = Exercise(
    name="fp8.micro_batches",
    reference="dsv3_tutorial.fp8.errors:accumulate",
    cases=[
        Case("8 micro-batches into BF16", _parts(0, 8, 3, 5)),
        Case("300 ones into BF16", _ones(300, torch.bfloat16)),
        Case("40 into float32", _parts(1, 40, 6, dtype=torch.float32, mean=1.0)),
        Case("one micro-batch", _parts(2, 1, 4), hidden=True),
        Case("2000, then ones, into FP16", _ones(80, torch.float16, 2000.0), hidden=True),
        Case("120 with a mean, into FP16", _parts(3, 120, 7, dtype=torch.float16, mean=0.7)),
        Case("BF16 into float32", _parts(4, 50, 4, dtype=torch.float32, own=torch.bfloat16)),
        Case("many into BF16", _parts(5, 200, 2, 3, 4, mean=0.1), hidden=True),
    ],
    hints=[
        "Start from zeros in dtype: torch.zeros_like(parts[0], dtype=dtype). Then one part after "
        "the other.",
        "total = (total.float() + part.float()).to(dtype): added in float32, then rounded to what "
        "the sum is kept in.",
    ],
    difficulty=1,
    importance=4,
    minutes=4,
    lines=4,
    tolerance=1e-3,  # a step of BF16 is 4e-3 or more
    mutants=[
        Mutant(
            "rounded at the end",
            lambda parts, dtype: sum(part.float() for part in parts).to(dtype),
            "The sum is rounded once, at the end: it must lie in dtype after every addition.",
        ),
        Mutant(
            "parts rounded",
            lambda parts, dtype: added(parts, dtype, before=lambda part: part.to(dtype)),
            "The parts are rounded too: they come in float32, and only the sum is kept in dtype.",
        ),
        Mutant(
            "parts alone rounded",
            lambda parts, dtype: sum(part.to(dtype).float() for part in parts).to(dtype),
            "The parts are rounded, the sum is not: it is the sum that is kept in dtype.",
        ),
        Mutant(
            "dtype ignored",
            lambda parts, dtype: added(parts, torch.float32),
            "dtype is not used: the sum is in float32.",
        ),
        Mutant(
            "widened again",
            lambda parts, dtype: added(parts, dtype, after=torch.Tensor.float),
            "The sum is widened at the end: return it in dtype.",
        ),
        Mutant(
            "mean",
            lambda parts, dtype: added(parts, dtype, after=lambda total: total / len(parts)),
            "This is the mean: return the sum.",
        ),
        Mutant(
            "last missing",
            lambda parts, dtype: added(parts[:-1] or parts, dtype),
            "The last micro-batch is missing.",
        ),
        Mutant(
            "first twice",
            lambda parts, dtype: added([parts[0], *parts], dtype),
            "The first micro-batch is counted twice.",
        ),
        Mutant(
            "pairs",
            _halves,
            "Halves are summed on their own: micro-batches come one after the other.",
        ),
        Mutant("in place", _in_place, "The sum grows in parts[0]: start from zeros in dtype."),
    ],
)
