"""The design game in a table: what a brief asks for, what a design has, and what it misses."""

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dsv3_tutorial.config import ConfigError, ModelConfig
from dsv3_tutorial.cost import designs, memory, params, serving_plan
from dsv3_tutorial.cost.design_briefs import BRIEFS, Brief
from dsv3_tutorial.cost.design_model import model
from dsv3_tutorial.cost.layout import Job, PlanError
from dsv3_tutorial.cost.plan import Plan
from dsv3_tutorial.cost.serving_plan import Serving
from dsv3_tutorial.cost.serving_target import Target
from dsv3_tutorial.learn.figures.design_heads import heads_table as heads_table

WORKED = {
    "worked answer: lab": (designs.lab_design(), "lab"),
    "worked answer: H20": (designs.cluster_design(), "h20"),
}
WIDTH = 100


@dataclass(frozen=True)
class Demand:
    """One demand with both numbers as they are printed. met None: nobody can say.

    spare: the share of what is asked for by which it is more than met; below 0 where it is missed.
    """

    what: str
    asked: str
    yours: str
    met: bool | None
    spare: float | None = None


@dataclass(frozen=True)
class Planned:
    """A design, built and planned; None where that fails, which `judge` explains."""

    design: Mapping[str, Any]
    brief: Brief
    cfg: ModelConfig | None
    plan: Plan | None
    served: Serving | None


def planned(design: Mapping[str, Any], brief: Brief | str) -> Planned:
    """Build the model, plan its training and its service: under a second."""
    brief = BRIEFS[brief] if isinstance(brief, str) else brief
    fields = {name: value for name, value in design.items() if name != "tokens"}
    try:
        cfg = model(**fields)
    except ConfigError:
        return Planned(design, brief, None, None, None)
    return Planned(design, brief, cfg, _trained(cfg, design, brief), _served(cfg, brief))


def demands(design: Mapping[str, Any], brief: Brief | str) -> list[Demand]:
    """Every demand that is a number, with what the design has: nothing where no plan stands."""
    made = planned(design, brief)
    return [*_sizes(made), *_training(made), *_service(made)]


def judged(
    design: Mapping[str, Any] | Callable[[], Any] | None = None, brief: Brief | str = "lab"
) -> None:
    """Print each demand with both numbers and what is to spare, the judge's words, and a score.

    design: a dict, or the function that returns it. The course's own is called so: after an answer
    that does not pass, that is what an exercise's name stands for. None: the brief alone.
    """
    brief = BRIEFS[brief] if isinstance(brief, str) else brief
    design = design() if callable(design) else design
    if not isinstance(design, Mapping):
        print(f"no design to judge\n{brief}")
        return
    whose = "the course's own design" if design == _worked(brief) else "your design"
    print(f"{brief.title}: {whose}")
    print(f"{'':28}{'asked for':>20}{'the design has':>20}{'to spare':>12}")
    for one in demands(design, brief):
        print(f"{one.what:28}{one.asked:>20}{one.yours:>20}{_spare(one):>12}")
    unmet = designs.judge(design, brief)
    for said in unmet:
        print(textwrap.fill(said, WIDTH, initial_indent="  - ", subsequent_indent="    "))
    print(_score(design, brief) if not unmet else f"{len(unmet)} unmet")


def _score(design: Mapping[str, Any], brief: Brief) -> str:
    """All is met: what a better design would raise, FLOP trained within the same brief."""
    spent, worked = _flop(design), _worked(brief)
    share = f", {100 * spent / _flop(worked):.0f} % of the worked answer's" if worked else ""
    return (
        f"all demands are met; score, 6 x activated x tokens: {spent:.3g} FLOP{share}.\n"
        "Can the same brief hold more training? Look at what is to spare."
    )


def _flop(design: Mapping[str, Any]) -> float:
    fields = {name: value for name, value in design.items() if name != "tokens"}
    return 6 * params.count(model(**fields)).activated * design["tokens"]


def _worked(brief: Brief) -> Mapping[str, Any] | None:
    return next((made for made, name in WORKED.values() if BRIEFS[name] == brief), None)


def _spare(one: Demand) -> str:
    if one.met is None:
        return "not known"
    return f"{100 * one.spare:,.0f} %" if one.met else "missed"


def compare(worked: Mapping[str, tuple[Mapping[str, Any], str]] | None = None) -> None:
    """Print designs side by side: {name: (design, brief)}; the two worked ones if none is given."""
    made = {name: planned(*pair) for name, pair in (worked or WORKED).items()}
    print(f"{'':34}" + "".join(f"{name:>22}" for name in made))
    for what, of in _ROWS.items():
        print(f"{what:34}" + "".join(f"{_said(of, each):>22}" for each in made.values()))


