"""Weights in eight bits: E4M3 values, and one float32 scale for each block of 128 x 128.

A block's largest magnitude is laid on 448, the largest E4M3 value, so that what is stored uses the
whole range wherever the block's numbers lie: weight = stored * scale. Letters: m x n the weight.
DeepSeek-V3 report, section 3.3.2; its checkpoints keep the scale as `weight_scale_inv`, the inverse
of what the weight was multiplied with, that is: the factor to multiply the stored value with.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_MAX = 448.0  # the largest E4M3 value
BLOCK = (128, 128)


class QuantizationError(ValueError):
    """Numbers that blocks of eight bits cannot hold, or that are no such blocks."""


def quantize_blocks(w: Tensor, block: tuple[int, int] = BLOCK) -> tuple[Tensor, Tensor]:
    """Store a weight in a quarter of float32's bytes, each block with its own scale.

    w (..., m, n), finite -> float8_e4m3fn (..., m, n) and the scales, float32, positive and finite,
    (..., ceil(m / 128), ceil(n / 128)). A block at the edge is smaller. A block of zeros gets the
    scale 1. Relative error: up to 1/16 of a value, more below 2^-15 of its block's largest.
    Raises QuantizationError for NaN and infinity: no scale would bring them back.
    """
    if w.ndim < 2 or not w.is_floating_point():
        raise QuantizationError(
            f"A weight of shape {tuple(w.shape)} and {w.dtype} has no blocks of real numbers. "
            "Give a floating-point matrix, or a stack of them."
        )
    w = w.float()
    if not w.isfinite().all():
        raise QuantizationError(
            "The weight holds NaN or infinity. One such value would decide the scale of its whole "
            "block. Find the step that made it before storing anything."
        )
    largest = _blocks(w.abs(), block).amax(dim=(-3, -1))  # (..., blocks of m, blocks of n)
    # not below the smallest normal number: there a quotient of tiny numbers would lose its digits
    scale = (largest / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    scale = scale.masked_fill(largest == 0, 1.0)
    # clamped before the cast: what torch makes of more than 464 differs between its versions
    stored = (w / _spread(scale, w.shape, block)).clamp(-FP8_MAX, FP8_MAX)
    return stored.to(torch.float8_e4m3fn), scale


def dequantize_blocks(
    w_fp8: Tensor,
    scale: Tensor,
    dtype: torch.dtype = torch.float32,
    block: tuple[int, int] = BLOCK,
) -> Tensor:
    """The weight that the stored blocks stand for: w_fp8 * scale, rounded once, to dtype.

    w_fp8 float8_e4m3fn (..., m, n), scale (..., ceil(m / 128), ceil(n / 128)) -> (..., m, n).
    Raises QuantizationError where the scales are not one a block.
    """
    wanted = scale_shape(w_fp8.shape, block)
    if w_fp8.dtype != torch.float8_e4m3fn or tuple(scale.shape) != wanted:
        raise QuantizationError(
            f"{w_fp8.dtype} {tuple(w_fp8.shape)} with scales {tuple(scale.shape)} are not "
            f"blocks of {block[0]} x {block[1]}: values would get another block's scale. "
            f"Give float8_e4m3fn and scales of shape {wanted}."
        )
    return (w_fp8.float() * _spread(scale.float(), w_fp8.shape, block)).to(dtype)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, ...]:
    """One scale a block: (..., m, n) -> (..., ceil(m / 128), ceil(n / 128))."""
    *lead, m, n = shape
    return (*lead, math.ceil(m / block[0]), math.ceil(n / block[1]))


def _blocks(w: Tensor, block: tuple[int, int]) -> Tensor:
    """(..., m, n) -> (..., blocks of m, rows, blocks of n, columns), filled up with zeros."""
    (rows, columns), (m, n) = block, w.shape[-2:]
    whole = F.pad(w, (0, -n % columns, 0, -m % rows))
    return whole.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))


def _spread(scale: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """Each value's own scale: (..., blocks of m, blocks of n) -> (..., m, n)."""
    rows = scale.repeat_interleave(block[0], dim=-2)[..., : shape[-2], :]
    return rows.repeat_interleave(block[1], dim=-1)[..., : shape[-1]]
