"""A decode step of one attention layer: absorbed, expanded again, expanded for good, transformers.

CPU: float32, one thread, process CPU time, forms in turn. All have the same weights and the same
cached tokens, and their outputs are compared before anything is timed.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import attention_gpu, attention_table, machine, timing
from dsv3_tutorial.bench import attention_steps as forms
from dsv3_tutorial.bench.attention_steps import CONFIGS, FORMS, OURS, REBUILT, SMALL, Layer
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost.attention import crossover_queries
from dsv3_tutorial.receipts import Receipt

NAME = "attention"
Stats = dict[str, float]


@dataclass(frozen=True)
class Plan:
    """What the CPU part measures, and how long: `seconds` of wall clock a cell, one round at least.

    limit: bytes that the caches and the largest step of a cell may take together.
    """

    contexts: tuple[int, ...] = (1024, 4096, 8192, 16384)
    batches: tuple[int, ...] = (1, 8)
    short: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)  # where absorbed may lose
    queries: tuple[int, ...] = (16, 64, 128, 192, 256, 384, 512)
    behind: int = 2048  # cached tokens behind those queries
    repeats: int = 7
    short_repeats: int = 61
    seconds: float = 30.0
    limit: float = 6 * 2**30


QUICK = Plan((64, 128, 256), (1, 2), (16, 32), (4, 8), 64, 2, 2, 2.0)


def decode_step_times(
    contexts: Sequence[int], seconds: float, cfg: ModelConfig | None = None, batch: int = 1
) -> dict[str, dict[int, float]]:
    """How one layer's decode step grows with the context, live: {form: {context: seconds}}.

    Medians for the forms "expanded", "reexpanded" and "absorbed", in about `seconds` of wall clock
    altogether, one repeat of each at least. On the GPU in BF16 where there is one, else float32.
    cfg None: the small one of the recorded benchmark.
    """
    place = machine.default_device()
    dtype = torch.bfloat16 if place == "cuda" else torch.float32
    deadline = time.perf_counter() + seconds
    names = ("expanded", "reexpanded", "absorbed")
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    with torch.no_grad():
        layer, timer = Layer(cfg or SMALL, place, dtype, peers=False), timing.timer_for(place)
        for done, context in enumerate(contexts):
            share = (deadline - time.perf_counter()) / (len(contexts) - done)
            started = time.perf_counter()
            steps = layer.steps(context, batch, names)
            forms.check_agreement(steps, forms.TOLERANCE[dtype])
            left = share - (time.perf_counter() - started)
            for name, stats in forms.compare(steps, timer, 1000, left).items():
                found[name][context] = stats["median"]
    return found


def cpu_receipts(name: str, batch: int, layer: Layer, plan: Plan) -> Iterator[Receipt]:
    """Everything about one config and batch on the CPU, as receipts."""
    steps: dict[str, dict[int, Receipt]] = {}
    for context in plan.contexts:
        for receipt in _cell(name, batch, layer, context, plan, FORMS, plan.repeats):
            steps.setdefault(receipt.shapes["form"], {})[context] = receipt
            yield receipt
    for by_context in steps.values():
        if len(by_context) > 1:
            yield _slope_receipt(by_context)
    short: dict[str, dict[int, Receipt]] = {form: {} for form in OURS}
    for context in plan.short:
        for receipt in _cell(name, batch, layer, context, plan, OURS, plan.short_repeats):
            short[receipt.shapes["form"]][context] = receipt
            if context not in plan.contexts:
                yield receipt
    yield from _crossover(short["absorbed"], short["expanded"], "cached tokens")


def query_receipts(name: str, layer: Layer, plan: Plan) -> Iterator[Receipt]:
    """How many new tokens at once make rebuilding the heads cheaper than absorbing."""
    found: dict[str, dict[int, Receipt]] = {"absorbed": {}, REBUILT: {}}
    for queries in plan.queries:
        steps = layer.steps(plan.behind, 1, tuple(found), queries)
        for receipt in _timed(name, 1, steps, plan.behind, plan.repeats, plan.seconds / 4):
            shapes = {**receipt.shapes, "queries": queries}
            receipt = replace(receipt, what="many queries", shapes=shapes)
            found[receipt.shapes["form"]][queries] = receipt
            yield receipt
    yield from _crossover(found["absorbed"], found[REBUILT], "new tokens")


def main(argv: list[str] | None = None) -> int:
    """`bench attention`: measure, keep receipts, print the table with the targets beside it."""
    parser = argparse.ArgumentParser(prog="dsv3_tutorial bench attention", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the receipts (default: data/measured)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the benchmark")
    parser.add_argument("--only", choices=("cpu", "gpu"), help="one of the two parts")
    options = parser.parse_args(argv)
    if options.only == "gpu" and not torch.cuda.is_available():
        parser.error("--only gpu: torch sees no CUDA device")
    if options.only != "gpu":
        _cpu(QUICK if options.quick else Plan(), options.out)
    if options.only != "cpu" and torch.cuda.is_available():
        attention_gpu.run(options.out, options.quick)
    return 0


def _cpu(plan: Plan, folder: Path | None) -> None:
    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for name, cfg in CONFIGS.items():
                layer = Layer(cfg)
                if layer.peer_problem is not None:
                    print(f"transformers is left out: {layer.peer_problem}")
                for batch in plan.batches:
                    rows += cpu_receipts(name, batch, layer, plan)
                    print(f"{name}, batch {batch}: measured", flush=True)
                rows += query_receipts(name, layer, plan)
    finally:
        torch.set_num_threads(threads)
    path = receipts.append(NAME, rows, folder=folder)
    print("\n".join(attention_table.lines(rows)))
    for name, cfg in CONFIGS.items():
        law = crossover_queries(cfg)
        print(f"{name}: by arithmetic alone absorbing loses from {law:.0f} new tokens at once")
    print(path)


def _cell(
    name: str,
    batch: int,
    layer: Layer,
    context: int,
    plan: Plan,
    wanted: Sequence[str],
    repeats: int,
) -> list[Receipt]:
    """All forms at one size, in turn; what does not fit in memory is left out, with a line."""
    fitting = forms.fitting(layer.cfg, context, batch, wanted, plan.limit)
    for form in wanted:
        if form not in fitting:
            size = f"{plan.limit / 2**30:.0f} GiB"
            print(f"{name}, batch {batch}, {context} tokens: {form} left out, over {size} together")
    steps = layer.steps(context, batch, fitting)
    return _timed(name, batch, steps, context, repeats, plan.seconds)


def _timed(
    name: str,
    batch: int,
    steps: dict[str, forms.Step],
    context: int,
    repeats: int,
    seconds: float,
) -> list[Receipt]:
    forms.check_agreement(steps, forms.TOLERANCE[torch.float32])
    times = forms.compare(steps, timing.cpu_timer(), repeats, seconds)
    return [
        _receipt(
            "decode step",
            {
                "config": name,
                "form": form,
                "context": context,
                "batch": batch,
                "cache_bytes": steps[form].cache_bytes,
                "dtype": "float32",
            },
            stats["median"],
            "s",
            {"q1": stats["q1"], "q3": stats["q3"]},
            int(stats["repeats"]),
        )
        for form, stats in times.items()
    ]


def _slope_receipt(by_context: dict[int, Receipt]) -> Receipt:
    found = attention_table.slope({t: r.value for t, r in by_context.items()})
    last = by_context[max(by_context)]
    shapes = {key: last.shapes[key] for key in ("config", "form", "batch", "dtype")}
    # one layer and one sequence: a preallocated cache has room for the new token as well
    shapes["cache_bytes_per_token"] = _bytes_per_token(by_context)
    shapes["contexts"] = sorted(by_context)
    spread = {"min": found.low, "max": found.high}
    repeats = min(r.repeats for r in by_context.values())
    return _receipt("time per cached token", shapes, found.value, "s", spread, repeats)


def _bytes_per_token(by_context: dict[int, Receipt]) -> int:
    few, many = min(by_context), max(by_context)
    held = [by_context[t].shapes["cache_bytes"] for t in (few, many)]
    return (held[1] - held[0]) // (many - few) // by_context[few].shapes["batch"]


def _crossover(ours: dict[int, Receipt], other: dict[int, Receipt], unit: str) -> Iterator[Receipt]:
    """Where the two take equally long, if each is the faster somewhere by more than the spread."""
    mine, theirs = ({size: r.value for size, r in rows.items()} for rows in (ours, other))
    found = attention_table.crossing(mine, theirs)
    if found is None or not (_ahead(ours, other) and _ahead(other, ours)):
        return
    last = max(mine)
    forms_ = ours[last].shapes["form"], other[last].shapes["form"]
    shapes = {key: ours[last].shapes[key] for key in ("config", "batch", "dtype")}
    shapes |= {"form": forms_[0], "against": forms_[1]}
    shapes["faster"] = forms_[mine[last] > theirs[last]]  # beyond the crossover
    spread = {"min": found.low, "max": found.high}
    repeats = min(r.repeats for r in ours.values())
    yield _receipt("crossover", shapes, found.value, unit, spread, repeats)


def _ahead(ours: dict[int, Receipt], other: dict[int, Receipt]) -> bool:
    """Whether `ours` is the faster at some size, its upper quartile below the other's lower."""
    return any(r.spread["q3"] < other[size].spread["q1"] for size, r in ours.items())


def _receipt(
    what: str, shapes: dict, value: float, unit: str, spread: dict[str, float], repeats: int
) -> Receipt:
    return Receipt(
        what=what,
        shapes=shapes,
        value=value,
        unit=unit,
        spread=spread,
        repeats=repeats,
        **machine.here(),
    )
