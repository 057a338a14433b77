"""Eight bits or four for each weight, and a scale for the weights that share one.

A weight (m, k) gives m outputs from k inputs, and each format says which weights share a scale:
    int8         a row of k, that is one output         scale (m,)
    int8-tensor  all of them                            scale ()
    int8-tile    128 neighbours of a row                scale (m, ceil(k / 128))
    fp8          a block of 128 x 128, E4M3 codes       scale (ceil(m / 128), ceil(k / 128))
    int4         128 neighbours of a row, two a byte    scale (m, ceil(k / 128))
All are symmetric, without a zero point: weight = code * scale. A stack of matrices (..., m, k), as
the experts of a layer are, has its leading axes in front of every part.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_tutorial.fp8.checks import QuantizationError, check_real
from dsv3_tutorial.fp8.quant import dequantize_blocks, quantize_blocks

FORMATS = ("int8", "int8-tensor", "int8-tile", "fp8", "int4")
GROUP = 128  # neighbours that share a scale in int8-tile and int4


@dataclass(frozen=True, eq=False)
class Quantized:
    """A weight as it lies in memory. `shape` (..., m, k) is that of the weight it stands for.

    codes int8 or float8_e4m3fn (..., m, k); int4: uint8 (..., m, ceil(k / 2)), column 2 j in the
    low half of byte j, each half 8 more than its code. scale float32, positive, as the module says.
    """

    fmt: str
    codes: Tensor
    scale: Tensor
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Eight bits for each weight and one scale for each output: the largest of a row becomes 127.

    weight (..., m, k), finite -> codes int8 (..., m, k) from -127 to 127, scale float32 (..., m).
    A row of zeros gets the scale 1. Error: up to half a scale a weight.
    """
    rows = weight.float()
    largest = rows.abs().amax(dim=-1)  # (m,)
    scale = (largest / 127).clamp_min(torch.finfo(torch.float32).tiny)
    scale = scale.masked_fill(largest == 0, 1.0)
    codes = (rows / scale[..., None]).round()  # half goes to the even neighbour
    return codes.clamp(-127, 127).to(torch.int8), scale


def quantize_int8_tensor(weight: Tensor) -> tuple[Tensor, Tensor]:
    """One scale for the whole matrix: its largest weight decides how coarse all others become.

    weight (..., m, k) -> codes int8 (..., m, k), scale float32 (...).
    """
    codes, scale = quantize_int8(weight.flatten(-2))
    return codes.view(weight.shape), scale


def quantize_int8_tiles(weight: Tensor, tile: int = GROUP) -> tuple[Tensor, Tensor]:
    """A scale for every 128 neighbours of a row: an outlier coarsens its own tile alone.

    weight (..., m, k) -> codes int8 (..., m, k), scale float32 (..., m, ceil(k / tile)). The last
    tile may be shorter. Bytes: 1 + 4 / 128 a weight.
    """
    codes, scale = quantize_int8(_tiles(weight, tile))
    return codes.flatten(-2)[..., : weight.shape[-1]].contiguous(), scale


