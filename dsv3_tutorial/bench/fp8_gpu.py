"""FP8 on a GPU, over the shapes of DeepSeek-V3's layers: quantising, products, training linears.

CUDA events, the L2 cache emptied before each run, contestants in turn, medians. The ceilings come
first: a copy, BF16 and per-tensor FP8 products of up to 8192 a side.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import fp8_forms as forms
from dsv3_tutorial.bench import machine, timing
from dsv3_tutorial.bench.attention_gpu import Device
from dsv3_tutorial.bench.fp8_table import BF16
from dsv3_tutorial.fp8 import engine, quant
from dsv3_tutorial.receipts import Receipt


@dataclass(frozen=True)
class Sizes:
    """Weights (k, n), rows m, whole linears (m, k, n), and matrices to quantise (m, n)."""

    weights: tuple[tuple[int, int], ...] = (
        (7168, 2048),
        (2048, 7168),
        (7168, 18432),
        (1536, 24576),
        (512, 32768),
        (16384, 7168),
    )
    rows: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
    linears: tuple[tuple[int, int, int], ...] = (
        (4096, 7168, 2048),
        (8192, 7168, 18432),
        (16384, 4096, 16384),
    )
    matrices: tuple[tuple[int, int], ...] = ((1024, 7168), (8192, 7168), (16384, 7168))
    ceilings: float = 8.0  # seconds
    repeats: int = 31
    seconds: float = 1.5  # a cell


QUICK = Sizes(((7168, 2048),), (64, 4096), ((4096, 7168, 2048),), ((8192, 7168),), 4.0, 5, 0.5)


def run(folder: Path | None, quick: bool = False) -> None:
    """Measure on the CUDA device, print as it goes, keep what was measured cell by cell."""
    sizes = QUICK if quick else Sizes()
    ceilings = machine.measure(sizes.ceilings, "cuda")
    print("\n".join(machine.lines(ceilings)))
    print(record(sizes, Device("cuda", timing.gpu_timer(), ceilings), folder))


def record(sizes: Sizes, device: Device, folder: Path | None) -> Path:
    """The ceilings and the three tables, each cell kept as soon as it is measured."""
    path = receipts.append("fp8", machine.as_receipts(device.ceilings), folder=folder)
    print(f"Transformer Engine: {engine.problem() or 'runs here'}")
    parts = chain(quantiser_rows(sizes, device), product_rows(sizes, device))
    for rows in chain(parts, linear_rows(sizes, device)):
        for row in rows:
            print(words(row), flush=True)
        path = receipts.append("fp8", rows, folder=folder) if rows else path
    return path


def quantiser_rows(sizes: Sizes, device: Device) -> Iterator[list[Receipt]]:
    """Bytes a second of quantising BF16: 2 read and 1 written a value, and the scales."""
    for m, n in sizes.matrices:
        yield _unless_full(f"quantising {m} x {n}", quantiser_cell, m, n, sizes, device)


def quantiser_cell(m: int, n: int, sizes: Sizes, device: Device) -> list[Receipt]:
    """Tiles and blocks, and a plain copy of as many bytes, at one size."""
    x = _random(device, m, n)
    unchecked = {"checked": False}  # as in training: a check would wait for the device
    tried = {
        "tiles": lambda: quant.quantize_tiles(x, **unchecked),
        "tiles, powers of two": lambda: quant.quantize_tiles(x, True, **unchecked),
        "blocks": lambda: quant.quantize_blocks(x, **unchecked),
    }
    tried = forms.that_run(tried)
    moved = {form: sum(_bytes(t) for t in (x, *made)) for form, (_, made) in tried.items()}
    runs = {form: run for form, (run, _) in tried.items()}
    half = torch.empty(3 * m * n // 2, dtype=torch.uint8, device=device.place)
    target = torch.empty_like(half)
    runs["copy"], moved["copy"] = lambda: target.copy_(half), 2 * _bytes(half)
    shapes, ceiling = {"m": m, "n": n, "dtype": "bfloat16"}, device.ceilings.copy.value
    times = _compare(runs, sizes, device)
    return [
        _rate("quantiser", {"form": form, **shapes}, stats, moved[form], "B/s", device, ceiling)
        for form, stats in times.items()
    ]


def product_rows(sizes: Sizes, device: Device) -> Iterator[list[Receipt]]:
    """Products (m, k) x (k, n) in every form, with and without quantising x; weights are ready."""
    for k, n in sizes.weights:
        for m in sizes.rows:
            where = f"{m} rows times {k} x {n}"
            yield _unless_full(where, product_cell, m, k, n, sizes, device)


def product_cell(m: int, k: int, n: int, sizes: Sizes, device: Device) -> list[Receipt]:
    """Seconds of every form that runs, and FLOP/s as a share of the ceiling of its format."""
    x, weight = _random(device, m, k), _random(device, n, k) * k**-0.5
    with torch.no_grad():
        wanted = x @ weight.T
        tried = forms.that_run(forms.product_forms(x, weight))
        runs = {form: run for form, (run, out) in tried.items() if forms.agrees(form, out, wanted)}
        times = _compare(runs, sizes, device)
    found = []
    for form, stats in times.items():
        shapes = {"form": form, "m": m, "n": n, "k": k}
        found.append(_seconds("product", shapes, stats, device))
        ceiling = device.ceilings.matrix.get("bf16" if form == BF16 else "fp8")
        name = None if ceiling is None else f"matmul {'bf16' if form == BF16 else 'fp8'}"
        value = None if ceiling is None else ceiling.value
        rate = _rate("product", shapes, stats, 2 * m * n * k, "FLOP/s", device, value, name)
        found.append(rate)
    return found


def linear_rows(sizes: Sizes, device: Device) -> Iterator[list[Receipt]]:
    """Forward and backward of a training linear, weights quantised in each, as a list a size."""
    for m, k, n in sizes.linears:
        where = f"linear of {m} rows, {k} x {n}"
        yield _unless_full(where, linear_cell, m, k, n, sizes, device)


def linear_cell(m: int, k: int, n: int, sizes: Sizes, device: Device) -> list[Receipt]:
    """Seconds of forward and backward in every form that runs and agrees with BF16."""
    x, weight, dy = _random(device, m, k), _random(device, n, k) * k**-0.5, _random(device, m, n)
    x.requires_grad_()
    layers = forms.linear_layers(weight)
    wanted = forms.both_ways(layers[BF16], x, dy)()
    tried = forms.that_run({form: forms.both_ways(layer, x, dy) for form, layer in layers.items()})
    runs = {
        form: run
        for form, (run, outs) in tried.items()
        if all(forms.agrees(form, out, want) for out, want in zip(outs, wanted))
    }
    shapes = {"m": m, "n": n, "k": k, "dtype": "bfloat16"}
    return [
        _seconds("training linear", {"form": form, **shapes}, stats, device)
        for form, stats in _compare(runs, sizes, device).items()
    ]


def words(r: Receipt) -> str:
    """One receipt, one aligned line."""
    s = r.shapes
    at = f"{s['m']:>6} x {s['n']:<6}" + (f"k {s['k']:<6}" if "k" in s else " " * 8)
    powers = {"s": (1e6, "us"), "B/s": (1e-9, "GB/s"), "FLOP/s": (1e-12, "TFLOP/s")}
    factor, unit = powers[r.unit]
    share = f"  {r.fraction:.0%} of measured {r.ceiling}" if r.ceiling else ""
    return f"{r.what:<16}{at}{s['form']:<38}{r.value * factor:>10.1f} {unit:<8}{share}"


def _unless_full(where: str, cell: Callable[..., list[Receipt]], *given: Any) -> list[Receipt]:
    try:
        return cell(*given)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        print(f"{where}: left out, out of memory")
        return []


def _compare(
    runs: dict[str, Callable], sizes: Sizes, device: Device
) -> dict[str, dict[str, float]]:
    options = {"timer": device.timer, "repeats": sizes.repeats, "seconds": sizes.seconds}
    return timing.compare(runs, **options) if runs else {}


def _random(device: Device, *size: int) -> Tensor:
    return torch.empty(size, device=device.place, dtype=torch.bfloat16).normal_()


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


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


def _rate(
    what: str,
    shapes: dict,
    stats: dict[str, float],
    work: int,
    unit: str,
    device: Device,
    ceiling: float | None,
    name: str | None = "copy",
) -> Receipt:
    """A run as work a second, and as a share of the measured ceiling where there is one."""
    timed, value = _seconds(what, shapes, stats, device), work / stats["median"]
    spread = {"q1": work / stats["q3"], "q3": work / stats["q1"]}
    rate = replace(timed, value=value, unit=unit, spread=spread)
    return rate if ceiling is None else replace(rate, ceiling=name, fraction=value / ceiling)
