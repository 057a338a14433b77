"""Number formats as grids: which values there are, how far apart, and where one lands.

A format is a sign, e exponent bits and m mantissa bits. Its codes without the sign count up through
the grid, so that the next code is always the next value: 2^m steps from each power of two to the
next, and below the smallest normal one the steps of that last octave go on down to zero. INT8 is
here as a grid of whole numbers: no exponent bits, and steps of 1 everywhere.

OCP 8-bit floating point (E4M3, E5M2), OCP microscaling 1.0, section 5.4.1 (UE8M0), IEEE 754 (FP16).
DeepSeek-V3 report, section 3.3.3: E5M6.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_tutorial.fp8.quant import QuantizationError


@dataclass(frozen=True)
class Format:
    """A grid of numbers: (-1)^sign * 2^(exponent - bias) * 1.mantissa, all from its fields."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    reserved: int  # codes at the top that are no finite number: infinity and NaN
    signed: bool = True
    subnormals: bool = True  # exponent field 0 is 0.mantissa, zero among them

    @property
    def bits(self) -> int:
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def has_infinity(self) -> bool:
        """One reserved code can only be NaN; IEEE's rule gives up a whole exponent for both."""
        return self.reserved > 1

    @property
    def max(self) -> float:
        return self.magnitude(self._codes - 1)

    @property
    def min_normal(self) -> float:
        """The smallest value with all its digits. For INT8 128, above its max: it has none."""
        return math.ldexp(1.0, self._lowest_exponent)

    @property
    def min_subnormal(self) -> float:
        """The smallest value above zero, the smallest of all where there is no zero."""
        return self.magnitude(1 if self.subnormals else 0)

    @property
    def overflow(self) -> str:
        """What becomes of more than the largest value, in words."""
        top = f"above {self.max:g} `round_to` saturates"
        if self.has_infinity:
            return f"{top}; an IEEE cast gives infinity"
        if self.reserved:
            return f"{top}; there is no infinity, and a cast that does not saturate gives NaN"
        return f"{top}; there is neither infinity nor NaN"

    @property
    def underflow(self) -> str:
        """What becomes of less than the smallest value, in words."""
        if not self.subnormals:
            return f"there is no zero: everything below {self.min_subnormal:g} becomes that"
        return f"up to {self.min_subnormal / 2:g} becomes zero"

    def magnitude(self, code: int) -> float:
        """The value of a code without its sign bit: exponent field above, mantissa field below."""
        field, fraction = divmod(code, 1 << self.mantissa_bits)
        if field == 0 and self.subnormals:
            return math.ldexp(fraction, 1 - self.bias - self.mantissa_bits)
        whole = (1 << self.mantissa_bits) + fraction
        return math.ldexp(whole, field - self.bias - self.mantissa_bits)

    def values(self) -> Tensor:
        """Every finite value once, ascending: float64 (values,). Plus and minus zero are one."""
        up = torch.tensor(
            [self.magnitude(code) for code in range(self._codes)], dtype=torch.float64
        )
        return torch.cat([-up[1:].flip(0), up]) if self.signed else up

    @property
    def _codes(self) -> int:
        return (1 << (self.exponent_bits + self.mantissa_bits)) - self.reserved

    @property
    def _lowest_exponent(self) -> int:
        return 1 - self.bias if self.subnormals else -self.bias


FORMATS = {
    one.name: one
    for one in (
        Format("e4m3", 4, 3, 7, reserved=1),  # "fn": finite up to 448, NaN at all ones only
        Format("e5m2", 5, 2, 15, reserved=4),
        Format("e5m6", 5, 6, 15, reserved=64),
        Format("ue8m0", 8, 0, 127, reserved=1, signed=False, subnormals=False),
        Format("bf16", 8, 7, 127, reserved=128),
        Format("fp16", 5, 10, 15, reserved=1024),
        Format("int8", 0, 7, -6, reserved=0),  # symmetric: the code of -128 is not used
    )
}


def round_to(x: Tensor, fmt: Format | str) -> Tensor:
    """The format's value nearest to each x; a tie goes to the even code.

    x (...) real -> (...), x's dtype. Saturates: beyond the largest value, infinity included, comes
    the largest. UE8M0 has no zero and no sign: all below 2^-127 becomes 2^-127, and a tie goes up.
    NaN stays NaN, and -0 stays -0. Arithmetic on the exponent, no search: a dozen passes over x.
    Raises QuantizationError for integers, and where x's dtype could not hold the format's values.
    """
    fmt = _format(fmt)
    _check_holds(x, fmt)
    inside = _inside(x, fmt)
    step = _step(inside, fmt)
    return (torch.round(inside / step) * step).to(x.dtype)


def spacing(x: Tensor, fmt: Format | str) -> Tensor:
    """How far the format's values lie apart around each x. x (...) real -> (...), x's dtype.

    On a power of two: the wider step, away from zero. Beyond the largest value: the last step.
    """
    fmt = _format(fmt)
    _check_holds(x, fmt)
    return _step(_inside(x, fmt), fmt).to(x.dtype)


