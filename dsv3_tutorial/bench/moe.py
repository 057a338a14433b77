"""Experts and whole models against transformers': four engines, and what sparsity costs when small.

CPU: float32, one thread, process CPU time, forms in turn. All have the same weights and the same
routing, and results and gradients are compared before anything is timed.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import attention_steps, machine, moe_gpu, moe_table, timing
from dsv3_tutorial.bench.moe_layer import DENSE, ENGINES, PEERS, Layer, Size, measure
from dsv3_tutorial.bench.moe_model import CONFIGS, PRESET, Pair
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.receipts import Receipt

NAME = "moe"
PARTS = ("layers", "growth", "rows", "decode", "training")


@dataclass(frozen=True)
class Plan:
    """What the CPU part measures, and how long: `seconds` of wall clock a cell, one round at least.

    The first three layers route equally many rows: they say what more experts cost.
    """

    layers: tuple[Size, ...] = (
        Size(16, 4, 2048),
        Size(32, 4, 2048),
        Size(64, 8, 1024),
        Size(64, 8, 256),
    )
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # of an expert, on average
    crossed: tuple[Size, ...] = (Size(16, 4, 0, 256, 32), Size(16, 4, 0, 512, 256))
    decoded: tuple[tuple[str, int], ...] = (
        *(("small", context) for context in (512, 2048, 8192)),
        *(("small preset", context) for context in (512, 2048, 8192)),
        ("v3-like", 8192),
    )
    trained: tuple[int, int] = (8, 256)  # sequences and their length
    repeats: int = 7
    short_repeats: int = 31
    seconds: float = 30.0
    short_seconds: float = 3.0


QUICK = Plan(
    (Size(4, 2, 32, 32, 16), Size(8, 2, 32, 32, 16), Size(16, 2, 32, 32, 16)),
    (1, 4),
    (Size(4, 2, 0, 32, 16),),
    (("small preset", 32),),
    (2, 16),
    2,
    2,
    2.0,
    1.0,
)


def engine_times(
    rows: Sequence[int], seconds: float, size: Size | None = None
) -> dict[str, dict[int, float]]:
    """How long the engines take by rows per expert, live: {engine: {rows: seconds}}, forward only.

    Every engine that runs here and "dense", one MLP of the activated width, in about `seconds` of
    wall clock altogether, one repeat of each at least. size None: the experts of our `small`.
    """
    place = machine.default_device()
    dtype = torch.bfloat16 if place == "cuda" else torch.float32
    size = size or _experts_of(PRESET)
    deadline, timer = time.perf_counter() + seconds, timing.timer_for(place)
    found: dict[str, dict[int, float]] = {}
    for done, count in enumerate(rows):
        share = (deadline - time.perf_counter()) / (len(rows) - done)
        layer = Layer(_with_rows(size, count), place, dtype)
        forms = layer.forms((*ENGINES, DENSE))
        with torch.no_grad():
            runs = {form: layer.forward(form) for form in forms}
            options = {"timer": timer, "repeats": 100, "warmup": 1, "seconds": share}
            for form, stats in timing.compare(runs, **options).items():
                found.setdefault(form, {})[count] = stats["median"]
    return found


def layer_receipts(plan: Plan) -> Iterator[Receipt]:
    """One layer's experts at full size, all forms, forward alone and with the backward pass."""
    for size in plan.layers:
        yield from _cell(size, (*ENGINES, DENSE, *PEERS), plan.repeats, plan.seconds)


def growth_receipts(rows: Sequence[Receipt], plan: Plan) -> Iterator[Receipt]:
    """What the first cell's work costs with the third cell's number of experts: times as much."""
    few, many = plan.layers[0], plan.layers[2]
    timed = {(_size_of(r), r.shapes["pass"], r.shapes["form"]): r for r in rows}
    for (size, passed, form), before in timed.items():
        after = timed.get((many, passed, form))
        if size != few or after is None or form == DENSE:
            continue
        shapes = {"form": form, "pass": passed, "from": few.experts, "to": many.experts}
        shapes |= {"rows": few.tokens * few.top_k, "dtype": "float32"}
        low = after.spread["q1"] / before.spread["q3"]
        high = after.spread["q3"] / before.spread["q1"]
        stats = {"median": after.value / before.value, "q1": low, "q3": high}
        repeats = min(before.repeats, after.repeats)
        yield _receipt("cost growth", shapes, stats | {"repeats": repeats}, "x")


def crossover_receipts(plan: Plan) -> Iterator[Receipt]:
    """Engines by rows per expert, and the dense MLP that does the same arithmetic."""
    forms = (*ENGINES, DENSE, *PEERS)
    for size in plan.crossed:
        for count in plan.rows:
            sized = _with_rows(size, count)
            for receipt in _cell(sized, forms, plan.short_repeats, plan.short_seconds):
                shapes = {**receipt.shapes, "rows_per_expert": count}
                yield replace(receipt, what="experts by rows", shapes=shapes)


