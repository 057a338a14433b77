"""When eight bits pay on a CPU: products of M rows with one weight, by every path there is.

Weights are met in turn, so many that each comes from memory and not from a cache, as a layer's do
in a model that is larger than the cache. M rows, side x side weights.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_tutorial.bench import timing
from dsv3_tutorial.weights import cpu
from dsv3_tutorial.weights.formats import Quantized, quantize

Multiply = Callable[[Tensor], Tensor]
PLAIN = "float32"
CHOSEN = "int8 chosen"  # what weights.cpu.product takes for the size


def multiplies(weight: Tensor) -> dict[str, Multiply]:
    """Each path's product with weight (m, k), x (M, k) float32 -> (M, m)."""
    q, narrow = quantize(weight, "int8"), weight.bfloat16()
    made: dict[str, Multiply] = {
        PLAIN: lambda x: F.linear(x, weight),
        "bf16": lambda x: F.linear(x.bfloat16(), narrow),
        "int8 weight-only": cpu._int8_bf16(q),
        "int8 _int_mm": _integers(q),
        CHOSEN: cpu.product(q).multiply,
        "int4": cpu.product(quantize(weight, "int4")).multiply,
    }
    if cpu.fbgemm_is_here():
        made["int8 fbgemm"] = cpu._int8(q)
    return made


def _integers(q: Quantized) -> Multiply:
    """`torch._int_mm`, inputs scaled token by token."""
    codes, scale = q.codes.T, q.scale

    def run(x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True).clamp_min(cpu.TINIEST)
        rounded = (x * (127 / largest)).round().to(torch.int8)
        return torch._int_mm(rounded, codes).float() * (largest / 127) * scale

    return run


def streams(side: int, streamed: int) -> dict[str, list[Multiply]]:
    """Each path's products with as many square weights as take `streamed` bytes in float32."""
    numbers, every = torch.Generator().manual_seed(side), {}
    for _ in range(max(1, streamed // (4 * side * side))):
        weight = torch.randn(side, side, generator=numbers)
        for name, multiply in multiplies(weight).items():
            every.setdefault(name, []).append(multiply)
    return every


def compare(
    every: dict[str, list[Multiply]], side: int, rows: int, repeats: int, seconds: float
) -> dict[str, dict[str, float]]:
    """Seconds of one product of `rows` rows by each path; a run goes through all weights once."""
    x = torch.randn(rows, side, generator=torch.Generator().manual_seed(rows))
    runs = {name: _through(each, x) for name, each in every.items() if _works(each[0], x)}
    found = timing.compare(runs, repeats=repeats, warmup=1, seconds=seconds)
    count, keys = len(every[PLAIN]), ("median", "q1", "q3", "min", "max")
    return {n: {**s, **{key: s[key] / count for key in keys}} for n, s in found.items()}


def _through(every: list[Multiply], x: Tensor) -> Callable[[], None]:
    def run() -> None:
        for multiply in every:
            multiply(x)

    return run


def _works(multiply: Multiply, x: Tensor) -> bool:
    """Some versions of `_int_mm` want more rows."""
    try:
        multiply(x)
    except RuntimeError:
        return False
    return True
