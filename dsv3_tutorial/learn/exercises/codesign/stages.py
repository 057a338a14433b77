"""Cutting layers into stages so that the slowest stage is as fast as can be."""

import math
from itertools import accumulate, pairwise

from dsv3_tutorial.learn.registry import Case, Exercise, Mutant

# Dense layers, MoE layers, and a head that weighs four layers: as V3's 61 layers would be.
V3_LIKE = [0.7, 0.7, 0.7, *[1.0] * 58, 2.1]


def _costs(costs: list[float], stages: int):
    return lambda: (list(costs), stages)


def _rising(count: int) -> list[float]:
    return [float(1 + 7 * i % 11) + i % 3 / 4 for i in range(count)]


def best(costs: list[float], stages: int) -> float:
    """The smallest largest sum of at most `stages` contiguous parts."""
    sums = [0.0, *accumulate(costs)]
    reached = [0.0] + [math.inf] * len(costs)  # of the first i costs, with so many stages
    for _ in range(stages):
        reached = [
            min(max(reached[j], sums[i] - sums[j]) for j in range(i + 1)) for i in range(len(sums))
        ]
    return reached[-1]


def _even_counts(costs, stages):
    """As many layers for every stage, the first ones one more."""
    size, more = divmod(len(costs), stages)
    ends = [i * size + min(i, more) for i in range(stages + 1)]
    return max(sum(costs[a:b]) for a, b in pairwise(ends))


def _rounded_up(costs, stages):
    size = -(-len(costs) // stages)
    return max(sum(costs[i : i + size]) for i in range(0, len(costs), size))


def _mean(costs, stages):
    return sum(costs) / stages


def _greedy(costs, stages):
    """A stage is closed as soon as it reaches the mean; the last one takes the rest."""
    mean, parts = sum(costs) / stages, [0.0]
    for cost in costs:
        if parts[-1] >= mean and len(parts) < stages:
            parts.append(0.0)
        parts[-1] += cost
    return max(parts)


def _never_above(costs, stages):
    """A stage is closed before it would pass the mean; the last one takes the rest."""
    mean, parts = sum(costs) / stages, [0.0]
    for cost in costs:
        if parts[-1] and parts[-1] + cost > mean and len(parts) < stages:
            parts.append(0.0)
        parts[-1] += cost
    return max(parts)


def _any_order(costs, stages):
    """The largest first, each to the stage that has least: not contiguous."""
    parts = [0.0] * stages
    for cost in sorted(costs, reverse=True):
        parts[parts.index(min(parts))] += cost
    return max(parts)


def _dealt(costs, stages):
    return max(sum(costs[i::stages]) for i in range(stages))


def _remaining(costs, stages):
    """Each stage is closed near the mean of what is left: better than greedy, not best."""
    left, at, worst = sum(costs), 0, 0.0
    for stage in range(stages, 0, -1):
        goal, own = left / stage, 0.0
        while at < len(costs) and (stage == 1 or own == 0 or own + costs[at] / 2 <= goal):
            own, at = own + costs[at], at + 1
        left, worst = left - own, max(worst, own)
    return worst


def _whole_limits(costs, stages):
    """A limit searched among whole numbers only."""
    limit = math.ceil(max(costs))
    while True:
        count, own = 1, 0.0
        for cost in costs:
            count, own = (count + 1, cost) if own + cost > limit else (count, own + cost)
        if count <= stages:
            return limit
        limit += 1


SLOWEST_STAGE = Exercise(
    name="codesign.slowest_stage",
    reference="dsv3_tutorial.cost.stage_split:slowest_stage",
    cases=[
        Case("5 layers, 2 stages", _costs([1.0, 2.0, 3.0, 4.0, 5.0], 2)),
        Case("a heavy head", _costs([1.0, 1.0, 1.0, 1.0, 1.0, 4.0], 3)),
        Case("a heavy layer in the middle", _costs([2.0, 3.0, 9.0, 1.0, 1.0, 5.0, 1.0], 4)),
        Case("one stage", _costs([1.5, 2.5, 1.0], 1)),
        Case("a stage for each layer", _costs([1.0, 6.0, 2.0], 3)),
        Case("as V3 would be, 16 stages", _costs(V3_LIKE, 16), hidden=True),
        Case("many", _costs(_rising(40), 7), hidden=True),
        Case("a light end", _costs([4.0, 4.0, 4.0, 4.0, 1.0, 1.0], 3), hidden=True),
        Case("even ones", _costs([1.0] * 10, 4), hidden=True),
        Case("a light start", _costs([1.0, 1.0, 4.0, 5.0, 3.0, 4.0, 2.0], 4), hidden=True),
    ],
    hints=[
        "Ask the other way round: given a limit, how many stages are needed if none may exceed it? "
        "Fill a stage until the next layer would pass the limit, then begin another.",
        "The answer is the sum of some layers i to j - 1. Try all those sums in order: the "
        "smallest that needs at most `stages` stages.",
        "Or stage by stage: the best for the first i layers on s stages is the least, over all j "
        "up to i, of max(best of the first j on s - 1, sum(costs[j:i])).",
    ],
    difficulty=4,
    importance=3,
    minutes=10,
    lines=8,
    tolerance=1e-9,
    mutants=[
        Mutant(
            "as many layers each",
            _even_counts,
            "Every stage gets as many layers: it is the sums that should be even.",
        ),
        Mutant(
            "rounded up",
            _rounded_up,
            "Every stage gets as many layers, rounded up: it is the sums that should be even.",
        ),
        Mutant(
            "the mean",
            _mean,
            "This is the mean: a layer is not cut, so the slowest stage has more.",
        ),
        Mutant(
            "no less than a layer",
            lambda costs, stages: max(sum(costs) / stages, *costs),
            "This is a bound that no cut may reach: the mean, or the largest layer.",
        ),
        Mutant(
            "largest layer",
            lambda costs, stages: max(costs),
            "This is the slowest layer: a stage has several.",
        ),
        Mutant(
            "past the mean",
            _greedy,
            "A stage is closed once it has passed the mean: the first cuts decide too early.",
        ),
        Mutant(
            "below the mean",
            _never_above,
            "A stage is closed before it passes the mean, and the last takes all the rest.",
        ),
        Mutant(
            "mean of the rest",
            _remaining,
            "Each cut is best for itself here, not for all: try every limit, or every cut.",
        ),
        Mutant(
            "any order",
            _any_order,
            "The layers change places here: a stage holds neighbours.",
        ),
        Mutant(
            "dealt out",
            _dealt,
            "The layers are dealt out like cards: a stage holds neighbours.",
        ),
        Mutant(
            "whole limits",
            _whole_limits,
            "Only whole numbers are tried as limits: seconds need not be whole.",
        ),
        Mutant(
            "one stage less",
            lambda costs, stages: best(costs, max(1, stages - 1)),
            "One stage is not used: stages parts need stages - 1 cuts.",
        ),
        Mutant(
            "one stage more",
            lambda costs, stages: best(costs, stages + 1),
            "One stage too many: stages - 1 cuts make that many parts.",
        ),
    ],
)
