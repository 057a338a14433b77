"""The two kernels behind quantisation, and the scale and the codes that both make.

Everything is in float32 and in its bits: no value depends on how a compiler divides.
"""

import triton
import triton.language as tl


@triton.jit
def tiles_kernel(
    x_ptr,
    stored_ptr,
    scale_ptr,
    n_rows,
    n,
    tiles_per_row,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    ACROSS: tl.constexpr,
    EVEN: tl.constexpr,
    POW2: tl.constexpr,
):
    """TILES tiles that follow each other in memory: codes and one scale each.

    ACROSS: x lies transposed, so they are the same tile of successive rows, and are turned on chip.
    EVEN: a row is a whole number of tiles, so that only the last program has any to leave out.
    """
    each, place = tl.arange(0, TILES), tl.arange(0, BLOCK)[None, :]
    if ACROSS:
        groups = tl.cdiv(n_rows, TILES)
        row = tl.program_id(0) % groups * TILES + each
        in_row = tl.program_id(0) // groups
        tile = row * tiles_per_row + in_row
        column = in_row * TILE + place
    else:
        tile = tl.program_id(0) * TILES + each
        row = tile // tiles_per_row
        column = (tile % tiles_per_row * TILE)[:, None] + place
    there = (row < n_rows)[:, None]
    if not EVEN:
        there = there & (place < TILE) & (column < n)
    stored_at = row.to(tl.int64)[:, None] * n + column
    x_at = stored_at
    if ACROSS:
        x_at = row[:, None] + column.to(tl.int64) * n_rows
    x = tl.load(x_ptr + x_at, mask=there, other=0.0).to(tl.float32)
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    scale = _scale(largest, POW2)
    tl.store(stored_ptr + stored_at, _codes(x, scale[:, None], POW2), mask=there)
    tl.store(scale_ptr + tile, scale, mask=row < n_rows)


@triton.jit
def blocks_kernel(x_ptr, stored_ptr, scale_ptr, m, n, SIDE: tl.constexpr, POW2: tl.constexpr):
    """One block (SIDE, SIDE) of one matrix of a stack, in the order of the scales."""
    across, down = tl.cdiv(n, SIDE), tl.cdiv(m, SIDE)
    block = tl.program_id(0)
    row = block // across % down * SIDE + tl.arange(0, SIDE)[:, None]
    column = block % across * SIDE + tl.arange(0, SIDE)[None, :]
    there = (row < m) & (column < n)
    where = (block // across // down).to(tl.int64) * m * n + row.to(tl.int64) * n + column
    x = tl.load(x_ptr + where, mask=there, other=0.0).to(tl.float32)
    largest = tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1), 0)
    scale = _scale(largest, POW2)
    tl.store(stored_ptr + where, _codes(x, scale, POW2), mask=there)
    tl.store(scale_ptr + block, scale)


@triton.jit
def _scale(largest, POW2: tl.constexpr):
    """The scale that lays `largest`, the bits of |x|, on 448: float32.

    As integers the bits order magnitudes as the numbers do, and NaN and infinity above all: the
    one maximum finds both. 0x00800000 is the smallest normal number, 0x7F800000 infinity.
    """
    quotient = tl.div_rn(largest.to(tl.float32, bitcast=True), 448.0)
    bits = tl.maximum(quotient.to(tl.int32, bitcast=True), 0x00800000)
    if POW2:
        bits = (bits + 0x007FFFFF) & 0x7F800000  # any digit behind the first carries
    scale = tl.where(largest == 0, 1.0, bits.to(tl.float32, bitcast=True))
    return tl.where(largest >= 0x7F800000, float("nan"), scale)


@triton.jit
def _codes(x, scale, POW2: tl.constexpr):
    """x / scale in E4M3, the quotient rounded as IEEE division rounds it.

    A division instruction for each value would cost as much as the memory; one reciprocal a tile
    and four fused steps give the same bits (Markstein: from a rounded reciprocal, a step with the
    exact remainder ends at the rounded quotient). Both are scaled first so that the divisor lies in
    [1, 2): no remainder then falls below float32.
    """
    bits = scale.to(tl.int32, bitcast=True)
    up = (0x7F000000 - (bits & 0x7F800000)).to(tl.float32, bitcast=True)  # 2 to minus its exponent
    up = tl.where(scale == scale, up, scale)
    if POW2:
        quotient = x * up
    else:
        divisor = scale * up
        minus_inverse = tl.div_rn(-1.0, divisor)
        minus_x = x * (up * -1.0)
        quotient = minus_x * minus_inverse
        for _ in tl.static_range(2):  # signs so that minus zero comes out as it went in
            excess = tl.fma(divisor, quotient, minus_x)
            quotient = tl.fma(excess, minus_inverse, quotient)
    clamped = tl.clamp(quotient, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return clamped.to(tl.float8e4nv)
