"""How a token lies in an FP8 latent cache: one row of bytes, and the parts that attention reads.

C kv latent, R rope head dim. The layout of `fp8.latent` has the RoPE key in BF16:

    C E4M3 bytes | ceil(C / 128) float32 scales | R BF16 values

and an ablation asks whether that was needed. Its RoPE key is stored as the latent is:

    C E4M3 bytes | ceil(C / 128) float32 scales | R E4M3 bytes | ceil(R / 128) float32 scales

656 and 596 bytes with DeepSeek-V3's sizes, where BF16 throughout takes 1,152.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3_tutorial.fp8.latent import latent_bytes, pack_latent, unpack_latent
from dsv3_tutorial.fp8.quant import dequantize_tiles


@dataclass(frozen=True)
class RowLayout:
    """Where the parts of a row begin, and what they are."""

    rank: int
    rope: int
    rope_fp8: bool = False

    @property
    def latent_width(self) -> int:
        """Bytes of the latent with its scales."""
        return latent_bytes(self.rank, 0)

    @property
    def width(self) -> int:
        """Bytes of one token in one layer."""
        if self.rope_fp8:
            return self.latent_width + latent_bytes(self.rope, 0)
        return latent_bytes(self.rank, self.rope)

    def pack(self, c_kv: Tensor, k_rope: Tensor) -> Tensor:
        """(..., C) and (..., R), real -> uint8 (..., width). A tile with NaN reads as NaN."""
        if not self.rope_fp8:
            return pack_latent(c_kv, k_rope, checked=False)
        parts = (pack_latent(part, part[..., :0], checked=False) for part in (c_kv, k_rope))
        return torch.cat(list(parts), dim=-1)

    def unpack(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """uint8 (..., width) -> what it stands for, (..., C) and (..., R) in dtype: copies."""
        if not self.rope_fp8:
            return unpack_latent(rows, self.rank, self.rope, dtype)
        parts = rows.split([self.latent_width, self.width - self.latent_width], dim=-1)
        c_kv, k_rope = (
            unpack_latent(part, n, 0, dtype)[0] for part, n in zip(parts, (self.rank, self.rope))
        )
        return c_kv, k_rope

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 (..., width) -> codes E4M3 (..., C), their scales (..., ceil(C / 128)), and keys.

        Scales are float32; keys (..., R) are BF16, or float32 where they had codes of their own.
        Views of the rows wherever their place in memory allows it.
        """
        end = self.latent_width
        codes = rows[..., : self.rank].view(torch.float8_e4m3fn)
        scales = _numbers(rows[..., self.rank : end], torch.float32)
        if not self.rope_fp8:
            return codes, scales, _numbers(rows[..., end:], torch.bfloat16)
        own = rows[..., end : end + self.rope].view(torch.float8_e4m3fn)
        return codes, scales, dequantize_tiles(own, _numbers(rows[..., end + self.rope :]))


def _numbers(part: Tensor, kind: torch.dtype = torch.float32) -> Tensor:
    """Bytes read as numbers: a view, or a copy where they begin off the numbers' own steps."""
    step = kind.itemsize
    if any(place % step for place in (part.storage_offset(), *part.stride()[:-1])):
        part = part.clone(memory_format=torch.contiguous_format)
    return part.view(kind)  # (..., numbers)
