"""Pairs of runs of one seed against each other: how far apart on average, and how sure that is."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from statistics import mean, stdev

from dsv3_tutorial.receipts import Receipt

BASE = "bf16"
PROMISE = 0.0025  # DeepSeek-V3 report, section 3.3: the loss stays this close, relatively
APART = 3  # errors: what two runs that do not differ exceed in 0.27 % of cases
INTERVAL = 2  # errors to either side: where the difference lies in 95.4 % of cases
TYPICAL = "fp8"  # whose pairs say how far rounding alone spreads a single pair


@dataclass(frozen=True)
class Pairs:
    """A variant's held-out loss over BF16's, less 1, as a mean over pairs of runs of one seed.

    error: the mean's standard error; infinite for one pair, which has none.
    """

    variant: str
    seeds: list[int]
    differences: list[float]

    @property
    def mean(self) -> float:
        return mean(self.differences)

    @property
    def spread(self) -> float:
        """The standard deviation of a single pair; infinite for one."""
        return stdev(self.differences) if len(self.differences) > 1 else math.inf

    @property
    def error(self) -> float:
        return self.spread / math.sqrt(len(self.differences))

    @property
    def within(self) -> bool | None:
        """Whether it is within 0.25 % plus two standard errors; None where one pair cannot say.

        The noisier the runs, the easier it is to be: `verdict` has not that fault.
        """
        return abs(self.mean) <= PROMISE + 2 * self.error if len(self.seeds) > 1 else None

    @property
    def interval(self) -> tuple[float, float]:
        """Where the difference lies: the mean and 2 errors to either side, with few pairs more."""
        reach = factor(len(self.differences), INTERVAL) * self.error
        return self.mean - reach, self.mean + reach

    @property
    def by_chance(self) -> float:
        """What one more pair as noisy as these exceeds as rarely as 3 errors, without a cause."""
        return factor(len(self.differences), APART) * self.spread

    def differs(self, by_chance: float = math.inf) -> bool:
        """Whether the mean lies beyond 3 errors (few pairs: more), or each pair beyond `by_chance`.

        by_chance is another variant's: so that two pairs, or one, can tell a large difference.
        """
        least = min(self.differences, key=abs)
        one_side = all(value * least > 0 for value in self.differences)
        alone = abs(self.mean) > factor(len(self.differences), APART) * self.error
        return alone or (one_side and abs(least) > by_chance)

    def verdict(self, by_chance: float = math.inf) -> str:
        """differs; or the whole interval lies inside +-0.25 %; or undecided, up to how much."""
        differs = self.differs(by_chance)
        if len(self.differences) < 2:
            beyond = f", beyond what {TYPICAL}'s pairs do by chance" if differs else ""
            return "one pair: no error" + beyond
        most = max(map(abs, self.interval))
        if differs:
            return "differs"
        if most <= PROMISE:
            return f"within {PROMISE:.2%}"
        return f"undecided: a difference of up to {most:.2%} cannot be excluded"

    def __str__(self) -> str:
        if self.within is None:
            return f"{self.variant}: {self.mean:+.3%} for one seed, and no error without a second"
        return (
            f"{self.variant}: {self.mean:+.3%} +- {self.error:.3%} over {len(self.seeds)} seeds, "
            f"{'within' if self.within else 'NOT within'} {PROMISE:.2%} plus two standard errors; "
            f"{self.verdict()}"
        )


def paired(found: Iterable[Receipt], base: str = BASE) -> dict[str, Pairs]:
    """Each variant against `base`, seed by seed: only runs of one length and device are paired.

    Takes receipts as `receipts.latest("precision")` gives them.
    """
    by_run = {(_pair_key(r), r.shapes["variant"]): r for r in found}
    pairs: dict[str, dict[int, float]] = {}
    for (key, variant), receipt in by_run.items():
        own = by_run.get((key, base))
        if own is not None and variant != base:
            difference = receipt.value / own.value - 1
            pairs.setdefault(variant, {})[receipt.shapes["seed"]] = difference
    return {name: Pairs(name, [*each], [*each.values()]) for name, each in pairs.items()}


def _pair_key(receipt: Receipt) -> tuple:
    shapes = receipt.shapes
    return shapes["seed"], shapes["length"], shapes["tokens_per_step"], receipt.device


def by_chance(compared: dict[str, Pairs]) -> float:
    """How far a single pair gets without a cause, as FP8's own pairs say; infinite without two."""
    known = compared.get(TYPICAL)
    return known.by_chance if known else math.inf


def apart(compared: dict[str, Pairs]) -> list[str]:
    """The variants that differ from BF16: by the mean of their pairs, or in every one of them.

    The second needs one assumption: rounding spreads the pairs of all variants alike.
    """
    return [name for name, each in compared.items() if each.differs(by_chance(compared))]


@cache
def factor(pairs: int, errors: float) -> float:
    """How many of its own errors a mean of few pairs must exceed to be as sure as `errors` of many.

    Student's t: for 3 errors 19.2 with three pairs and 4.5 with eight; infinite with one.
    """
    if pairs < 2:
        return math.inf
    wanted, low, high = math.erf(errors / math.sqrt(2)), 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, pairs - 1) < wanted else (low, middle)
    return high


def _inside(t: float, freedom: int) -> float:
    """The share of Student's distribution within +-t; Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle, odd = math.atan(t / math.sqrt(freedom)), freedom % 2
    term, total = math.cos(angle) ** odd, 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    inside = math.sin(angle) * total
    return 2 / math.pi * (angle + inside) if odd else inside
