"""What hardware should come next: each recommendation turned, and what moves, before and after.

The papers recommend; here each recommendation that has a size gets a price: seconds of V3's
training step, tokens served, a user's time per token. Derived, with every assumption in its knob.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from dsv3_tutorial.cost import future_world
from dsv3_tutorial.cost.future_knobs import EVERYTHING as EVERYTHING
from dsv3_tutorial.cost.future_knobs import KNOBS as KNOBS
from dsv3_tutorial.cost.future_knobs import TOGETHER as TOGETHER
from dsv3_tutorial.cost.future_knobs import Knob as Knob
from dsv3_tutorial.cost.future_unpriced import UNPRICED as UNPRICED
from dsv3_tutorial.cost.future_world import World
from dsv3_tutorial.cost.future_world import today as today

# name -> what it is, unit, seconds or tokens of a world in that unit, whether less is better
MEASURES = {
    "step": ("a training step", "s", future_world.step_s, True),
    "hours": (
        "the whole training",
        "k GPU-h",
        lambda world: future_world.gpu_hours(world) / 1e3,
        True,
    ),
    "serving": (
        "served at 20 tokens/s a user",
        "tokens/s a GPU",
        future_world.serving,
        False,
    ),
    "token": (
        "a user's token, exchanges alone",
        "ms",
        lambda world: 1e3 * future_world.token_s(world),
        True,
    ),
    "return": (
        "a conversation back from the CPU",
        "ms",
        lambda world: 1e3 * future_world.return_s(world),
        True,
    ),
}


@dataclass(frozen=True)
class Row:
    """One figure without a knob and with it; gain 1.25: a quarter more, or in 1 / 1.25 the time."""

    knob: str
    measure: str
    unit: str
    before: float
    after: float
    less_is_better: bool

    @property
    def gain(self) -> float:
        return self.before / self.after if self.less_is_better else self.after / self.before


def knob(name: str) -> Knob:
    """A knob by its name. Raises KeyError that lists the names."""
    found = {each.name: each for each in (*KNOBS, EVERYTHING)}
    if name not in found:
        known = ", ".join(found)
        raise KeyError(f"no knob {name!r}: nothing can be turned. There are {known}.")
    return found[name]


def what_if(turned: Knob | str) -> tuple[Row, ...]:
    """Every figure that a knob can move, before and after it is turned."""
    turned = knob(turned) if isinstance(turned, str) else turned
    return tuple(
        compared(name, turned.name, turned.before, turned.after) for name in turned.measures
    )


def together(names: Iterable[str]) -> tuple[Row, ...]:
    """Every figure today and with several knobs turned at once, in the order given.

    Gains do not multiply: once a link is fast, what a step waits for is another thing.
    """
    turned = [knob(name) for name in names]
    world = today()
    for each in turned:
        world = each.apply(world)
    title = " + ".join(each.name for each in turned) or "today"
    return tuple(compared(measure, title, today(), world) for measure in MEASURES)


def compared(measure: str, name: str, before: World, after: World) -> Row:
    """One figure in two worlds."""
    title, unit, of, less = MEASURES[measure]
    return Row(name, title, unit, of(before), of(after), less)


def ranking(measure: str = "step") -> list[Row]:
    """All knobs that can move a figure, the largest gain first."""
    found = [
        compared(measure, each.name, each.before, each.after)
        for each in KNOBS
        if measure in each.measures
    ]
    return sorted(found, key=lambda row: -row.gain)


def report(width: int = 90) -> str:
    """All knobs and what each buys, as text; then what has no price, and why."""
    lines = [f"{'knob':<34}{'figure':<32}{'before':>9}{'after':>9}{'gain':>6}", "-" * width]
    for each in (*KNOBS, EVERYTHING):
        for i, row in enumerate(what_if(each)):
            name = row.knob if i == 0 else ""
            figure = f"{row.measure}, {row.unit}" if len(row.measure) < 24 else row.measure
            before, after = (f"{value:,.4g}" for value in (row.before, row.after))
            lines.append(f"{name:<34}{figure:<32}{before:>9}{after:>9}{row.gain:>5.2f}x")
    lines += ["", "Not priced:"]
    lines += [f"- {what} ({where}): {why}." for what, where, why in UNPRICED]
    return "\n".join(lines)
