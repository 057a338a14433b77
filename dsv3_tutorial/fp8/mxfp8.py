"""MXFP8: groups of 32 E4M3 values that share a power of two, as the OCP standard has it.

The scale is one byte, UE8M0: nothing but an exponent. OCP microscaling 1.0, section 6.3: the
largest power of two at or below the group's largest magnitude, divided by the largest power of two
of the element's format (256 for E4M3); elements beyond 448 saturate. So the largest lands between
256 and 512, and one that would land above 448 loses up to an eighth. (NVIDIA's libraries round the
exponent of amax / 448 up instead: nothing saturates, up to half of the range stays unused.)
"""

import math

import torch
from torch import Tensor

from dsv3_tutorial.fp8.formats import real_tiles
from dsv3_tutorial.fp8.quant import FP8_MAX, QuantizationError, power_of_two_scale

GROUP = 32


def quantize_mx(x: Tensor, up: bool = False) -> tuple[Tensor, Tensor]:
    """Store x in eight bits, every 32 neighbours with a power of two in a byte of its own.

    x (..., n) real -> float8_e4m3fn (..., n) and float8_e8m0fnu (..., ceil(n / 32)). A last group
    may be shorter. A group of zeros gets the smallest scale, 2^-127. Bytes: 1 + 1 / 32 a value.
    `up` rounds the scale up, as NVIDIA does, and not down, as the standard does.
    Raises QuantizationError for NaN and infinity.
    """
    groups = real_tiles(x, GROUP)  # (..., groups, 32)
    largest = groups.abs().amax(dim=-1)  # (..., groups)
    if up:
        code = power_of_two_scale(largest).view(torch.int32) >> 23
        code = code.masked_fill(largest == 0, 0)
    else:
        exponent = largest.view(torch.int32) >> 23  # with float32's bias of 127
        code = (exponent - 8).clamp_min(0)  # and UE8M0 has the same bias
    scale = code.to(torch.uint8).view(torch.float8_e8m0fnu)
    stored = (groups / scale.float()[..., None]).clamp(-FP8_MAX, FP8_MAX)
    return stored.to(torch.float8_e4m3fn).flatten(-2)[..., : x.shape[-1]], scale


def dequantize_mx(x_fp8: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the stored groups stand for: x_fp8 * scale, rounded once, to dtype.

    x_fp8 float8_e4m3fn (..., n), scale float8_e8m0fnu (..., ceil(n / 32)) -> (..., n).
    Raises QuantizationError where the scales are not one a group.
    """
    n = x_fp8.shape[-1] if x_fp8.ndim else 0
    wanted = (*x_fp8.shape[:-1], math.ceil(n / GROUP))
    kinds = (x_fp8.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float8_e8m0fnu)
    if not kinds or n == 0 or tuple(scale.shape) != wanted:
        raise QuantizationError(
            f"{x_fp8.dtype} {tuple(x_fp8.shape)} with {scale.dtype} {tuple(scale.shape)} are not "
            f"MXFP8: values would get another group's scale. Give float8_e4m3fn, and "
            f"float8_e8m0fnu of shape {wanted}."
        )
    each = scale.float().repeat_interleave(GROUP, dim=-1)[..., :n]  # (..., n)
    return (x_fp8.float() * each).to(dtype)
