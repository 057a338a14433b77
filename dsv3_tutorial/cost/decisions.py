"""V3 unbuilt: what each decision saves in hours, dollars and kWh, taken back and made alone.

A plan without a decision is a plan of another model or with other choices, on the fastest layout
that is then left. Decisions work into each other's hands, so each is priced in two orders: as the
last one taken back from the whole, and as the first one made from the bare model.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import search, serving_plan
from dsv3_tutorial.cost.assumptions import Assumptions
from dsv3_tutorial.cost.choices import Choices
from dsv3_tutorial.cost.layout import Job, Layout, PlanError
from dsv3_tutorial.cost.plan import Plan, plan
from dsv3_tutorial.cost.removal import DECISIONS, Variant, made, without
from dsv3_tutorial.cost.search_space import above_mean
from dsv3_tutorial.cost.serving_plan import Serving
from dsv3_tutorial.cost.serving_target import USUAL, Target
from dsv3_tutorial.hardware import Cluster, HardwareError

__all__ = ["DECISIONS", "Outcome", "Row", "Tornado", "Variant", "both_orders", "made", "tornado"]
__all__ += ["unbuild", "without"]


@dataclass(frozen=True)
class Outcome:
    """A model without some of its decisions: its training and its serving, or why there is none.

    Where no plan fits, training is None, `error` says what is missing, and hours, dollars and kWh
    are infinite. Serving that meets no target gives 0 tokens; its own `reason` says why.
    """

    removed: tuple[str, ...]
    notes: tuple[str, ...]
    training: Plan | None
    error: str
    serving: Serving | None
    serving_error: str = ""

    @property
    def fits(self) -> bool:
        return self.training is not None

    @property
    def gpu_hours(self) -> float:
        return self.training.gpu_hours if self.training else math.inf

    @property
    def cost_usd(self) -> float:
        return self.training.cost_usd if self.training else math.inf

    @property
    def energy_kwh(self) -> float | None:
        """None where nobody publishes the chip's power."""
        return self.training.energy_kwh if self.training else math.inf

    @property
    def serving_tokens_per_second_per_gpu(self) -> float:
        return self.serving.tokens_per_second_per_gpu if self.serving else 0.0


def unbuild(
    cfg: ModelConfig,
    cluster: Cluster,
    job: Job,
    removed: Collection[str] = (),
    assume: Assumptions = Assumptions(),  # noqa: B008 (frozen)
    target: Target | None = USUAL,
    layout: Layout | None = None,
    choices: Choices = Choices(),  # noqa: B008
    kv_heads: int | None = None,
) -> Outcome:
    """The plan of a model without the decisions `removed`, on the fastest layout there is then.

    layout: keep this one and change only what must change; None: search. target None: no serving.
    kv_heads: as in `without`. With nothing removed exactly plan(...) of the layout. Raises
    PlanError for decisions that this model has not.
    """
    variant = without(cfg, removed, choices, assume, target or USUAL, kv_heads)
    named = tuple(name for name in DECISIONS if name in removed)
    training, error = None, ""
    try:
        training = _train(variant, cluster, job, layout)
    except PlanError as why:
        error = str(why)
    serving, unserved = None, ""
    if target is not None:
        try:
            serving = _serve(variant, cluster)
        except (HardwareError, ValueError) as why:
            unserved = str(why)
    return Outcome(named, variant.notes, training, error, serving, unserved)


def _train(variant: Variant, cluster: Cluster, job: Job, layout: Layout | None) -> Plan:
    how = (variant.assume, variant.choices, variant.violation)
    if layout is None:
        return search.best(variant.cfg, cluster, job, *how, explain=False).plan
    kept = _adapted(layout, variant.choices)
    above = above_mean(variant.cfg, kept.ep, variant.violation)
    assume = replace(variant.assume, expert_load=variant.assume.expert_load + above)
    found = plan(variant.cfg, cluster, job, kept, assume)
    if not found.fits:
        gb = 1e-9
        raise PlanError(
            f"The layout holds {found.memory_per_gpu_bytes * gb:.1f} GB on a GPU of "
            f"{cluster.chip.title}, and {found.room * gb:.1f} GB can be used. Such a run ends "
            "before its first step. Search for a layout, recompute more or take more GPUs."
        )
    return found


def _adapted(layout: Layout, choices: Choices) -> Layout:
    """The layout, with what is no longer allowed replaced by the last thing that is."""
    kept = {
        "schedule": choices.schedules,
        "precision": choices.precisions,
        "dispatch": choices.dispatches,
    }
    changed = {
        name: allowed[-1] for name, allowed in kept.items() if getattr(layout, name) not in allowed
    }
    return replace(layout, **changed)


