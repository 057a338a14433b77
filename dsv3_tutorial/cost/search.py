"""The fastest layout of a model on a cluster, found by trying all that divide and fit.

Exhaustive, up to three rules that cost no optimum: of the ways to send tokens to experts only the
quickest of an expert group is tried; recomputing less is never slower, so the least that fits is
taken; and a layout is left out once its step without more than the least recomputation, and with no
gradients to send, is as long as the best that fits. Of equal steps the one that holds less wins.
"""

from dataclasses import dataclass, fields

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import search_report
from dsv3_tutorial.cost.assumptions import Assumptions
from dsv3_tutorial.cost.choices import Choices
from dsv3_tutorial.cost.layout import Job, Layout
from dsv3_tutorial.cost.plan import Plan
from dsv3_tutorial.cost.search_space import Space, order
from dsv3_tutorial.hardware import Cluster

FIELDS = tuple(f.name for f in fields(Layout) if f.name != "dp")  # dp follows from pp and tp


@dataclass(frozen=True)
class Found:
    """The fastest plan that fits. examined: layouts that were priced.

    refused: why others were not taken, and how many. runners_up: the best plan with another
    schedule, with another precision and so on, fastest first; why: a sentence on each of them, with
    seconds.
    """

    plan: Plan
    examined: int
    refused: dict[str, int]
    runners_up: tuple[Plan, ...] = ()
    why: tuple[str, ...] = ()


def best(
    cfg: ModelConfig,
    cluster: Cluster,
    job: Job,
    assume: Assumptions = Assumptions(),  # noqa: B008 (frozen)
    choices: Choices = Choices(),  # noqa: B008
    violation: float = 0.0,
    explain: bool = True,
) -> Found:
    """The fastest plan that fits, what came next, and why; explain False: the plan alone.

    violation: how much further than assumed a busiest expert's load lies above the mean; a GPU's by
    that over the square root of its experts. Raises PlanError where no layout divides or fits, with
    the number that would change it.
    """
    space = Space(cfg, cluster, job, assume, choices, violation)
    won = space.fastest()
    if won is None:
        raise search_report.impossible(space)
    if not explain:
        return Found(won, len(space.priced), space.refusals())
    others = {name: space.fastest(name, getattr(won.layout, name)) for name in FIELDS}
    distinct = {other.layout: other for other in others.values() if other}
    ranked = tuple(sorted(distinct.values(), key=order))
    why = tuple(search_report.why(space, won, others))
    return Found(won, len(space.priced), space.refusals(), ranked, why)
