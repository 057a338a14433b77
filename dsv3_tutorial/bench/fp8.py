"""What FP8 costs and gains: emulated on a CPU, in hardware on a GPU, beside what it is to replace.

CPU: one thread, process CPU time, forms in turn. Emulation is slower than float32, and the question
is how little. Results are compared with float32 before anything is timed, and the error is kept.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import fp8_gpu, fp8_table, host, machine, timing
from dsv3_tutorial.bench.attention_steps import BenchError
from dsv3_tutorial.bench.fp8_table import BF16, FP32, POW2, SCALED_MM
from dsv3_tutorial.fp8 import cpu, gemm, quant
from dsv3_tutorial.fp8.accumulate import HOPPER
from dsv3_tutorial.fp8.linear import DEEPSEEK, Fp8Linear, Scaling
from dsv3_tutorial.receipts import Receipt

NAME = "fp8"
FORMS = {"fp8, float32 scales": Scaling(pow2=False), "fp8, DeepSeek's scales": DEEPSEEK}
WORST = 0.1  # of a result's norm: more is no rounding to four digits
Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Plan:
    """What the CPU part measures, (tokens, n, k) each, and for how long: seconds a cell."""

    linears: tuple[tuple[int, int, int], ...] = ((1024, 1024, 2048), (2048, 512, 1536))
    matrix: tuple[int, int] = (1024, 2048)  # for the quantisers
    product: tuple[int, int, int] = (256, 256, 256)  # PyTorch's takes a second for this one
    repeats: int = 15
    seconds: float = 60.0


QUICK = Plan(((32, 128, 128),), (64, 256), (16, 32, 128), 2, 1.0)


class _PowersOfTwo(torch.autograd.Function):
    """A linear layer whose every scale is a power of two, so that bfloat16 holds each operand."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        dtype = cpu.operand_dtype(True, torch.bfloat16)
        x = cpu.round_trip_tiles(x, pow2=True, dtype=dtype)
        weight = cpu.round_trip_blocks(weight, pow2=True, dtype=dtype)
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        options = {"pow2": True, "dtype": x.dtype}
        dx = cpu.round_trip_tiles(dy, **options) @ weight
        across = cpu.round_trip_tiles(dy, axis=-2, **options).T
        return dx, across @ cpu.round_trip_tiles(x, axis=-2, **options)


def linear_steps(m: int, n: int, k: int, seed: int = 0) -> dict[str, Step]:
    """Forward and backward of one linear layer in every form: () -> (y (m, n), dx, dw)."""
    made = torch.Generator().manual_seed(seed)
    x, weight, dy = (torch.randn(*size, generator=made) for size in ((m, k), (n, k), (m, n)))
    weight *= k**-0.5
    x, weight = x.requires_grad_(), weight.requires_grad_()
    narrow = [t.detach().bfloat16().requires_grad_(t.requires_grad) for t in (x, weight, dy)]
    steps = {
        FP32: _step(torch.nn.functional.linear, x, weight, dy),
        BF16: _step(torch.nn.functional.linear, *narrow),
        POW2: _step(_PowersOfTwo.apply, x, weight, dy),
    }
    for form, scaling in FORMS.items():
        layer = Fp8Linear(k, n, bias=False, scaling=scaling, device="meta")
        layer.weight = torch.nn.Parameter(weight.detach())
        steps[form] = _step(lambda x, _, layer=layer: layer(x), x, layer.weight, dy)
    return steps


def linear_errors(steps: dict[str, Step]) -> dict[str, tuple[float, float, float]]:
    """Each form's distance from float32 as a share of its norm: of y, dx and dw.

    Raises BenchError where one is no rounding but something else.
    """
    exact = steps[FP32]()
    found = {
        form: tuple(_distance(got, want) for got, want in zip(step(), exact))
        for form, step in steps.items()
        if form != FP32
    }
    wrong = [f"{form}: {max(all_):.2f}" for form, all_ in found.items() if not max(all_) < WORST]
    if wrong:
        raise BenchError(
            f"Forms of one linear layer lie {', '.join(wrong)} from float32, and rounding to FP8 "
            "moves a result by 0.04. Their times cannot be compared. Run tests/fp8/test_linear.py."
        )
    return found


def linear_receipts(plan: Plan) -> Iterator[Receipt]:
    """A training linear's time in every form, its ratio to float32, and errors of three draws."""
    for m, n, k in plan.linears:
        at = {"m": m, "n": n, "k": k}
        yield from _error_receipts(
            [linear_errors(linear_steps(m, n, k, seed)) for seed in range(3)], at
        )
        times = _compare(linear_steps(m, n, k), plan)
        for form, stats in times.items():
            shapes = {"form": form, **at}
            yield _receipt("training linear", shapes, stats, "s")
            if form != FP32:
                ratio = _ratio(stats, times[FP32])
                yield _receipt("training linear over float32", shapes, ratio, "x")


