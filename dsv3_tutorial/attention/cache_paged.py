"""A layer's cache whose rows lie in pages: what attention sees of a pool that many texts share.

B batch, S new tokens, T cached positions, C kv latent, R rope head dim. The views of all layers
share one page table and, where they are equally far, one set of lengths and slots.
"""

from collections.abc import Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dsv3_tutorial.attention.cache import CacheError
from dsv3_tutorial.attention.decode_paged import (
    fp8_latent_decode_paged,
    latent_decode_paged,
    slots,
)
from dsv3_tutorial.attention.rows_fp8 import RowLayout


class Group:
    """Sequences that are read together: one page table (B, P), and how many tokens each may hold.

    `alive` turns False once one of them is closed or joins another group: its views then refuse to
    work, since the pages may be somebody else's.
    """

    def __init__(self, tables: Tensor, page_size: int, rooms: list[int]):
        self.tables, self.page_size, self.rooms = tables, page_size, rooms
        self.alive = True
        self._extents: WeakValueDictionary[tuple[int, ...], Extent] = WeakValueDictionary()

    def extent(self, ends: tuple[int, ...], lengths: Tensor | None = None) -> "Extent":
        """The state in which sequence b has `ends[b]` tokens: one object for all layers in it."""
        found = self._extents.get(ends)
        if found is None:
            if lengths is None:
                lengths = torch.tensor(ends).to(self.tables.device, non_blocking=True)
            found = self._extents[ends] = Extent(self, ends, lengths)
        return found


class Extent:
    """How far the sequences of a group are: to Python (`ends`) and to the device (`lengths`).

    Never changed, so that layers share it: the first layer of a step works out the slots of the
    new tokens, the others find them, and no length travels between device and host.
    """

    def __init__(self, group: Group, ends: tuple[int, ...], lengths: Tensor):
        self.group, self.ends, self.lengths = group, ends, lengths
        self.shortest, self.longest = min(ends), max(ends)
        self._next: tuple[int, Extent, Tensor] | None = None

    def grown(self, count: int) -> "tuple[Extent, Tensor]":
        """The state after `count` tokens more of each, and their slots (B * S,)."""
        if self._next is None or self._next[0] != count:
            self._check_room(count)
            new = torch.arange(count, device=self.lengths.device)
            at = slots(self.group.tables, self.lengths[:, None] + new, self.group.page_size)
            ends = tuple(end + count for end in self.ends)
            after = self.group.extent(ends, self.lengths + count)
            self._next = count, after, at.flatten()
        return self._next[1:]

    def _check_room(self, count: int) -> None:
        for place, (end, room) in enumerate(zip(self.ends, self.group.rooms)):
            if end + count > room:
                raise CacheError(
                    f"Sequence {place} of the batch is full: {end} tokens held, {count} more, its "
                    f"pages have room for {room}. The next page is another text's. Reserve the "
                    "final length with open(key, tokens), and do not pad beyond it."
                )


