"""The kernel behind scaled FP8 products, and how it is launched with given blocks.

A tensor core adds FP8 products in about 14 bits, and a scale holds for 128 of them: so every 128
products the sum leaves the tensor core, meets its two scales, and is added to a float32 sum in
registers. That promotion takes as many instructions as the copies; what hides it is a second
program on the same SM, and what leaves room for that one are two narrow products in place of a wide
one: their unscaled sums need half the registers (128 a thread instead of 157 for 128 x 128).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dsv3_tutorial.fp8.gemm_blocks import Blocks, tiles_of

STEP = tl.constexpr(128)  # products between promotions, and to a scale


def launch(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype,
    blocks: Blocks,
    splits: int = 1,
) -> Tensor:
    """a (m, k) times the transpose of b (n, k), with these blocks and parts of k: (m, n).

    More parts than one are summed in float32 by a second kernel, always in the same order.
    """
    (m, k), n = a.shape, b.shape[0]
    out = a.new_empty((splits, m, n), dtype=torch.float32 if splits > 1 else out_dtype)
    sides = [(a, a_scale, out.stride(1)), (b, b_scale, out.stride(2))]
    turn = -1 if blocks.swapped else 1
    (left, left_scale, stride_row), (right, right_scale, stride_column) = sides[::turn]
    *left_strides, left_share = _reading(left_scale, left)
    *right_strides, right_share = _reading(right_scale, right)
    _check_parts(blocks, right_share)
    with torch.cuda.device_of(a):
        product_kernel[(tiles_of(blocks, m, n), splits)](
            _descriptor(left, blocks.rows) if blocks.tma else left,
            _descriptor(right, blocks.columns) if blocks.tma else right,
            left_scale,
            right_scale,
            out,
            left.shape[0],
            right.shape[0],
            k,
            left.stride(0),
            right.stride(0),
            *left_strides,
            *right_strides,
            out.stride(0),
            stride_row,
            stride_column,
            ROWS=blocks.rows,
            COLUMNS=blocks.columns,
            PARTS=blocks.parts,
            LEFT_SHARE=left_share,
            RIGHT_SHARE=right_share,
            SPLIT=splits > 1,
            TMA=blocks.tma,
            EVEN=k % STEP.value == 0,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    return out[0] if splits == 1 else out.sum(0).to(out_dtype)


def _check_parts(blocks: Blocks, right_share: int) -> None:
    if blocks.parts == 2 and right_share == 1:
        raise ValueError("blocks of two parts read one scale for both: the columns must share one")


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, STEP.value])


def _reading(scale: Tensor, x: Tensor) -> tuple[int, int, int]:
    """The scales' strides along x's rows and along k, and how many rows share one: 1 or 128.

    One for a row or for the whole matrix is the same number at every step: a stride of 0.
    """
    if scale.numel() == 1:
        return 0, 0, STEP.value
    share = 1 if scale.shape[0] == x.shape[0] else STEP.value
    return scale.stride(0), scale.stride(1) if scale.shape[1] > 1 else 0, share


@triton.jit
def product_kernel(
    left,
    right,
    left_scale_ptr,
    right_scale_ptr,
    out_ptr,
    n_rows,
    n_columns,
    n_sum,
    stride_left,
    stride_right,
    stride_left_row,
    stride_left_k,
    stride_right_row,
    stride_right_k,
    stride_split,
    stride_row,
    stride_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    LEFT_SHARE: tl.constexpr,
    RIGHT_SHARE: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    EVEN: tl.constexpr,
):
    """One tile (ROWS, COLUMNS * PARTS) of the result, over one part of k.

    left, right: descriptors, whose copies fill in zeros past the edge, or pointers (of one part).
    LEFT_SHARE, RIGHT_SHARE: the rows of an operand that share a scale, 1 or 128. Eight tiles stand
    beside each other for every column of tiles, so that both sides are met again in L2. The scales
    of a step are loaded during the one before: they wait for memory, the product must not.
    """
    height_of_tiles = tl.cdiv(n_rows, ROWS)
    width_of_tiles = tl.cdiv(n_columns, COLUMNS * PARTS)
    band = tl.program_id(0) // (8 * width_of_tiles)
    within = tl.program_id(0) % (8 * width_of_tiles)
    height = tl.minimum(height_of_tiles - band * 8, 8)
    first_row = (band * 8 + within % height) * ROWS
    first_column = within // height * (COLUMNS * PARTS)

    last = tl.cdiv(n_sum, STEP) - 1
    begin, end = 0, last + 1
    if SPLIT:
        each = tl.cdiv(last + 1, tl.num_programs(1))
        begin = tl.program_id(1) * each
        end = tl.minimum(begin + each, last + 1)

    row = tl.minimum(first_row + tl.arange(0, ROWS), n_rows - 1)  # past the edge: not stored
    column = tl.minimum(first_column + tl.arange(0, COLUMNS), n_columns - 1)
    left_scale_at = left_scale_ptr + row // LEFT_SHARE * stride_left_row
    if RIGHT_SHARE == 1:
        right_scale_at = right_scale_ptr + column * stride_right_row
    else:  # one number for all columns of this tile
        right_scale_at = right_scale_ptr + first_column // RIGHT_SHARE * stride_right_row
    place = tl.arange(0, STEP)
    left_place, right_place = left, right
    if not TMA:
        left_place += row.to(tl.int64)[:, None] * stride_left + place[None, :]
        right_place += column.to(tl.int64)[None, :] * stride_right + place[:, None]

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    total_2 = total
    left_scale = tl.load(left_scale_at + tl.minimum(begin, last) * stride_left_k)
    right_scale = tl.load(right_scale_at + tl.minimum(begin, last) * stride_right_k)
    for step in range(begin, end):
        start = step * STEP
        after = tl.minimum(step + 1, last)
        next_left = tl.load(left_scale_at + after * stride_left_k)
        if RIGHT_SHARE == 1:  # as many as columns: no registers to hold two sets
            right_scale = tl.load(right_scale_at + step * stride_right_k)
        else:
            next_right = tl.load(right_scale_at + after * stride_right_k)
        if TMA:
            a = left.load([first_row, start])
            b = right.load([first_column, start]).T
        elif EVEN:
            a = tl.load(left_place + start)
            b = tl.load(right_place + start)
        else:
            there = place < n_sum - start
            a = tl.load(left_place + start, mask=there[None, :], other=0.0)
            b = tl.load(right_place + start, mask=there[:, None], other=0.0)
        if RIGHT_SHARE == 1:
            total += tl.dot(a, b) * left_scale[:, None] * right_scale[None, :]
        else:
            total += tl.dot(a, b) * (left_scale * right_scale)[:, None]
        if PARTS == 2:
            b = right.load([first_column + COLUMNS, start]).T
            total_2 += tl.dot(a, b) * (left_scale * right_scale)[:, None]
        left_scale = next_left
        if RIGHT_SHARE != 1:
            right_scale = next_right

    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    if SPLIT:
        out_ptr += tl.program_id(1).to(tl.int64) * stride_split
    _store(out_ptr, total, row, column, n_rows, n_columns, stride_row, stride_column)
    if PARTS == 2:
        column += COLUMNS
        _store(out_ptr, total_2, row, column, n_rows, n_columns, stride_row, stride_column)


@triton.jit
def _store(out_ptr, total, row, column, n_rows, n_columns, stride_row, stride_column):
    place = out_ptr + row.to(tl.int64)[:, None] * stride_row
    place += column.to(tl.int64)[None, :] * stride_column
    there = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=there)
