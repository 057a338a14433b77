"""The KV latent of one token and layer as bytes: 656 instead of 1,152 for DeepSeek-V3.

What attention multiplies thousands of times may lie in E4M3, 128 values to a scale; the RoPE key,
which carries the position, stays in BF16. In this order, little endian, without gaps:

    rank E4M3 bytes | ceil(rank / 128) float32 scales | rope BF16 values

512 + 4 * 4 + 2 * 64 = 656 for a rank of 512 and a RoPE key of 64.
"""

import math
import sys

import torch
from torch import Tensor

from dsv3_tutorial.fp8.quant import TILE, QuantizationError, dequantize_tiles, quantize_tiles


def latent_bytes(rank: int, rope: int) -> int:
    """Bytes of one token in one layer: rank + 4 * ceil(rank / 128) + 2 * rope."""
    if rank < 1 or rope < 0:
        raise QuantizationError(
            f"a latent of rank {rank} with a RoPE key of {rope} has no layout: nothing says where "
            "a part ends. Give a rank of 1 or more, and a RoPE key of 0 or more."
        )
    return rank + 4 * math.ceil(rank / TILE) + 2 * rope


def pack_latent(c_kv: Tensor, k_rope: Tensor, checked: bool = True) -> Tensor:
    """Store latent and RoPE key in one row of bytes a token.

    c_kv (..., C) and k_rope (..., R), real -> uint8 (..., latent_bytes(C, R)), on their device.
    Error: E4M3's for the latent, up to 1/16 of a value; BF16's for the key, up to 1/256.
    Raises QuantizationError for NaN and infinity in c_kv, unless not `checked` (then the tile reads
    as NaN), and for shapes that are not the same tokens'.
    """
    if not k_rope.is_floating_point() or k_rope.shape[:-1] != c_kv.shape[:-1] or k_rope.ndim < 1:
        raise QuantizationError(
            f"latents {tuple(c_kv.shape)} and RoPE keys {k_rope.dtype} {tuple(k_rope.shape)} are "
            "not of the same tokens: a row would mix two of them. Give two floating-point tensors "
            "that differ in their last axis only."
        )
    _check_order()
    return pack_rows(*quantize_tiles(c_kv, checked=checked), k_rope)


def pack_rows(codes: Tensor, scales: Tensor, k_rope: Tensor) -> Tensor:
    """One row of bytes for a token: its codes, then their scales, then its RoPE key in BF16.

    codes (..., C) float8_e4m3fn, scales (..., ceil(C / 128)) float32, k_rope (..., R) in any real
    dtype -> uint8 (..., C + 4 ceil(C / 128) + 2 R). The bits are kept, nothing but the key rounds.
    """
    parts = codes, scales, k_rope.to(torch.bfloat16)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)


def unpack_latent(
    packed: Tensor, rank: int, rope: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Latent and RoPE key from a row of bytes a token, both in dtype.

    packed uint8 (..., latent_bytes(rank, rope)) -> (..., rank), (..., rope).
    Raises QuantizationError where the bytes are not such rows.
    """
    wanted = latent_bytes(rank, rope)
    if packed.dtype != torch.uint8 or packed.ndim < 1 or packed.shape[-1] != wanted:
        raise QuantizationError(
            f"{packed.dtype} {tuple(packed.shape)} is no row of a rank {rank} latent and a RoPE "
            f"key of {rope}: values would be cut at the wrong byte. Give uint8 (..., {wanted})."
        )
    _check_order()
    kinds = (torch.float8_e4m3fn, torch.float32, torch.bfloat16)
    parts = packed.split([rank, wanted - rank - 2 * rope, 2 * rope], dim=-1)
    stored, scale, key = (_read(part, kind) for part, kind in zip(parts, kinds))
    return dequantize_tiles(stored, scale, dtype), key.to(dtype)


def _read(part: Tensor, kind: torch.dtype) -> Tensor:
    """Bytes as numbers, cloned: four become a float32 only from a multiple of four on."""
    flat = part.clone(memory_format=torch.contiguous_format).flatten().view(kind)
    return flat.view(*part.shape[:-1], part.shape[-1] // kind.itemsize)  # (..., numbers)


def _check_order() -> None:
    """The layout is little endian and `view` is the machine's: the same wherever PyTorch runs."""
    if sys.byteorder != "little":
        raise QuantizationError(
            "This machine stores the highest byte first, and the layout is little endian: another "
            "machine would read other numbers. Pack on a little-endian one."
        )