def neighbours(x: Tensor, fmt: Format | str) -> tuple[Tensor, Tensor]:
    """The two values of the format that x lies between: below <= x <= above, each (...), x's dtype.

    Both are x where x is such a value. Infinity stands for a neighbour that is not there.
    """
    fmt = _format(fmt)
    _check_holds(x, fmt)
    inside = _inside(x, fmt)
    step = _step(inside, fmt)
    below = (torch.floor(inside / step) * step).to(x.dtype)
    above = (torch.ceil(inside / step) * step).to(x.dtype)
    return below.masked_fill(x < below, -torch.inf), above.masked_fill(x > above, torch.inf)


def round_e4m3(x: Tensor) -> Tensor:
    """Round to E4M3 by hand: eight steps in every octave, ties to even, no more than 448.

    x float32 (...) -> float32 (...), bit for bit what a saturating cast to float8_e4m3fn holds.
    Below 2^-6 the step stays 2^-9: subnormal numbers. NaN stays NaN.
    """
    size = x.abs().clamp(2.0**-6, 448.0)
    mantissa, _ = torch.frexp(size)  # size = mantissa * 2^exponent, 1/2 <= mantissa < 1
    octave = size / mantissa / 2  # the power of two at or below size, exactly
    step = octave / 8  # three bits of mantissa
    return (torch.round(x / step) * step).clamp(-448.0, 448.0)


def real_tiles(x: Tensor, tile: int, checked: bool = True) -> Tensor:
    """The last axis in tiles: x (..., n) real -> float32 (..., ceil(n / tile), tile).

    A shorter last tile is filled up with zeros. Raises QuantizationError for what is no vector of
    floating-point numbers, and, if `checked`, for NaN and infinity: on a GPU that waits for it.
    """
    if not x.is_floating_point() or x.ndim < 1 or x.shape[-1] == 0:
        raise QuantizationError(
            f"{x.dtype} of shape {tuple(x.shape)} has no tiles of {tile} real numbers along its "
            "last axis. What came out would stand for something else. Give a floating-point tensor "
            "with at least one value there."
        )
    x = x.float()
    if checked and not x.isfinite().all():
        raise QuantizationError(
            "The tensor holds NaN or infinity. One such value would decide the scale of its whole "
            "tile. Find the step that made it before storing anything."
        )
    return F.pad(x, (0, -x.shape[-1] % tile)).unflatten(-1, (-1, tile))  # (..., tiles, tile)


def power_of_two(exponent: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """2^exponent, exact on any device: written as bits, for `pow` may be off by one of them.

    exponent (...) whole numbers of a normal float32 or float64 -> (...).
    """
    integer, digits, bias = _LAYOUT[dtype]
    return ((exponent.to(integer) + bias) << digits).view(dtype)


_LAYOUT = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}


def _format(fmt: Format | str) -> Format:
    if isinstance(fmt, Format):
        return fmt
    if fmt not in FORMATS:
        raise QuantizationError(
            f"no format {fmt!r}. Nothing says which values there are. Name one of {list(FORMATS)}."
        )
    return FORMATS[fmt]


def _inside(x: Tensor, fmt: Format) -> Tensor:
    """x within the format's range, in a dtype whose normal numbers hold all of its steps."""
    fine = x.dtype == torch.float64 or fmt.min_subnormal < 2.0**-126
    least = -fmt.max if fmt.signed else fmt.min_subnormal
    return x.to(torch.float64 if fine else torch.float32).clamp(least, fmt.max)


def _step(inside: Tensor, fmt: Format) -> Tensor:
    """The power of two between neighbours: the octave's, 2^mantissa_bits times smaller."""
    integer, digits, bias = _LAYOUT[inside.dtype]
    exponent = (inside.abs().view(integer) >> digits) - bias  # floor(log2 |x|) of normal numbers
    octave = exponent.clamp(fmt._lowest_exponent, math.frexp(fmt.max)[1] - 1)
    if fmt.exponent_bits == 0:
        octave = torch.full_like(exponent, fmt._lowest_exponent)
    return power_of_two(octave - fmt.mantissa_bits, inside.dtype)


def _check_holds(x: Tensor, fmt: Format) -> None:
    """Whether a dtype has every value of the format; nothing else could be handed back."""
    if not x.is_floating_point():
        raise QuantizationError(
            f"{x.dtype} holds no fractions: the values of {fmt.name} would be cut off. "
            "Give float32 or float64."
        )
    info = torch.finfo(x.dtype)
    least = info.smallest_normal * info.eps
    if info.eps > 2.0**-fmt.mantissa_bits or info.max < fmt.max or least > fmt.min_subnormal:
        raise QuantizationError(
            f"{x.dtype} cannot hold every value of {fmt.name}: what came out would be rounded "
            "twice. Give float32 or float64."
        )
