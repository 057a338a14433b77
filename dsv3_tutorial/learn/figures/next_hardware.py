"""What hardware should come next: each recommendation's price, and V3 on hardware of your choice.

Seconds of a training step and tokens served, today and with one number turned; the layout stays
DeepSeek's. `cost.future` has the knobs and what each assumes.
"""

import textwrap
from functools import cache

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_tutorial.cost import future, future_world, successors
from dsv3_tutorial.cost.future_world import World
from dsv3_tutorial.cost.layout import PlanError
from dsv3_tutorial.learn.figures import service_units
from dsv3_tutorial.learn.figures.service_units import served
from dsv3_tutorial.learn.figures.style import (
    COMMUNICATION,
    COMPUTE,
    IDLE,
    INK,
    MEMORY,
    SERIES,
    figure,
    finish,
    note,
)

GRID = {
    "arithmetic": [1, 2, 4, 8],
    "memory_bandwidth": [1, 2, 4],
    "memory_size": [1, 2, 4],
    "scale_out": [0.5, 1, 2, 4, 8],
    "domain": [8, 64, 256],
}
START = {"arithmetic": 1, "memory_bandwidth": 1, "memory_size": 1, "scale_out": 1, "domain": 8}
# Parts of a step by what they wait for.
ROLES = {
    "arithmetic": (COMPUTE, ("products", "attention", "recomputation")),
    "memory bandwidth": (MEMORY, ("memory traffic", "optimizer")),
    "network": (
        COMMUNICATION,
        ("dispatch", "combine", "tensor parallel", "pipeline sends", "gradients"),
    ),
    "idle": (IDLE, ("bubble", "uneven stages")),
}
SERVED, WIDTH = SERIES[5], 100
_TITLE = {"x": 0.01, "ha": "left", "fontsize": 13, "color": INK, "weight": "bold"}


def knobs() -> Figure:
    """What each recommendation buys in training and in serving; `knobs_table` has the others."""
    gains = {of: {row.knob: row.gain for row in future.ranking(of)} for of in future.MEASURES}
    steps, served, token = gains["step"], gains["serving"], gains["token"]
    order = sorted(served | token, key=lambda knob: (-served.get(knob, 1), -token.get(knob, 1)))
    fig, (left, right) = figure(11, 1.6 + 0.35 * len(steps), columns=2)
    _gains(left, [*steps], {"a training step": (steps, COMPUTE)})
    told = {
        "tokens/s a GPU, 20 a user": (served, SERVED),
        "a token's exchanges": (token, COMMUNICATION),
    }
    _gains(right, order, told)
    finish(fig, left, "", "faster by, %", "")
    finish(fig, right, "", "more or faster by, %", "")
    for ax in (left, right):
        ax.legend(loc="lower right", fontsize=10, frameon=False)
    knob, most = next(iter(steps)), max(served.values())
    alike = sum(gain > most - 1e-9 for gain in served.values())
    each = "each of " if alike > 1 else ""
    fig.suptitle(
        f"Training gains most by {knob}, {steps[knob]:.2f}x; serving {most:.2f}x, by "
        f"{each}{alike} knob{'s' if alike > 1 else ''}",
        **_TITLE,
    )
    note(fig, f"derived; {len(future.UNPRICED)} more wishes have no price: knobs_table() says why")
    return fig


def best() -> str:
    """The knob that shortens a training step most."""
    return future.ranking("step")[0].knob


def knobs_table() -> None:
    """Print what each knob assumes and moves, and why others have no price."""
    for knob in (*future.KNOBS, future.EVERYTHING):
        rows = future.what_if(knob)
        moved = ", ".join(f"{_SHORT[row.measure]} {row.gain:.2f}x" for row in rows)
        print(f"{knob.name:34}{moved}")
        print(_wrapped(f"{knob.where}: {knob.assumes}"))
    print("\nnot priced")
    for what, where, why in future.UNPRICED:
        print(_wrapped(f"{what} ({where}): {why}", "  - "))


def what_if(
    arithmetic: float = 1,
    memory_bandwidth: float = 1,
    memory_size: float = 1,
    scale_out: float = 1,
    domain: int = 8,
) -> Figure:
    """V3's training step and its service on H800 with these numbers multiplied, beside today's."""
    worlds = future.today(), changed(arithmetic, memory_bandwidth, memory_size, scale_out, domain)
    fig, (left, right) = figure(11, 3.0, columns=2)
    for ax in (left, right):
        ax.set_yticks([0, 1], ["today", "asked"])
        ax.set_ylim(1.6, -0.8)
        ax.grid(False, axis="y")
    for y, world in enumerate(worlds):
        _step(left, y, world)
        rate, by = served(world).tokens_per_second_per_gpu, served(world).devices
        right.barh(y, rate, 0.6, color=SERVED, alpha=(0.5, 1)[y])
        look = {"va": "center", "fontsize": 10, "color": INK}
        limit = service_units.ends(served(world))
        right.text(rate, y, f" {rate:,.0f} by {by} GPUs; {limit} binds", **look)
    right.set_xlim(0, 2.3 * max(served(world).tokens_per_second_per_gpu for world in worlds))
    left.set_xlim(0, 1.2 * max(_seconds(world) or 0 for world in worlds))
    finish(fig, left, "", "s of a training step on 2,048 GPUs", "")
    finish(fig, right, "", "tokens/s a GPU, served at 20 tokens/s a user", "", legend=False)
    left.legend(loc="upper left", ncols=4, fontsize=9, frameon=False)
    fig.suptitle(_finding(*worlds), **_TITLE)
    note(fig, "derived: DeepSeek's layout as it is; serving is decoding alone, at 4,989 tokens")
    return fig


