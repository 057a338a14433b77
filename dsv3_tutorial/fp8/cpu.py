"""FP8 emulated fast on a CPU: what quantising and back leaves of a matrix, in a few passes.

No CPU multiplies E4M3, so a training step there needs the values that the codes stand for, in
float32, and not the codes. These functions give the bits that `fp8.quant` gives, three times as
fast: no code is stored, nothing is padded or transposed, and work goes through buffers that stay in
the cache. Letters: m x n a matrix.

On an integer view of float32, a value's exponent alone is a power of two; 1.5 * 2^20 of it is so
large that adding it leaves three digits behind the first, rounded to nearest even, and taking it
away again gives them back. That is E4M3; below 2^-6 its step stays 2^-9.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3_tutorial.fp8.checks import QuantizationError, check_part, check_real
from dsv3_tutorial.fp8.quant import BLOCK, SAFE_SCALE, TILE, clamp_decoded, scale_for

Size = tuple[int, int]

_EXPONENT = 0x7F800000  # of a float32, in its bits
_ROUNDER = 1.5 * 2.0**20  # 23 digits of float32 less 3 of E4M3
_SMALLEST = 1.5 * 2.0**14  # the same for 2^-6, E4M3's smallest normal number
_CHUNK = 2**18  # values at a time: three buffers of them are about one core's share of the cache


class _Part(NamedTuple):
    """A rectangle of a matrix, cut into parts of one size, and where its scales lie."""

    rows: slice
    columns: slice
    size: Size
    scales: tuple[slice, slice]


def round_trip_tiles(
    x: Tensor,
    pow2: bool = False,
    tile: int = TILE,
    axis: int = -1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What quantising through tiles and back leaves of x, in one go.

    x (..., n) real -> (..., n), float32: bit-equal to dequantize_tiles(*quantize_tiles(x)), a tile
    with NaN or infinity all NaN. axis=-2: tiles of 128 x 1, down the columns of x (..., m, n), with
    no transposed copy. dtype bfloat16 is as exact with `pow2`, and rounds without it.
    What rounding up carries beyond float32 is clamped to its largest, as there.
    Raises QuantizationError for what has no tiles of real numbers.
    """
    check_real(x, 1 if axis == -1 else 2)
    if axis not in (-1, -2):
        what = f"axis={axis}: tiles lie along the last axis or the one before it"
        raise QuantizationError(f"{what}. No product sums over another. Pass -1 or -2.")
    if axis == -2:
        return _round_trip(x, (tile, 1), pow2, dtype)
    flat = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])  # (M, n)
    return _round_trip(flat, (1, tile), pow2, dtype).view(x.shape)