def decode_receipts(plan: Plan) -> Iterator[Receipt]:
    """A whole model's decode step behind so many cached tokens, batch 1."""
    pairs: dict[str, Pair] = {}
    with torch.no_grad():
        for config, context in plan.decoded:
            if config not in pairs:
                pairs = {config: Pair(CONFIGS[config])}  # one at a time in memory
            steps = pairs[config].decode_steps(context)
            attention_steps.check_agreement(steps, 1e-4)
            options = timing.cpu_timer(), plan.short_repeats, plan.seconds
            for form, stats in attention_steps.compare(steps, *options).items():
                shapes = {"config": config, "form": form, "context": context, "batch": 1}
                shapes |= {"cache_bytes": steps[form].cache_bytes, "dtype": "float32"}
                yield _receipt("model decode step", shapes, stats, "s")


def training_receipts(plan: Plan, cfg: ModelConfig = PRESET) -> Iterator[Receipt]:
    """A training step of our `small`, forward, backward and AdamW, in tokens a second."""
    batch, length = plan.trained
    steps = Pair(cfg).training_steps(batch, length)
    _check_losses({form: float(step()) for form, step in steps.items()})
    options = {"timer": timing.cpu_timer(), "repeats": plan.repeats, "seconds": plan.seconds}
    for form, stats in timing.compare(steps, warmup=0, **options).items():
        tokens = batch * length
        rates = {"median": tokens / stats["median"], "q1": tokens / stats["q3"]}
        rates |= {"q3": tokens / stats["q1"], "repeats": stats["repeats"]}
        shapes = {"config": "small preset", "form": form, "batch": batch, "length": length}
        yield _receipt("model training step", shapes | {"dtype": "float32"}, rates, "tokens/s")


def main(argv: list[str] | None = None) -> int:
    """`bench moe`: measure, keep receipts, print the tables with the targets beside them."""
    parser = argparse.ArgumentParser(prog="dsv3_tutorial bench moe", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the receipts (default: data/measured)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the benchmark")
    parser.add_argument("--only", choices=("cpu", "gpu"), help="one of the two parts")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of the CPU's")
    options = parser.parse_args(argv)
    if options.only == "gpu" and not torch.cuda.is_available():
        parser.error("--only gpu: torch sees no CUDA device")
    if options.only != "gpu":
        _cpu(QUICK if options.quick else Plan(), options.out, options.parts)
    if options.only != "cpu" and torch.cuda.is_available():
        moe_gpu.run(options.out, options.quick)
    return 0


def _cpu(plan: Plan, folder: Path | None, wanted: Sequence[str] = PARTS) -> None:
    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], Iterator[Receipt]]] = {
        "layers": lambda: layer_receipts(plan),
        "growth": lambda: growth_receipts([r for r in rows if r.what == "experts"], plan),
        "rows": lambda: crossover_receipts(plan),
        "decode": lambda: decode_receipts(plan),
        "training": lambda: training_receipts(plan),
    }
    try:
        for name in (name for name in parts if name in wanted):
            found = list(parts[name]())
            path = receipts.append(NAME, found, folder=folder)  # kept, whatever comes after
            rows += found
            print(f"{len(rows)} receipts", flush=True)
    finally:
        torch.set_num_threads(threads)
    print("\n".join(moe_table.lines(rows)))
    print(path)


def _cell(size: Size, wanted: Sequence[str], repeats: int, seconds: float) -> list[Receipt]:
    layer = Layer(size)
    if layer.peer_problem is not None:
        print(f"transformers is left out: {layer.peer_problem}")
    found = measure(layer, wanted, timing.cpu_timer(), repeats, seconds)
    return [
        _receipt("experts", _shapes(size, form, passed), stats, "s")
        for passed, times in found.items()
        for form, stats in times.items()
    ]


def _shapes(size: Size, form: str, passed: str) -> dict:
    shapes = {"form": form, "pass": passed, "experts": size.experts, "top_k": size.top_k}
    shapes |= {"tokens": size.tokens, "hidden": size.hidden, "width": size.width}
    return shapes | {"dtype": "float32"}


def _size_of(r: Receipt) -> Size:
    return Size(*(r.shapes[name] for name in ("experts", "top_k", "tokens", "hidden", "width")))


def _experts_of(cfg: ModelConfig) -> Size:
    sizes = cfg.n_routed_experts, cfg.num_experts_per_tok, 0
    return Size(*sizes, cfg.hidden_size, cfg.moe_intermediate_size)


def _with_rows(size: Size, rows: int) -> Size:
    """The size with so many tokens that an expert has `rows` on average, one token at least."""
    return replace(size, tokens=max(1, rows * size.experts // size.top_k))


def _check_losses(losses: dict[str, float]) -> None:
    first = next(iter(losses.values()))
    wrong = [f"{form}: {loss}" for form, loss in losses.items() if abs(loss - first) > 1e-4]
    if wrong:
        raise attention_steps.BenchError(
            f"The losses of equal weights differ from ours, {first} ({', '.join(wrong)}). Their "
            "times cannot be compared. Run tests/test_model.py, which says where they part."
        )


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
