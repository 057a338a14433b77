"""The least time a chip can take: its arithmetic or its memory, whichever is slower.

Perfect overlap and no latency: a bound to be held against, not a forecast.
"""

from dsv3_tutorial.hardware import Chip


def time_s(flops: float, bytes: float, chip: Chip, fmt: str = "bf16") -> float:
    """Seconds for this much arithmetic and traffic: max(FLOP / rate, bytes / bandwidth)."""
    return max(flops / chip.rate(fmt), bytes / chip.bandwidth())


def intensity(flops: float, bytes: float) -> float:
    """FLOP per byte moved."""
    return flops / bytes


def ridge(chip: Chip, fmt: str = "bf16") -> float:
    """FLOP per byte at which arithmetic and memory take equally long: H100, BF16, 295."""
    return chip.rate(fmt) / chip.bandwidth()


def bound(flops: float, bytes: float, chip: Chip, fmt: str = "bf16") -> str:
    """'compute' or 'memory': which of the two sets the time."""
    return "compute" if intensity(flops, bytes) >= ridge(chip, fmt) else "memory"


def attainable_flops(flops_per_byte: float, chip: Chip, fmt: str = "bf16") -> float:
    """The roof: FLOP/s within reach at an arithmetic intensity."""
    return min(chip.rate(fmt), flops_per_byte * chip.bandwidth())
