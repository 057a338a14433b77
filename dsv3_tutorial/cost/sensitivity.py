"""What a tenth more of each resource would buy, and so which one a step waits for.

Each answer is a second plan on a chip with one number multiplied; nothing is differentiated. A
resource that buys nothing is not useless: another one hides it.
"""

import math
from dataclasses import replace

from dsv3_tutorial.cost import search
from dsv3_tutorial.cost.choices import Choices
from dsv3_tutorial.cost.layout import PlanError
from dsv3_tutorial.cost.plan import Plan, plan
from dsv3_tutorial.cost.scaled import RESOURCES, scaled
from dsv3_tutorial.hardware import Cluster

NAMES = {name: name.replace("_", " ") for name in RESOURCES}  # as they are printed
GPUS = "GPUs"
_FURTHEST = 4  # times as many data-parallel ranks are looked at to find a cluster that divides


def gains(
    plan: Plan,
    by: float = 1.1,
    search: bool = False,
    choices: Choices = Choices(),  # noqa: B008 (frozen)
) -> dict[str, float]:
    """The share of a step's time that `by` times as much of each resource saves, one by one.

    Of arithmetic, memory bandwidth, memory, scale up and scale out; GPUs as `_of_gpus`. search: the
    layout may change, which alone gives more memory a worth, and both steps are the fastest found;
    a search each. Raises PlanError for a `by` of 1 or less.
    """
    if not by > 1 or not math.isfinite(by):
        raise PlanError(
            f"by = {by!r} times a resource: what more of it buys cannot be said. Give a number "
            "above 1, 1.1 for a tenth more."
        )
    base = _step(plan, plan.cluster, search, choices)
    found = {}
    for name, shown in NAMES.items():
        cluster = Cluster(scaled(plan.cluster.chip, **{name: by}), plan.cluster.gpus)
        found[shown] = 1 - _step(plan, cluster, search, choices) / base
    return found | _of_gpus(plan, by)


def bottleneck(plan: Plan) -> str:
    """The resource of a chip that buys most; memory where the plan does not fit."""
    if not plan.fits:
        return NAMES["memory"]
    found = gains(plan)
    found.pop(GPUS, None)
    return max(found, key=found.__getitem__)


def _step(of: Plan, cluster: Cluster, searched: bool, choices: Choices) -> float:
    if not searched:
        return plan(of.cfg, cluster, of.job, of.layout, of.assume).step_time_s
    found = search.best(of.cfg, cluster, of.job, of.assume, choices, explain=False)
    return found.plan.step_time_s


def _of_gpus(of: Plan, by: float) -> dict[str, float]:
    """The share of a step that `by` times as many GPUs save, from the next number that divides.

    With GPUs' power found there: a step takes GPUs^-e seconds. The same tokens cost more GPU hours
    where e is below 1. Nothing where no larger number up to four times divides.
    """
    larger = _larger(of)
    if larger is None:
        return {}
    grown = larger.cluster.gpus / of.cluster.gpus
    power = math.log(of.step_time_s / larger.step_time_s) / math.log(grown)
    return {GPUS: 1 - by**-power}


def _larger(of: Plan) -> Plan | None:
    """The same layout with the next larger number of data-parallel ranks that divides."""
    for dp in range(of.layout.dp + 1, _FURTHEST * of.layout.dp + 1):
        layout = replace(of.layout, dp=dp)
        cluster = Cluster(of.cluster.chip, layout.gpus)
        if not layout.problems(of.cfg, cluster, of.job):
            try:
                return plan(of.cfg, cluster, of.job, layout, of.assume)
            except PlanError:  # a link of unknown rate would be crossed
                return None
    return None
