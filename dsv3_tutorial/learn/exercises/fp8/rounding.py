"""Rounding by hand: a number to E4M3's grid, and a scale up to a power of two."""

import torch
from torch import Tensor

from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _numbers(*values: float):
    return lambda: (torch.tensor(values),)


def _spanning(seed: int, *shape: int, low: float, high: float):
    """Numbers of both signs whose powers of two lie between low and high."""

    def make() -> tuple[Tensor]:
        sign, place = randn(seed, shape, shape)
        return (sign.sign() * torch.exp2(low + (high - low) * place.sigmoid()),)

    return make


def on_grid(
    x: Tensor,
    near=torch.round,
    lowest: int = -6,
    digits: int = 3,
    largest: float = 448.0,
    shift: int = 0,
) -> Tensor:
    """`round_e4m3` with its parts open to be got wrong."""
    bounded = x.clamp(-largest, largest)
    exponent = (torch.frexp(bounded)[1] - 1).clamp_min(lowest)
    step = torch.exp2((exponent - digits + shift).double()).float()
    return near(bounded / step) * step


def _half_away(x: Tensor) -> Tensor:
    return on_grid(x, lambda q: q.sign() * (q.abs() + 0.5).floor())


def _flushed(x: Tensor) -> Tensor:
    y = on_grid(x)
    return y.masked_fill(y.abs() < 2.0**-6, 0.0)


def _overflows(x: Tensor) -> Tensor:
    return on_grid(x).masked_fill(x.abs() > 464, torch.nan)


def _e5m2(x: Tensor) -> Tensor:
    return on_grid(x, lowest=-14, digits=2, largest=57344.0)


ROUND_E4M3 = Exercise(
    name="fp8.round_e4m3",
    reference="dsv3_tutorial.fp8.formats:round_e4m3",
    cases=[
        Case("between 1 and 4", _numbers(1.0, 1.1, 1.2, 1.45, 2.6, 3.3, -1.3, -3.9)),
        Case(
            "halfway between two neighbours",
            _numbers(1.0625, 1.1875, 2.125, 2.375, -1.0625, -1.3125, 17.0, 19.0),
        ),
        Case("near zero", _numbers(0.0, 0.0009, 0.001, 0.003, -0.0041, 0.012, 0.0157, -2e-9)),
        Case("beyond 448", _numbers(447.0, 448.0, 460.0, 480.0, -500.0, 1e9, -torch.inf)),
        Case("all the range", _spanning(0, 40, 25, low=-12.0, high=10.0), hidden=True),
        Case("small only", _spanning(1, 3, 5, 40, low=-11.0, high=-5.0), hidden=True),
        Case("a single number", lambda: (torch.tensor(-0.3),), hidden=True),
        Case("the last before overflow", _numbers(432.0, 433.0, -416.5, 239.0, 247.9), hidden=True),
    ],
    hints=[
        "Saturate first: x.clamp(-448, 448). Then the spacing at each number, then round.",
        "The exponent is e = torch.frexp(x)[1] - 1. Three bits after the leading one: neighbours "
        "lie 2 ** (e - 3) apart, and below 2 ** -6 they stay 2 ** -9 apart.",
        "spacing = 2.0 ** (e.clamp(min=-6) - 3); torch.round(x / spacing) * spacing rounds ties to "
        "even.",
    ],
    difficulty=3,
    importance=5,
    minutes=8,
    lines=4,
    mutants=[
        Mutant("truncated", lambda x: on_grid(x, torch.trunc), "Digits are cut off: round them."),
        Mutant("floor", lambda x: on_grid(x, torch.floor), "floor rounds down, always: round."),
        Mutant(
            "half away",
            _half_away,
            "Halfway cases go away from zero: the one with an even last bit wins, as torch.round.",
        ),
        Mutant(
            "subnormals flushed",
            _flushed,
            "Below 2 ** -6 all becomes zero: subnormals lie there, 2 ** -9 apart.",
        ),
        Mutant(
            "no lowest exponent",
            lambda x: on_grid(x, lowest=-120),
            "Below 2 ** -6 the spacing keeps shrinking: it stays 2 ** -9.",
        ),
        Mutant(
            "lowest exponent off",
            lambda x: on_grid(x, lowest=-7),
            "The spacing stops shrinking one power of two too low: 2 ** -6 is the last.",
        ),
        Mutant(
            "no saturation",
            lambda x: on_grid(x, largest=torch.inf),
            "Nothing is larger than 448 in E4M3: saturate.",
        ),
        Mutant("NaN", _overflows, "Too large becomes NaN here: clamp to 448 before the cast."),
        Mutant(
            "480",
            lambda x: on_grid(x, largest=480.0),
            "480 is no number: E4M3 keeps its last code for NaN, so 448 is the largest.",
        ),
        Mutant(
            "240",
            lambda x: on_grid(x, largest=240.0),
            "240 would be the largest if the top exponent were kept for infinity: it is not.",
        ),
        Mutant(
            "integers",
            lambda x: x.clamp(-448, 448).round(),
            "These are integers: the spacing depends on the exponent.",
        ),
        Mutant(
            "one bit more",
            lambda x: on_grid(x, shift=-1),
            "The spacing is half of what it should be: three bits follow the leading one.",
        ),
        Mutant(
            "one bit less",
            lambda x: on_grid(x, shift=1),
            "The spacing is twice what it should be: three bits follow the leading one.",
        ),
        Mutant("no sign", lambda x: on_grid(x.abs()), "The sign is lost."),
        Mutant("E5M2", _e5m2, "This is E5M2: E4M3 has one exponent bit less, one digit more."),
    ],
)

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
    (x,) = _spanning(3, 4, 5, 7, low=-40.0, high=30.0)()
    return (x.abs(),)