def _trained(cfg: ModelConfig, design: Mapping[str, Any], brief: Brief) -> Plan | None:
    try:
        job = Job(tokens=design.get("tokens"), sequences=brief.sequences)
        return designs.planned(cfg, brief, job)
    except PlanError:
        return None


def _served(cfg: ModelConfig, brief: Brief) -> Serving | None:
    """The service as `judge` plans it; None where experts do not divide over its devices."""
    if cfg.n_routed_experts and cfg.n_routed_experts % brief.devices:
        return None
    target = Target(brief.context, brief.rate, brief.devices)
    return serving_plan.serve(cfg, brief.cluster.chip, target, brief.devices)


def _sizes(made: Planned) -> list[Demand]:
    if made.cfg is None:
        return []
    counted, brief = params.count(made.cfg), made.brief
    return [
        _least("parameters", counted.total, brief.total, 1e9, "B"),
        _least("activated parameters", counted.activated, brief.activated, 1e9, "B"),
    ]


def _training(made: Planned) -> list[Demand]:
    tokens, brief, plan = made.design.get("tokens"), made.brief, made.plan
    found = []
    if isinstance(tokens, int | float):
        found.append(_least("tokens", tokens, brief.tokens, 1e9, "B"))
    for what, asked, unit, of in (
        ("days", brief.days, "{:,.1f}", lambda: plan.days),
        ("dollars", brief.budget_usd, "${:,.0f}", lambda: plan.cost_usd),
    ):
        if asked is not None:
            have = None if plan is None else of()
            yours = "no plan" if have is None else unit.format(have)
            met = None if have is None else have <= asked
            spare = None if have is None else 1 - have / asked
            found.append(Demand(what, f"at most {unit.format(asked)}", yours, met, spare))
    return found


def _service(made: Planned) -> list[Demand]:
    served, brief = made.served, made.brief
    if made.cfg is None:
        return []
    what = f"users at {brief.rate:g} tokens/s"
    asked = f"at least {brief.users:,}"
    if served is None:
        return [Demand(what, asked, "no plan", None)]
    met, spare = served.batch >= brief.users, served.batch / brief.users - 1
    return [Demand(what, asked, f"{served.batch:,}", met, spare)]


def _least(what: str, have: float, least: float, unit: float, name: str) -> Demand:
    asked, yours = (_short(number / unit, name) for number in (least, have))
    return Demand(what, f"at least {asked}", yours, have >= least, have / least - 1)


def _short(number: float, name: str) -> str:
    return f"{number:,.0f} {name}" if number >= 1000 else f"{number:.4g} {name}"


def _attention(made: Planned) -> str:
    cfg = made.cfg
    if cfg.kv_lora_rank is not None:
        return f"MLA {cfg.kv_lora_rank}, {cfg.num_attention_heads} heads"
    return (
        f"{cfg.num_key_value_heads or cfg.num_attention_heads} of {cfg.num_attention_heads} heads"
    )


def _experts(made: Planned) -> str:
    cfg = made.cfg
    if cfg.n_routed_experts is None:
        return "dense"
    return f"{cfg.num_experts_per_tok} of {cfg.n_routed_experts}"


def _said(of, made: Planned) -> str:
    """A cell, or a dash where there is no model, no plan or no service."""
    try:
        return of(made)
    except (AttributeError, KeyError, TypeError):
        return "-"


_ROWS = {
    "brief": lambda made: made.brief.title,
    "parameters, B": lambda made: f"{params.count(made.cfg).total / 1e9:,.1f}",
    "activated, B": lambda made: f"{params.count(made.cfg).activated / 1e9:,.2f}",
    "layers x hidden_size": lambda made: f"{made.cfg.num_hidden_layers} x {made.cfg.hidden_size:,}",
    "attention": _attention,
    "experts a token": _experts,
    "cache, KB a token": lambda made: f"{memory.kv_cache_bytes_per_token(made.cfg) / 1e3:,.1f}",
    "tokens, B": lambda made: f"{made.design['tokens'] / 1e9:,.0f}",
    "days of training": lambda made: f"{made.plan.days:,.1f} of {made.brief.days:g}",
    "thousand dollars": lambda made: f"{made.plan.cost_usd / 1e3:,.0f}",
    "MFU of the BF16 peak, %": lambda made: f"{100 * made.plan.mfu:.1f}",
    "a tenth more would help most of": lambda made: str(made.plan.bottleneck),
    "users served": lambda made: f"{made.served.batch:,} of {made.brief.users:,}",
    "what ends the batch": lambda made: made.served.limit,
}
