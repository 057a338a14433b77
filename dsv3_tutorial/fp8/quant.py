"""Eight bits and a scale: E4M3 values, and one float32 for each tile, block, row or tensor.

The largest magnitude is laid on 448, the largest E4M3 value, so that what is stored uses the whole
range wherever the numbers lie: x = stored * scale. Letters: n the last axis, m x n a weight.
DeepSeek-V3 report, section 3.3.2: tiles of 1 x 128 for activations and their gradients, blocks of
128 x 128 for weights, scales taken from the tensor at hand. Its checkpoints call the scale
`weight_scale_inv`: the inverse of what the weight was multiplied with.

DeepSeek's inference code never lets a tile's largest count for less than 1e-4. A gradient's may be
a thousandth of that, so nothing here does: only zero, and what float32 cannot divide, is held up.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_tutorial.backend import pick
from dsv3_tutorial.fp8.checks import (
    TINY,
    QuantizationError,
    check_part,
    check_real,
    check_scale,
    check_scales,
)

FP8_MAX = 448.0  # the largest E4M3 value
TILE = 128
BLOCK = (128, 128)
SAFE_SCALE = 2.0**119  # the largest power of two that 448 can be multiplied with in float32


def quantize_tiles(
    x: Tensor,
    pow2: bool = False,
    tile: int = TILE,
    checked: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Store x in eight bits, every 128 neighbours with a scale of their own.

    x (..., n) real -> float8_e4m3fn (..., n), and float32 scales, positive, (..., ceil(n / 128)).
    A last tile may be shorter. A tile of zeros gets the scale 1. `pow2` rounds a scale up to a
    power of two: dividing by it is exact, and up to half of the range stays unused. Error: up to
    1/16 of a value, more below 2^-15 of its tile's largest. Bytes: 1 + 4 / 128 a value.
    Raises QuantizationError for FP8, and for NaN, infinity and a float64 beyond float32, which on a
    GPU waits for the device; unchecked, their tile gets the scale NaN and comes back as NaN.
    """
    check_part(tile)
    check_real(x, 1, checked)
    if pick_fp8(x, backend) == "triton":
        from dsv3_tutorial.fp8 import triton_quant

        return triton_quant.quantize_tiles(x, pow2, tile)
    n = x.shape[-1]
    whole = x.float() if n % tile == 0 else F.pad(x.float(), (0, -n % tile))
    if not pow2:
        stored, scale = cast_tiles(whole, tile)
    else:
        tiles = whole.unflatten(-1, (-1, tile))  # (..., tiles, tile)
        scale = power_of_two_scale(tiles.abs().amax(dim=-1))
        stored = _cast(tiles / scale[..., None]).flatten(-2)  # (..., n)
    return stored[..., :n], scale


def cast_tiles(x: Tensor, tile: int = 128) -> tuple[Tensor, Tensor]:
    """The definition of `quantize_tiles` for whole tiles and float32 scales.

    x (..., n), n a multiple of `tile` -> float8_e4m3fn (..., n), float32 (..., n / tile).
    """
    tiles = x.float().unflatten(-1, (-1, tile))  # (..., n / tile, tile)
    largest = tiles.abs().amax(dim=-1)
    scale = (largest / 448.0).clamp_min(torch.finfo(torch.float32).tiny)
    scale = scale.masked_fill(largest == 0, 1.0).masked_fill(~largest.isfinite(), torch.nan)
    # clamped before the cast: what torch makes of more than 464 differs between its versions
    stored = (tiles / scale[..., None]).clamp(-448.0, 448.0)
    return stored.to(torch.float8_e4m3fn).flatten(-2), scale


