"""What a layer keeps of the tokens it has read: preallocated, written in place, one object a layer.

B batch, T cached positions, H key-value heads, C kv latent, R rope head dim. A cache is for
inference: no gradient flows through it. It may hold a narrower dtype than the model computes in:
what is stored is rounded to it, what is read is widened. Sequences of a batch may have different
lengths: prefill them padded on the right, then `trim` to the true ones; causal attention never read
the padding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv3_tutorial.attention.decode import latent_decode
from dsv3_tutorial.config import ModelConfig


class CacheError(ValueError):
    """What was to be stored does not fit the cache."""


class Cache:
    """Preallocated tensors (B, T_max, ...) and how many tokens each sequence has in them.

    `lengths` (B,) int64 is what attention masks by; `shortest` and `longest` say the same to
    Python, so that a decode step never waits for the device to learn a length.
    """

    def __init__(self, batch: int, capacity: int, *shapes: tuple[int, ...], **where: object):
        sizes = (batch, capacity, *(size for shape in shapes for size in shape))
        if min(sizes) < 1:
            raise CacheError(
                f"A cache of {batch} sequences of {capacity} tokens with parts {shapes} has an "
                "empty side, so nothing could be stored. Every size must be 1 or more."
            )
        self.batch, self.capacity, self.shapes = batch, capacity, shapes  # of a token's parts
        with torch.inference_mode(False):  # or it could be written to in inference mode only
            # Zeros: a slot beyond a short sequence has probability 0, and 0 times NaN is NaN.
            self.parts = tuple(torch.zeros(batch, capacity, *shape, **where) for shape in shapes)
            device = self.parts[0].device
            self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
            self.rows = torch.arange(batch, device=device)[:, None]  # (B, 1)
        self.shortest = self.longest = 0

    @property
    def uniform(self) -> bool:
        """Whether all sequences are equally long: then no index and no mask is needed."""
        return self.shortest == self.longest

    @property
    def nbytes(self) -> int:
        """The bytes really held for keys and values, used or not."""
        return sum(part.untyped_storage().nbytes() for part in self.parts)

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        for tensor in (*self.parts, self.lengths):
            tensor.zero_()
        self.shortest = self.longest = 0

    def trim(self, lengths: Sequence[int] | Tensor) -> None:
        """Keep the first `lengths[b]` tokens of sequence b: drops padding, or a rejected draft."""
        lengths = torch.as_tensor(lengths, dtype=torch.int64, device=self.lengths.device)
        if lengths.shape != self.lengths.shape:
            raise CacheError(
                f"{tuple(lengths.shape)} lengths for {self.batch} sequences: each needs its own. "
                f"Give {self.batch} integers."
            )
        if bool((lengths < 0).any() or (lengths > self.lengths).any()):
            raise CacheError(
                f"Cannot trim lengths {self.lengths.tolist()} to {lengths.tolist()}: tokens that "
                "were never read cannot be kept. Give 0 up to the present length for each."
            )
        self.lengths.copy_(lengths)
        self.shortest, self.longest = int(lengths.min()), int(lengths.max())

    def _store(self, *new: Tensor) -> None:
        """Write (B, S, ...) behind each sequence's last token, one tensor per part."""
        self._check(new)
        count, start = new[0].shape[1], self.longest
        at = slice(start, start + count)
        if not self.uniform:
            at = self.lengths[:, None] + torch.arange(count, device=self.rows.device)  # (B, S)
        stored = self._encoded(*(tokens.detach() for tokens in new))
        for part, tokens in zip(self.parts, stored, strict=True):
            part[(slice(None) if self.uniform else self.rows, at)] = tokens
        self.lengths += count
        self.shortest += count
        self.longest += count

    def _encoded(self, *new: Tensor) -> tuple[Tensor, ...]:
        """The new tokens as the parts hold them."""
        return tuple(tokens.to(part.dtype) for part, tokens in zip(self.parts, new))

    def _check(self, new: tuple[Tensor, ...]) -> None:
        count = new[0].shape[1]
        for shape, tokens in zip(self.shapes, new, strict=True):
            wanted = (self.batch, count, *shape)
            if tokens.shape != wanted or not tokens.is_floating_point():
                raise CacheError(
                    f"Got {tuple(tokens.shape)} {tokens.dtype} to store where this cache holds "
                    f"{wanted} of real numbers: tokens of another batch or width cannot lie "
                    "beside those it has. Make the cache with for_config(cfg, batch, ...)."
                )
        if self.longest + count > self.capacity:
            raise CacheError(
                f"The cache is full: {self.longest} tokens held, {count} more, room for "
                f"{self.capacity}. Writing on would overwrite what is still read. "
                "Make it longer, or reset() it for a new text."
            )


