"""What the measured decode steps amount to: time per cached token, where one form overtakes."""

import itertools
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dsv3_tutorial.bench.attention_steps import OURS, PEERS
from dsv3_tutorial.receipts import Receipt

# How much less time per cached token than transformers the absorbed form is to take.
TARGETS = {"small": 35.0, "v3-like": 60.0}
_ORDER = (*OURS, *PEERS)


@dataclass(frozen=True)
class Slope:
    """Seconds per cached token: the straight line through all points, and its steepness between
    neighbouring points, least and greatest."""

    value: float
    low: float
    high: float


def slope(times: Mapping[int, float]) -> Slope:
    """Fit time = fixed + slope * context by least squares: {context: seconds} -> seconds a token.

    The fit is a weighted mean of the slopes between neighbours, so it lies between those.
    """
    if len(times) < 2:
        raise ValueError(
            f"A slope was asked of {len(times)} context. One point lies on every line. "
            "Measure at two contexts or more."
        )
    points = sorted(times.items())
    contexts, seconds = zip(*points, strict=True)
    value = statistics.linear_regression(contexts, seconds).slope
    pairs = itertools.pairwise(points)
    between = [(later - sooner) / (far - near) for (near, sooner), (far, later) in pairs]
    return Slope(value, min(value, *between), max(value, *between))


def crossing(ours: Mapping[int, float], other: Mapping[int, float]) -> Slope | None:
    """Where `ours` and `other` take equally long: the last change of side along the sizes.

    Interpolated between its two neighbours, which are low and high. None where one is the faster
    throughout.
    """
    sizes = sorted(set(ours) & set(other))
    gaps = [ours[size] - other[size] for size in sizes]
    for at in reversed(range(len(sizes) - 1)):
        before, after = gaps[at], gaps[at + 1]
        if (before > 0) != (after > 0):
            low, high = sizes[at], sizes[at + 1]
            return Slope(low + (high - low) * before / (before - after), low, high)
    return None


def lines(rows: Iterable[Receipt]) -> list[str]:
    """The CPU receipts of one run as an aligned table, then the targets beside what was reached."""
    rows = list(rows)
    text = []
    for config, batch in _cells(rows):
        here = [r for r in rows if (r.shapes["config"], r.shapes["batch"]) == (config, batch)]
        text += ["", *_table(config, batch, here), *_verdicts(config, batch, here)]
    return text[1:]


def _cells(rows: list[Receipt]) -> list[tuple[str, int]]:
    slopes = (r for r in rows if r.what == "time per cached token")
    return list(dict.fromkeys((r.shapes["config"], r.shapes["batch"]) for r in slopes))


def _table(config: str, batch: int, rows: list[Receipt]) -> list[str]:
    slopes = _slopes(rows)
    contexts = max((r.shapes["contexts"] for r in rows if "contexts" in r.shapes), key=len)
    steps = {(r.shapes["form"], r.shapes["context"]): r for r in rows if r.what == "decode step"}
    head = "".join(f"{f'{t:,}':>10}" for t in contexts)
    text = [
        f"{config}, batch {batch}: ms a step at so many cached tokens",
        f"{'':<20}{head}{'us/token':>10}{'x absorbed':>12}{'cache bytes/token':>19}",
    ]
    for form, receipt in slopes.items():
        cells = [steps.get((form, t)) for t in contexts]
        times = "".join(f"{'left out' if r is None else f'{r.value * 1e3:.2f}':>10}" for r in cells)
        ratio = receipt.value / slopes["absorbed"].value
        held = receipt.shapes["cache_bytes_per_token"]
        text.append(f"{form:<20}{times}{receipt.value * 1e6:>10.3f}{ratio:>11.1f}x{held:>19,}")
    return text


def _verdicts(config: str, batch: int, rows: list[Receipt]) -> list[str]:
    slopes, target = _slopes(rows), TARGETS.get(config)
    text = []
    for form in PEERS:
        if form in slopes and target is not None:
            ratio = slopes[form].value / slopes["absorbed"].value
            reached = "reached" if ratio >= target else "not reached"
            text.append(
                f"  {form} takes {ratio:.1f}x absorbed's time per cached token; "
                f"target {target:.0f}x: {reached}"
            )
    found = [r for r in rows if r.what == "crossover"]
    text += [f"  absorbed against {r.shapes['against']}: {_crossover_words(r)}" for r in found]
    if all(r.shapes["against"] != "expanded" for r in found):
        text += _no_crossover_words(rows)
    return text


def _no_crossover_words(rows: list[Receipt]) -> list[str]:
    """One line on the form that keeps every head, if absorbed lies on one side of it throughout."""
    steps = [r for r in rows if r.what == "decode step"]
    ours, other = (
        {r.shapes["context"]: r.value for r in steps if r.shapes["form"] == form}
        for form in ("absorbed", "expanded")
    )
    both = sorted(set(ours) & set(other))
    sides = {"faster" if ours[size] < other[size] else "slower" for size in both}
    if len(sides) != 1:
        return []
    size = f"{both[0]:,} to {both[-1]:,} cached tokens"
    return [f"  absorbed against expanded: {sides.pop()} at every size measured, {size}"]


def _crossover_words(r: Receipt) -> str:
    size = f"{r.value:,.0f} {r.unit}"
    between = f"(between {r.spread['min']:,} and {r.spread['max']:,})"
    return f"{r.shapes['faster']} is faster beyond {size} {between}"


def _slopes(rows: list[Receipt]) -> dict[str, Receipt]:
    found = {r.shapes["form"]: r for r in rows if r.what == "time per cached token"}
    return {form: found[form] for form in _ORDER if form in found}
