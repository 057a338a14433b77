"""The latent cache in eight bits: rows of bytes where `LatentCache` has rows of numbers.

B batch, S new tokens, T cached positions, H heads, C kv latent, R rope head dim.
"""

import torch
from torch import Tensor

from dsv3_tutorial.attention.cache import Cache, CacheError
from dsv3_tutorial.attention.decode_fp8 import fp8_latent_decode
from dsv3_tutorial.attention.rows_fp8 import RowLayout
from dsv3_tutorial.config import ModelConfig


class Fp8LatentCache(Cache):
    """MLA's cache with the latent in E4M3: 656 bytes a token and layer for DeepSeek-V3, not 1,152.

    What `LatentCache` offers, but that `c_kv` and `k_rope` are copies, in `dtype`: the type the
    model computes in, float32 if not said. A latent is off by up to 1/16 of a value, a RoPE key by
    BF16's 1/256, and `rope_fp8` stores that in E4M3 too, to see what it costs. On a CPU a step
    takes longer than over float32: the codes are widened first, at every step.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        rank: int,
        rope_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        rope_fp8: bool = False,
    ):
        self.layout = RowLayout(rank, rope_dim, rope_fp8)
        shape = (self.layout.width,)
        super().__init__(batch, capacity, shape, dtype=torch.uint8, device=device)
        self.rank, self.shapes = rank, ((rank,), (rope_dim,))
        self.dtype = dtype or torch.get_default_dtype()

    @classmethod
    def for_config(
        cls,
        cfg: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        rope_fp8: bool = False,
    ) -> "Fp8LatentCache":
        """For one layer of `cfg`, which must be MLA."""
        if not cfg.is_mla:
            raise CacheError(
                f"A {cfg.model_type} config without kv_lora_rank has no latent, and only a latent "
                "is kept in FP8 here: keys and values of every head would need rows of their own. "
                "Use FullCache."
            )
        sizes = cfg.kv_lora_rank, cfg.qk_rope_head_dim
        return cls(batch, capacity, *sizes, dtype, device, rope_fp8)

    @property
    def packed(self) -> Tensor:
        """The rows as they are stored: uint8 (B, T, bytes), a view."""
        return self.parts[0][:, : self.longest]

    @property
    def c_kv(self) -> Tensor:
        return self.unpacked()[0]

    @property
    def k_rope(self) -> Tensor:
        return self.unpacked()[1]

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """All that is held as numbers, (B, T, C) and (B, T, R): what a long prefill expands."""
        return self.layout.unpack(self.packed, self.dtype)

    def append(self, c_kv: Tensor, k_rope: Tensor) -> Tensor:
        """Store S tokens, give back all rows held: (B, S, C), (B, S, R) -> uint8 (B, T, bytes)."""
        self._store(c_kv, k_rope)
        return self.packed

    def attend(self, q: Tensor, scale: float, backend: str | None = None) -> Tensor:
        """As LatentCache.attend: q (B, S, H, C + R) -> (B, S, H, C). The S tokens are stored."""
        rows, rope_fp8 = self.packed, self.layout.rope_fp8
        return fp8_latent_decode(q, rows, self.lengths, self.rank, scale, backend, rope_fp8)

    def _encoded(self, *new: Tensor) -> tuple[Tensor, ...]:
        return (self.layout.pack(*new),)