def _power(amax: Tensor, near, divide: float = 448.0) -> Tensor:
    exponent = near((amax.double() / divide).log2())
    return torch.exp2(exponent).float().masked_fill(amax == 0, 1.0)


def _narrow_logarithm(amax: Tensor) -> Tensor:
    """log2 as float32 rounds it: whole for what lies a last digit above a power of two."""
    exponent = (amax.float() / 448).double().log2().float().ceil()
    return torch.exp2(exponent).masked_fill(amax == 0, 1.0)


def _next_always(amax: Tensor) -> Tensor:
    return _power(amax, lambda log: log.floor() + 1)


POWER_OF_TWO_SCALE = Exercise(
    name="fp8.power_of_two_scale",
    reference="dsv3_tutorial.fp8.quant:power_of_two_scale",
    cases=[
        Case("448, and around it", _largest(448.0, 447.0, 449.0, 1.0, 1000.0)),
        Case("small, and zero", _largest(0.0, 1e-9, 0.02, 3.5)),
        Case("a last digit above 448 times a power of two", _just_above),
        Case("448 times powers of two", _edges, hidden=True),
        Case("tiles of many sizes", _random_tiles, hidden=True),
        Case("BF16", _largest(3.0, 0.0, 896.0, 1e-5, dtype=torch.bfloat16), hidden=True),
    ],
    hints=[
        "largest / 448 is the smallest scale that would do; the power of two at or above it.",
        "A logarithm in float32 loses the last digit, torch.frexp does not: mantissa, exponent = "
        "torch.frexp(largest.float() / 448): the mantissa lies in [0.5, 1).",
        "A mantissa of 0.5 is a power of two already, 2 ** (exponent - 1); else 2 ** exponent. "
        "torch.ldexp(torch.tensor(1.0), exponent) makes the power; torch.where(largest == 0, 1.0, "
        "scale) keeps zero apart.",
    ],
    difficulty=3,
    importance=3,
    minutes=7,
    lines=4,
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
    ],
)
