"""Rounding by hand: a number to E4M3's grid."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.registry import Budget, Case, Exercise, Mutant

_NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)


def _numbers(*values: float):
    return lambda: (torch.tensor(values),)


def spanning(seed: int, *shape: int, low: float, high: float):
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


def _infinity_undefined(x: Tensor) -> Tensor:
    return on_grid(x).masked_fill(x.isinf(), torch.nan)


def _nan_as(value: float):
    return lambda x: on_grid(x).nan_to_num(value)


def _e5m2(x: Tensor) -> Tensor:
    return on_grid(x, lowest=-14, digits=2, largest=57344.0)


class _Casts(TorchDispatchMode):
    """Notes whether numbers were cast to FP8; bits that are only viewed as FP8 were not."""

    seen = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        source = {"_to_copy": 0, "copy_": 1}.get(func.__name__.partition(".")[0])
        if source is not None and made.dtype in _NARROW and args[source].dtype not in _NARROW:
            self.seen = True
        return made


def _casts(function, x: Tensor) -> int:
    with _Casts() as mode:
        function(x)
    return int(mode.seen)


_NAN_LOST = (
    "NaN becomes a number here: it compares as False with everything, and sign(NaN) is 0. Keep it."
)

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
        Case("beyond 448", _numbers(447.0, 448.0, 460.0, 480.0, -500.0, 1e9)),
        Case("infinity and NaN", _numbers(torch.inf, 1.3, -torch.inf, torch.nan)),
        Case("all the range", spanning(0, 40, 25, low=-12.0, high=10.0), hidden=True),
        Case("small only", spanning(1, 3, 5, 40, low=-11.0, high=-5.0), hidden=True),
        Case("a single number", lambda: (torch.tensor(-0.3),), hidden=True),
        Case("the last before overflow", _numbers(432.0, 433.0, -416.5, 239.0, 247.9), hidden=True),
        Case("NaN by itself", lambda: (torch.tensor(torch.nan),), hidden=True),
    ],
    hints=[
        "Saturate first: x = x.clamp(-448, 448), which leaves NaN as it is. Then the spacing at "
        "each number, then round.",
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
            "half up",
            lambda x: on_grid(x, lambda q: (q + 0.5).floor()),
            "Halfway cases always go up: the one with an even last bit wins, as torch.round.",
        ),
        Mutant(
            "half down",
            lambda x: on_grid(x, lambda q: (q - 0.5).ceil()),
            "Halfway cases always go down: the one with an even last bit wins, as torch.round.",
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
        Mutant("NaN", _overflows, "Too large becomes NaN here: clamp to 448 first."),
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
        Mutant(
            "infinity undefined",
            _infinity_undefined,
            "Infinity becomes NaN here: it is larger than 448, so 448. Clamp before anything else.",
        ),
        Mutant("NaN as 448", _nan_as(448.0), _NAN_LOST),
        Mutant("NaN as -448", _nan_as(-448.0), _NAN_LOST),
        Mutant("NaN as 0", _nan_as(0.0), _NAN_LOST),
        Mutant(
            "cast",
            lambda x: x.clamp(-448, 448).to(torch.float8_e4m3fn).float(),
            "The cast does the rounding here: find the spacing of E4M3's values and round to it.",
        ),
    ],
    budget=Budget(_casts, 0, "cast to FP8"),
)