def round_trip_blocks(
    w: Tensor, pow2: bool = False, block: Size = BLOCK, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What quantising through blocks and back leaves of a weight (..., m, n): as for tiles."""
    check_real(w, 2)
    return _round_trip(w, block, pow2, dtype)


def round_trip(x: Tensor, size: Size, pow2: bool = False) -> Tensor:
    """The same for a matrix (m, n) in parts of any `size`, rows x columns: float32 (m, n)."""
    check_real(x, 2)
    return _round_trip(x, size, pow2, torch.float32)


def round_trip_kept(
    x: Tensor, size: Size = (1, TILE), pow2: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """What quantising and back leaves of a matrix, and the codes and scales to keep it by.

    x (m, n) real, in parts of `size` -> float32 (m, n), float8_e4m3fn (m, n), and a float32 scale a
    part. A forward multiplies the first and keeps the others for Wgrad. All lie as x lies.
    """
    check_real(x, 2)
    if _lies_transposed(x):
        values, codes, scale = round_trip_kept(x.mT, size[::-1], pow2)
        return values.mT, codes.mT, scale.mT
    m, n = x.shape
    codes = torch.empty(m, n, dtype=torch.float8_e4m3fn)
    scale = torch.empty(-(-m // size[0]), -(-n // size[1]))
    return _round_trip(x, size, pow2, torch.float32, (codes, scale)), codes, scale


def widen(x_fp8: Tensor) -> Tensor:
    """float8_e4m3fn -> float32, exact: PyTorch's own cast is the slow part of emulation on a CPU.

    The same digits in a float16 stand for 2^-8 of the value, and the cast from there is fast.
    """
    if x_fp8.dtype != torch.float8_e4m3fn:
        what = f"{x_fp8.dtype} is not float8_e4m3fn: its bits would be read as another number's"
        raise QuantizationError(f"{what}. Give the codes that quantize_tiles returns first.")
    if x_fp8.device.type != "cpu":
        return x_fp8.float()
    out = torch.empty(x_fp8.shape)
    codes = x_fp8.view(torch.int8).reshape(-1)
    for some, wide in zip(codes.split(_CHUNK), out.view(-1).split(_CHUNK)):
        wide.copy_(_half(some)).mul_(256.0)
    return out


def dequantize(x_fp8: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`gemm.dequantize`, fast: x_fp8 float8_e4m3fn (m, n) times its scales -> (m, n).

    scale: one a tile (m, ceil(n / 128)), a block, a row (m, 1), or the tensor (). dtype bfloat16
    is exact where the scales are powers of two.
    """
    m, n = x_fp8.shape
    out = torch.empty(m, n, dtype=dtype)
    scale = scale.float().reshape(1, 1) if scale.ndim == 0 else scale.float()
    size = tuple(_part_size(side, count) for side, count in zip((m, n), scale.shape))
    for part in _parts(m, n, size):
        codes, values = _cut(x_fp8.view(torch.int8), part), _cut(out, part)
        each = scale[part.scales][:, None, :, None]  # (parts down, 1, parts across, 1)
        for chunk in _chunks(codes):
            _restore(codes[chunk], each[chunk], values[chunk])
    return out


def operand_dtype(pow2: bool, out_dtype: torch.dtype) -> torch.dtype:
    """What to multiply emulated operands in: bfloat16 where that is exact and faster, else float32.

    An E4M3 value times a power of two keeps its four digits, and bfloat16 has eight: with scales
    that are powers of two on both sides every product is exact (a scale below 2^-124 excepted).
    Sums are float32 inside, but PyTorch's CPU kernel gives only their rounding to bfloat16. Faster
    with AMX or AVX512-BF16 (2.3 times float32 on a Zen 4 core), slower than float32 elsewhere.
    """
    exact = pow2 and out_dtype == torch.bfloat16
    return torch.bfloat16 if exact and has_bf16_products() else torch.float32


def has_bf16_products() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware: AMX tiles, or AVX512-BF16."""
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def _round_trip(
    x: Tensor, size: Size, pow2: bool, dtype: torch.dtype, kept: tuple[Tensor, ...] = ()
) -> Tensor:
    """x (..., m, n) in parts of m x n `size`, whatever lies before as matrices of their own."""
    if _lies_transposed(x):
        return _round_trip(x.mT, size[::-1], pow2, dtype).mT
    check_part(*size)
    *_, m, n = x.shape
    out = torch.empty(x.shape, dtype=dtype)
    buffers = torch.empty(2, min(m * n, _CHUNK + size[0] * n))
    for source, target in zip(x.reshape(-1, m, n), out.view(-1, m, n)):
        for part in _parts(m, n, size):
            before, after = _cut(source, part), _cut(target, part)
            for chunk in _chunks(before):
                work, scale = _round_parts(before[chunk], after[chunk], buffers, pow2)
                if kept:
                    _cut(kept[0], part)[chunk] = work
                    kept[1][part.scales][chunk] = scale[:, 0, :, 0]
    return out


def _lies_transposed(x: Tensor) -> bool:
    return x.mT.is_contiguous() and not x.is_contiguous()


def _round_parts(x: Tensor, out: Tensor, buffers: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    """x (parts down, rows, parts across, columns) into `out`; gives the E4M3 values and scales.

    No clamp: the quotient by a scale that lays the largest on 448 is at most a rounding above it.
    """
    x = x.float()
    work, rounder = (buffer[: x.numel()].view(x.shape) for buffer in buffers)
    scale = scale_for(torch.abs(x, out=work).amax(dim=(1, 3), keepdim=True), pow2)
    torch.div(x, scale, out=work)
    torch.bitwise_and(work.view(torch.int32), _EXPONENT, out=rounder.view(torch.int32))
    rounder.mul_(_ROUNDER).clamp_min_(_SMALLEST)
    work.add_(rounder).sub_(rounder).copysign_(x)  # -0.0 keeps its sign, as in a cast
    values = torch.mul(work, scale, out=out if out.dtype == torch.float32 else rounder)
    if pow2:  # no other scale, of its own part's largest, leads beyond float32
        clamp_decoded(values, scale, out.dtype)
    if values is not out:
        out.copy_(values)
    return work, scale


def _parts(m: int, n: int, size: Size) -> Iterator[_Part]:
    """The matrix as up to four rectangles: whole parts, and the narrower ones at its two edges."""
    for rows, height, down in _steps(m, size[0]):
        for columns, width, across in _steps(n, size[1]):
            yield _Part(rows, columns, (height, width), (down, across))


def _steps(length: int, step: int) -> Iterator[tuple[slice, int, slice]]:
    whole = length // step
    if whole:
        yield slice(0, whole * step), step, slice(0, whole)
    if length % step:
        yield slice(whole * step, length), length % step, slice(whole, whole + 1)


def _cut(matrix: Tensor, part: _Part) -> Tensor:
    """A view of the rectangle: (parts down, rows, parts across, columns)."""
    height, width = part.size
    inside = matrix[part.rows, part.columns]
    return inside.unflatten(1, (-1, width)).unflatten(0, (-1, height))


def _chunks(parts: Tensor) -> Iterator[slice]:
    """Along the first axis, as many at a time as stay in the cache."""
    step = max(1, _CHUNK // parts[0].numel())
    for begin in range(0, len(parts), step):
        yield slice(begin, begin + step)


def _part_size(side: int, count: int) -> int:
    """How many values along a side share one of `count` scales."""
    return 1 if count == side else side if count == 1 else TILE


def _half(codes: Tensor) -> Tensor:
    """2^-8 of what E4M3's bits s eeee mmm stand for: float16's s 0eeee mmm0000000. From int8."""
    bits = codes.to(torch.int16).bitwise_left_shift_(7)  # the sign in bits 14 and 15
    half, unsigned = bits.bitwise_and_(~0x4000).view(torch.float16), codes.bitwise_and(0x7F)
    if codes.numel() and unsigned.amax() == 0x7F:  # two NaN; comparing every value would cost more
        half.masked_fill_(unsigned == 0x7F, torch.nan)
    return half


def _restore(codes: Tensor, scale: Tensor, out: Tensor) -> None:
    """codes * scale into `out`, rounded once: one pass where 256 * scale does not overflow."""
    large = scale > SAFE_SCALE
    plain = out if out.dtype == torch.float32 else None
    values = torch.mul(_half(codes), torch.where(large, scale, 256 * scale), out=plain)
    if large.any():
        clamp_decoded(values.mul_(torch.where(large, 256.0, 1.0)), scale, out.dtype)
    if plain is None:
        out.copy_(values)
