"""Reading an unknown matmul's accumulator from its answers: what it keeps of a sum, and how.

A probe is one dot product of at most 8192 terms. A large term makes small ones vanish, and which of
them vanish shows the width of the accumulator, its rounding, the size of its groups, whether the
running sum is aligned with the products, and how often it is promoted: five probes for all five.
Terms are powers of two, whose factors every E4M3 has, so nothing but the addition can round.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from dsv3_tutorial.fp8.accumulate import ROUNDINGS, TensorCore, matmul_emulated

LONGEST = 8192  # terms of one probe
PROBES = 20
BIG = 2.0**16  # the largest power of two that is a product of two E4M3 values
CHOICES = {
    "bits": tuple(range(8, 21)),
    "group": (4, 8, 16, 32, 64, 128),
    "promote": (None, 128, 256, 512, 1024, 2048, 4096, 8192),
    "rounding": tuple(ROUNDINGS),
    "joint": (True, False),
}


class ProbeError(ValueError):
    """A probe that cannot be asked, or one too many."""


class Chip:
    """An unknown matmul, asked one dot product at a time.

    matmul(a (m, k), b (n, k)) of E4M3 values in float32 -> float32 (m, n). `used` counts the dot
    products asked for; beyond `limit` of them, ProbeError.
    """

    def __init__(self, matmul: Callable[[Tensor, Tensor], Tensor], limit: int | None = None):
        self._matmul, self.limit, self.used = matmul, limit, 0

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b^T as this chip sums it; m * n probes. Raises ProbeError when they are used up."""
        _check_length(a.shape[-1])
        self.used += len(a) * len(b)
        if self.limit is not None and self.used > self.limit:
            raise ProbeError(
                f"{self.limit} probes are used up. On hardware each costs time, so there are no "
                "more. Ask several questions in one sum, or halve an interval."
            )
        return self._matmul(a, b)

    def dot(self, products: Iterable[float]) -> float:
        """The sum of these products as this chip takes it, in this order: one probe.

        Each is zero or a product of two E4M3 values, such as 2^-12 to 2^16. Raises ProbeError.
        """
        a, b = operands(products)
        return float(self.matmul(a, b)[0, 0])


class Engine(Chip):
    """A matmul whose accumulator is drawn from a seed and hidden: find out which it is."""

    def __init__(self, seed: int, limit: int | None = PROBES):
        core = hidden_core(seed)
        super().__init__(lambda a, b: matmul_emulated(a, b, core), limit)
        self.seed = seed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Engine) and self.seed == other.seed

    def __hash__(self) -> int:
        return hash(self.seed)

    def __repr__(self) -> str:
        return f"Engine({self.seed}), {self.used} probes used"


def identify(engine: Chip) -> TensorCore:
    """The accumulator behind an engine, in five probes.

    A large number and its negative cancel; between them, only what the accumulator keeps beside
    the large number survives. First, 23 such pairs of falling size: as many survivors as bits.
    """
    unit, tiny, stride = 2.0**-8, 2.0**-12, [0.0] * 127
    fading = [(2.0**i, unit, -(2.0**i), *stride[2:]) for i in range(15, -8, -1)]
    bits = int(engine.dot(term for part in fading for term in part) / unit)
    big, last = 2.0**16, 2.0 ** (16 - bits)  # what the last bit is worth beside big
    nearest = engine.dot([big, 0.75 * last, -big]) > 0
    survivors = int(engine.dot([big, -big] + [tiny] * 254) / tiny)
    group = 256 - survivors
    together = engine.dot([big] + [0.0] * (group - 1) + [last / 4] * group) == big
    late = engine.dot([big, *stride] + [last / 4, *stride] * 63) - big
    promote = 8192 - 128 * int(late / (last / 4)) if late else None
    return TensorCore(bits, group, promote, "nearest" if nearest else "truncate", together)


def hidden_core(seed: int) -> TensorCore:
    """The accumulator that Engine(seed) hides: one of 2,496, the same for the same seed."""
    draw = random.Random(seed)
    return TensorCore(**{name: draw.choice(values) for name, values in CHOICES.items()})


