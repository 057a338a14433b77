"""The engines' receipts on a CPU, part by part: see `bench.inference` for what each one holds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import correlation, linear_regression

import torch

from dsv3_tutorial.bench import (
    inference_model,
    inference_rows,
    inference_serve,
    inference_spec,
    inference_text,
    inference_timing,
    machine,
)
from dsv3_tutorial.bench.attention_steps import check_agreement
from dsv3_tutorial.bench.attention_table import slope
from dsv3_tutorial.bench.inference_model import PEERS, PLAIN, Engines
from dsv3_tutorial.bench.inference_plan import Cell, Plan
from dsv3_tutorial.receipts import Receipt


def step_receipts(engines: Engines, cells: Sequence[Cell], plan: Plan) -> Iterator[Receipt]:
    """Every form's decode step in every cell, equal logits asserted; then lines through them."""
    found: list[Receipt] = []
    timed = plan.repeats, plan.seconds, plan.burst
    with torch.inference_mode():
        for batch, context, forms in cells:
            made = engines.steps(context, batch, forms)
            check_agreement({f: e for f, e in made.items() if f in (PLAIN, *PEERS)}, 1e-4)
            for form, stats in inference_timing.compare(made, *timed).items():
                engine = made[form]
                shapes = {"model": engines.name, "form": form, "batch": batch, "context": context}
                shapes |= {"weight_bytes": engine.weight_bytes, "cache_bytes": engine.cache_bytes}
                shapes |= {"working_bytes": inference_timing.working_bytes(engine)}
                found.append(_receipt("decode step", shapes, stats, "s"))
    yield from found
    yield from line_receipts(found)


def line_receipts(rows: Sequence[Receipt]) -> Iterator[Receipt]:
    """t = a + b L through the steps of one form at batch 1, from four contexts on."""
    times: dict[tuple[str, str], dict[int, float]] = {}
    for r in (r for r in rows if r.what == "decode step" and r.shapes["batch"] == 1):
        key = r.shapes["model"], r.shapes["form"]
        times.setdefault(key, {})[r.shapes["context"]] = r.value
    for (model, form), at in times.items():
        if len(at) < 4:
            continue
        found, lengths = slope(at), sorted(at)
        seconds = [at[length] for length in lengths]
        shapes = {"model": model, "form": form, "batch": 1, "contexts": lengths}
        shapes |= {"fixed_s": linear_regression(lengths, seconds).intercept}
        shapes |= {"r2": correlation(lengths, seconds) ** 2}
        spread = {"min": found.low, "max": found.high}
        yield _made("time per cached token", shapes, found.value, "s", spread, len(at))


def generation_receipts(engines: Engines, plan: Plan) -> Iterator[Receipt]:
    """Whole calls of `generate`, ours and transformers'."""
    drafting = inference_model.trained(mtp=True)
    for batch, new in plan.generated:
        timed = plan.repeats, 2 * plan.seconds
        args = engines, drafting, batch, new, plan.narrow, *timed
        for form, (stats, same) in inference_serve.generation(*args).items():
            shapes = {"model": "trained", "form": form, "batch": batch, "new_tokens": new}
            shapes |= {"prompt": inference_text.PROMPT, "same": same}
            yield _receipt("generation", shapes, stats, "tokens/s")


def speculation_receipts(plan: Plan) -> Iterator[Receipt]:
    """Plain and speculative decoding by batch, what passes cost, and the law beside the gain."""
    model, pairs = inference_model.trained(mtp=True), []
    for batch in plan.batches:
        drafts = plan.more_drafts if batch == 1 else plan.drafts
        timed = plan.repeats, plan.seconds
        costs = inference_spec.pass_costs(model, batch, max(drafts) + 1, *timed)
        for name, stats in costs.items():
            of, queries = ("draft" if "draft" in name else "pass"), int(name.split()[-1])
            shapes = {"model": "trained", "batch": batch, "queries": queries, "context": 192}
            yield _receipt(f"{of} cost", shapes, stats, "s")
        timed = plan.repeats, plan.seconds * (3 if batch == 1 else 1)  # the target's own cell
        found = inference_spec.by_batch(model, batch, drafts, plan.new, *timed)
        plain = found[0][0]
        for k, (stats, done) in found.items():
            shapes = {"model": "trained", "batch": batch, "drafts": k, "new_tokens": plan.new}
            own = inference_spec.facts(done)
            bound = inference_spec.bytes_bound(model, batch, k, own["acceptance"]) if k else 1.0
            yield _receipt("speculation", {**shapes, **own, "bound": bound}, stats, "tokens/s")
            if k:
                given = done.decoded / (done.passes * batch)
                law = inference_spec.predicted(costs, given, k)
                gain = _ratio(stats, plain)
                shapes |= {"predicted": law, "bound": bound, "acceptance": own["acceptance"]}
                yield _receipt("speculation gain", shapes, gain, "x")
                pairs.append((law, gain["median"]))
    yield _law("tokens a pass / (c(k + 1) + d(n) + (k - 1) d(1))", pairs)