def quantize_blocks(
    w: Tensor,
    block: tuple[int, int] = BLOCK,
    pow2: bool = False,
    checked: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Store a weight in a quarter of float32's bytes, each block with its own scale.

    w (..., m, n) -> float8_e4m3fn (..., m, n) and the scales, float32, positive,
    (..., ceil(m / 128), ceil(n / 128)). A block at the edge is smaller. Zeros, NaN, infinity and
    the error of a value: as in `quantize_tiles`. The kernel knows blocks of 128 x 128 only.
    """
    check_part(*block)
    check_real(w, 2, checked)
    if pick_fp8(w, backend) == "triton" and (block == BLOCK or backend is not None):
        from dsv3_tutorial.fp8 import triton_quant

        _check_block(block)
        return triton_quant.quantize_blocks(w, pow2)
    w = w.float()
    largest = _blocks(w.abs(), block).amax(dim=(-3, -1))  # (..., blocks of m, blocks of n)
    scale = scale_for(largest, pow2)
    return _cast(w / _spread(scale, w.shape, block)), scale


def quantize_rows(x: Tensor, pow2: bool = False, checked: bool = True) -> tuple[Tensor, Tensor]:
    """One scale a token: x (..., n) -> float8_e4m3fn (..., n), float32 (..., 1)."""
    check_real(x, 1, checked)
    x = x.float()
    scale = scale_for(x.abs().amax(dim=-1, keepdim=True), pow2)
    return _cast(x / scale), scale


def quantize_tensor(
    x: Tensor, pow2: bool = False, checked: bool = True, scale: float | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One scale for all: x (...) -> float8_e4m3fn (...), float32 ().

    `scale` gives it from outside, as delayed scaling does (`fp8.delayed`): what it does not cover
    is clamped to 448 of it, and what lies far below is lost. Raises QuantizationError where it is
    not one positive number; unchecked, a tensor's value is not read.
    """
    check_real(x, 1, checked)
    x = x.float()
    if scale is None:
        scale = scale_for(x.abs().amax(), pow2)
    else:
        check_scale(scale, checked)
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    return _cast(x / scale), scale


def scale_for(largest: Tensor, pow2: bool = False) -> Tensor:
    """The scale that lays `largest` on 448. largest (...), >= 0 -> float32 (...).

    1 for zero, NaN for what is not finite.
    """
    if pow2:
        return power_of_two_scale(largest)
    scale = (largest.float() / FP8_MAX).clamp_min(TINY)
    return scale.masked_fill(largest == 0, 1.0).masked_fill(~largest.isfinite(), torch.nan)


def power_of_two_scale(largest: Tensor) -> Tensor:
    """The smallest power of two that brings `largest` to 448 or below. (...) -> float32 (...).

    A power of two has no digits behind its first: in float32's bits, adding all ones of the
    mantissa carries into the exponent unless they were all zero. 1 for zero, NaN for not finite.
    """
    quotient = (largest.float() / 448.0).clamp_min(torch.finfo(torch.float32).tiny)
    bits = (quotient.view(torch.int32) + 0x7FFFFF) & 0x7F800000
    scale = bits.view(torch.float32)
    return scale.masked_fill(largest == 0, 1.0).masked_fill(~largest.isfinite(), torch.nan)


def dequantize_tiles(
    x_fp8: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32, tile: int = TILE
) -> Tensor:
    """What the stored tiles stand for: x_fp8 * scale, rounded once, to dtype.

    x_fp8 float8_e4m3fn (..., n), scale (..., ceil(n / 128)) -> (..., n). What a power of two above
    2^119 would carry beyond float32, or BF16 if that is dtype, is clamped to its largest number.
    Raises QuantizationError where the scales are not one a tile.
    """
    check_part(tile)
    n = x_fp8.shape[-1] if x_fp8.ndim else 0
    check_scales(x_fp8, scale, (*x_fp8.shape[:-1], math.ceil(n / tile)), f"tiles of {tile}")
    if n % tile == 0:
        values = restore_tiles(x_fp8, scale, tile)
    else:
        values = x_fp8.float() * scale.float().repeat_interleave(tile, dim=-1)[..., :n]
    return clamp_decoded(values, scale, dtype).to(dtype)


def restore_tiles(x_fp8: Tensor, scale: Tensor, tile: int = 128) -> Tensor:
    """`dequantize_tiles` for whole tiles, but its clamp: (..., n), (..., n / tile) -> float32."""
    tiles = x_fp8.float().unflatten(-1, (-1, tile))  # (..., n / tile, tile)
    return (tiles * scale[..., None]).flatten(-2)


def dequantize_blocks(
    w_fp8: Tensor,
    scale: Tensor,
    dtype: torch.dtype = torch.float32,
    block: tuple[int, int] = BLOCK,
) -> Tensor:
    """The weight that the stored blocks stand for: w_fp8 * scale, rounded once, to dtype.

    w_fp8 float8_e4m3fn (..., m, n), scale (..., ceil(m / 128), ceil(n / 128)) -> (..., m, n).
    Clamped as in `dequantize_tiles`. Raises QuantizationError where scales are not one a block.
    """
    check_part(*block)
    wanted = scale_shape(w_fp8.shape, block)
    check_scales(w_fp8, scale, wanted, f"blocks of {block[0]} x {block[1]}")
    values = w_fp8.float() * _spread(scale.float(), w_fp8.shape, block)
    return clamp_decoded(values, scale, dtype).to(dtype)


def clamp_decoded(values: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """In place: float32's largest, or BF16's, for what rounding up carried beyond it."""
    # the scales tell whether there can be any; a GPU would have to be waited for
    if values.device.type != "cpu" or (scale > SAFE_SCALE).any():
        limit = torch.finfo(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32).max
        values.clamp_(-limit, limit)
    return values


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, ...]:
    """One scale a block: (..., m, n) -> (..., ceil(m / 128), ceil(n / 128))."""
    *lead, m, n = shape
    return (*lead, math.ceil(m / block[0]), math.ceil(n / block[1]))


def pick_fp8(x: Tensor, backend: str | None = None) -> str:
    """`backend.pick`, but the reference where nothing is forced and the GPU has no FP8."""
    name = pick(x, backend)
    if name == "triton" and backend is None:
        from dsv3_tutorial.fp8.triton_quant import fp8_problem

        return name if fp8_problem(x.device) is None else "reference"
    return name


def _check_block(block: tuple[int, int]) -> None:
    if block != BLOCK:
        raise QuantizationError(
            f"The kernel has no blocks of {block[0]} x {block[1]}. It was forced, so nothing else "
            "was run in its place. Leave the backend open, or take blocks of 128 x 128."
        )


def _cast(quotient: Tensor) -> Tensor:
    """Clamped first: what torch's cast makes of more than 464 differs between its versions."""
    return quotient.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _blocks(w: Tensor, block: tuple[int, int]) -> Tensor:
    """(..., m, n) -> (..., blocks of m, rows, blocks of n, columns), filled up with zeros."""
    (rows, columns), (m, n) = block, w.shape[-2:]
    whole = F.pad(w, (0, -n % columns, 0, -m % rows))
    return whole.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))


def _spread(scale: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """Each value's own scale: (..., blocks of m, blocks of n) -> (..., m, n)."""
    rows = scale.repeat_interleave(block[0], dim=-2)[..., : shape[-2], :]
    return rows.repeat_interleave(block[1], dim=-1)[..., : shape[-1]]
