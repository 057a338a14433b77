"""The decode kernel over the latent cache: split the tokens, attend to each part, then combine.

One new token per sequence leaves too few rows to fill a GPU, so the cached tokens of a sequence are
split over programs ("flash decoding"). A program holds a block of heads, walks its tokens once with
an online softmax, and reads a row of the cache once for all those heads, as key and as value. A
second, small kernel weighs the parts by their log-sum-exp. S queries fold into the head axis: row
s * H + h, each with its own causal limit.

Imported by attention/decode.py alone, and only where Triton is to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_tutorial.attention.decode_blocks import (
    Blocks,
    choose_blocks,
    choose_splits,
    padded,
    slots_of,
)
from dsv3_tutorial.backend import BackendError

LOG2_E = 1.4426950408889634  # the hardware has exp2, not exp
INTERPRETED = (4, 232_448)  # SMs and shared memory per program that the interpreter stands in for


def latent_decode(q: Tensor, latent: Tensor, lengths: Tensor, rank: int, scale: float) -> Tensor:
    """`attention.decode.latent_decode` on CUDA, or anywhere in Triton's interpreter.

    BF16, FP16 or float32 in, float32 accumulation. Raises BackendError where it has no kernel.
    """
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise BackendError(
            f"the Triton kernel has no {q.dtype}: tensor cores would not run it. Nothing else was "
            "run in its place. Pass backend='reference', or cast to bfloat16."
        )
    batch, n_queries, n_heads, width = q.shape
    n_sms, limit = _device(q)
    n_rows, padded_width = n_queries * n_heads, padded(rank) + padded(width - rank)
    blocks = choose_blocks(n_rows, padded_width, q.element_size(), limit)
    programs = batch * triton.cdiv(n_rows, blocks.rows)
    steps = triton.cdiv(latent.shape[1], blocks.tokens)
    splits = choose_splits(programs, steps, blocks, slots_of(blocks, n_sms, limit))
    return launch(q, latent, lengths, rank, scale, blocks, splits)


def launch(
    q: Tensor,
    latent: Tensor,
    lengths: Tensor,
    rank: int,
    scale: float,
    blocks: Blocks,
    splits: int,
) -> Tensor:
    """Run both kernels with these blocks and this many parts; one part needs no second kernel."""
    if latent.stride(-1) != 1:
        raise ValueError(
            f"latent has strides {latent.stride()}: the numbers of a cached row must be adjacent. "
            "A copy each step would cost what the kernel saves. Store the cache as (B, T, C + R)."
        )
    batch, n_queries, n_heads, width = q.shape
    n_rows = n_queries * n_heads
    parts = q.new_empty(
        (batch, splits, n_rows, rank), dtype=torch.float32 if splits > 1 else q.dtype
    )
    lse = q.new_empty((batch, splits, n_rows), dtype=torch.float32)
    with torch.cuda.device_of(q):
        attend_kernel[(triton.cdiv(n_rows, blocks.rows), splits, batch)](
            q.contiguous(),
            latent,
            lengths,
            parts,
            lse,
            scale * LOG2_E,
            n_queries,
            n_heads,
            latent.shape[1],
            splits,
            latent.stride(0),
            latent.stride(1),
            C=rank,
            R=width - rank,
            BLOCK_C=padded(rank),
            BLOCK_R=padded(width - rank),
            ROWS=blocks.rows,
            TOKENS=blocks.tokens,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
        return (parts if splits == 1 else _combine(parts, lse, q)).view(*q.shape[:3], rank)


def _combine(parts: Tensor, lse: Tensor, q: Tensor) -> Tensor:
    """(B, splits, S * H, C) float32 parts to (B, S * H, C) in q's dtype."""
    batch, splits, n_rows, rank = parts.shape
    out = q.new_empty((batch, n_rows, rank))
    block = triton.next_power_of_2(splits)
    columns = max(16, min(128, 8192 // block))  # 8192 numbers a program: 64 registers a thread
    combine_kernel[(n_rows, triton.cdiv(rank, columns), batch)](
        parts, lse, out, splits, C=rank, SPLITS=block, COLUMNS=columns, num_warps=4
    )
    return out


def _device(q: Tensor) -> tuple[int, int]:
    """SMs, and bytes of shared memory one program may take."""
    if not q.is_cuda:
        return INTERPRETED
    properties = torch.cuda.get_device_properties(q.device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


@triton.jit
def attend_kernel(
    q_ptr,
    latent_ptr,
    lengths_ptr,
    out_ptr,
    lse_ptr,
    scale_log2,
    n_queries,
    n_heads,
    n_cached,
    n_splits,
    stride_latent_batch,
    stride_latent_token,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
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
    latent_row = latent_ptr + batch * stride_latent_batch

    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for first in range(start, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        there = (token < end)[:, None]
        place = latent_row + token[:, None] * stride_latent_token
        c = tl.load(place + col_c[None, :], mask=there & (col_c < C)[None, :], other=0.0)
        r = tl.load(place + C + col_r[None, :], mask=there & (col_r < R)[None, :], other=0.0)
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
