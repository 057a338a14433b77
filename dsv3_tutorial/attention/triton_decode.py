"""The decode kernel over the latent cache: split the tokens, attend to each part, then combine.

One new token per sequence leaves too few rows to fill a GPU, so the cached tokens of a sequence are
split over programs ("flash decoding"). A program holds a block of heads, walks its tokens once with
an online softmax, and reads a row of the cache once for all those heads, as key and as value. A
second, small kernel weighs the parts by their log-sum-exp. S queries fold into the head axis: row
s * H + h, each with its own causal limit. Rows may lie in pages, found through a page table.

Imported by attention/decode*.py alone, and only where Triton is to run.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dsv3_tutorial.attention.decode_blocks import (
    Blocks,
    choose_blocks,
    choose_splits,
    padded,
    slots_of,
    within_page,
)
from dsv3_tutorial.attention.triton_decode_kernels import attend_kernel, combine_kernel
from dsv3_tutorial.backend import BackendError

LOG2_E = 1.4426950408889634  # the hardware has exp2, not exp
INTERPRETED = (4, 232_448)  # SMs and shared memory per program that the interpreter stands in for
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class Pages(NamedTuple):
    """Where rows lie that do not follow each other: tables (B, P) integer, `size` rows a page."""

    tables: Tensor
    size: int


def latent_decode(
    q: Tensor,
    latent: Tensor,
    lengths: Tensor,
    rank: int,
    scale: float,
    pages: Pages | None = None,
) -> Tensor:
    """`attention.decode.latent_decode` on CUDA, or anywhere in Triton's interpreter.

    BF16, FP16 or float32 in, float32 accumulation. With `pages`, latent is their storage
    (slots, C + R) for all sequences. Raises BackendError where it has no kernel.
    """
    blocks, splits = plan(q, rank, room(latent, pages), pages)
    return launch(q, latent, lengths, rank, scale, blocks, splits, pages)


def plan(
    q: Tensor, rank: int, n_cached: int, pages: Pages | None, of_bytes: bool = False
) -> tuple[Blocks, int]:
    """The blocks and the number of parts for these queries over n_cached tokens at most."""
    if q.dtype not in _FLOATS:
        raise BackendError(
            f"the Triton kernel has no {q.dtype}: tensor cores would not run it. Nothing else was "
            "run in its place. Pass backend='reference', or cast to bfloat16."
        )
    batch, n_queries, n_heads, width = q.shape
    n_sms, limit = _device(q)
    n_rows, padded_width = n_queries * n_heads, padded(rank) + padded(width - rank)
    blocks = choose_blocks(n_rows, padded_width, q.element_size(), limit, of_bytes)
    if pages is not None:
        blocks = within_page(blocks, pages.size)
    programs = batch * triton.cdiv(n_rows, blocks.rows)
    steps = triton.cdiv(n_cached, blocks.tokens)
    return blocks, choose_splits(programs, steps, blocks, slots_of(blocks, n_sms, limit))


def room(rows: Tensor, pages: Pages | None) -> int:
    """Tokens that a sequence can have at most."""
    return rows.shape[1] if pages is None else pages.tables.shape[1] * pages.size


def launch(
    q: Tensor,
    latent: Tensor,
    lengths: Tensor,
    rank: int,
    scale: float,
    blocks: Blocks,
    splits: int,
    pages: Pages | None = None,
) -> Tensor:
    """Run both kernels with these blocks and this many parts; one part needs no second kernel."""
    constants = {"C": rank, "R": q.shape[-1] - rank}
    constants |= {"BLOCK_C": padded(rank), "BLOCK_R": padded(q.shape[-1] - rank)}
    return run_parts(
        attend_kernel, q, latent, [latent], lengths, scale, blocks, splits, pages, constants
    )


def run_parts(
    kernel: triton.JITFunction,
    q: Tensor,
    rows: Tensor,
    views: list[Tensor],
    lengths: Tensor,
    scale: float,
    blocks: Blocks,
    splits: int,
    pages: Pages | None,
    constants: dict[str, int],
) -> Tensor:
    """Launch an attention kernel over the parts of `rows`, which it sees as `views`; combine them.

    Strides are in numbers of `rows`, whose last axis must be adjacent. Returns (B, S, H, C).
    """
    check_adjacent(rows)
    (batch, n_queries, n_heads, _), rank = q.shape, constants["C"]
    n_rows = n_queries * n_heads
    parts = q.new_empty(
        (batch, splits, n_rows, rank), dtype=torch.float32 if splits > 1 else q.dtype
    )
    lse = q.new_empty((batch, splits, n_rows), dtype=torch.float32)
    tables = lengths if pages is None else pages.tables.contiguous()  # never read without pages
    with torch.cuda.device_of(q):
        kernel[(triton.cdiv(n_rows, blocks.rows), splits, batch)](
            q.contiguous(),
            *views,
            tables,
            lengths,
            parts,
            lse,
            scale * LOG2_E,
            n_queries,
            n_heads,
            room(rows, pages),
            splits,
            rows.stride(0) if pages is None else 0,
            rows.stride(-2),
            tables.stride(0),
            **constants,
            ROWS=blocks.rows,
            TOKENS=blocks.tokens,
            PAGE=0 if pages is None else pages.size,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
        return (parts if splits == 1 else _combine(parts, lse, q)).view(*q.shape[:3], rank)


def check_adjacent(rows: Tensor) -> None:
    """Refuses rows whose numbers do not lie side by side."""
    if rows.stride(-1) != 1:
        raise ValueError(
            f"latent has strides {rows.stride()}: the numbers of a cached row must be adjacent. "
            "A copy each step would cost what the kernel saves. Store the cache as (B, T, C + R)."
        )


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
