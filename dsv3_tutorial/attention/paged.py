"""Latent caches for texts that come and go: pages taken when a text starts, given back after.

A contiguous cache reserves the longest text for every place of a batch. Pages let a text hold what
it needs, wherever there is room, and no hole is too small to be used. C kv latent, R rope head dim.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from dsv3_tutorial.attention.cache import CacheError
from dsv3_tutorial.attention.cache_paged import Fp8PagedCache, Group, PagedCache
from dsv3_tutorial.attention.decode_paged import slots
from dsv3_tutorial.attention.page_pool import PagePool, PoolFull
from dsv3_tutorial.attention.rows_fp8 import RowLayout
from dsv3_tutorial.config import ModelConfig

__all__ = ["LatentPages", "PagePool", "PoolFull", "slots"]


@dataclass
class _Text:
    """One open text: its pages, and how many tokens each layer has of it (stale in a group)."""

    pages: list[int]
    ends: list[int]
    group: "_Together | None" = None


@dataclass
class _Together:
    """The texts that are read together now, and each layer's view of them."""

    keys: tuple[Hashable, ...]
    group: Group
    views: list[PagedCache]


class LatentPages:
    """The latent cache of all layers in pages: one storage a layer, one page table for all layers.

    A storage is (n_pages * page_size, C + R) of `dtype`, or with `fp8` rows of bytes
    (`attention.rows_fp8`; `rope_fp8` is the ablation: the RoPE key in FP8 too).
    `layers` is how many there are: None, the default, means the main model's, without its MTP
    modules. All memory is reserved here, once: n_pages * page_size tokens; a text wastes less than
    a page in each layer. Raises CacheError for a config without a latent and for an empty pool.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        n_pages: int,
        page_size: int = 64,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        fp8: bool = False,
        layers: int | None = None,
        rope_fp8: bool = False,
    ):
        if not cfg.is_mla:
            raise CacheError(
                f"A {cfg.model_type} config without kv_lora_rank has no latent to keep in pages: "
                "its layers make keys and values for every head. Use FullCache."
            )
        if page_size < 1:
            raise CacheError(f"Pages of {page_size} tokens hold nothing. Give 1 token or more.")
        self.pool, self.page_size = PagePool(n_pages), page_size
        self.layout = layout = RowLayout(cfg.kv_lora_rank, cfg.qk_rope_head_dim, rope_fp8)
        if fp8 or rope_fp8:
            width, dtype = layout.width, torch.uint8
            self._view = partial(Fp8PagedCache, layout=layout)
        else:
            width = layout.rank + layout.rope
            self._view = partial(PagedCache, rank=layout.rank)
        size = (n_pages * page_size, width)
        with torch.inference_mode(False):  # or it could be written to in inference mode only
            self.storages = [
                torch.zeros(size, dtype=dtype, device=device)
                for _ in range(layers or cfg.num_hidden_layers)
            ]
        self._texts: dict[Hashable, _Text] = {}

    @property
    def free(self) -> int:
        """How many pages are free."""
        return self.pool.free

    @property
    def n_pages(self) -> int:
        return self.pool.n_pages

    @property
    def nbytes(self) -> int:
        """The bytes of all layers' storages, used or not."""
        return sum(storage.untyped_storage().nbytes() for storage in self.storages)

    def __len__(self) -> int:
        """How many texts are open."""
        return len(self._texts)

    def needs(self, tokens: int) -> int:
        """How many pages hold this many tokens."""
        return -(-tokens // self.page_size)

    def held(self, key: Hashable) -> tuple[int, ...]:
        """The pages of a text, in the order of its tokens."""
        return tuple(self._text(key).pages)

    def length(self, key: Hashable) -> int:
        """How many tokens of a text are in every layer."""
        text = self._text(key)
        if text.group is not None:
            self._part(text.group)
        return min(text.ends)

    def open(self, key: Hashable, tokens: int) -> None:
        """Reserve all pages that a text of `tokens` tokens will ever need, in every layer.

        Raises PoolFull, and changes nothing, where there are not that many; CacheError for a name
        that is in use.
        """
        if key in self._texts:
            raise CacheError(
                f"Text {key!r} is open already: two would write to one name's pages. Close it "
                "first, or take another name."
            )
        pages = self.pool.take(self.needs(tokens))
        self._texts[key] = _Text(pages, [0] * len(self.storages))

    def close(self, key: Hashable) -> None:
        """Give back a text's pages; views in which it took part stop working."""
        text = self._text(key)
        if text.group is not None:
            self._part(text.group)
        self.pool.give_back(text.pages)
        del self._texts[key]

    def caches(self, keys: Sequence[Hashable]) -> list[PagedCache]:
        """One cache per layer for exactly these texts, in this order: what a model's forward takes.

        The views of the last call where the texts are the same, so that a step costs nothing here.
        Otherwise the batches that these texts were in are dissolved, and their views stop working.
        """
        keys = tuple(keys)
        texts = [self._text(key) for key in keys]
        if not keys or len(set(keys)) < len(keys):
            raise CacheError(
                f"{len(keys)} texts, {len(set(keys))} of them different, make no batch: each place "
                "needs a text of its own. Name one or more open texts, each once."
            )
        together = texts[0].group
        if together is None or together.keys != keys:
            together = self._join(keys, texts)
        return list(together.views)

    def _join(self, keys: tuple[Hashable, ...], texts: list[_Text]) -> _Together:
        for text in texts:
            if text.group is not None:
                self._part(text.group)
        rows = [text.pages for text in texts]
        longest = max(map(len, rows))
        tables = torch.tensor([row + [0] * (longest - len(row)) for row in rows])  # (B, P)
        tables = tables.int().to(self.storages[0].device, non_blocking=True)
        group = Group(tables, self.page_size, [len(row) * self.page_size for row in rows])
        ends = zip(*(text.ends for text in texts))  # one tuple per layer
        extents = [group.extent(end) for end in ends]
        views = [
            self._view(storage, extent=extent)
            for storage, extent in zip(self.storages, extents, strict=True)
        ]
        together = _Together(keys, group, views)
        for text in texts:
            text.group = together
        return together

    def _part(self, together: _Together) -> None:
        """Dissolve a batch: note how far each of its texts came, and end its views."""
        together.group.alive = False
        for place, key in enumerate(together.keys):
            text = self._texts[key]
            text.ends = [view.extent.ends[place] for view in together.views]
            text.group = None

    def _text(self, key: Hashable) -> _Text:
        if key not in self._texts:
            raise CacheError(
                f"Text {key!r} is not open: it was never opened, or its pages are given back and "
                "may be another's. Call open(key, tokens) first."
            )
        return self._texts[key]