def every_core() -> list[TensorCore]:
    """All accumulators that an Engine can hide."""
    return [TensorCore(*values) for values in itertools.product(*CHOICES.values())]


def plainest(core: TensorCore) -> TensorCore:
    """The one that stands for all that no probe can tell from `core`.

    A promotion after 8192 terms or more never comes within a probe. Where every group is promoted,
    the running sum is zero whenever it would be aligned. An exact sum has no groups.
    """
    promote = core.promote if core.promote and core.promote < LONGEST else None
    if core.bits is None:
        return TensorCore(bits=None, group=1, promote=promote)
    return replace(core, promote=promote, joint=core.joint or promote == core.group)


def twins() -> list[tuple[TensorCore, ...]]:
    """The hidden accumulators that no probe can tell apart, in classes of two or more."""
    classes: dict[TensorCore, list[TensorCore]] = {}
    for core in every_core():
        classes.setdefault(plainest(core), []).append(core)
    return [tuple(alike) for alike in classes.values() if len(alike) > 1]


def tell_apart(one: TensorCore, other: TensorCore) -> list[float] | None:
    """A short sum that the two answer differently, or None where no probe can tell them apart."""
    if plainest(one) == plainest(other):
        return None
    questions = [question for core in (one, other) for question in _questions(core)]
    for products in sorted(questions, key=len):
        if answer(one, products) != answer(other, products):
            return products
    return None


def answer(core: TensorCore, products: Sequence[float]) -> float:
    """What an accumulator of this kind makes of a sum of products."""
    a, b = operands(products)
    return float(matmul_emulated(a, b, core)[0, 0])


def written(products: Sequence[float]) -> str:
    """A list of products in few characters, as Python reads it: [65536.0] + [0.0] * 31 + [8.0]."""
    runs = [(value, len(list(alike))) for value, alike in itertools.groupby(products)]
    parts: list[str] = []
    for value, count in runs:
        if count == 1 and parts and not parts[-1].endswith(")"):
            parts[-1] = f"{parts[-1][:-1]}, {value!r}]"
        else:
            parts.append(f"[{value!r}]" if count == 1 else f"([{value!r}] * {count})")
    return " + ".join(part.strip("()") for part in parts)


def operands(products: Iterable[float]) -> tuple[Tensor, Tensor]:
    """E4M3 values a, b, float32 (1, k) each, with a * b the given products. Raises ProbeError."""
    wanted, known = list(products), _factors()
    _check_length(len(wanted))
    unknown = [value for value in wanted if value not in known]
    if unknown:
        raise ProbeError(
            f"{unknown[0]!r} is not a product of two E4M3 values, so another sum would be asked "
            "for. Take powers of two from 2**-12 to 2**16, or such a power times 1.5."
        )
    pairs = [known[value] for value in wanted]
    a, b = torch.tensor(pairs, dtype=torch.float32).view(-1, 2).T.contiguous()  # (k,) each
    return a[None], b[None]


def _questions(core: TensorCore) -> list[list[float]]:
    """One sum for each property, as it is asked of an accumulator like `core`."""
    group = min(core.group, LONGEST // 2)  # an answer may hold any number
    promote = min(core.promote or LONGEST, LONGEST) - 1
    last = BIG * 2.0 ** -(core.bits or 23)
    return [
        [BIG, last, -BIG],
        [BIG, 0.75 * last, -BIG],
        [BIG, -BIG] + [0.0] * (group - 2) + [2.0**-12],
        [BIG] + [0.0] * (group - 1) + [last / 4] * max(group, 4),
        [BIG] + [0.0] * promote + [last / 4] * (promote < LONGEST - 1),
    ]


@cache
def _factors() -> dict[float, tuple[float, float]]:
    """Every product of two E4M3 values with two such factors, normal ones where there are."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
    pairs = list(itertools.product(values[8:] + values[:8], repeat=2))  # the first 8 not normal
    found = {x * y: (x, y) for x, y in reversed(pairs)}
    return {-value: (x, -y) for value, (x, y) in found.items()} | found


def _check_length(k: int) -> None:
    if k > LONGEST:
        raise ProbeError(
            f"A probe sums at most {LONGEST} products, got {k}. Longer sums cost more than one "
            "question is worth. Leave terms out."
        )
