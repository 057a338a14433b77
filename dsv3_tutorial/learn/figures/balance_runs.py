"""The recorded runs of six ways to balance the experts, and a live run drawn over them.

A run is one receipt of `bench balance`: MaxVio and loss as means of ten steps, the held-out loss,
and which experts each kind of text went to. Every function takes the runs it shall read, so that
nothing it says is true of one set of receipts only.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure

from dsv3_tutorial import receipts
from dsv3_tutorial.bench.balance import CONFIG, EVERY, NAME, VARIANTS
from dsv3_tutorial.learn.figures.style import (
    COMPUTE,
    INK,
    figure,
    finish,
    note,
    plain_log,
    series,
)

Runs = dict[str, dict[int, receipts.Receipt]]
BASE = "none"
LAST = 50  # steps at the end of a run that count as its outcome
SPREAD = np.log2([0.25, 0.5, 1, 2, 4])  # an expert's share: at most E / K = 4 times the even one


def runs(folder: Path | None = None) -> Runs:
    """The recorded runs, variants in the benchmark's order: variant -> seed -> its last receipt."""
    found: Runs = {variant: {} for variant in VARIANTS}
    for receipt in receipts.read(NAME, folder=folder):
        found.setdefault(receipt.shapes["variant"], {})[receipt.shapes["seed"]] = receipt
    return {variant: seeds for variant, seeds in found.items() if seeds}


def held_out(found: Runs) -> dict[str, float]:
    """Held-out bits per byte of each variant, mean over its seeds."""
    return {v: mean(r.value for r in seeds.values()) for v, seeds in found.items()}


def last_violation(found: Runs) -> dict[str, float]:
    """MaxVio of the last LAST steps' batches of each variant, mean over its seeds."""
    return {v: mean(_last(r) for r in seeds.values()) for v, seeds in found.items()}


def held_out_violation(found: Runs) -> dict[str, float]:
    """MaxVio over the held-out text as a whole, mean over the seeds."""
    return {
        v: mean(r.shapes["held_out_violation"] for r in seeds.values())
        for v, seeds in found.items()
    }


def _last(receipt: receipts.Receipt) -> float:
    return mean(receipt.shapes["max_violation"][-LAST // EVERY :])


def best_balanced(found: Runs | None = None) -> str:
    """The variant whose last batches were nearest to an even load."""
    ends = last_violation(found or runs())
    return min(ends, key=ends.__getitem__)


def least_balanced(found: Runs | None = None) -> str:
    """The variant whose last batches were furthest from an even load."""
    ends = last_violation(found or runs())
    return max(ends, key=ends.__getitem__)


def learns_best(found: Runs | None = None) -> str:
    """The variant with the lowest mean held-out loss; `paired` says whether by more than noise."""
    ends = held_out(found or runs())
    return min(ends, key=ends.__getitem__)


def paired(found: Runs, base: str = BASE) -> dict[str, tuple[float, float | None]]:
    """Each variant's held-out loss minus `base`'s with the same seed: mean and standard error.

    Only seeds that both have; no error from a single one.
    """
    other = found.get(base, {})
    gaps = {v: [r.value - other[s].value for s, r in seeds.items() if s in other]
            for v, seeds in found.items() if v != base}
    return {v: (mean(gap), _error(gap)) for v, gap in gaps.items() if gap}


def _error(values: Sequence[float]) -> float | None:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def balance_table(found: Runs | None = None) -> None:
    """Print each variant's held-out loss, its paired gap to no balancing, and its two MaxVios."""
    found = found or runs()
    loss, gaps = held_out(found), paired(found)
    last, whole = last_violation(found), held_out_violation(found)
    print(f"{'balanced by':20}{'bits/byte':>10}{'minus none, paired':>20}{'MaxVio':>8}{'held out':>10}")
    for variant in found:
        gap = _signed(*gaps[variant]) if variant in gaps else ""
        numbers = f"{loss[variant]:>10.3f}{gap:>20}{last[variant]:>8.2f}{whole[variant]:>10.2f}"
        print(f"{variant:20}{numbers}")
    print(f"MaxVio: batches of the last {LAST} steps, and the held-out text as a whole; 0 is even")
    print(f"{_seeds(found)}; +- is the standard error over the seeds")


def _signed(gap: float, error: float | None) -> str:
    return f"{gap:+.3f}" + (f" +- {error:.3f}" if error is not None else "")


def _seeds(found: Runs) -> str:
    low, high = min(map(len, found.values())), max(map(len, found.values()))
    return (f"{low}" if low == high else f"{low} to {high}") + f" seed{'s' * (high > 1)} each"


def balance_curves(found: Runs | None = None) -> Figure:
    """MaxVio over the steps, and the loss of the same batches, each with the band of its seeds."""
    found = found or runs()
    fig, (left, right) = figure(11, 5.0, columns=2)
    for variant in found:
        _band(left, found, variant, "max_violation")
        _band(right, found, variant, "loss")
    plain_log(left.yaxis, subs=(1.0, 2.0, 5.0))
    loss = held_out(found)
    right.set_ylim(min(loss.values()) - 0.3, max(loss.values()) + 2)
    ends = last_violation(found)
    best, worst = best_balanced(found), least_balanced(found)
    apart = max(loss.values()) - min(loss.values())
    title = f"MaxVio at the end: {ends[worst]:.2f} ({worst})\nto {ends[best]:.2f} ({best})"
    finish(fig, left, title, f"steps (means of {EVERY})", "MaxVio, mean over layers", legend=False)
    title = f"Held-out losses end within\n{apart:.3f} bits per byte"
    finish(fig, right, title, f"steps (means of {EVERY})", "bits per byte", legend=False)
    fig.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return _captioned(fig, found)


def _band(ax: Axes, found: Runs, variant: str, what: str, look: dict | None = None) -> None:
    """One variant's mean over the seeds and the band between them, in its colour of the course."""
    look = look or series(list(VARIANTS).index(variant))
    steps, values = _over_steps(found[variant], what)
    ax.plot(steps, values.mean(axis=0), label=variant, markersize=4, markevery=3, **look)
    ax.fill_between(steps, values.min(axis=0), values.max(axis=0), color=look["color"], alpha=0.2)


def _over_steps(seeds: dict[int, receipts.Receipt], what: str) -> tuple[list[int], np.ndarray]:
    """The recorded steps, and a curve of every seed -> (seeds, steps)."""
    all_runs = list(seeds.values())
    return all_runs[0].shapes["steps"], np.array([r.shapes[what] for r in all_runs])


def _captioned(fig: Figure, found: Runs) -> Figure:
    note(fig, receipts.caption([r for seeds in found.values() for r in seeds.values()]))
    return fig
