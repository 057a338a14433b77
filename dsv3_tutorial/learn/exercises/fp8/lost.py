"""Tokens that are lost among louder ones."""

import torch
from torch import Tensor

from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _one_scale(seed: int, *shape: int, span: float, limit=None, dtype=None, size: float = 1.0):
    """Tokens that span magnitudes, and what one scale for all of them leaves."""

    def make() -> tuple:
        x, octaves = randn(seed, shape, (*shape[:-1], 1))
        x = (x * size * torch.exp2(span * octaves)).to(dtype or torch.float32)
        scale = x.float().abs().max() / 448
        y = (x.float() / scale).to(torch.float8_e4m3fn).float() * scale
        return (x, y.to(x.dtype), *([limit] if limit is not None else []))

    return make


def _by_hand(*rows: tuple[list[float], list[float]]):
    return lambda: tuple(torch.tensor(side) for side in zip(*rows, strict=True))


def _noisy(seed: int, m: int, d: int, limit: float):
    def make() -> tuple:
        x, noise, size = randn(seed, (m, d), (m, d), (m, 1))
        return x, x + noise * size.sigmoid(), limit

    return make


_EDGE = _by_hand(([4.0, 0.0], [2.0, 0.0]), ([4.0, 0.0], [1.9, 0.0]), ([3.0, 4.0], [3.0, 4.0]))
_ZERO = _by_hand(([0.0, 0.0], [0.0, 0.0]), ([1.0, 2.0], [0.0, 0.0]), ([1.0, 2.0], [1.0, 2.1]))
_BROKEN = _by_hand(
    ([1.0, 2.0], [torch.nan, 2.0]), ([1.0, 2.0], [1.0, 2.0]), ([3.0, 1.0], [3.0, torch.nan])
)


def errors(x: Tensor, y: Tensor, dim: int | None = -1) -> tuple[Tensor, Tensor]:
    """The norm of what changed, and that of what it was."""
    return (y.double() - x.double()).norm(dim=dim), x.double().norm(dim=dim)


def share(lost: Tensor) -> float:
    return lost.double().mean().item()


def _nan_kept(x, y, limit=0.5):
    error, size = errors(x, y)
    return share(error > limit * size)


def _zero_lost(x, y, limit=0.5):
    error, size = errors(x, y)
    return share(~(error < limit * size))


def _zero_divided(x, y, limit=0.5):
    error, size = errors(x, y)
    return share(~(error / size <= limit))


def _held_up(x, y, limit=0.5):
    error, size = errors(x, y)
    return share(~(error / (size + 1e-8) <= limit))


def _at_limit(x, y, limit=0.5):
    error, size = errors(x, y)
    return share(~(error < limit * size) & ~((error == 0) & (size == 0)))


def _values(x, y, limit=0.5):
    return share(~((y.double() - x.double()).abs() <= limit * x.double().abs()))


def _matrix(x, y, limit=0.5):
    error, size = errors(x, y, None)
    return float(~(error <= limit * size))


def _matrix_error(x, y, limit=0.5):
    error, size = errors(x, y, None)
    return (error / size).item()


def _channels(x, y, limit=0.5):
    error, size = errors(x, y, 0)
    return share(~(error <= limit * size))


def _squared(x, y, limit=0.5):
    error, size = errors(x, y)
    return share(~(error**2 <= limit * size**2))


def _absolute(x, y, limit=0.5):
    return share(~(errors(x, y)[0] <= limit))


def _of_the_result(x, y, limit=0.5):
    return share(~(errors(x, y)[0] <= limit * y.double().norm(dim=-1)))


def _kept(x, y, limit=0.5):
    error, size = errors(x, y)
    return share(error <= limit * size)


def _count(x, y, limit=0.5):
    error, size = errors(x, y)
    return (~(error <= limit * size)).sum().item()


