"""Which values share a scale in each of a linear layer's products, and the products themselves.

On a GPU the eight bits are multiplied. No CPU does that: there an operand is rounded and restored,
and float32 is multiplied, the same up to the order of the sum. DeepSeek-V3 report, section 3.3.2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3_tutorial.fp8 import cpu, quant
from dsv3_tutorial.fp8.checks import check_scale
from dsv3_tutorial.fp8.gemm import matmul

_CAST: dict[str, Callable] = {
    "tile": quant.quantize_tiles,
    "block": quant.quantize_blocks,
    "row": quant.quantize_rows,
    "tensor": quant.quantize_tensor,
}
PARTS = tuple(_CAST)
_SMALL = 2**19  # values: below, the plain cast is faster than the one that works in chunks


class Quantized(NamedTuple):
    """A matrix in FP8: values float8_e4m3fn (m, k), and the scales that `gemm.matmul` takes.

    restored: what they stand for, float32 (m, k), on a CPU, which multiplies that. There the two
    others are missing where nobody keeps them.
    """

    values: Tensor | None
    scale: Tensor | None
    restored: Tensor | None = None

    @property
    def T(self) -> "Quantized":
        """The transpose, where the parts are as high as wide: blocks, or one scale for all."""
        if self.restored is not None:
            return Quantized(None, None, self.restored.T)
        scale = self.scale.T.contiguous() if self.scale.ndim else self.scale
        return Quantized(self.values.T.contiguous(), scale)

    @property
    def kept(self) -> tuple[Tensor, Tensor]:
        """What is worth keeping for backward: the eight bits, not what they stand for."""
        return self.values, self.scale


@dataclass(frozen=True)
class Scaling:
    """What shares a scale: 1 x 128 of it a "tile", 128 x 128 a "block", a "row", or the "tensor".

    x, w, dy: the layer's input, its weight, the gradient of its output. `pow2` rounds the scales
    of x up to powers of two: the cached 1 x 128 tiles become 128 x 1 in Wgrad, and moving a value
    from one power of two to another costs it no digit. `grad_scale` replaces every scale of dy by
    this constant, as a global loss scale would; None measures them.
    """

    x: str = "tile"
    w: str = "block"
    dy: str = "tile"
    pow2: bool = True
    grad_scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("x", "w", "dy"):
            if getattr(self, name) not in PARTS:
                raise ValueError(
                    f"Scaling({name}={getattr(self, name)!r}): nothing knows which values share a "
                    f"scale. Choose one of {', '.join(PARTS)}."
                )
        if self.w not in ("block", "tensor"):
            raise ValueError(
                f"Scaling(w={self.w!r}): Fprop sums over a weight's columns, Dgrad over its rows, "
                "and both take the same values. Choose 'block' or 'tensor'."
            )
        if self.grad_scale is not None:
            check_scale(self.grad_scale)

    def input(self, x: Tensor, keep: bool = True) -> Quantized:
        return quantized(x, self.x, self.pow2, keep)

    def weight(self, w: Tensor) -> Quantized:
        return quantized(w, self.w)

    def gradient(self, dy: Tensor) -> Quantized:
        if self.grad_scale is not None:
            return stored(*quant.quantize_tensor(dy, checked=False, scale=self.grad_scale))
        return quantized(dy, self.dy, keep=False)


DEEPSEEK = Scaling()
PER_TENSOR = Scaling(x="tensor", w="tensor", dy="tensor", pow2=False)


def quantized(x: Tensor, part: str, pow2: bool = False, keep: bool = True) -> Quantized:
    """x (m, k) in FP8, one scale a `part`. NaN and infinity make their whole part NaN.

    With keep=False a CPU makes only what the product needs: the values rounded, and no codes.
    """
    if x.device.type == "cpu":
        return _on_cpu(x, part, pow2, keep)
    return Quantized(*_CAST[part](x, pow2=pow2, checked=False))


def _on_cpu(x: Tensor, part: str, pow2: bool, keep: bool) -> Quantized:
    (m, k), tile = x.shape, quant.TILE
    size = {"tile": (1, tile), "block": quant.BLOCK, "row": (1, k), "tensor": (m, k)}[part]
    if not keep:
        return Quantized(None, None, cpu.round_trip(x, size, pow2))
    if x.numel() > _SMALL:
        restored, values, scale = cpu.round_trip_kept(x, size, pow2)
        return Quantized(values, scale, restored)
    return stored(*_CAST[part](x, pow2=pow2, checked=False))


def stored(values: Tensor, scale: Tensor) -> Quantized:
    """What was kept for backward, made ready for a product again."""
    at_hand = cpu.dequantize(values, scale) if values.device.type == "cpu" else None
    return Quantized(values, scale, at_hand)


def product(a: Quantized, b: Quantized, dtype: torch.dtype) -> Tensor:
    """a (m, k) times the transpose of b (n, k), summed in float32 and rounded to dtype."""
    if a.restored is not None and b.restored is not None:
        return (a.restored @ b.restored.T).to(dtype)
    out = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    return matmul(*a.kept, *b.kept, out).to(dtype)
