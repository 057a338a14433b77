"""What eight bits save and what they cost: bytes of values and of scales, and quantisation's time.

Derived, never measured: peak rates, full bandwidth, perfect overlap within a product, none between
products and the quantisation before them, and no launch times. A matrix product is (m, k) times the
transpose of (n, k): m tokens, k channels in, n out. DeepSeek-V3 report, section 3.3.
"""

import math
from dataclasses import dataclass

from dsv3_tutorial.cost import roofline
from dsv3_tutorial.hardware import Chip

TILE, BLOCK = 128, 128 * 128  # values that share a scale: of an activation, of a weight
SCALE_BYTES = 4  # float32
EIGHT_BITS = ("fp8", "int8")
BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}


@dataclass(frozen=True)
class Storage:
    """How a tensor lies in memory: `bits` a value and, for every `per` values, `scale_bits`."""

    bits: int
    scale_bits: int = 0
    per: int = TILE

    @property
    def bits_per_value(self) -> float:
        """Bits a value, its share of the scale included: FP8 in tiles 8.25."""
        return self.bits + self.scale_bits / self.per

    @property
    def overhead(self) -> float:
        """The scales' share of the values' bytes: FP8 in tiles 3.1 %, in blocks 0.024 %."""
        return self.scale_bits / self.per / self.bits


STORAGE = {
    "bf16": Storage(16),
    "e4m3": Storage(8, 32),
    "e4m3, blocks": Storage(8, 32, BLOCK),
    "e5m2": Storage(8, 32),
    "e5m6": Storage(12, 32),
    "int8": Storage(8, 32),
    "mxfp8": Storage(8, 8, 32),
    "mxfp8, up": Storage(8, 8, 32),  # its scale rounded up, as NVIDIA's libraries do
    "logfmt-8": Storage(8, 2 * 32),  # the tile's smallest logarithm and the step between codes
    "logfmt-10": Storage(10, 2 * 32),
}


@dataclass(frozen=True)
class Time:
    """Seconds of a Linear layer's products, and of quantising what goes into them."""

    products: float
    quantization: float = 0.0

    @property
    def total(self) -> float:
        return self.products + self.quantization


def operand_bytes(rows: int, columns: int, fmt: str, block: bool = False) -> float:
    """Bytes of a matrix, scales along the columns included: float32, a tile's or a block's."""
    across = math.ceil(columns / TILE)
    down = math.ceil(rows / TILE) if block else rows
    scales = SCALE_BYTES * across * down if fmt in EIGHT_BITS else 0
    return rows * columns * BYTES[fmt] + scales


def gemm_bytes(m: int, n: int, k: int, fmt: str = "bf16", out_bytes: int = 2) -> float:
    """Bytes one product moves at least: both matrices and their scales once, the result once.

    The second matrix (n, k) is scaled by block. The result has out_bytes a number: 2 is BF16.
    """
    matrices = operand_bytes(m, k, fmt) + operand_bytes(n, k, fmt, block=True)
    return matrices + out_bytes * m * n


def gemm_time(m: int, n: int, k: int, chip: Chip, fmt: str = "bf16", out_bytes: int = 2) -> float:
    """Roofline seconds of one product. Raises HardwareError where the chip has no such rate."""
    return roofline.time_s(2 * m * n * k, gemm_bytes(m, n, k, fmt, out_bytes), chip, fmt)


def quantization_bytes(rows: int, columns: int, layouts: int = 1) -> float:
    """Bytes to read a BF16 matrix once and write it in eight bits: 3.03 a value for one layout.

    layouts=2 writes it for a product along the rows and for one along the columns, as training
    needs of every activation and gradient.
    """
    return rows * columns * (BYTES["bf16"] + layouts * (1 + SCALE_BYTES / TILE))


def forward(m: int, n: int, k: int, chip: Chip, fmt: str = "fp8", quantize: bool = True) -> Time:
    """A Linear layer's product, and the quantisation of the activations that enter it.

    The weight counts as quantised already: once an optimizer step, for all its micro-batches.
    Products that share an input, as gate and up do, share its quantisation: count their outputs as
    one n. Fused into the kernel that makes the input, it would cost nothing.
    """
    moved = quantization_bytes(m, k) if quantize and fmt in EIGHT_BITS else 0.0
    return Time(gemm_time(m, n, k, chip, fmt), moved / chip.bandwidth())


def training(m: int, n: int, k: int, chip: Chip, fmt: str = "fp8", quantize: bool = True) -> Time:
    """Fprop, Dgrad and Wgrad of a Linear layer, with x and dy quantised once in two layouts.

    Fprop and Dgrad give BF16, Wgrad float32.
    """
    products = gemm_time(m, n, k, chip, fmt) + gemm_time(m, k, n, chip, fmt)
    products += gemm_time(n, k, m, chip, fmt, out_bytes=4)
    if not quantize or fmt not in EIGHT_BITS:
        return Time(products)
    moved = quantization_bytes(m, k, layouts=2) + quantization_bytes(m, n, layouts=2)
    return Time(products, moved / chip.bandwidth())


def speedup(
    m: int, n: int, k: int, chip: Chip, quantize: bool = True, passes: str = "forward"
) -> float:
    """How many times faster FP8 is than BF16, below 1 where it loses. passes: forward, training."""
    if passes not in ("forward", "training"):
        raise ValueError(
            f"passes is {passes!r}, so it is not known which products to count. "
            "Take forward or training."
        )
    layer = forward if passes == "forward" else training
    return layer(m, n, k, chip, "bf16").total / layer(m, n, k, chip, "fp8", quantize).total


def breakeven_width(chip: Chip) -> float:
    """Output channels n at which FP8's faster product just pays for quantising its input: 895.

    For products bound by arithmetic, forward. A value of x costs the same 3.03 bytes however many
    outputs use it, and saves 2 n (1 / BF16 rate - 1 / FP8 rate) seconds: m and k cancel.
    """
    saved = 2 * (1 / chip.rate("bf16") - 1 / chip.rate("fp8"))
    return quantization_bytes(1, TILE) / TILE / chip.bandwidth() / saved
