"""The attention kernel over cached rows of bytes: codes become BF16 on the chip, scales included.

The cache is read as 656 bytes a token instead of 1,152, and nothing wider is ever written back. The
reference multiplies scores and probabilities with the scales and leaves the codes alone; a program
of 64 rows has no registers for that many scales, so here a code meets its scale on its way to the
tensor cores, and is rounded to the queries' type once: 2^-9 of a value that E4M3 holds to 2^-4.
"""

import triton
import triton.language as tl

from dsv3_tutorial.attention.triton_decode_kernels import row_places


@triton.jit
def attend_fp8_kernel(
    q_ptr,
    codes_ptr,
    scales_ptr,
    rope_ptr,
    tables_ptr,
    lengths_ptr,
    out_ptr,
    lse_ptr,
    scale_log2,
    n_queries,
    n_heads,
    n_cached,
    n_splits,
    stride_batch,
    stride_token,
    stride_table,
    C: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PAGE: tl.constexpr,
):
    """`attend_kernel` over rows of C codes, a float32 scale for each 128 of them, R BF16 numbers.

    codes_ptr, scales_ptr, rope_ptr: the same bytes as three types; strides count bytes. TILES
    tiles of TILE columns hold C, both powers of two.
    """
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    n_rows = n_queries * n_heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < n_rows
    col, col_r = tl.arange(0, TILE * TILES), tl.arange(0, BLOCK_R)
    tile = tl.arange(0, TILES)
    col_3 = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]

    length = tl.minimum(tl.load(lengths_ptr + batch).to(tl.int32), n_cached)  # never read past it
    per_split = tl.cdiv(tl.cdiv(length, n_splits), TOKENS) * TOKENS
    start = split * per_split
    end = tl.minimum(start + per_split, length)
    limit = tl.where(row_ok, length - n_queries + row // n_heads + 1, 0)  # tokens the row may see

    q_row = q_ptr + batch * n_rows * (C + R) + row[:, None] * (C + R)
    q_c = tl.load(q_row + col[None, :], mask=row_ok[:, None] & (col < C)[None, :], other=0.0)
    q_r = tl.load(
        q_row + C + col_r[None, :], mask=row_ok[:, None] & (col_r < R)[None, :], other=0.0
    )
    N_SCALES: tl.constexpr = (C + 127) // 128

    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, TILE * TILES), tl.float32)
    for first in range(start, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        base, at = row_places(
            tl.minimum(token, end - 1),  # past the end the last row again, with probability 0
            first,
            batch,
            tables_ptr,
            stride_batch,
            stride_token,
            stride_table,
            TOKENS,
            PAGE,
        )
        codes_at = codes_ptr + base + at[:, None, None] + col_3[None, :, :]
        scale_at = scales_ptr + (base >> 2) + C // 4 + (at >> 2)[:, None] + tile[None, :]
        rope_at = (
            rope_ptr + (base >> 1) + (C + 4 * N_SCALES) // 2 + (at >> 1)[:, None] + col_r[None, :]
        )
        if C == TILE * TILES:
            codes, scales = tl.load(codes_at), tl.load(scale_at)
        else:
            codes = tl.load(codes_at, mask=(col_3 < C)[None, :, :], other=0.0)
            scales = tl.load(scale_at, mask=(tile < N_SCALES)[None, :], other=0.0)
        if R == BLOCK_R:
            r = tl.load(rope_at).to(q_r.dtype)
        else:
            r = tl.load(rope_at, mask=(col_r < R)[None, :], other=0.0).to(q_r.dtype)
        c = codes.to(tl.float32) * scales[:, :, None]
        c = tl.reshape(c.to(q_c.dtype), (TOKENS, TILE * TILES))

        scores = tl.dot(q_c, tl.trans(c), input_precision="ieee")
        scores = tl.dot(q_r, tl.trans(r), scores, input_precision="ieee") * scale_log2
        scores = tl.where(token[None, :] < limit[:, None], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        # a row that has seen nothing yet keeps -inf: shift by 0 there, or -inf minus -inf is NaN
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)
        p = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(best - shift)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(c.dtype), c, acc * shrink[:, None], input_precision="ieee")
        best = new_best

    part = (batch * n_splits + split) * n_rows
    filled = total > 0.0
    total = tl.where(filled, total, 1.0)
    lse = tl.where(filled, best + tl.log2(total), float("-inf"))
    tl.store(lse_ptr + part + row, lse, mask=row_ok)
    acc *= (1.0 / total)[:, None]
    place = out_ptr + part * C + (row[:, None] * C + col[None, :])
    out_ok = row_ok[:, None] & (col < C)[None, :]
    tl.store(place, acc.to(out_ptr.dtype.element_ty), mask=out_ok)
