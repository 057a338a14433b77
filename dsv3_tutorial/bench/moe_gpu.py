"""Grouped products and whole expert layers on a GPU, as fractions of what the device can do.

CUDA events, the L2 cache emptied before each run, medians. Our Triton kernels beside PyTorch's
grouped_mm, and every engine of a layer beside transformers'. BF16, DeepSeek-V3's expert sizes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import machine, timing
from dsv3_tutorial.bench.attention_gpu import Device
from dsv3_tutorial.bench.moe_layer import (
    ENGINES,
    PEERS,
    Layer,
    Size,
    check_agreement,
    measure,
)
from dsv3_tutorial.moe.grouped import Multiply, grouped_mm, grouped_mm_problem
from dsv3_tutorial.receipts import Receipt

TRITON, TORCH = "triton", "grouped_mm"
PASSES = ("forward", "input gradient", "weight gradient")


@dataclass(frozen=True)
class Sizes:
    """Grouped products (experts, n, k, and rows of an expert) and whole layers."""

    experts: tuple[int, ...] = (8, 32, 256)
    matrices: tuple[tuple[int, int], ...] = ((4096, 7168), (7168, 2048))
    rows: tuple[int, ...] = (1, 16, 64, 256, 1024, 4096)
    most_rows: int = 2**17  # over all experts
    layers: tuple[Size, ...] = (
        Size(32, 8, 8192, 7168, 2048),
        Size(64, 8, 256, 2048, 1408),
        Size(64, 8, 8192, 2048, 1408),
    )
    repeats: int = 21
    seconds: float = 2.0  # a cell


QUICK = Sizes((8,), ((4096, 7168),), (16, 1024), 2**14, (Size(64, 8, 256, 2048, 1408),), 5, 0.5)


def run(folder: Path | None, quick: bool = False) -> None:
    """Measure on the CUDA device, print as it goes, keep what was measured cell by cell."""
    ceilings = machine.measure(4.0, "cuda")
    device = Device("cuda", timing.gpu_timer(), ceilings)
    print("\n".join(machine.lines(ceilings)))
    print(record(QUICK if quick else Sizes(), device, folder))


def record(sizes: Sizes, device: Device, folder: Path | None) -> Path | None:
    """Both tables, each cell kept as soon as it is measured; the file, None if nothing fitted."""
    path = None
    for rows in chain(product_rows(sizes, device), layer_rows(sizes, device)):
        for row in rows:
            print(words(row), flush=True)
        path = receipts.append("moe", rows, folder=folder) if rows else path
    return path


def product_rows(sizes: Sizes, device: Device) -> Iterator[list[Receipt]]:
    """The three products of a grouped linear layer at every size that fits, a list a cell."""
    for experts in sizes.experts:
        for matrix in sizes.matrices:
            for rows in sizes.rows:
                if rows * experts <= sizes.most_rows:
                    cell = (experts, *matrix, rows, sizes, device)
                    where = f"{experts} experts of {matrix}, {rows} rows each"
                    yield _unless_out_of_memory(where, lambda cell=cell: product_cell(*cell))


def product_cell(
    experts: int, n: int, k: int, rows: int, sizes: Sizes, device: Device
) -> list[Receipt]:
    """Our kernels and PyTorch's at one size: seconds, and FLOP/s over the measured ceiling."""
    counts = torch.multinomial(torch.ones(experts), rows * experts, replacement=True)
    ends = counts.bincount(minlength=experts).cumsum(0).to(device.place, torch.int32)
    options = {"device": device.place, "dtype": torch.bfloat16}
    x = torch.empty(rows * experts, k, **options).normal_()
    weight = torch.empty(experts, n, k, **options).normal_()
    grad = torch.empty(rows * experts, n, **options).normal_()
    forms = {name: _passes(multiply, x, weight, ends, grad) for name, multiply in _multiplies(x)}
    shapes = {"experts": experts, "n": n, "k": k, "rows_per_expert": rows, "dtype": "bfloat16"}
    found = []
    for passed in PASSES:
        runs = {name: passes[passed] for name, passes in forms.items()}
        check_agreement({name: lambda run=run: (run(),) for name, run in runs.items()}, 0.05)
        options = {"timer": device.timer, "repeats": sizes.repeats, "seconds": sizes.seconds}
        for form, stats in timing.compare(runs, **options).items():
            timed = _seconds(
                "grouped product", {"form": form, "pass": passed, **shapes}, stats, device
            )
            found += [timed, _rate(timed, 2 * rows * experts * n * k, device)]
    return found


