"""How a weight in eight or four bits lies on disk: which tensors, of which dtype and shape.

    fp8   W float8_e4m3fn, W_scale_inv float32 by block                DeepSeek-V3's own files
    int8  W int8, W_scale (m, 1)                                       compressed-tensors'
    int4  W_packed int32 (m, ceil(k / 8)), W_scale by group, W_shape   `int-` and `pack-quantized`

Eight codes of four bits lie in an int32, the first in the lowest bits: on a little-endian machine
these are the bytes of `weights.formats.quantize_int4`, filled up to whole int32.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_tutorial.config import QuantizationConfig
from dsv3_tutorial.fp8.quant import BLOCK, scale_shape
from dsv3_tutorial.weights.formats import GROUP, Quantized, quantize

CODED = ("fp8", "int8", "int4")  # what a folder can hold
SUFFIXES = ("_scale_inv", "_scale", "_packed", "_shape")
_KINDS = {"F8_E4M3": "fp8", "I8": "int8"}
_FLOATS = ("F32", "BF16", "F16")
_TORCH = {
    **{"F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32, "I8": torch.int8},
    **{"I32": torch.int32, "I64": torch.int64},
}
Pieces = dict[str, tuple[tuple[str, ...], tuple[int, ...]]]  # name -> dtypes it may have, shape


def format_of(name: str, stored: Mapping) -> str | None:
    """The format that the weight `name` is stored in; None where it is plain, or not there."""
    if name in stored:
        return _KINDS.get(stored[name].dtype)
    return "int4" if f"{name}_packed" in stored else None


def pieces(fmt: str, name: str, shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> Pieces:
    """The tensors that a weight (..., m, k) becomes on disk, the codes first."""
    *lead, m, k = shape
    if fmt == "fp8":
        scale = {f"{name}_scale_inv": (("F32",), scale_shape(shape, block))}
        return {name: (("F8_E4M3",), tuple(shape)), **scale}
    if fmt == "int8":
        return {name: (("I8",), tuple(shape)), f"{name}_scale": (_FLOATS, (*lead, m, 1))}
    return {
        f"{name}_packed": (("I32",), (*lead, m, math.ceil(k / 8))),
        f"{name}_scale": (_FLOATS, (*lead, m, math.ceil(k / GROUP))),
        f"{name}_shape": (("I64",), (2,)),
    }


def announced_in_vain(announced: QuantizationConfig | None, stored: Mapping) -> str | None:
    """What is wrong where a config says that weights are coded, and no file holds a code."""
    names = {name.removesuffix("_packed") for name in stored}
    if announced is None or any(format_of(name, stored) for name in names):
        return None
    kind = {"e4m3": "fp8"}.get(announced.fmt, announced.fmt).upper()
    held = ", ".join(sorted({tensor.dtype for tensor in stored.values()}))
    return (
        f"config.json announces weights in {kind} (quantization_config), and the files hold plain "
        f"ones ({held}), no code at all: remove quantization_config from config.json if these are "
        "the weights that are meant, or fetch the files that it describes"
    )


def outlines(fmt: str, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The tensors that a save writes for a weight, without their values."""
    return {
        piece: torch.empty(wanted, dtype=_TORCH[kinds[0]], device="meta")
        for piece, (kinds, wanted) in pieces(fmt, name, shape).items()
    }


def encode(fmt: str, name: str, value: Tensor) -> dict[str, Tensor]:
    """A weight (m, k) as the tensors that stand for it on disk, on the CPU."""
    q = quantize(value, fmt)
    codes, scale = q.codes.cpu(), q.scale.cpu()
    if fmt == "fp8":
        return {name: codes, f"{name}_scale_inv": scale}
    if fmt == "int8":
        return {name: codes, f"{name}_scale": scale[..., None]}
    whole = F.pad(codes, (0, -codes.shape[-1] % 4), value=8 | 8 << 4)  # codes of 0
    shape = torch.tensor(value.shape[-2:], dtype=torch.int64)
    packed = whole.contiguous().view(torch.int32)
    return {f"{name}_packed": packed, f"{name}_scale": scale, f"{name}_shape": shape}


def decode(
    fmt: str, name: str, found: Mapping[str, Tensor], shape: tuple[int, ...]
) -> Quantized | None:
    """The weight that stored tensors stand for; None where a scale or the shape cannot be right.

    A code of -128, or of -8, which no file of ours holds, is a code like any other.
    """
    stored = found[f"{name}_scale_inv" if fmt == "fp8" else f"{name}_scale"]
    scale = stored.float()
    if not (scale.isfinite() & (scale > 0)).all():
        return None
    if fmt != "int4":
        return Quantized(fmt, found[name], scale if fmt == "fp8" else scale[..., 0], tuple(shape))
    if found[f"{name}_shape"].tolist() != list(shape[-2:]):
        return None
    codes = found[f"{name}_packed"].contiguous().view(torch.uint8)
    return Quantized(fmt, codes[..., : math.ceil(shape[-1] / 2)].contiguous(), scale, tuple(shape))
