"""What a tensor core keeps of a sum: an emulation whose every bit is stated.

An FP8 product is exact; the addition is not. Hopper takes the products of a group of 32, shifts all
of them to the largest exponent among them, cuts off what lies below 13 fraction bits and adds the
result to a register that keeps 13 as well: sign, 8 exponent bits, 13 of mantissa, "FP22". With the
leading one that makes the 14 bits of the DeepSeek-V3 report (section 3.3.2). Source: ISCA paper,
section 3.1.1. The remedy, "promotion": every N_C = 128 products the partial sum is added to a
float32 register outside the tensor core, and starts again from zero.

What the sources leave open is a parameter or a choice of ours, and a chip may differ: whether the
running sum is aligned together with the products (here: yes, as Fasi, Higham, Mikaitis and Pranesh,
2021, found of V100 to A100 in FP16), how the sum is rounded when it is stored (here: as its terms
are), and which products form a group (here: neighbours along k). The register's exponent range is
float32's. Letters: m x n the result, k the summed axis.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDINGS = {"truncate": torch.trunc, "nearest": torch.round}  # toward zero; half to even
WIDEST = 23  # fraction bits of the float32 that a tensor core returns
_EXPONENT = 0x7FF << 52  # the bits of a float64 that hold its exponent
_AT_ONCE = 2**17  # products held at once: 1 MiB of float64 stays in the cache


class AccumulationError(ValueError):
    """An accumulator that cannot be, or operands that cannot be multiplied."""


def _problems(core: "TensorCore") -> list[str]:
    found = []
    if core.bits is not None and not (_whole(core.bits) and core.bits <= WIDEST):
        found.append(f"bits is 1 to {WIDEST} or None, got {core.bits!r}")
    if not _whole(core.group):
        found.append(f"group is a whole number of at least 1, got {core.group!r}")
    elif core.promote is not None and not (_whole(core.promote) and not core.promote % core.group):
        found.append(f"promote is a multiple of group {core.group} or None, got {core.promote!r}")
    if core.rounding not in ROUNDINGS:
        found.append(f"rounding is one of {', '.join(ROUNDINGS)}, got {core.rounding!r}")
    if not isinstance(core.joint, bool):
        found.append(f"joint is True or False, got {core.joint!r}")
    return found


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True)
class TensorCore:
    """How products are summed. The defaults are Hopper's, without promotion.

    bits: fraction bits kept; None sums exactly and rounds to float32 once. group: products summed
    at once. promote: after how many products the sum goes to float32 (None: never). rounding:
    "truncate" or "nearest". joint: the running sum is aligned with the products; if not, they are
    summed by themselves first. Raises AccumulationError with all that is wrong.
    """

    bits: int | None = 13
    group: int = 32
    promote: int | None = None
    rounding: str = "truncate"
    joint: bool = True

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise AccumulationError(
                f"There is no such accumulator: {'; '.join(problems)}. "
                "Its sums would mean nothing. Mend what is named."
            )


HOPPER = TensorCore()
HOPPER_PROMOTED = TensorCore(promote=128)


def matmul_emulated(a: Tensor, b: Tensor, core: TensorCore = HOPPER) -> Tensor:
    """a @ b^T, each sum taken as the tensor core would take it.

    a (m, k), b (n, k), floating point (FP8 values: their products are exact) -> float32 (m, n).
    Time: about 10 passes over the m * n * k products, so meant for lessons. Groups of nothing but
    zeros change no sum and are passed over. NaN or infinity in a row makes its results NaN.
    Raises AccumulationError for operands that do not fit.
    """
    _check(a, b)
    a, b = a.double(), b.double()
    rows = max(1, _AT_ONCE // max(1, len(b) * min(core.group, a.shape[1])))
    parts = [_promoted(part, b, core) for part in a.split(rows)]
    return torch.cat(parts)


def aligned_sum(
    terms: Tensor, bits: int, rounding: str = "truncate", carried: Tensor | None = None
) -> Tensor:
    """Add terms as fixed-point numbers that share the largest one's exponent.

    terms (t, ...) and carried (...), float64 -> float64 (...). The unit is 2^(e - bits) with e the
    exponent of the largest magnitude, `carried` included: every term is cut (or rounded) to whole
    units, the whole numbers are added exactly, and of their sum `bits` fraction bits are kept.
    """
    largest = terms.abs().amax(dim=0)  # (...)
    if carried is not None:
        largest = torch.maximum(largest, carried.abs())
    per_unit = _per_unit(largest, bits)
    cut = ROUNDINGS[rounding]
    total = cut(terms * per_unit).sum(dim=0)  # (...)
    if carried is not None:
        total = total + cut(carried * per_unit)
    total = total / per_unit
    per_unit = _per_unit(total.abs(), bits)
    return cut(total * per_unit) / per_unit


def _promoted(a: Tensor, b: Tensor, core: TensorCore) -> Tensor:
    """Partial sums of `promote` products each, added in float32. a (m, k), b (n, k) -> (m, n)."""
    k = a.shape[1]
    total = torch.zeros(len(a), len(b), dtype=torch.float32, device=a.device)
    for left, right in _slices(a, b, core.promote or max(k, 1)):
        exact = core.bits is None
        total = total + (left @ right.T if exact else _partial(left, right, core)).float()
    return total


def _partial(a: Tensor, b: Tensor, core: TensorCore) -> Tensor:
    """One register's sum, group after group. float64 (m, k), (n, k) -> float64 (m, n)."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    for left, right in _slices(a, b, core.group):
        products = left.T[:, :, None] * right.T[:, None, :]  # (group, m, n)
        if core.joint:
            total = aligned_sum(products, core.bits, core.rounding, carried=total)
        else:
            alone = aligned_sum(products, core.bits, core.rounding)
            total = aligned_sum(alone[None], core.bits, core.rounding, carried=total)
    return total


def _slices(a: Tensor, b: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Both operands in parts of `size` along k, without the parts that hold only zeros."""
    products = a.ne(0).any(dim=0) & b.ne(0).any(dim=0)  # (k,)
    size = min(size, max(len(products), 1))  # a group may be longer than the sum
    at = range(0, len(products), size)
    held = torch.nn.functional.pad(products, (0, -len(products) % size)).view(-1, size).any(dim=1)
    kept = [start for start, alive in zip(at, held.tolist(), strict=True) if alive]
    return [(a[:, start : start + size], b[:, start : start + size]) for start in kept]


def _per_unit(largest: Tensor, bits: int) -> Tensor:
    """1 / 2^(e - bits), a power of two and so exact, e the exponent of `largest`. Zero: any."""
    power = (largest.view(torch.int64) & _EXPONENT).view(torch.float64)
    return 2.0**bits / power.clamp(min=2.0**-900)


def _check(a: Tensor, b: Tensor) -> None:
    real = a.is_floating_point() and b.is_floating_point()
    if real and a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1] and a.device == b.device:
        return
    raise AccumulationError(
        f"{a.dtype} {tuple(a.shape)} on {a.device} and {b.dtype} {tuple(b.shape)} on {b.device} "
        "have no products to sum along k. What came out would not be a @ b^T. Give floating-point "
        "a (m, k) and b (n, k) on one device."
    )
