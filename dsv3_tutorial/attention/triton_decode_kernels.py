"""The kernels behind decoding over the latent cache: attend to a part of the tokens, combine parts.

Imported by the other triton_decode modules alone, and only where Triton is to run.
"""

import triton
import triton.language as tl


@triton.jit
def attend_kernel(
    q_ptr,
    latent_ptr,
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
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PAGE: tl.constexpr,
):
    """One block of rows of one sequence over one part of its cached tokens.

    Writes the part's normalized result (B, n_splits, S * H, C) and its log2-sum-exp2, -inf where a
    row saw no token. Head blocks are the fastest grid axis: they meet the same rows in L2.
    """
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    n_rows = n_queries * n_heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < n_rows
    col_c, col_r = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)

    length = tl.minimum(tl.load(lengths_ptr + batch).to(tl.int32), n_cached)  # never read past it
    per_split = tl.cdiv(tl.cdiv(length, n_splits), TOKENS) * TOKENS
    start = split * per_split
    end = tl.minimum(start + per_split, length)
    limit = tl.where(row_ok, length - n_queries + row // n_heads + 1, 0)  # tokens the row may see

    q_row = q_ptr + batch * n_rows * (C + R) + row[:, None] * (C + R)
    q_c = tl.load(q_row + col_c[None, :], mask=row_ok[:, None] & (col_c < C)[None, :], other=0.0)
    q_r = tl.load(
        q_row + C + col_r[None, :], mask=row_ok[:, None] & (col_r < R)[None, :], other=0.0
    )

    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for first in range(start, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        there = (token < end)[:, None]
        base, at = row_places(
            tl.minimum(token, end - 1),
            first,
            batch,
            tables_ptr,
            stride_batch,
            stride_token,
            stride_table,
            TOKENS,
            PAGE,
        )
        place = latent_ptr + base + at[:, None]
        c = tl.load(place + col_c[None, :], mask=there & (col_c < C)[None, :], other=0.0).to(
            q_c.dtype
        )
        r = tl.load(place + C + col_r[None, :], mask=there & (col_r < R)[None, :], other=0.0).to(
            q_c.dtype
        )
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
    place = out_ptr + part * C + (row[:, None] * C + col_c[None, :])
    out_ok = row_ok[:, None] & (col_c < C)[None, :]
    tl.store(place, acc.to(out_ptr.dtype.element_ty), mask=out_ok)


@triton.jit
def row_places(
    token,
    first,
    batch,
    tables_ptr,
    stride_batch,
    stride_token,
    stride_table,
    TOKENS: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Where these tokens' cached rows begin: a start for all, and how far each lies behind it.

    PAGE = 0: a sequence's rows follow each other. Else its page table says where each PAGE of them
    lie. `first`, the first token, is a multiple of TOKENS: where a page holds them all, one number
    is looked up, and as in a sequence without pages 32 bits hold the distances.
    """
    table = tables_ptr + batch * stride_table
    if PAGE == 0:
        base, at = batch * stride_batch, token * stride_token
    elif PAGE % TOKENS == 0:
        page = tl.load(table + first // PAGE).to(tl.int64)
        base, at = page * PAGE * stride_token, token % PAGE * stride_token
    else:
        page = tl.load(table + token // PAGE).to(tl.int64)
        base, at = batch * 0, (page * PAGE + token % PAGE) * stride_token
    return base, at


@triton.jit
def combine_kernel(
    parts_ptr,
    lse_ptr,
    out_ptr,
    n_splits,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some columns of one row: its parts, each weighed by its share of the softmax's denominator.

    A part that saw no token has weight 0, and is not read.
    """
    row, n_rows = tl.program_id(0), tl.num_programs(0)
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    batch = tl.program_id(2).to(tl.int64)
    split = tl.arange(0, SPLITS)
    part = (batch * n_splits + split) * n_rows + row
    lse = tl.load(lse_ptr + part, mask=split < n_splits, other=float("-inf"))
    filled = lse > float("-inf")
    best = tl.max(tl.where(filled, lse, -1e30), 0)  # finite where no part saw a token
    weight = tl.where(filled, tl.exp2(lse - best), 0.0)
    total = tl.sum(weight, 0)
    place = parts_ptr + part[:, None] * C + col[None, :]
    value = tl.load(place, mask=filled[:, None] & (col < C)[None, :], other=0.0)
    result = tl.sum(value * weight[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    place = out_ptr + (batch * n_rows + row) * C + col
    tl.store(place, result.to(out_ptr.dtype.element_ty), mask=col < C)