def quantize_int4(weight: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """Four bits for each weight, and a scale for every 128 neighbours of a row.

    weight (..., m, k) -> uint8 (..., m, ceil(k / 2)), scale float32 (..., m, ceil(k / group)).
    Codes run from -7 to 7 and lie as code + 8, the even column in the low half; an odd k fills up
    with a code of 0. Error: up to half a scale, a fourteenth of the group's largest.
    """
    tiles = _tiles(weight, group)  # (..., m, groups, group)
    largest = tiles.abs().amax(dim=-1)
    scale = (largest / 7).clamp_min(torch.finfo(torch.float32).tiny).masked_fill(largest == 0, 1.0)
    codes = (tiles / scale[..., None]).round().clamp(-7, 7).flatten(-2)[..., : weight.shape[-1]]
    return pack_int4(codes.to(torch.int8)), scale


def pack_int4(codes: Tensor) -> Tensor:
    """Two codes in a byte: int8 (..., k) from -8 to 7 -> uint8 (..., ceil(k / 2))."""
    halves = (F.pad(codes, (0, codes.shape[-1] % 2)) + 8).to(torch.uint8)
    return halves[..., ::2] | halves[..., 1::2] << 4


def unpack_int4(packed: Tensor, k: int) -> Tensor:
    """The codes again: uint8 (..., ceil(k / 2)) -> int8 (..., k) from -8 to 7."""
    halves = torch.stack([packed & 15, packed >> 4], dim=-1)  # (..., ceil(k / 2), 2)
    return halves.flatten(-2)[..., :k].to(torch.int8) - 8


_QUANTIZE = {
    "int8": quantize_int8,
    "int8-tensor": quantize_int8_tensor,
    "int8-tile": quantize_int8_tiles,
    "fp8": quantize_blocks,
    "int4": quantize_int4,
}


def quantize(weight: Tensor, fmt: str) -> Quantized:
    """A weight in one of FORMATS. weight (..., m, k), real -> Quantized, on its device.

    Raises QuantizationError for an unknown format, for what is no matrix of real numbers, and for
    NaN or infinity, which would decide the scale of all that share it.
    """
    check_format(fmt)
    check_real(weight, 2, checked=True)
    codes, scale = _QUANTIZE[fmt](weight)
    return Quantized(fmt, codes, scale, tuple(weight.shape))


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight that the codes stand for, code * scale rounded once to dtype: (..., m, k)."""
    check_format(q.fmt)
    if q.fmt == "fp8":
        return dequantize_blocks(q.codes, q.scale, dtype)
    codes = unpack_int4(q.codes, q.shape[-1]) if q.fmt == "int4" else q.codes
    return (codes.float() * spread(q)).to(dtype)


def spread(q: Quantized) -> Tensor:
    """Each weight's own scale: float32, (..., m, k) or what broadcasts to it."""
    if q.fmt == "int8":
        return q.scale[..., None]
    if q.fmt == "int8-tensor":
        return q.scale[..., None, None]
    rows = q.scale
    if q.fmt == "fp8":
        rows = rows.repeat_interleave(GROUP, dim=-2)[..., : q.shape[-2], :]
    return rows.repeat_interleave(GROUP, dim=-1)[..., : q.shape[-1]]


def spacing(q: Quantized) -> Tensor:
    """How far apart the numbers lie that a weight could have become: float32 (..., m, k).

    The scale itself for integers. E4M3 has 8 steps from one power of two to the next, the last of
    them 2^-9 wide below 2^-6.
    """
    if q.fmt != "fp8":
        return spread(q).expand(q.shape)
    size = q.codes.float().abs().clamp_min(2.0**-9)  # zero lies among the smallest
    exponent = torch.frexp(size).exponent.clamp_min(-5)  # size = fraction * 2^exponent, from 1/2 on
    return torch.ldexp(spread(q), exponent - 4)


def predicted_error(x: Tensor, scale: Tensor) -> Tensor:
    """The error of a dot product before it is computed: what INT8 weights do to each output.

    x (M, k), scale (m,) -> (M, m), the standard deviation. A rounding error lies anywhere within
    half a step of 0: its deviation is step / sqrt(12). k independent ones meet their inputs, and
    variances add: |x| step / sqrt(12).
    """
    return x.norm(dim=-1, keepdim=True) * scale / 12**0.5


def check_format(fmt: str) -> None:
    """Refuses what is none of FORMATS."""
    if fmt not in FORMATS:
        raise QuantizationError(
            f"There is no weight format {fmt!r}. Codes without a rule to read them are noise. "
            f"Name one of {', '.join(FORMATS)}."
        )


def _tiles(weight: Tensor, tile: int) -> Tensor:
    """(..., k) -> (..., ceil(k / tile), tile), filled up with zeros."""
    return F.pad(weight.float(), (0, -weight.shape[-1] % tile)).unflatten(-1, (-1, tile))
