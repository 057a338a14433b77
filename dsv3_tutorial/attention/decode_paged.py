"""Decoding over a latent cache in pages: the rows of a sequence lie wherever its page table says.

The arithmetic is that of `attention.decode` (and `attention.decode_fp8`, where rows are bytes), and
so are the results, to the last bit on a CPU: only where a row is found differs. Letters: B batch,
S queries, H heads, C latent, R rope head dim, P pages of the longest table.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dsv3_tutorial.attention.decode import latent_decode_reference
from dsv3_tutorial.attention.decode_fp8 import fp8_latent_decode_reference
from dsv3_tutorial.backend import BackendError, pick
from dsv3_tutorial.fp8.quant import pick_fp8


def slots(tables: Tensor, positions: Tensor, page_size: int) -> Tensor:
    """Where in the storage each token of each sequence lies: a page table's one line of work.

    tables (B, P) integer, the pages of each sequence in order; positions (B, S) integer, counted
    from the sequence's first token -> (B, S) int64, rows of a storage (pages * page_size, ...).
    """
    page = tables.long().gather(1, positions.long() // page_size)  # (B, S)
    return page * page_size + positions % page_size


def latent_decode_paged(
    q: Tensor,
    storage: Tensor,
    tables: Tensor,
    page_size: int,
    lengths: Tensor,
    rank: int,
    scale: float,
    backend: str | None = None,
) -> Tensor:
    """`attention.decode.latent_decode`, the rows found through a page table.

    q (B, S, H, C + R), storage (pages * page_size, C + R), tables (B, P) int32, lengths (B,) int32
    or int64: cached tokens of each sequence, the S queries included -> (B, S, H, C) in q's dtype.
    A storage in another dtype is widened row by row. On a CPU, pages that follow each other are
    read in place and others copied, a page at a time.
    Raises ValueError for what does not fit, BackendError for a forced backend that cannot run.
    """
    _check(q, storage, tables, page_size, lengths)
    if _reference(q, backend):
        rows = PagedRows(storage, tables, page_size)
        return latent_decode_reference(q, rows, lengths, rank, scale)
    from dsv3_tutorial.attention import triton_decode_paged as kernels  # Triton: not before

    return kernels.latent_decode_paged(q, storage, tables, page_size, lengths, rank, scale)


def fp8_latent_decode_paged(
    q: Tensor,
    storage: Tensor,
    tables: Tensor,
    page_size: int,
    lengths: Tensor,
    rank: int,
    scale: float,
    backend: str | None = None,
    rope_fp8: bool = False,
) -> Tensor:
    """`attention.decode_fp8.fp8_latent_decode`, the rows of bytes found through a page table.

    storage uint8 (pages * page_size, bytes); the rest as `latent_decode_paged`. `rope_fp8` rows
    have no kernel: the reference runs, on any device.
    """
    _check(q, storage, tables, page_size, lengths)
    if _reference(q, "reference" if rope_fp8 and backend is None else backend, pick_fp8):
        rows = PagedRows(storage, tables, page_size)
        return fp8_latent_decode_reference(q, rows, lengths, rank, scale, rope_fp8)
    if rope_fp8:
        raise BackendError(
            "backend='triton' has no kernel for a RoPE key in FP8, which is an ablation. It was "
            "forced, so nothing else was run in its place. Pass backend='reference', or None."
        )
    from dsv3_tutorial.attention import triton_decode_paged as kernels  # Triton: not before

    return kernels.fp8_latent_decode_paged(q, storage, tables, page_size, lengths, rank, scale)


class PagedRows:
    """A cache as the references read one, rows[b, :length] -> (length, W), out of a storage.

    A view where a sequence's pages follow each other, a copy where they do not.
    """

    def __init__(self, storage: Tensor, tables: Tensor, page_size: int):
        self.storage, self.page_size, self.tables = storage, page_size, tables.tolist()
        self.by_page = storage.view(-1, page_size, storage.shape[1])

    def __getitem__(self, place: tuple[int, slice]) -> Tensor:
        b, length = place[0], place[1].stop
        pages = self.tables[b][: -(-length // self.page_size)]
        if pages == list(range(pages[0], pages[0] + len(pages))):
            start = pages[0] * self.page_size
            return self.storage[start : start + length]
        return self.by_page[pages].flatten(0, 1)[:length]  # (length, W)


def _reference(q: Tensor, backend: str | None, pick: Callable[..., str] = pick) -> bool:
    if backend is None and q.dtype == torch.float64:
        return True  # tensor cores take no part in a float64 check
    return pick(q, backend) == "reference"


def _check(q: Tensor, storage: Tensor, tables: Tensor, page_size: int, lengths: Tensor) -> None:
    problem = _problem(q, storage, tables, page_size, lengths)
    if problem is not None:
        raise ValueError(
            f"A decode through a page table: {problem}. Heads would read another sequence's rows. "
            "Pass q (B, S, H, C + R), storage (pages * page_size, width), tables (B, P) int32 and "
            "lengths (B,) with S <= lengths <= P * page_size."
        )


def _problem(
    q: Tensor, storage: Tensor, tables: Tensor, page_size: int, lengths: Tensor
) -> str | None:
    shapes = (tuple(x.shape) for x in (q, storage, tables, lengths))
    if (q.ndim, storage.ndim, tables.ndim, lengths.ndim) != (4, 2, 2, 1):
        return "expected 4, 2, 2 and 1 dimensions, got {}, {}, {} and {}".format(*shapes)
    if not 0 < len(q) == len(tables) == len(lengths):
        return f"{len(q)} queries, {len(tables)} tables and {len(lengths)} lengths"
    if page_size < 1 or len(storage) % page_size:
        return f"{len(storage)} rows are no whole number of pages of {page_size}"
    if storage.dtype != torch.uint8 and storage.shape[1] != q.shape[-1]:
        return f"a query is {q.shape[-1]} wide and a stored row {storage.shape[1]}"
    if lengths.device.type == "cpu":
        shortest, longest = (int(bound) for bound in lengths.aminmax())
        if shortest < q.shape[1] or longest > tables.shape[1] * page_size:
            room = tables.shape[1] * page_size
            return f"lengths from {shortest} to {longest}, outside {q.shape[1]} to {room}"
    return None
