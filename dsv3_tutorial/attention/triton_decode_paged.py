"""The decode kernels where a page table says where rows lie: the same kernels, one look-up more.

A step of the loop reads tokens of one page where a page holds 16 or more, so that its number is
looked up once a step and not once a token. Nothing is gathered: a page's rows are read in place.

Imported by attention/decode_paged.py alone, and only where Triton is to run.
"""

import torch
from torch import Tensor

from dsv3_tutorial.attention.triton_decode import Pages, latent_decode
from dsv3_tutorial.attention.triton_decode_fp8 import fp8_latent_decode


def latent_decode_paged(
    q: Tensor,
    storage: Tensor,
    tables: Tensor,
    page_size: int,
    lengths: Tensor,
    rank: int,
    scale: float,
) -> Tensor:
    """`attention.decode_paged.latent_decode_paged` on CUDA, or anywhere in Triton's interpreter.

    q (B, S, H, C + R), storage (slots, C + R), tables (B, P) int32, lengths (B,) -> (B, S, H, C) in
    q's dtype. Computes in the wider type of q and storage: a narrower row is widened as it is read.
    A length over P * page_size reads no further, a page that does not exist is not caught.
    """
    wide = torch.promote_types(q.dtype, storage.dtype)
    pages = Pages(tables, page_size)
    return latent_decode(q.to(wide), storage, lengths, rank, scale, pages).to(q.dtype)


def fp8_latent_decode_paged(
    q: Tensor,
    storage: Tensor,
    tables: Tensor,
    page_size: int,
    lengths: Tensor,
    rank: int,
    scale: float,
) -> Tensor:
    """`attention.decode_paged.fp8_latent_decode_paged`, likewise: storage uint8 (slots, bytes)."""
    return fp8_latent_decode(q, storage, lengths, rank, scale, Pages(tables, page_size))
