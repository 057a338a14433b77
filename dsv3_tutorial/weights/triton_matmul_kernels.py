"""The kernel behind products with quantised weights, and how it is launched with given blocks.

With few tokens, reading the weight is the cost, so its codes cross the memory as they are stored
and become numbers in registers. Codes of all formats are exact in BF16 and FP16; their scale is
not, so it multiplies a sum: every 128 products where it changes along k, else once at the end. The
weight is the left side: a tensor core takes 64 rows of it, and as few as 16 tokens beside them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_tutorial.weights.matmul_blocks import GROUP, Blocks


def launch(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    fmt: str,
    shape: tuple[int, int],
    blocks: Blocks,
    splits: int = 1,
) -> Tensor:
    """x (M, k) times the transpose of the weight (m, k), with these blocks and parts of k: (M, m).

    More parts than one are summed in float32 by a second kernel, always in the same order.
    """
    x, codes, scale = _rows_lie(x), _rows_lie(codes), scale.contiguous()
    (m, k), n_tokens = shape, x.shape[0]
    out = x.new_empty((splits, n_tokens, m), dtype=torch.float32 if splits > 1 else x.dtype)
    grouped = scale.ndim == 2
    programs = triton.cdiv(m, blocks.rows) * triton.cdiv(n_tokens, blocks.tokens)
    with torch.cuda.device_of(x):
        matmul_kernel[(programs, splits)](
            x,
            codes,
            scale,
            out,
            n_tokens,
            m,
            k,
            x.stride(0),
            codes.stride(0),
            scale.stride(0) if scale.ndim else 0,
            ROWS=blocks.rows,
            TOKENS=blocks.tokens,
            STEP=blocks.step,
            GROUP=GROUP,
            SHARE=GROUP if fmt == "fp8" else 1,
            GROUPED=grouped,
            PACKED=fmt == "int4",
            EVEN=k % blocks.step == 0,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    return out[0] if splits == 1 else out.sum(0).to(x.dtype)


def _rows_lie(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def matmul_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    out_ptr,
    n_tokens,
    n_rows,
    n_sum,
    stride_x,
    stride_codes,
    stride_scale,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    SHARE: tl.constexpr,
    GROUPED: tl.constexpr,
    PACKED: tl.constexpr,
    EVEN: tl.constexpr,
):
    """ROWS outputs of TOKENS tokens, over one part of k, which is a whole number of steps.

    GROUPED: scales (rows / SHARE, k / GROUP), STEP divides GROUP; else one a row, or one for all.
    PACKED: two codes of four bits in a byte, the even column in the low half. Writes (parts,
    tokens, rows). Past an edge the last row or token is read again, and not stored.
    """
    tiles_of_tokens = tl.cdiv(n_tokens, TOKENS)
    first_row = tl.program_id(0) // tiles_of_tokens * ROWS
    first_token = tl.program_id(0) % tiles_of_tokens * TOKENS
    steps = tl.cdiv(n_sum, STEP)
    each = tl.cdiv(steps, tl.num_programs(1))
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, steps)

    row = tl.minimum(first_row + tl.arange(0, ROWS), n_rows - 1)
    token = tl.minimum(first_token + tl.arange(0, TOKENS), n_tokens - 1)
    WIDTH: tl.constexpr = STEP // 2 if PACKED else STEP  # bytes of a row in one step
    place, byte = tl.arange(0, STEP), tl.arange(0, WIDTH)
    x_place = x_ptr + token.to(tl.int64)[:, None] * stride_x + place[None, :]
    codes_place = codes_ptr + row.to(tl.int64)[:, None] * stride_codes + byte[None, :]
    scale_place = scale_ptr + row // SHARE * stride_scale

    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in range(begin, end):
        start = step * STEP
        if EVEN:
            x = tl.load(x_place + start)
            codes = tl.load(codes_place + step * WIDTH)
        else:
            left = n_sum - start
            bytes_left = (left + 1) // 2 if PACKED else left
            x = tl.load(x_place + start, mask=(place < left)[None, :], other=0.0)
            codes = tl.load(
                codes_place + step * WIDTH, mask=(byte < bytes_left)[None, :], other=0.0
            )
        if PACKED:
            even, odd = tl.split(tl.reshape(x, (TOKENS, WIDTH, 2)))
            low = _numbers((codes & 15).to(tl.int8) - 8, x)
            high = _numbers((codes >> 4).to(tl.int8) - 8, x)
            part = tl.dot(low, tl.trans(even), input_precision="ieee")
            part = tl.dot(high, tl.trans(odd), part, input_precision="ieee")
            total += part * tl.load(scale_place + start // GROUP)[:, None]
        elif GROUPED:
            part = tl.dot(_numbers(codes, x), tl.trans(x), input_precision="ieee")
            total += part * tl.load(scale_place + start // GROUP)[:, None]
        else:
            total = tl.dot(_numbers(codes, x), tl.trans(x), total, input_precision="ieee")
    if not GROUPED:
        total *= tl.load(scale_place)[:, None]

    row = first_row + tl.arange(0, ROWS)
    token = first_token + tl.arange(0, TOKENS)
    out_ptr += tl.program_id(1).to(tl.int64) * n_tokens * n_rows
    out_place = out_ptr + token.to(tl.int64)[None, :] * n_rows + row[:, None]
    there = (row < n_rows)[:, None] & (token < n_tokens)[None, :]
    tl.store(out_place, total.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def _numbers(codes, x):
    """Codes in the type of x, exactly; by way of float32, which converts alike everywhere."""
    return codes.to(tl.float32).to(x.dtype)
