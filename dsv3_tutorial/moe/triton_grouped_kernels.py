"""The two kernels behind grouped products, and how they are launched with given blocks.

One program takes one tile of a result. Which expert's it is, it finds on the device, from where the
experts' rows end: the grid is the largest that any counts could need, so the host never waits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_tutorial.moe.grouped_blocks import Blocks, most_tiles


def launch_rows(a: Tensor, weight: Tensor, ends: Tensor, blocks: Blocks) -> Tensor:
    """a (M, c) times the transpose of each group's (n, c), with these blocks: (M, n)."""
    a, weight, ends = _adjacent(a), _adjacent(weight), ends.contiguous()
    (n_rows, n_sum), (n_groups, n_columns, _) = a.shape, weight.shape
    out = a.new_empty((n_rows, n_columns))
    tiles = most_tiles(n_rows, n_groups, blocks.rows)
    programs = tiles * triton.cdiv(n_columns, blocks.columns)
    if programs == 0:
        return out
    with torch.cuda.device_of(a):
        rows_kernel[(programs,)](
            a,
            weight,
            ends,
            out,
            tiles,
            n_groups,
            n_columns,
            n_sum,
            a.stride(0),
            *weight.stride(),
            GROUPS=triton.next_power_of_2(n_groups),
            ROWS=blocks.rows,
            COLUMNS=blocks.columns,
            STEP=blocks.step,
            EVEN=n_sum % blocks.step == 0,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    return out


def launch_weights(a: Tensor, b: Tensor, ends: Tensor, blocks: Blocks) -> Tensor:
    """a (M, n) and b (M, k): the sum over each group's rows of a^T b, (E, n, k)."""
    a, b, ends = a.contiguous(), b.contiguous(), ends.contiguous()
    n_groups, n_rows, n_columns = ends.shape[0], a.shape[1], b.shape[1]
    out = a.new_empty((n_groups, n_rows, n_columns))
    tiles = triton.cdiv(n_rows, blocks.rows) * triton.cdiv(n_columns, blocks.columns)
    with torch.cuda.device_of(a):
        weights_kernel[(tiles, n_groups)](
            a,
            b,
            ends,
            out,
            n_rows,
            n_columns,
            ROWS=blocks.rows,
            COLUMNS=blocks.columns,
            STEP=blocks.step,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    return out


def _adjacent(x: Tensor) -> Tensor:
    """x itself where a row's, or a column's, numbers lie side by side; else a copy where they do.

    A transposed matrix is read where it lies; an expanded one (a sum's gradient) is not.
    """
    rows_lie = x.stride(-1) == 1
    columns_lie = x.ndim == 3 and x.stride(-2) == 1
    return x if rows_lie or columns_lie else x.contiguous()


@triton.jit
def rows_kernel(
    a_ptr,
    weight_ptr,
    ends_ptr,
    out_ptr,
    n_tiles,
    n_groups,
    n_columns,
    n_sum,
    stride_a,
    stride_group,
    stride_column,
    stride_sum,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    EVEN: tl.constexpr,
):
    """One tile (ROWS, COLUMNS) of the result: rows of one group times that group's matrix.

    Eight row tiles stand beside each other for every column tile, so that both of a product's
    sides are met again in L2. A tile past the last group's ends at once.
    """
    columns_of_tiles = tl.cdiv(n_columns, COLUMNS)
    band = tl.program_id(0) // (8 * columns_of_tiles)
    within = tl.program_id(0) % (8 * columns_of_tiles)
    height = tl.minimum(n_tiles - band * 8, 8)
    tile = band * 8 + within % height
    group, first, end = _find(tile, ends_ptr, n_groups, GROUPS, ROWS)
    if first >= end:
        return

    row = tl.arange(0, ROWS)
    column = within // height * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.arange(0, STEP)
    row_ok, column_ok = row < end - first, column < n_columns
    a_place = a_ptr + first.to(tl.int64) * stride_a + row[:, None] * stride_a + place[None, :]
    w_place = weight_ptr + group.to(tl.int64) * stride_group
    w_place += place[:, None] * stride_sum + column[None, :] * stride_column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, n_sum, STEP):
        a_ok, w_ok = row_ok[:, None], column_ok[None, :]
        if not EVEN:
            a_ok = a_ok & (place < n_sum - start)[None, :]
            w_ok = w_ok & (place < n_sum - start)[:, None]
        a = tl.load(a_place, mask=a_ok, other=0.0)
        w = tl.load(w_place, mask=w_ok, other=0.0)
        total = tl.dot(a, w, total, input_precision="ieee")
        a_place += STEP
        w_place += STEP * stride_sum
    out_place = out_ptr + first.to(tl.int64) * n_columns + row[:, None] * n_columns
    out_ok = row_ok[:, None] & column_ok[None, :]
    tl.store(out_place + column[None, :], total.to(out_ptr.dtype.element_ty), mask=out_ok)


@triton.jit
def _find(tile, ends_ptr, n_groups, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """The group that a tile belongs to, its first row, and where that group ends; 0 if it has none.

    Groups have whole tiles of their own, so at most one group's range of tiles holds this one.
    """
    group = tl.arange(0, GROUPS)
    there = group < n_groups
    end = tl.load(ends_ptr + group, mask=there, other=0)
    start = tl.load(ends_ptr + group - 1, mask=there & (group > 0), other=0)
    tiles = tl.where(there, (end - start + ROWS - 1) // ROWS, 0)
    up_to = tl.cumsum(tiles, 0)
    mine = (up_to - tiles <= tile) & (tile < up_to)
    first = tl.sum(tl.where(mine, start + (tile - up_to + tiles) * ROWS, 0), 0)
    return tl.sum(tl.where(mine, group, 0), 0), first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def weights_kernel(
    a_ptr,
    b_ptr,
    ends_ptr,
    out_ptr,
    n_rows,
    n_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile (ROWS, COLUMNS) of one group's a^T b, summed over that group's rows.

    A group without rows writes zeros: its gradient is zero, and nobody else would write it.
    """
    columns_of_tiles = tl.cdiv(n_columns, COLUMNS)
    group = tl.program_id(1)
    row = tl.program_id(0) // columns_of_tiles * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % columns_of_tiles * COLUMNS + tl.arange(0, COLUMNS)
    row_ok, column_ok = row < n_rows, column < n_columns
    first = tl.load(ends_ptr + group - 1, mask=group > 0, other=0)
    length = tl.load(ends_ptr + group) - first

    place = tl.arange(0, STEP)
    a_place = a_ptr + first.to(tl.int64) * n_rows + place[None, :] * n_rows + row[:, None]
    b_place = b_ptr + first.to(tl.int64) * n_columns + place[:, None] * n_columns + column[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, length, STEP):
        there = place < length - start
        a = tl.load(a_place, mask=row_ok[:, None] & there[None, :], other=0.0)
        b = tl.load(b_place, mask=there[:, None] & column_ok[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        a_place += STEP * n_rows
        b_place += STEP * n_columns
    out_place = out_ptr + group.to(tl.int64) * n_rows * n_columns
    out_place += row[:, None].to(tl.int64) * n_columns + column[None, :]
    out_ok = row_ok[:, None] & column_ok[None, :]
    tl.store(out_place, total.to(out_ptr.dtype.element_ty), mask=out_ok)