def _fixed_limit(x, y, limit=0.5):
    error, size = errors(x, y)
    return share(~(error <= 0.5 * size))


def _sizes(x, y, limit=0.5):
    size, other = x.double().norm(dim=-1), y.double().norm(dim=-1)
    return share(~((other - size).abs() <= limit * size))


LOST_TOKENS = Exercise(
    name="fp8.lost_tokens",
    reference="dsv3_tutorial.fp8.errors:lost_tokens",
    cases=[
        Case("tokens that span magnitudes", _one_scale(0, 64, 40, span=7.0)),
        Case("a limit of 10 %", _one_scale(1, 48, 24, span=6.0, limit=0.1)),
        Case("zeros that came back, and some that did not", _ZERO),
        Case("tokens that came back as NaN", _BROKEN),
        Case("right at the limit", _EDGE),
        Case("all of one size", _one_scale(2, 10, 32, span=0.0), hidden=True),
        Case("a batch of sequences", _one_scale(3, 2, 15, 20, span=8.0), hidden=True),
        Case("BF16", _one_scale(4, 60, 16, span=7.0, dtype=torch.bfloat16), hidden=True),
        Case("noise", _noisy(5, 80, 12, 0.4), hidden=True),
        Case("gradients of 1e-9", _one_scale(6, 50, 20, span=6.0, size=1e-9), hidden=True),
    ],
    hints=[
        "A token's error is (y - x).norm(dim=-1); compare it with limit * x.norm(dim=-1). Take "
        "x.float() and y.float() first: a norm in BF16 is rounded.",
        "NaN is neither above nor below anything: ask who is kept, error <= limit * size, and "
        "count the others with ~.",
        "lost = ~(error <= limit * size); return lost.float().mean().item(). Multiplying instead "
        "of dividing keeps a row of zeros from being 0 / 0.",
    ],
    difficulty=2,
    importance=4,
    minutes=5,
    lines=3,
    tolerance=1e-6,  # a share of float32 numbers
    mutants=[
        Mutant(
            "NaN kept",
            _nan_kept,
            "NaN > limit is False: a token that came back as NaN counts as kept. It is lost.",
        ),
        Mutant(
            "zeros lost",
            _zero_lost,
            "Right at the limit a token is kept: zeros that came back as zeros too.",
        ),
        Mutant(
            "zeros divided",
            _zero_divided,
            "0 / 0 is NaN: a row of zeros that came back as zeros is not lost.",
        ),
        Mutant(
            "held up",
            _held_up,
            "A constant in the divisor hides small tokens: gradients are that small. Multiply.",
        ),
        Mutant("at the limit", _at_limit, "Right at the limit is not above it: <= keeps."),
        Mutant("values", _values, "These are single values: a token is lost as a whole row."),
        Mutant("matrix", _matrix, "The matrix is judged as a whole: each token on its own."),
        Mutant(
            "matrix error",
            _matrix_error,
            "This is the matrix's error: the share of tokens above the limit is asked for.",
        ),
        Mutant("channels", _channels, "Columns are judged: a token is a row, dim=-1."),
        Mutant("squared", _squared, "The squared error is compared: take the root, or norm()."),
        Mutant("absolute", _absolute, "The error is not relative: divide by the token's norm."),
        Mutant(
            "of the result",
            _of_the_result,
            "The error is held against y: against x, what the token was.",
        ),
        Mutant("kept", _kept, "This is the share that is kept: the lost ones are asked for."),
        Mutant(
            "each token",
            lambda x, y, limit=0.5: ~(errors(x, y)[0] <= limit * errors(x, y)[1]),
            "This says of each token whether it is lost: return their mean, a number.",
        ),
        Mutant("count", _count, "This is a number of tokens: divide by all of them."),
        Mutant("limit ignored", _fixed_limit, "limit is not used: it is 0.5 here."),
        Mutant("sizes", _sizes, "Two norms are compared: the norm of the difference is the error."),
    ],
)