class FullCache(Cache):
    """Every key-value head's own key and value: keys (B, T_max, H, N + R), values (B, T_max, H, V).

    Costs H (N + R + V) elements a token: 40,960 with DeepSeek-V3's sizes, 71 times the latent.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        shapes = (heads, key_dim), (heads, value_dim or key_dim)
        super().__init__(batch, capacity, *shapes, dtype=dtype, device=device)

    @classmethod
    def for_config(
        cls,
        cfg: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "FullCache":
        """For one layer of `cfg`. An MLA layer has as many expanded heads as query heads."""
        heads = cfg.num_attention_heads if cfg.is_mla else cfg.kv_heads
        return cls(batch, capacity, heads, cfg.qk_head_dim, cfg.value_dim, dtype, device)

    @property
    def keys(self) -> Tensor:
        return self.parts[0][:, : self.longest]

    @property
    def values(self) -> Tensor:
        return self.parts[1][:, : self.longest]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store S tokens, give back all held: (B, S, H, ...) -> (B, T, H, ...), in keys' dtype.

        Views where that is the cache's own dtype, else a copy of everything at each call.
        """
        self._store(keys, values)
        return self.keys.to(keys.dtype), self.values.to(values.dtype)


class LatentCache(Cache):
    """MLA's cache: one latent and one rotated key a token, shared by all heads, in one tensor.

    Costs C + R elements a token: 576 with DeepSeek-V3's sizes. One tensor, because a decode step
    then reads it with one matrix product; `c_kv` and `k_rope` are views of it.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        rank: int,
        rope_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__(batch, capacity, (rank + rope_dim,), dtype=dtype, device=device)
        self.rank, self.shapes = rank, ((rank,), (rope_dim,))
        self.whole = self.parts[0]  # (B, T_max, C + R)
        self.parts = self.whole[..., :rank], self.whole[..., rank:]

    @classmethod
    def for_config(
        cls,
        cfg: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "LatentCache":
        """For one layer of `cfg`, which must be MLA."""
        if not cfg.is_mla:
            raise CacheError(
                f"A {cfg.model_type} config without kv_lora_rank has no latent: its layers make "
                "keys and values for every head. Use FullCache."
            )
        return cls(batch, capacity, cfg.kv_lora_rank, cfg.qk_rope_head_dim, dtype, device)

    @property
    def nbytes(self) -> int:
        """The bytes really held: the two parts share one storage."""
        return self.whole.untyped_storage().nbytes()

    @property
    def latent(self) -> Tensor:
        return self.whole[:, : self.longest]

    @property
    def c_kv(self) -> Tensor:
        return self.parts[0][:, : self.longest]

    @property
    def k_rope(self) -> Tensor:
        return self.parts[1][:, : self.longest]

    def append(self, c_kv: Tensor, k_rope: Tensor) -> Tensor:
        """Store S tokens, give back all held: (B, S, C), (B, S, R) -> (B, T, C + R), a view."""
        self._store(c_kv, k_rope)
        return self.latent

    def attend(self, q: Tensor, scale: float, backend: str | None = None) -> Tensor:
        """Attend from the last S tokens of each sequence to all that it holds, causally.

        q (B, S, H, C + R), absorbed query beside rotated part -> (B, S, H, C), in q's dtype: see
        `attention.decode`. The S tokens are appended first. Costs a copy of the cache each call
        where its dtype is not q's.
        """
        wide = torch.promote_types(q.dtype, self.whole.dtype)
        latent = self.latent.to(wide)  # no copy where it is wide already
        return latent_decode(q.to(wide), latent, self.lengths, self.rank, scale, backend).to(
            q.dtype
        )