def layer_rows(sizes: Sizes, device: Device) -> Iterator[list[Receipt]]:
    """All engines of whole expert layers against transformers', BF16: receipts as on the CPU."""
    for size in sizes.layers:
        yield _unless_out_of_memory(str(size), lambda size=size: layer_cell(size, sizes, device))


def layer_cell(size: Size, sizes: Sizes, device: Device) -> list[Receipt]:
    """Every form at one size, forward alone and with the backward pass."""
    layer = Layer(size, device.place, torch.bfloat16)
    if layer.peer_problem is not None:
        print(f"transformers is left out: {layer.peer_problem}")
    found = measure(layer, (*ENGINES, *PEERS), device.timer, sizes.repeats, 2 * sizes.seconds)
    shapes = {"experts": size.experts, "top_k": size.top_k, "tokens": size.tokens}
    shapes |= {"hidden": size.hidden, "width": size.width, "dtype": "bfloat16"}
    return [
        _seconds("experts", {"form": form, "pass": passed, **shapes}, stats, device)
        for passed, times in found.items()
        for form, stats in times.items()
    ]


def words(r: Receipt) -> str:
    """One receipt, one aligned line."""
    shapes = r.shapes
    at = f"{shapes['experts']:>4} experts  "
    if "n" in shapes:
        at += f"{shapes['n']:>5} x {shapes['k']:<5}{shapes['rows_per_expert']:>6} rows each  "
    else:
        at += f"top {shapes['top_k']} of {shapes['tokens']:>6} tokens  "
    powers = {"s": (1e6, "us"), "FLOP/s": (1e-12, "TFLOP/s")}
    factor, unit = powers[r.unit]
    share = f"  {r.fraction:.0%} of measured {r.ceiling}" if r.ceiling else ""
    return f"{at}{shapes['form']:<26}{shapes['pass']:<22}{r.value * factor:>10.1f} {unit:<8}{share}"


def _multiplies(x: Tensor) -> Iterator[tuple[str, Multiply]]:
    """Ours, and PyTorch's where it takes this tensor."""
    from dsv3_tutorial.moe.triton_grouped import grouped_matmul

    yield TRITON, grouped_matmul
    if grouped_mm_problem(x) is None:
        yield TORCH, grouped_mm


def _passes(
    multiply: Multiply, x: Tensor, weight: Tensor, ends: Tensor, grad: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """The three products, each alone: a gradient is asked of a graph that is there already."""
    to_x, to_weight = (t.detach().requires_grad_() for t in (x, weight))
    of_x, of_weight = multiply(to_x, weight, ends), multiply(x, to_weight, ends)
    kept = {"retain_graph": True}
    return {
        "forward": lambda: multiply(x, weight, ends),
        "input gradient": lambda: torch.autograd.grad(of_x, to_x, grad, **kept)[0],
        "weight gradient": lambda: torch.autograd.grad(of_weight, to_weight, grad, **kept)[0],
    }


def _unless_out_of_memory(where: str, cell: Callable[[], list[Receipt]]) -> list[Receipt]:
    try:
        return cell()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        print(f"{where}: left out, out of memory")
        return []


def _seconds(what: str, shapes: dict, stats: dict[str, float], device: Device) -> Receipt:
    return Receipt(
        what=what,
        shapes=shapes,
        value=stats["median"],
        unit="s",
        spread={"q1": stats["q1"], "q3": stats["q3"]},
        repeats=int(stats["repeats"]),
        **machine.here(device.place),
    )


def _rate(timed: Receipt, flops: int, device: Device) -> Receipt:
    """The same run as FLOP/s, and as a share of the measured matrix product where there is one."""
    low, high = (flops / timed.spread[name] for name in ("q3", "q1"))
    value, ceiling = flops / timed.value, device.ceilings.matrix.get("bf16")
    rate = replace(timed, value=value, unit="FLOP/s", spread={"q1": low, "q3": high})
    if ceiling is None:
        return rate
    return replace(rate, ceiling="matmul bf16", fraction=value / ceiling.value)
