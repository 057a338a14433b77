"""`python -m dsv3_tutorial plan`: what a model costs to train on a cluster, and what it serves."""

import json
import os
import sys
from typing import Any

from dsv3_tutorial.cost import (
    plan_options,
    plan_report,
    search,
    sensitivity,
    serving_plan,
    serving_report,
    unbuild_report,
)
from dsv3_tutorial.cost.decisions import DECISIONS
from dsv3_tutorial.cost.plan import Plan, plan
from dsv3_tutorial.cost.plan_options import Task

_SMALLER = "raise pp, ep, tp or zero, and with them the GPUs"


def main(argv: list[str] | None = None) -> int:
    """Print the plan; 1 where nothing fits.

    Raises PlanError, HardwareError, ConfigError or ServingError, each saying which number to
    change: `__main__` prints it and exits 1.
    """
    given = plan_options.joined(sys.argv[1:] if argv is None else argv)
    options = plan_options.parser(DECISIONS).parse_args(given)
    task = plan_options.task(options)
    if options.tornado:
        return _print(*unbuild_report.tornado(task), options.json)
    if task.removed:
        return _print(*unbuild_report.removed(task, _best(task)[0]), options.json)
    made, chosen = _best(task)
    served = serving_plan.best(task.cfg, task.cluster, task.target) if options.serve else None
    found = {**made.as_json(), "model": task.name}
    if options.short:
        blocks = [plan_report.short(task.name, made)]
    else:
        blocks = [plan_report.report(task.name, made, _gains(made), chosen, options.assumptions)]
    if served:
        blocks.append(serving_report.report(served, made.assume.rent))
        found["serving"] = serving_report.as_json(served)
    return _print("\n\n".join(blocks), found, _problem(made), options.json)


def _best(task: Task) -> tuple[Plan, list[str]]:
    """The plan in the layout that was given or found, and why it was found."""
    what = (task.cfg, task.cluster, task.job)
    if task.layout is not None:
        return plan(*what, task.layout, task.assume), []
    found = search.best(*what, task.assume)
    return found.plan, [*found.why, f"{found.examined:,} layouts were examined"]


def _gains(made: Plan) -> dict[str, float]:
    return sensitivity.gains(made) if made.fits else {}


def _problem(made: Plan) -> str:
    """What is wrong with a plan whose memory is too small, and which number would change it."""
    if made.fits:
        return ""
    part = max(made.memory, key=made.memory.get)
    moving = part in ("activations", "logits")
    what = "raise tp or recompute, lower micro_batch or --seq-len" if moving else _SMALLER
    return (
        f"This plan does not fit: a GPU would hold {made.memory_per_gpu_bytes / 1e9:.1f} GB and "
        f"has room for {made.room / 1e9:.1f}, so the run would stop in its first step. Most of it "
        f"is {part}, {made.memory[part] / 1e9:.1f} GB: {what}, or take --layout auto."
    )


def _print(text: str, found: dict[str, Any], problem: str, as_json: bool) -> int:
    try:
        print(json.dumps(found, indent=2) if as_json else text, flush=True)
    except BrokenPipeError:  # whoever read has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if problem:
        print(problem, file=sys.stderr)
    return 1 if problem else 0
