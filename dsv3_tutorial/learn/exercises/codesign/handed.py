"""A design handed in, and what the planner says of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dsv3_tutorial.cost import designs
from dsv3_tutorial.learn.compare import describe
from dsv3_tutorial.learn.figures.design import demands
from dsv3_tutorial.learn.registry import Case

FIELDS = "The task's table has every field's name, and says which are always needed."
SHAPE = "The task lists what a shape must keep to; each line says which number to change."
TOKENS = '"tokens" is one number, written as 300e9 for 300 B.'
EXPERTS = "Each GPU of the service holds as many experts as any other."


@dataclass(frozen=True)
class Handed:
    """What was handed in for a brief."""

    design: Any
    brief: str


def hand_in(function: Callable, brief: str) -> Handed:
    """The learner's design, to be judged by this brief."""
    return Handed(function(), brief)


def comparison(hints: Mapping[str, str]) -> Callable[[Handed, Handed], str | None]:
    """A comparison that asks the planner, and lists all that is missed, a line each.

    hints: what is said of each kind of a demand that is missed (`designs.Missed`); the first
    one's is given.
    """
    known = {"fields": FIELDS, "shape": SHAPE, "tokens": TOKENS, "experts": EXPERTS, **hints}

    def compare(got: Handed, expected: Handed) -> str | None:
        if not isinstance(got.design, Mapping):
            return f"returned {describe(got.design)}, expected a dict of fields and tokens"
        found = designs.missed(got.design, designs.BRIEFS[got.brief])
        if not found:
            return None
        lines = [f"- {one.said}" for one in found]
        if found[0].kind == "fields":
            lines = ["there is no model yet", *lines]
        else:
            lines = [_count(found), *lines, f"Your design: {_numbers(got)}"]
        return "\n".join(lines) + f". Hint: {known[found[0].kind].rstrip('. ')}"

    return compare


def cases(brief: str) -> list[Case]:
    """The whole brief, and the same once more: a design is no matter of chance."""
    return [
        Case("the whole brief", lambda: (brief,)),
        Case("once more", lambda: (brief,), hidden=True),
    ]


def _count(found: list[designs.Missed]) -> str:
    one = len(found) == 1
    return "one demand is missed" if one else f"{len(found)} demands are missed"


def _numbers(got: Handed) -> str:
    """Every demand that is a number, with what the design has: those that are met as well."""
    return "; ".join(
        f"{one.what} {one.yours}, {one.asked}" for one in demands(got.design, got.brief)
    )
