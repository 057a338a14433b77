"""Rows that change ranks: an all-to-all whose backward is the reverse one, in narrow forms too.

R rows, D hidden. A message holds one row after the other, sorted by where they go. A row travels as
it is, in BF16, or in FP8: one message of D codes and ceil(D / 128) float32 scales a row, as bytes,
because no collective knows FP8. DeepSeek-V3 report, sections 3.2.2 and 3.3.3.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_tutorial.fp8.quant import TILE, dequantize_tiles, quantize_tiles

FORMS = ("as is", "bf16", "fp8")


class Wire(NamedTuple):
    """The form of a row on its way, and that of its gradient on the way back."""

    there: str = "as is"
    back: str = "as is"


AS_IS = Wire()
FP8_DISPATCH = Wire("fp8", "bf16")  # to the experts in FP8, the gradient of that summed from BF16
BF16_COMBINE = Wire("bf16", "fp8")  # sums need more digits than eight bits have


def exchange(
    rows: Tensor,
    sent: list[int],
    received: list[int],
    group: dist.ProcessGroup | None = None,
    wire: Wire = AS_IS,
) -> Tensor:
    """Send sent[i] of the rows to rank i of the group, and get received[i] from it.

    rows (sum(sent), ...), sorted by receiver -> (sum(received), ...) in rows' dtype, sorted by
    sender. Differentiable: gradients go the way back. Every rank of the group must call it, with 0
    rows too, and what comes out must reach every rank's loss, or a backward waits for ever.
    """
    return _Exchange.apply(rows, sent, received, group, wire)


def swap_counts(counts: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Row i of counts goes to rank i: what each rank announces to each other. (ranks, n) int64."""
    theirs = torch.empty_like(counts)
    dist.all_to_all_single(theirs, counts.contiguous(), group=group)
    return theirs


def transfer(
    rows: Tensor,
    sent: list[int],
    received: list[int],
    group: dist.ProcessGroup | None = None,
    form: str = "as is",
) -> Tensor:
    """`exchange` without gradients, for numbers of any kind: one message to each rank."""
    message = encode(rows, form).contiguous()
    arrived = message.new_empty(sum(received), *message.shape[1:])
    dist.all_to_all_single(arrived, message, received, sent, group=group)
    return decode(arrived, form, rows)


def encode(rows: Tensor, form: str) -> Tensor:
    """What travels for rows (R, D): themselves, bfloat16 (R, D), or uint8 (R, D + scales)."""
    if form == "fp8":
        return pack_fp8(rows)
    return rows.to(torch.bfloat16) if form == "bf16" else rows


def decode(message: Tensor, form: str, like: Tensor) -> Tensor:
    """The rows of a message, as wide as `like` (..., D) and in its dtype."""
    if form == "fp8":
        return unpack_fp8(message, like.shape[-1], like.dtype)
    return message.to(like.dtype)


def pack_fp8(rows: Tensor) -> Tensor:
    """Codes and scales of a row side by side, in bytes: (R, D) -> uint8 (R, D + 4 ceil(D / 128)).

    Scales are powers of two, as in the report: what was rounded once is not changed by a second
    rounding on a further hop, and fits into BF16. A tile with NaN or infinity arrives as NaN.
    """
    codes, scales = quantize_tiles(rows, pow2=True, checked=False)
    return torch.cat([codes.view(torch.uint8), scales.view(torch.uint8)], dim=1)


def unpack_fp8(message: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rows that `pack_fp8` stored: uint8 (R, D + 4 ceil(D / 128)), D = width -> (R, D)."""
    codes = message[:, :width].contiguous().view(torch.float8_e4m3fn)
    scales = message[:, width:].contiguous().view(torch.float32)
    return dequantize_tiles(codes, scales, dtype)


def row_bytes(width: int, form: str, itemsize: int = 4) -> int:
    """Bytes of a row of D = width values on its way; itemsize is that of a value left as it is."""
    each = {"as is": itemsize * width, "bf16": 2 * width}
    each["fp8"] = width + 4 * math.ceil(width / TILE)
    return each[form]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, sent: list, received: list, group, wire: Wire) -> Tensor:
        ctx.way_back = received, sent, group, Wire(wire.back, wire.there)
        return transfer(rows, sent, received, group, wire.there)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return exchange(grad, *ctx.way_back), None, None, None, None
