"""E5M6: twelve bits a value, for the one activation that eight bits hurt most.

What enters the Linear after attention is used again in attention's backward pass, so DeepSeek-V3
keeps it in a sign, five exponent and six mantissa bits: FP16 without its last four. The scale of
each 1 x 128 tile is a power of two, so that the same values can be cut into 128 x 1 tiles for Wgrad
without being rounded again. DeepSeek-V3 report, section 3.3.3; it does not say how the power is
chosen. Here: the smallest that brings the tile's largest to 65,024, E5M6's largest, or below.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_tutorial.fp8.formats import FORMATS, power_of_two, real_tiles, round_to
from dsv3_tutorial.fp8.quant import TILE, QuantizationError

_FORMAT = FORMATS["e5m6"]


def pack_e5m6(x: Tensor, checked: bool = True) -> tuple[Tensor, Tensor]:
    """Store two values in three bytes, every 128 neighbours with a power of two of their own.

    x (..., n) real -> uint8 (..., 3 * ceil(n / 2)) and float32 scales (..., ceil(n / 128)). The
    first value of a pair lies in the lower twelve bits. Error: up to 1/128 of a value, more below
    2^-28 of its tile's largest. A tile of zeros has the scale 1; no scale is below 2^-126.
    Raises QuantizationError for NaN and infinity; unchecked, their whole tile comes back as NaN.
    """
    tiles = real_tiles(x, TILE, checked)  # (..., tiles, 128)
    scale = _scale(tiles.abs().amax(dim=-1))
    values = round_to(tiles / scale[..., None], _FORMAT).half()  # exact: FP16 has all of them
    codes = (values.view(torch.int16).int() >> 4) & 0xFFF
    codes = codes.flatten(-2)[..., : x.shape[-1]]  # (..., n)
    first, second = F.pad(codes, (0, x.shape[-1] % 2)).unflatten(-1, (-1, 2)).unbind(-1)
    pair = first | second << 12
    triple = torch.stack([pair & 0xFF, (pair >> 8) & 0xFF, pair >> 16], dim=-1)
    return triple.to(torch.uint8).flatten(-2), scale  # (..., 3 * ceil(n / 2))


def unpack_e5m6(
    packed: Tensor, scale: Tensor, n: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What the packed pairs stand for: value * scale, to dtype. -> (..., n).

    packed uint8 (..., 3 * ceil(n / 2)), scale (..., ceil(n / 128)).
    Raises QuantizationError where bytes, scales and n do not belong together.
    """
    lead = tuple(packed.shape[:-1])
    sizes, scales = (*lead, 3 * math.ceil(n / 2)), (*lead, math.ceil(n / TILE))
    if packed.dtype != torch.uint8 or packed.shape != sizes or scale.shape != scales or n < 1:
        raise QuantizationError(
            f"{packed.dtype} {tuple(packed.shape)} with scales {tuple(scale.shape)} are not {n} "
            "values of E5M6: bytes would be cut at the wrong place. "
            f"Give uint8 of shape {sizes} and scales of shape {scales}."
        )
    low, middle, high = packed.int().unflatten(-1, (-1, 3)).unbind(-1)
    pair = low | middle << 8 | high << 16
    codes = torch.stack([pair & 0xFFF, pair >> 12], dim=-1).flatten(-2)[..., :n]  # (..., n)
    values = (codes << 4).to(torch.int16).view(torch.float16).float()
    back = values * scale.repeat_interleave(TILE, dim=-1)[..., :n]
    limit = torch.finfo(torch.float32).max  # rounding up may have led beyond it
    return back.clamp(-limit, limit).to(dtype)


def _scale(largest: Tensor) -> Tensor:
    """The smallest power of two with largest <= 65,024 * scale: from the exponent, so exactly."""
    mantissa, exponent = torch.frexp(largest.masked_fill(~largest.isfinite(), 1.0))
    top, octaves = math.frexp(_FORMAT.max)
    power = power_of_two((exponent - octaves + (mantissa > top)).clamp_min(-126))
    return power.masked_fill(largest == 0, 1.0).masked_fill(~largest.isfinite(), torch.nan)