class PagedCache:
    """One layer's view of its pages, for the sequences of one group: what `LatentCache` offers.

    `LatentPages.caches` makes them. Appending writes the new rows where the page table says;
    `c_kv` and `k_rope` are copies, which only a prefill that expands the latent asks for.
    """

    def __init__(self, storage: Tensor, rank: int, extent: Extent):
        self.storage, self.rank, self.extent = storage, rank, extent

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, on the device."""
        return self.extent.lengths

    @property
    def shortest(self) -> int:
        return self.extent.shortest

    @property
    def longest(self) -> int:
        return self.extent.longest

    @property
    def uniform(self) -> bool:
        """Whether all sequences are equally long: then no index and no mask is needed."""
        return self.extent.shortest == self.extent.longest

    @property
    def batch(self) -> int:
        return len(self.extent.ends)

    @property
    def nbytes(self) -> int:
        """The bytes of this layer's rows that its sequences have reserved."""
        return sum(self.extent.group.rooms) * self.storage.shape[1] * self.storage.itemsize

    @property
    def c_kv(self) -> Tensor:
        return self._unpacked()[0]

    @property
    def k_rope(self) -> Tensor:
        return self._unpacked()[1]

    def append(self, c_kv: Tensor, k_rope: Tensor) -> None:
        """Store S tokens behind each sequence's last: (B, S, C), (B, S, R)."""
        self._check(c_kv, k_rope)
        after, at = self.extent.grown(c_kv.shape[1])
        rows = self._packed(c_kv.detach(), k_rope.detach())  # (B, S, W)
        self.storage.index_copy_(0, at, rows.flatten(0, 1))
        self.extent = after

    def attend(self, q: Tensor, scale: float, backend: str | None = None) -> Tensor:
        """As LatentCache.attend: q (B, S, H, C + R) -> (B, S, H, C). The S tokens are stored."""
        self._check_alive()
        group, lengths = self.extent.group, self.extent.lengths
        return latent_decode_paged(
            q, self.storage, group.tables, group.page_size, lengths, self.rank, scale, backend
        )

    def trim(self, lengths: Sequence[int] | Tensor) -> None:
        """Keep the first `lengths[b]` tokens of sequence b; its pages stay reserved."""
        self._check_alive()
        ends = tuple(torch.as_tensor(lengths).tolist())
        if len(ends) != self.batch or not all(
            isinstance(end, int) and 0 <= end <= held for end, held in zip(ends, self.extent.ends)
        ):
            raise CacheError(
                f"Cannot trim lengths {list(self.extent.ends)} to {list(ends)}: tokens that were "
                "never read cannot be kept. Give 0 up to the present length for each sequence."
            )
        self.extent = self.extent.group.extent(ends)

    def _packed(self, c_kv: Tensor, k_rope: Tensor) -> Tensor:
        """(B, S, C) and (B, S, R) as rows of the storage, (B, S, W)."""
        return torch.cat([c_kv, k_rope], dim=-1).to(self.storage.dtype)

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Undoes `_packed`."""
        return rows[..., : self.rank], rows[..., self.rank :]

    def _unpacked(self) -> tuple[Tensor, Tensor]:
        """All that is held, (B, T, C) and (B, T, R); zeros behind a shorter sequence's end.

        What lies there in the storage is a former text's: 0 times its NaN would be NaN.
        """
        self._check_alive()
        group, lengths = self.extent.group, self.extent.lengths[:, None]  # (B, 1)
        held = torch.arange(self.longest, device=lengths.device).expand(self.batch, -1)  # (B, T)
        c_kv, k_rope = self._split(self.storage[slots(group.tables, held, group.page_size)])
        if self.uniform:
            return c_kv, k_rope
        beyond = (held >= lengths)[..., None]  # (B, T, 1)
        return c_kv.masked_fill(beyond, 0), k_rope.masked_fill(beyond, 0)

    def _widths(self) -> tuple[int, int]:
        return self.rank, self.storage.shape[1] - self.rank

    def _check(self, c_kv: Tensor, k_rope: Tensor) -> None:
        self._check_alive()
        start = (self.batch, c_kv.shape[1] if c_kv.ndim == 3 else 0)
        wanted = [(*start, width) for width in self._widths()]
        if [c_kv.shape, k_rope.shape] != wanted or 0 in start or not c_kv.is_floating_point():
            raise CacheError(
                f"Got {c_kv.dtype} {tuple(c_kv.shape)} and {tuple(k_rope.shape)} to store where "
                f"rows for {wanted} are kept: tokens of another batch or width cannot lie beside "
                "those it has. Ask LatentPages.caches for the views of exactly these sequences."
            )

    def _check_alive(self) -> None:
        if not self.extent.group.alive:
            raise CacheError(
                "This view is out of date: one of its sequences was closed, or joined another "
                "batch, and its pages may hold somebody else's text. Ask LatentPages.caches again."
            )


class Fp8PagedCache(PagedCache):
    """The same over rows of bytes, as `attention.rows_fp8` lays them out."""

    def __init__(self, storage: Tensor, layout: RowLayout, extent: Extent):
        super().__init__(storage, layout.rank, extent)
        self.layout = layout

    def attend(self, q: Tensor, scale: float, backend: str | None = None) -> Tensor:
        """As Fp8LatentCache.attend: q (B, S, H, C + R) -> (B, S, H, C). The S tokens are stored."""
        self._check_alive()
        group, lengths = self.extent.group, self.extent.lengths
        return fp8_latent_decode_paged(
            q,
            self.storage,
            group.tables,
            group.page_size,
            lengths,
            self.rank,
            scale,
            backend,
            self.layout.rope_fp8,
        )

    def _packed(self, c_kv: Tensor, k_rope: Tensor) -> Tensor:
        return self.layout.pack(c_kv, k_rope)

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.layout.unpack(rows, torch.float32)

    def _widths(self) -> tuple[int, int]:
        return self.rank, self.layout.rope