def what_if_in_words(
    arithmetic: float = 1,
    memory_bandwidth: float = 1,
    memory_size: float = 1,
    scale_out: float = 1,
    domain: int = 8,
) -> str:
    """What the step spends where, what a tenth more of would buy most, and what ends the batch."""
    world = changed(arithmetic, memory_bandwidth, memory_size, scale_out, domain)
    found = _finding(future.today(), world)
    unit = service_units.in_words(world)
    if _seconds(world) is None:
        return f"{found}. {unit}"
    plan = future_world.training(world)
    parts = ", ".join(f"{role} {100 * s / plan.step_time_s:.0f} %" for role, s in _parts(world))
    return (
        f"{found}. Of the step: {parts}. A tenth more of {plan.bottleneck} would save most of it. "
        f"{unit}"
    )


@cache
def changed(
    arithmetic: float = 1,
    memory_bandwidth: float = 1,
    memory_size: float = 1,
    scale_out: float = 1,
    domain: int = 8,
) -> World:
    """Today's world with a scaled H800; the links inside a node stay as fast as they are."""
    return future.today().with_chip(
        arithmetic=arithmetic,
        memory_bandwidth=memory_bandwidth,
        memory=memory_size,
        scale_out=scale_out,
        domain=domain,
    )


def models_after() -> None:
    """Print what later models changed, and what each change does to the bill."""
    for model in successors.SUCCESSORS:
        print(f"{model.name}, {model.when} ({model.confidence})")
        print(_wrapped(f"{model.changed}. From {model.source}."))
        for effect in successors.effects(model.name):
            numbers = f"{effect.before:>10,.4g}{effect.after:>10,.4g}{effect.ratio:>7.2f}x"
            print(f"    {effect.what:44}{numbers}  {effect.unit}")


_SHORT = {about[0]: name for name, about in future.MEASURES.items()}


def _wrapped(text: str, first: str = "    ") -> str:
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent="    ")


def _gains(ax: Axes, names: list[str], told: dict[str, tuple[dict[str, float], str]]) -> None:
    """A bar for each knob and figure that it moves, with the gain; none for a gain of 1.00x."""
    high = 0.78 / len(told)
    for place, (label, (gains, colour)) in enumerate(told.items()):
        at = [(y, gains[name]) for y, name in enumerate(names) if name in gains]
        lines = [y + (place - (len(told) - 1) / 2) * high for y, _ in at]
        shares = [100 * (gain - 1) * (f"{gain:.2f}" != "1.00") for _, gain in at]
        bars = ax.barh(lines, shares, high, color=colour, label=label)
        ax.bar_label(bars, [f"{gain:.2f}x" for _, gain in at], padding=3, fontsize=9)
    ax.set_yticks(range(len(names)), names, fontsize=10)
    ax.set_xlim(0, 1.2 * max(100 * (gain - 1) for of, _ in told.values() for gain in of.values()))
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(False, axis="y")


def _step(ax: Axes, y: int, world: World) -> None:
    """One step as a bar of its roles, or why there is none."""
    seconds, at = _seconds(world), 0.0
    if seconds is None:
        ax.text(0, y, " does not fit", va="center", fontsize=11, color=INK)
        return
    for role, spent in _parts(world):
        label = role if y == 0 else None
        ax.barh(y, spent, 0.6, left=at, color=ROLES[role][0], label=label)
        at += spent
    ax.text(at, y, f" {seconds:.2f} s", va="center", fontsize=11, color=INK)


def _parts(world: World) -> list[tuple[str, float]]:
    times = future_world.training(world).times
    return [(role, sum(times[part] for part in parts)) for role, (_, parts) in ROLES.items()]


def _seconds(world: World) -> float | None:
    try:
        return future_world.step_s(world)
    except PlanError:
        return None


def _finding(today: World, asked: World) -> str:
    rates = [served(world).tokens_per_second_per_gpu for world in (today, asked)]
    serves = f"served {rates[1]:,.0f} tokens/s a GPU ({rates[1] / rates[0]:.2f}x)"
    seconds = _seconds(asked)
    if seconds is None:
        return f"V3's layout does not fit; {serves}"
    return f"A step takes {seconds:.2f} s ({_seconds(today) / seconds:.2f}x as fast), {serves}"
