"""Decoding over rows of bytes on a GPU: 656 of them a token are read, and nothing wider is stored.

`attention.decode_fp8` on CUDA. Imported by that and by triton_decode_paged alone.
"""

import torch
from torch import Tensor

from dsv3_tutorial.attention.decode_blocks import Blocks, padded
from dsv3_tutorial.attention.triton_decode import (
    Pages,
    check_adjacent,
    plan,
    room,
    run_parts,
)
from dsv3_tutorial.attention.triton_decode_fp8_kernels import attend_fp8_kernel
from dsv3_tutorial.backend import BackendError
from dsv3_tutorial.fp8.latent import latent_bytes
from dsv3_tutorial.fp8.triton_quant import need_fp8

TILE = 128  # codes to a scale


def fp8_latent_decode(
    q: Tensor,
    rows: Tensor,
    lengths: Tensor,
    rank: int,
    scale: float,
    pages: Pages | None = None,
) -> Tensor:
    """`attention.decode_fp8.fp8_latent_decode` on CUDA, or anywhere in Triton's interpreter.

    BF16, FP16 or float32 queries, float32 accumulation; a cached value is rounded to q's dtype
    once. float32 spills registers: correct, not fast. With `pages`, rows is their storage
    (slots, bytes). Raises BackendError where it has no kernel.
    """
    need_fp8(q)
    blocks, splits = plan(q, rank, room(rows, pages), pages, of_bytes=True)
    return launch(q, rows, lengths, rank, scale, blocks, splits, pages)


def launch(
    q: Tensor,
    rows: Tensor,
    lengths: Tensor,
    rank: int,
    scale: float,
    blocks: Blocks,
    splits: int,
    pages: Pages | None = None,
) -> Tensor:
    """Run both kernels with these blocks and this many parts; one part needs no second kernel."""
    rope = q.shape[-1] - rank
    check_adjacent(rows)
    _check_bytes(rows, rank, rope)
    tile = min(TILE, padded(rank))
    constants = {"C": rank, "R": rope, "TILE": tile, "TILES": padded(rank) // tile}
    constants["BLOCK_R"] = padded(rope)
    views = [rows.view(kind) for kind in (torch.float8_e4m3fn, torch.float32, torch.bfloat16)]
    return run_parts(
        attend_fp8_kernel, q, rows, views, lengths, scale, blocks, splits, pages, constants
    )


def _check_bytes(rows: Tensor, rank: int, rope: int) -> None:
    width = latent_bytes(rank, rope)
    apart = [rank, width, rows.storage_offset(), *rows.stride()[:-1]]
    if rows.dtype != torch.uint8 or rows.shape[-1] != width or any(n % 4 for n in apart):
        raise BackendError(
            f"the Triton kernel reads scales of four bytes, and in {rows.dtype} "
            f"{tuple(rows.shape)}, strides {rows.stride()} and rank {rank}, they do not begin at "
            "multiples of four. Nothing else was run in its place. Take a rank that is a "
            "multiple of 4 and an even RoPE key, or pass backend='reference'."
        )
