"""Rounding a scale up to a power of two."""

import torch
from torch import Tensor

from dsv3_tutorial.learn.exercises.fp8.rounding import spanning
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant

_EXACT = 448.0


def _largest(*values: float, dtype: torch.dtype = torch.float32):
    return lambda: (torch.tensor(values, dtype=dtype),)


def _just_above() -> tuple[Tensor]:
    """The next number after 448 times a power of two: no longer covered by that power."""
    edges = _EXACT * torch.exp2(torch.arange(-40.0, 41.0, 8.0))
    return (torch.nextafter(edges, torch.tensor(torch.inf)),)


def _edges() -> tuple[Tensor]:
    return (_EXACT * torch.exp2(torch.arange(-30.0, 31.0)).view(1, 61),)


def _random_tiles() -> tuple[Tensor]:
    (x,) = spanning(3, 4, 5, 7, low=-40.0, high=30.0)()
    return (x.abs(),)


def _power(amax: Tensor, near, divide: float = 448.0) -> Tensor:
    exponent = near((amax.double() / divide).log2())
    return torch.exp2(exponent).float().masked_fill(amax == 0, 1.0)


def _narrow_logarithm(amax: Tensor) -> Tensor:
    """log2 as float32 rounds it: whole for what lies a last digit above a power of two."""
    exponent = (amax.float() / 448).double().log2().float().ceil()
    return torch.exp2(exponent).masked_fill(amax == 0, 1.0)


def _infinite_as_one(largest: Tensor) -> Tensor:
    """What 2 ** exponent gives: frexp calls the exponent of infinity and of NaN 0."""
    return _power(largest, torch.ceil).masked_fill(~largest.isfinite(), 1.0)


def _infinity_as_one(largest: Tensor) -> Tensor:
    return _power(largest, torch.ceil).masked_fill(largest.isinf(), 1.0)


def _infinite_as_largest(largest: Tensor) -> Tensor:
    return _power(largest.clamp(max=torch.finfo(torch.float32).max), torch.ceil)


def _nan_as_one(largest: Tensor) -> Tensor:
    scale = _power(largest, torch.ceil).masked_fill(largest.isnan(), 1.0)
    return scale.masked_fill(largest.isinf(), torch.nan)


def _next_always(amax: Tensor) -> Tensor:
    return _power(amax, lambda log: log.floor() + 1)


_NOT_FINITE = (
    "Infinity or NaN gets a finite scale, and the broken tile looks whole: its scale is NaN. "
    "frexp gives them the exponent 0."
)

POWER_OF_TWO_SCALE = Exercise(
    name="fp8.power_of_two_scale",
    reference="dsv3_tutorial.fp8.quant:power_of_two_scale",
    cases=[
        Case("448, and around it", _largest(448.0, 447.0, 449.0, 1.0, 1000.0)),
        Case("small, and zero", _largest(0.0, 1e-9, 0.02, 3.5)),
        Case("a last digit above 448 times a power of two", _just_above),
        Case("infinity and NaN", _largest(torch.inf, 5.0, torch.nan, 0.0)),
        Case("448 times powers of two", _edges, hidden=True),
        Case("tiles of many sizes", _random_tiles, hidden=True),
        Case("BF16", _largest(3.0, 0.0, 896.0, 1e-5, dtype=torch.bfloat16), hidden=True),
        Case("BF16 and NaN", _largest(torch.nan, 7.0, dtype=torch.bfloat16), hidden=True),
    ],
    hints=[
        "largest / 448 is the smallest scale that would do; the power of two at or above it.",
        "A logarithm in float32 loses the last digit, torch.frexp does not: mantissa, exponent = "
        "torch.frexp(largest.float() / 448): the mantissa lies in [0.5, 1).",
        "A mantissa of 0.5 is a power of two already: exponent = exponent - (mantissa == 0.5)"
        ".int(). scale = torch.ldexp(torch.ones_like(mantissa), exponent) makes the power; then "
        "scale = torch.where(largest == 0, 1.0, scale) keeps zero apart, and "
        "scale.masked_fill(~largest.isfinite(), torch.nan) what is not finite.",
    ],
    difficulty=3,
    importance=3,
    minutes=7,
    lines=4,
    tolerance=0.0,  # a power of two is exact, the small beside the large too
    mutants=[
        Mutant(
            "nearest",
            lambda largest: _power(largest, torch.round),
            "The nearest power of two may be too small, so that values beyond 448 are cut.",
        ),
        Mutant(
            "floor",
            lambda largest: _power(largest, torch.floor),
            "Rounded down: largest / scale is beyond 448. Round up.",
        ),
        Mutant(
            "next always",
            _next_always,
            "A power of two stays as it is: 448 / 1 fits, and 2 gives a bit away.",
        ),
        Mutant(
            "float32 logarithm",
            _narrow_logarithm,
            "The logarithm lost a last digit, and the scale is half of what it must be: use frexp.",
        ),
        Mutant(
            "not divided",
            lambda largest: _power(largest, torch.ceil, 1.0),
            "This brings the largest to 1 or below: E4M3 goes to 448.",
        ),
        Mutant(
            "512",
            lambda largest: _power(largest, torch.ceil, 512.0),
            "This brings the largest to 512 or below: E4M3 ends at 448.",
        ),
        Mutant(
            "zero",
            lambda largest: _power(largest, torch.ceil).masked_fill(largest == 0, 0.0),
            "A tile of zeros gets the scale 0, and 0 / 0 is NaN: give it 1.",
        ),
        Mutant(
            "exponent",
            lambda largest: _power(largest, torch.ceil).log2(),
            "These are exponents: return the powers of two.",
        ),
        Mutant(
            "inverse",
            lambda largest: 1 / _power(largest, torch.ceil),
            "This is the inverse: x is x_fp8 * scale.",
        ),
        Mutant(
            "infinity kept",
            lambda largest: _power(largest, torch.ceil),
            "Infinity gets the scale infinity: for what is not finite it is NaN.",
        ),
        Mutant("not finite as 1", _infinite_as_one, _NOT_FINITE),
        Mutant("NaN as 1", _nan_as_one, _NOT_FINITE),
        Mutant("infinity as 1", _infinity_as_one, _NOT_FINITE),
        Mutant("infinity as the largest", _infinite_as_largest, _NOT_FINITE),
    ],
)
