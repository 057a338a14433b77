"""Pairs of runs of one seed against each other: how far apart on average, and how sure that is."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean, stdev

from dsv3_tutorial.receipts import Receipt

BASE = "bf16"
PROMISE = 0.0025  # DeepSeek-V3 report, section 3.3: the loss stays this close, relatively


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
    def error(self) -> float:
        count = len(self.differences)
        return stdev(self.differences) / math.sqrt(count) if count > 1 else math.inf

    @property
    def within(self) -> bool | None:
        """Whether it is within 0.25 % plus two standard errors; None where one pair cannot say."""
        return abs(self.mean) <= PROMISE + 2 * self.error if len(self.seeds) > 1 else None

    def __str__(self) -> str:
        if self.within is None:
            return f"{self.variant}: {self.mean:+.3%} for one seed, and no error without a second"
        return (
            f"{self.variant}: {self.mean:+.3%} +- {self.error:.3%} over {len(self.seeds)} seeds, "
            f"{'within' if self.within else 'NOT within'} {PROMISE:.2%} plus two standard errors"
        )


def paired(found: Iterable[Receipt]) -> dict[str, Pairs]:
    """Each variant against BF16, seed by seed: only runs of equal length on one device are paired.

    Takes receipts as `receipts.latest("precision")` gives them.
    """
    by_run = {(_pair_key(r), r.shapes["variant"]): r for r in found}
    pairs: dict[str, dict[int, float]] = {}
    for (key, variant), receipt in by_run.items():
        base = by_run.get((key, BASE))
        if base is not None and variant != BASE:
            difference = receipt.value / base.value - 1
            pairs.setdefault(variant, {})[receipt.shapes["seed"]] = difference
    return {name: Pairs(name, [*each], [*each.values()]) for name, each in pairs.items()}


def _pair_key(receipt: Receipt) -> tuple:
    shapes = receipt.shapes
    return shapes["seed"], shapes["length"], shapes["tokens_per_step"], receipt.device
