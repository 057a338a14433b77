"""A plan in words and columns: what an engineer would paste beside a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import fields

from dsv3_tutorial.cost import checks, validation
from dsv3_tutorial.cost import plan_text as text
from dsv3_tutorial.cost.assumptions import SOURCES, Assumptions
from dsv3_tutorial.cost.layout import Layout
from dsv3_tutorial.cost.plan import Plan

GB = 1e9


def report(
    name: str,
    plan: Plan,
    gains: Mapping[str, float],
    chosen: Sequence[str] = (),
    sources: bool = False,
) -> str:
    """The whole report of one plan. gains: share of the step that a tenth more of a resource saves.

    chosen: the search's reasons, none where the layout was given. sources: where each assumption is
    from.
    """
    blocks = [
        [headline(name, plan)],
        text.fields(_what(plan)),
        [*(["why this layout"] if chosen else []), *text.bullets(chosen)],
        [*text.bars("memory of the fullest GPU", plan.memory, "GB", GB), _room(plan)],
        [*text.bars("one step", plan.times, "seconds", 1, 3), *_hidden(plan)],
        text.fields(_totals(plan)),
        _gains(plan, gains),
        assumptions(plan.assume, sources),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def short(name: str, plan: Plan) -> str:
    """The same in a few lines: layout, memory, step, rate and bill."""
    memory = ", ".join(f"{part} {held / GB:.1f}" for part, held in plan.memory.items() if held)
    step = ", ".join(f"{part} {s:.2f}" for part, s in plan.times.items() if s >= 0.005)
    lines = {
        "layout": layout(plan),
        "GB a GPU": f"{plan.memory_per_gpu_bytes / GB:.1f} of {plan.room / GB:.1f}: {memory}",
        "one step": f"{plan.step_time_s:.2f} s: {step}",
    }
    return "\n".join([headline(name, plan), *text.fields({**lines, **_totals(plan)})])


def headline(name: str, plan: Plan) -> str:
    """The answer in one line."""
    chips = f"{plan.cluster.gpus:,} x {plan.cluster.chip.title}"
    answer = f"{_days(plan.days)}, {text.dollars(plan.cost_usd)}"
    if not plan.fits:
        answer = "DOES NOT FIT"
    return f"{name} on {chips}, {text.given(plan.job.tokens)} tokens: {answer}"


def layout(plan: Plan) -> str:
    """The layout in one sentence."""
    own: Layout = plan.layout
    job = plan.job
    batches = job.sequences // (own.dp * own.micro_batch)
    return (
        f"pp {own.pp} x dp {own.dp} x tp {own.tp}, experts over {own.ep}; {own.schedule}, ZeRO "
        f"{own.zero}, {own.precision}, recompute {own.recompute}, dispatch {own.dispatch}, "
        f"{batches:,} micro-batches of {own.micro_batch} x {job.seq_len:,} tokens"
    )


def assumptions(assume: Assumptions, sources: bool = False) -> list[str]:
    """Every assumption with its kind, and how far predictions lie from published runs.

    sources: where each assumption is from, each prediction, and what no number here knows.
    """
    usual = Assumptions()
    kinds: dict[str, list[str]] = {}
    for name in (f.name for f in fields(assume)):
        value = getattr(assume, name)
        kind, source = SOURCES[name]
        said = f"{name} {value:.4g}"
        if value != getattr(usual, name):
            kind = "given"
        kinds.setdefault(kind, []).append(f"{said}: {source}" if sources else said)
    if sources:
        lines = [text.bullets(f"{said} ({kind})" for said in all) for kind, all in kinds.items()]
        return ["assumptions", *(line for some in lines for line in some), "", *_trust()]
    said = [f"{kind}: {', '.join(all)}" for kind, all in kinds.items()]
    known = validation.checks()
    own, worst = known[0], checks.worst(known)
    said.append(
        f"no number is fitted to a run: V3's printed {own.quoted:g} s a step comes out as "
        f"{own.computed:.2f} ({own.off:+.0%}); the worst of {len(known)} published numbers is off "
        f"by {worst.off:+.0%}"
    )
    return ["assumptions (--assumptions says where from; --assume NAME=VALUE)", *text.bullets(said)]


def _trust() -> list[str]:
    rows = [
        (f"  {check.row.id}", f"{check.quoted:,.5g}", f"{check.computed:,.5g}", f"{check.off:+.1%}")
        for check in validation.checks()
    ]
    return [
        *text.columns(("published runs", "printed", "planned", "off"), rows, first=44),
        "",
        "what the planner does not know",
        *text.bullets(validation.UNKNOWN),
    ]


def _what(plan: Plan) -> dict[str, str]:
    own = plan.parameters
    drafts = f", and {text.count(own.mtp)} of MTP" if own.mtp and plan.assume.mtp else ""
    return {
        "model": f"{text.count(own.total)} parameters, {text.count(own.activated)} of them "
        f"activated by a token{drafts}; {text.count(plan.flops_per_token)} FLOP a trained token",
        "layout": layout(plan),
    }


def _room(plan: Plan) -> str:
    room = f"{plan.room / GB:,.1f} GB can be used"
    if plan.fits:
        return f"  {room}: fits, {plan.spare / GB:,.1f} GB to spare"
    return f"  {room}: DOES NOT FIT, {-plan.spare / GB:,.1f} GB too much"


def _hidden(plan: Plan) -> list[str]:
    hidden = [f"{n} {s:.2f} s" for n, s in plan.hidden.items() if s >= 0.005]
    return text.fields({"  hidden": f"behind arithmetic: {', '.join(hidden)}"}) if hidden else []


def _totals(plan: Plan) -> dict[str, str]:
    rent = plan.assume.rent
    return {
        "a day": f"{text.count(plan.tokens_per_day)} tokens, in steps of "
        f"{text.count(plan.tokens_per_step)}",
        "MFU": f"{plan.mfu:.1%} of the BF16 peak, counted causally; {plan.mfu_non_causal:.1%} "
        "non-causally",
        "whole run": f"{_days(plan.days)}, {_hours(plan.gpu_hours)} GPU hours, "
        f"{text.dollars(plan.cost_usd)} at {text.dollars(rent)} an hour, "
        f"{text.energy(plan.energy_kwh)}",
        "bottleneck": plan.bottleneck,
    }


def _gains(plan: Plan, gains: Mapping[str, float]) -> list[str]:
    if not gains:
        return []
    ranked = sorted(gains.items(), key=lambda item: -item[1])
    return [
        "10 % more of a resource, and nothing else changed, saves",
        *(f"  {name:<24}{saved:>9.2%} of the step" for name, saved in ranked),
    ]


def _hours(hours: float) -> str:
    return text.count(hours) if hours >= 10 else f"{hours:.2g}"


def _days(days: float) -> str:
    return f"{days:,.1f} days" if days >= 1 else f"{24 * days:,.2g} hours"
