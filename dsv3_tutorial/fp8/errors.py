"""How much eight bits lose, in measures that can move: by matrix, by token, by sum.

A matrix's relative error hides who pays for it: where tokens span magnitudes, one scale for many
of them leaves the large ones as they were and rounds the small ones away, and the matrix's error
stays that of its large tokens. Letters: M tokens, D channels, m x n a result, k the summed axis.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def relative_error(x: Tensor, y: Tensor) -> float:
    """The matrix's error: the norm of y - x over that of x, both any shape, in float64.

    0 where both are zero, infinite where x alone is; NaN in y makes it NaN.
    """
    lost, size = (y.double() - x.double()).norm(), x.double().norm()
    return 0.0 if lost == 0 else float(lost / size)


def lost_tokens(x: Tensor, y: Tensor, limit: float = 0.5) -> float:
    """The share of tokens that came back with more than `limit` of relative error: 0 to 1.

    x (..., D) as it was, y (..., D) as it came back: a token is a row. A row of zeros that came
    back as zeros is not lost; one that came back with NaN is, though NaN exceeds nothing.
    """
    error = (y.double() - x.double()).norm(dim=-1)  # (...)
    lost = ~(error <= limit * x.double().norm(dim=-1))
    return lost.double().mean().item()


def accumulate(parts: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of micro-batches' gradients, one after the other, kept in dtype in between.

    Each part float32, of one shape -> that shape, in dtype. An addition is made in float32 and
    rounded once. A BF16 sum stops growing where a part is below half a step: at 256 parts of 1.
    """
    total = None
    for part in parts:
        wide = part.float() if total is None else total.float() + part.float()
        total = wide.to(dtype)
    return total


def quantized_linear(x: Tensor, w: Tensor, tile: int = 128) -> Tensor:
    """What rounding its operands alone makes of a linear layer: x @ w^T, summed in float32.

    x (m, k), w (n, k) through E4M3, every `tile` neighbours along k with a scale -> (m, n) float32.
    A tile's largest is 0, or 1e-35 and above.
    """
    restored = []
    for operand in (x, w):
        tiles = operand.float().unflatten(-1, (-1, tile))  # (rows, k / tile, tile)
        largest = tiles.abs().amax(dim=-1, keepdim=True)
        factor = torch.where(largest > 0, 448.0 / largest, 1.0)
        codes = (tiles * factor).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        restored.append((codes.float() / factor).flatten(-2))  # (rows, k)
    return restored[0] @ restored[1].T