def acceptance_receipts(plan: Plan) -> Iterator[Receipt]:
    """The first draft's acceptance by kind of token."""
    model = inference_model.trained(mtp=True)
    for text, rule, kind, share, count in inference_spec.by_kind(model, *plan.kinds):
        shapes = {"model": "trained", "text": text, "rule": rule, "kind": kind, "tokens": count}
        stats = inference_spec.quartiles(share, count)
        yield _receipt("acceptance by kind", shapes, stats, "share")


def row_receipts(plan: Plan) -> Iterator[Receipt]:
    """Products by number of rows, eight bits and others."""
    for side in plan.sides:
        every = inference_rows.streams(side, plan.streamed)
        for rows in plan.rows:
            timed = plan.repeats, plan.seconds / 4
            for form, stats in inference_rows.compare(every, side, rows, *timed).items():
                shapes = {"form": form, "rows": rows, "side": side}
                yield _receipt("product by rows", shapes, stats, "s")


def batching_receipts(plan: Plan) -> Iterator[Receipt]:
    """Uneven requests one by one, in static batches, and in a continuous one."""
    model = inference_model.trained()
    found = inference_serve.batching(model, *plan.requests, 2 * plan.seconds)
    for form, stats in found.items():
        shapes = {"model": "trained", "form": form, "requests": plan.requests[0]}
        shapes |= {"slots": inference_serve.SLOTS, "longest": plan.requests[1]}
        yield _receipt("batching", shapes, stats, "tokens/s")


def phase_receipts(plan: Plan) -> Iterator[Receipt]:
    """Prefill and decoding as shares of what the machine can do."""
    ceilings = machine.measure(min(4.0, plan.seconds), "cpu")
    wide = Engines("wide", plan.wide_config, peers=False).plain
    for name, model in (("trained", inference_model.trained()), ("wide", wide)):
        for batch, tokens in plan.prefilled:
            args = model, tokens, batch, ceilings, plan.seconds / 2
            for phase, unit, stats, ceiling, share in inference_serve.phases(*args):
                shapes = {"model": name, "phase": phase, "batch": batch, "tokens": tokens}
                yield _receipt("phase", shapes, stats, unit, ceiling, share)


def parts(plan: Plan) -> dict[str, Callable[[], Iterator[Receipt]]]:
    """The parts by name, in the order in which they run."""
    return {
        "trained": lambda: step_receipts(Engines("trained"), plan.trained, plan),
        "wide": lambda: step_receipts(Engines("wide", plan.wide_config), plan.wide, plan),
        "generation": lambda: generation_receipts(Engines("trained"), plan),
        "speculation": lambda: speculation_receipts(plan),
        "acceptance": lambda: acceptance_receipts(plan),
        "rows": lambda: row_receipts(plan),
        "batching": lambda: batching_receipts(plan),
        "phases": lambda: phase_receipts(plan),
    }


def _law(law: str, pairs: Sequence[tuple[float, float]]) -> Receipt:
    """1 - squared error of the predictions / that of the mean: R2 without a fit."""
    mean = sum(gain for _, gain in pairs) / len(pairs)
    off = sum((gain - expected) ** 2 for expected, gain in pairs)
    around = sum((gain - mean) ** 2 for _, gain in pairs)
    value = 1 - off / around if around else 0.0
    shapes = {"law": law, "points": len(pairs)}
    return _made("law", shapes, value, "R2", {"min": value, "max": value}, 1)


def _ratio(above: Mapping[str, float], below: Mapping[str, float]) -> dict[str, float]:
    low, high = above["q1"] / below["q3"], above["q3"] / below["q1"]
    ratio = {"median": above["median"] / below["median"], "q1": low, "q3": high}
    return ratio | {"repeats": min(above["repeats"], below["repeats"])}


def _receipt(
    what: str,
    shapes: dict,
    stats: Mapping[str, float],
    unit: str,
    ceiling: str | None = None,
    fraction: float | None = None,
) -> Receipt:
    spread = {"q1": stats["q1"], "q3": stats["q3"]}
    repeats = int(stats["repeats"])
    return _made(what, shapes, stats["median"], unit, spread, repeats, ceiling, fraction)


def _made(
    what: str,
    shapes: dict,
    value: float,
    unit: str,
    spread: dict[str, float],
    repeats: int,
    ceiling: str | None = None,
    fraction: float | None = None,
) -> Receipt:
    return Receipt(
        what=what, shapes=shapes, value=value, unit=unit, spread=spread, repeats=repeats,
        ceiling=ceiling, fraction=fraction, **machine.here("cpu"),
    )  # fmt: skip