def quantiser_receipts(plan: Plan) -> Iterator[Receipt]:
    """Values a second of quantising, of going back, and of both in one; a copy beside them."""
    m, n = plan.matrix
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    codes, scale = quant.quantize_tiles(x)

    def quantise() -> tuple[Tensor, Tensor]:
        return quant.quantize_tiles(x, checked=False)

    runs = {
        "copy": lambda: x.clone(),
        "quantize_tiles": quantise,
        "quantize_tiles, powers of two": lambda: quant.quantize_tiles(x, True, checked=False),
        "quantize_blocks": lambda: quant.quantize_blocks(x, checked=False),
        "dequantize_tiles": lambda: quant.dequantize_tiles(codes, scale),
        "quantize_tiles and back": lambda: quant.dequantize_tiles(*quantise()),
        "cpu.round_trip_tiles": lambda: cpu.round_trip_tiles(x),
        "cpu.round_trip_tiles, down": lambda: cpu.round_trip_tiles(x, axis=-2),
        "cpu.round_trip_blocks": lambda: cpu.round_trip_blocks(x),
        "float8 cast by torch": lambda: codes.float(),
        "cpu.widen": lambda: cpu.widen(codes),
    }
    for form, stats in _compare(runs, plan).items():
        yield _receipt("quantiser", {"form": form, "m": m, "n": n}, _per(m * n, stats), "values/s")


def product_receipts(plan: Plan) -> Iterator[Receipt]:
    """FLOP/s of a scaled product: ours as it should be summed, as Hopper sums it, and PyTorch's."""
    m, n, k = plan.product
    made = torch.Generator().manual_seed(0)
    x, weight = torch.randn(m, k, generator=made), torch.randn(n, k, generator=made)
    tiles, blocks = quant.quantize_tiles(x), quant.quantize_blocks(weight)
    whole = *quant.quantize_tensor(x), *quant.quantize_tensor(weight)
    runs = {
        FP32: lambda: x @ weight.T,
        "fp8.gemm.matmul": lambda: gemm.matmul(*tiles, *blocks),
        "fp8.gemm.matmul, Hopper's sums": lambda: gemm.matmul(*tiles, *blocks, core=HOPPER),
        SCALED_MM: lambda: gemm.matmul(*whole, backend="scaled_mm"),
    }
    for form, stats in _compare(runs, plan).items():
        shapes = {"form": form, "m": m, "n": n, "k": k}
        yield _receipt("scaled product", shapes, _per(2 * m * n * k, stats), "FLOP/s")


def load_receipts(plan: Plan) -> Iterator[Receipt]:
    """How many processes wanted a core: CPU time leaves out their work, not their cache misses."""
    with suppress(OSError, AttributeError):  # not every system keeps it
        load, shapes = timing.summary([os.getloadavg()[0]]), {"cores": host.allowed_cores()}
        yield _receipt("processes that wanted a core", shapes, load, "processes")


def main(argv: list[str] | None = None) -> int:
    """`bench fp8`: measure, keep receipts, print the tables with the targets beside them."""
    parser = argparse.ArgumentParser(prog="dsv3_tutorial bench fp8", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the receipts (default: data/measured)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the benchmark")
    parser.add_argument("--only", choices=("cpu", "gpu"), help="one of the two parts")
    options = parser.parse_args(argv)
    if options.only == "gpu" and not torch.cuda.is_available():
        parser.error("--only gpu: torch sees no CUDA device")
    if options.only != "gpu":
        _cpu(QUICK if options.quick else Plan(), options.out)
    if options.only != "cpu" and torch.cuda.is_available():
        fp8_gpu.run(options.out, options.quick)
    return 0


def _cpu(plan: Plan, folder: Path | None) -> None:
    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for part in (linear_receipts, quantiser_receipts, product_receipts, load_receipts):
            found = list(part(plan))
            path = receipts.append(NAME, found, folder=folder)  # kept, whatever comes after
            rows += found
            print(f"{len(rows)} receipts", flush=True)
    finally:
        torch.set_num_threads(threads)
    print("\n".join(fp8_table.lines(rows)))
    print(path)


def _step(layer: Callable, x: Tensor, weight: Tensor, dy: Tensor) -> Step:
    def run() -> tuple[Tensor, ...]:
        y = layer(x, weight)
        return y.detach(), *torch.autograd.grad(y, (x, weight), dy.to(y.dtype))

    return run


def _error_receipts(draws: list[dict[str, tuple]], at: dict) -> Iterator[Receipt]:
    for form in draws[0]:
        for place, product in enumerate(("y", "dx", "dw")):
            stats = timing.summary([draw[form][place] for draw in draws])
            shapes = {"form": form, "product": product, **at}
            yield _receipt("training linear error", shapes, stats, "of the norm")


def _distance(got: Tensor, want: Tensor) -> float:
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm()).item()


def _compare(runs: dict[str, Callable], plan: Plan) -> dict[str, dict[str, float]]:
    options = {"timer": timing.cpu_timer(), "repeats": plan.repeats, "seconds": plan.seconds}
    return timing.compare(runs, warmup=1, **options)


def _per(work: int, stats: dict[str, float]) -> dict[str, float]:
    """Seconds as work a second; a clock too coarse for the run counts as its own step."""
    rates = {name: work / max(stats[name], 1e-9) for name in ("median", "q1", "q3")}
    return rates | {"q1": rates["q3"], "q3": rates["q1"], "repeats": stats["repeats"]}


def _ratio(stats: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    low, high = stats["q1"] / base["q3"], stats["q3"] / base["q1"]
    repeats = min(stats["repeats"], base["repeats"])
    return {"median": stats["median"] / base["median"], "q1": low, "q3": high, "repeats": repeats}


def _receipt(what: str, shapes: dict, stats: dict[str, float], unit: str) -> Receipt:
    return Receipt(
        what=what,
        shapes=shapes,
        value=stats["median"],
        unit=unit,
        spread={"q1": stats["q1"], "q3": stats["q3"]},
        repeats=int(stats["repeats"]),
        **machine.here(),
    )
