"""What a plan becomes without a decision, beside the plan with it; and all of them in a tornado."""

import math
from collections.abc import Callable
from typing import Any

from dsv3_tutorial.cost import decisions, plan_report, serving_report
from dsv3_tutorial.cost import plan_text as text
from dsv3_tutorial.cost.decisions import Outcome, Row, Tornado
from dsv3_tutorial.cost.plan import Plan, PlanError
from dsv3_tutorial.cost.plan_options import Task
from dsv3_tutorial.cost.serving_plan import Serving

_NOTHING = "does not fit"
_HEAD = ("", "hours last", "first", "serves last", "first")
_BAR = 26
_TRAINED: dict[str, Callable[[Plan], str]] = {
    "parameters": lambda p: text.count(p.parameters.total),
    "activated": lambda p: text.count(p.parameters.activated),
    "layout": lambda p: f"pp {p.layout.pp} dp {p.layout.dp} tp {p.layout.tp} ep {p.layout.ep}",
    "": lambda p: f"{p.layout.schedule}, {p.layout.precision}, {p.layout.recompute}",
    "memory": lambda p: f"{p.memory_per_gpu_bytes / 1e9:.1f} GB",
    "a step": lambda p: text.seconds(p.step_time_s),
    "tokens a day": lambda p: text.count(p.tokens_per_day),
    "MFU, causal": lambda p: f"{p.mfu:.1%}",
    "GPU hours": lambda p: text.count(p.gpu_hours),
    "dollars": lambda p: text.dollars(p.cost_usd),
    "energy": lambda p: text.energy(p.energy_kwh),
}
_SERVED: dict[str, Callable[[Serving], str]] = {
    "served from": lambda s: f"{s.devices} GPUs, {s.batch:,} sequences",
    "tokens/s a user": lambda s: f"{s.per_user:,.1f}",
    "tokens/s and GPU": lambda s: f"{s.tokens_per_second_per_gpu:,.0f}",
}


def removed(task: Task, made: Plan) -> tuple[str, dict[str, Any], str]:
    """The plan beside the one without what was removed: text, JSON, and what does not fit.

    The plan without keeps a layout that was given, as far as it may, and else has the best.
    """
    what = (task.cfg, task.cluster, task.job)
    whole = decisions.unbuild(*what, (), task.assume, task.target, made.layout)
    left = decisions.unbuild(*what, task.removed, task.assume, task.target, task.layout)
    name = f"without {', '.join(left.removed)}"
    rows = [
        *_rows(_TRAINED, whole.training, left.training),
        *_rows(_SERVED, whole.serving, left.serving),
    ]
    blocks = [
        [plan_report.headline(task.name, made), f"{name}: {_change(made, left)}"],
        text.columns(("", "as planned", name), rows),
        ["what stands in its place", *text.bullets(left.notes)],
        plan_report.assumptions(task.assume),
    ]
    found = {**as_json(left), "model": task.name, "as_planned": as_json(whole)}
    return "\n\n".join("\n".join(block) for block in blocks), found, left.error


def as_json(left: Outcome) -> dict[str, Any]:
    """An outcome for programs: a plan's keys, null where nothing fits, what was removed, serving.

    tokens_per_second_per_gpu of the serving is 0 where nothing serves.
    """
    trained = left.training.as_json() if left.training else dict.fromkeys(_KEYS)
    return {
        **trained,
        "without": list(left.removed),
        "notes": list(left.notes),
        "fits": left.fits,
        "error": left.error,
        "serving": serving_report.as_json(left.serving) if left.serving else None,
        "serving_error": left.serving_error,
    }


def tornado(task: Task) -> tuple[str, dict[str, Any], str]:
    """Every decision in both orders: text, JSON, and nothing that is wrong.

    Raises PlanError where a layout was given: each of the plans has its own.
    """
    if task.layout is not None:
        raise PlanError(
            "--tornado plans without each decision on the best layout that is left, and a layout "
            "was given: one of them would be ignored. Leave out --layout, or take --without."
        )
    found = decisions.tornado(task.cfg, task.cluster, task.job, task.assume, task.target)
    whole, bare = found.whole, found.bare
    blocks = [
        [f"{task.name} unbuilt on {task.cluster.gpus:,} x {task.cluster.chip.title}"],
        text.fields({"all made": _hours(whole), "none made": _hours(bare)}),
        [
            "what each decision saves in GPU hours, and adds in tokens/s and GPU when serving,",
            "taken back from the whole (last) and made in the bare model (first)",
            *text.columns(_HEAD, _cells(found), first=12, each=12),
        ],
        ["what stands in their place", *text.bullets(bare.notes)],
        plan_report.assumptions(task.assume),
    ]
    said = {
        "model": task.name,
        "whole": as_json(whole),
        "bare": as_json(bare),
        "decisions": {row.decision: _both(row) for row in found.rows},
    }
    return "\n\n".join("\n".join(block) for block in blocks), said, ""


_KEYS = (
    *("gpu_hours", "step_time_s", "tokens_per_day", "mfu", "cost_usd", "energy_kwh"),
    *("bottleneck", "memory_per_gpu_bytes"),
)


def _rows(shown: dict, with_it: Any, without: Any) -> list[tuple[str, ...]]:
    return [
        (name, *(_NOTHING if each is None else cell(each) for each in (with_it, without)))
        for name, cell in shown.items()
    ]


def _change(made: Plan, left: Outcome) -> str:
    return f"{left.gpu_hours / made.gpu_hours - 1:+.1%} GPU hours" if left.fits else _NOTHING


def _hours(left: Outcome) -> str:
    serves = f"{left.serving_tokens_per_second_per_gpu:,.0f} tokens/s and GPU"
    trained = f"{text.count(left.gpu_hours)} GPU hours" if left.fits else _NOTHING
    return f"{trained} to train; serves {serves}"


def _cells(found: Tornado) -> list[tuple[str, ...]]:
    largest = max(
        (abs(row.hours[0]) for row in found.rows if math.isfinite(row.hours[0])), default=1
    )
    return [
        (row.decision, *map(_signed, row.hours), *map(_signed, _added(row)), _bar(row, largest))
        for row in found.rows
    ]


def _added(row: Row) -> tuple[float, ...]:
    """Tokens a second and GPU that the decision adds when serving."""
    return tuple(0.0 - lost for lost in row.serving)


def _bar(row: Row, largest: float) -> str:
    hours = row.hours[0]
    if not math.isfinite(hours) or not largest:
        return ""
    return f"  {('#' if hours > 0 else '-') * round(_BAR * abs(hours) / largest)}"


def _signed(value: float) -> str:
    if not math.isfinite(value):
        return _NOTHING if value > 0 else "-"
    return f"{'-' if value < 0 else '+'}{text.count(abs(value))}" if round(value) else "0"


def _both(row: Row) -> dict[str, list[float | None]]:
    """Numbers in removal and in addition order; null where a plan does not fit."""
    pairs = {"gpu_hours_saved": row.hours, "serving_tokens_per_second_per_gpu": _added(row)}
    return {
        name: [value if math.isfinite(value) else None for value in pair]
        for name, pair in pairs.items()
    }