def _serve(variant: Variant, cluster: Cluster) -> Serving:
    """The best unit; uneven experts weigh more the fewer of them a device holds."""
    cfg, target = variant.cfg, variant.target
    if not variant.violation:
        return serving_plan.best(cfg, cluster, target)
    found = []
    for devices in _units(cfg, cluster, target):
        load = target.exchange.load + above_mean(cfg, devices, variant.violation)
        sent = replace(target.exchange, load=load)
        dealt = replace(target, devices=devices, exchange=sent, cut=bool(target.cut))
        found.append(serving_plan.best(cfg, cluster, dealt))
    best = max(found, key=lambda serving: serving.tokens_per_second_per_gpu)
    if best.fits or target.cut is not None:
        return best
    return serving_plan.best(cfg, cluster, target)  # cut evenly, where no expert is busier


def _units(cfg: ModelConfig, cluster: Cluster, target: Target) -> list[int]:
    """Numbers of devices over which the experts divide, in whole domains beyond the first."""
    if target.devices is not None:
        return [target.devices]
    most, domain = min(cluster.gpus, cfg.n_routed_experts), cluster.domain
    dealt = [n for n in range(1, most + 1) if cfg.n_routed_experts % n == 0]
    return [n for n in dealt if n <= domain or n % domain == 0]


def both_orders(
    price: Callable[[frozenset[str]], float], decisions: Collection[str]
) -> dict[str, tuple[float, float]]:
    """What each decision saves, as the last one taken back and as the first one made.

    price(kept): of a plan that keeps these decisions alone. removal: price without it less price
    with all; addition: price with none less price with it alone. Where they differ, decisions work
    into each other's hands, and no single number says what one of them is worth.
    """
    every = frozenset(decisions)
    whole, bare = price(every), price(frozenset())
    return {
        name: (price(every - {name}) - whole, bare - price(frozenset({name}))) for name in decisions
    }


@dataclass(frozen=True)
class Row:
    """One decision's bars, each the difference of two outcomes of a Tornado.

    Each is (removal, addition). hours: GPU hours saved. factors: how many times as many it takes
    without; a bare plan is dearer, so equal factors are unequal hours. serving: tokens a second and
    GPU lost, below 0 where the decision helps. Not a number where neither of two plans fits.
    """

    decision: str
    hours: tuple[float, float]
    factors: tuple[float, float]
    serving: tuple[float, float]


@dataclass(frozen=True)
class Tornado:
    """Every decision in both orders, the largest removal first; outcomes by what was removed."""

    rows: tuple[Row, ...]
    outcomes: dict[frozenset[str], Outcome]

    @property
    def whole(self) -> Outcome:
        """With every decision."""
        return self.outcomes[frozenset()]

    @cached_property
    def bare(self) -> Outcome:
        """With none of them."""
        return self.outcomes[frozenset(row.decision for row in self.rows)]


def tornado(
    cfg: ModelConfig,
    cluster: Cluster,
    job: Job,
    assume: Assumptions = Assumptions(),  # noqa: B008 (frozen)
    target: Target | None = USUAL,
    decisions: Collection[str] | None = None,
    choices: Choices = Choices(),  # noqa: B008
    kv_heads: int | None = None,
) -> Tornado:
    """What each decision saves in removal and in addition order: 2 n + 2 outcomes, each once.

    decisions None: all that the model has made on this cluster. Sorted by hours at removal.
    """
    every = frozenset(made(cfg, cluster) if decisions is None else decisions)
    outcomes: dict[frozenset[str], Outcome] = {}

    def outcome(kept: frozenset[str]) -> Outcome:
        removed = every - kept
        if removed not in outcomes:
            how = (assume, target, None, choices, kv_heads)
            outcomes[removed] = unbuild(cfg, cluster, job, removed, *how)
        return outcomes[removed]

    named = [name for name in DECISIONS if name in every]
    hours = both_orders(lambda kept: outcome(kept).gpu_hours, named)
    logs = both_orders(lambda kept: math.log(outcome(kept).gpu_hours), named)
    served = both_orders(lambda kept: outcome(kept).serving_tokens_per_second_per_gpu, named)
    factors = {name: (math.exp(each[0]), math.exp(each[1])) for name, each in logs.items()}
    rows = [Row(name, hours[name], factors[name], served[name]) for name in named]
    return Tornado(tuple(sorted(rows, key=_largest)), outcomes)


def _largest(row: Row) -> float:
    """Sorts what saves most first; not a number goes last."""
    return math.inf if math.isnan(row.hours[0]) else -row.hours[0]
