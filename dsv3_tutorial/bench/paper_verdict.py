"""What a printed number is worth beside ours: equal, within so much, or different and why."""

from dataclasses import dataclass, field
from decimal import Decimal

from dsv3_tutorial import paper
from dsv3_tutorial.cost.checks import Check

ROUND = 0.03  # no rounding moves a number further: 2.6 is not "3"
NEAR = 0.1  # further off than this a number differs, and a reason has to stand beside it
# Where ours is from. A setting is the weakest: it says only that our code was told the same.
KINDS = {
    "counted": "from a model's sizes, or by wiring a network",
    "arithmetic": "from other printed numbers",
    "model": "a cost model, with its assumptions",
    "planner": "a whole plan of a run, whose efficiencies are calibrated on other numbers",
    "config": "the published config.json beside the report's text",
    "setting": "the constant that our code runs with",
}


@dataclass(frozen=True)
class Reproduced(Check):
    """A check with the share of the printed number that it may be off.

    tolerance: 0 asks for all printed digits. why: the reason, wherever the two numbers differ.
    """

    kind: str = field(kw_only=True)
    tolerance: float = field(default=0.0, kw_only=True)
    why: str = field(default="", kw_only=True)

    @property
    def equal(self) -> bool:
        """Whether ours, rounded as the printed number is, is that number."""
        near = half_digit(self.row.value) * (1 + 1e-9)
        return abs(self.computed - self.row.value) <= near and abs(self.off) <= ROUND

    @property
    def holds(self) -> bool:
        """Whether ours lies within the tolerance; all printed digits always do."""
        return self.equal or abs(self.off) <= self.tolerance

    @property
    def verdict(self) -> str:
        """equal, within x %, or differs by it: over a tenth, or the paper contradicts itself."""
        if self.why:
            return f"differs by {100 * abs(self.off):.2g} %"
        return "equal" if self.equal else f"within {100 * abs(self.off):.2g} %"


@dataclass(frozen=True)
class Inconsistency:
    """What does not fit: printed where and how, the calculation, and the number that it gives."""

    what: str
    where: str
    printed: str
    calculation: str
    ours: str


def half_digit(value: float) -> float:
    """Half of the last digit that a number is printed with: 0.005 of 4.66, 0.5 of 250."""
    exponent = Decimal(repr(value)).normalize().as_tuple().exponent
    return 0.5 * 10.0 ** min(exponent, 0)


def check(id: str, computed: float, how: str, kind: str, tolerance: float = 0, why: str = ""):
    """One reproduced number by its row's id; `computed` in the row's unit."""
    return Reproduced(paper.row(id), computed, how, kind=kind, tolerance=tolerance, why=why)


def value(id: str) -> float:
    """The printed number of a row."""
    return paper.row(id).value
