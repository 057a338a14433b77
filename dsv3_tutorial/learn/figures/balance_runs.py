"""The recorded runs of six ways to balance the experts, and a live run drawn over them.

A run is one receipt of `bench balance`: MaxVio and loss as means of ten steps, and the held-out
loss; `balance_domains` reads which experts each kind of text went to. Every function can be given
the runs to read, so that nothing it says is true of one set of receipts only.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_tutorial import receipts
from dsv3_tutorial.bench.balance import EVERY, NAME, VARIANTS, by_chance
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
    gaps = {
        v: [r.value - other[s].value for s, r in seeds.items() if s in other]
        for v, seeds in found.items()
        if v != base
    }
    return {v: (mean(gap), _error(gap)) for v, gap in gaps.items() if gap}


def _error(values: Sequence[float]) -> float | None:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def balance_table(found: Runs | None = None) -> None:
    """Print each variant's held-out loss, its paired gap to no balancing, and its two MaxVios."""
    found = found or runs()
    loss, gaps = held_out(found), paired(found)
    last, whole = last_violation(found), held_out_violation(found)
    heads = f"{'bits/byte':>10}{'minus none, paired':>20}{'MaxVio':>8}{'held out':>10}"
    print(f"{'balanced by':20}{heads}")
    for variant in found:
        gap = _signed(*gaps[variant]) if variant in gaps else ""
        numbers = f"{loss[variant]:>10.3f}{gap:>20}{last[variant]:>8.2f}{whole[variant]:>10.2f}"
        print(f"{variant:20}{numbers}")
    print(f"MaxVio: batches of the last {LAST} steps, and the held-out text as a whole; 0 is even,")
    print(f"and chance alone would leave {by_chance():.2f} in a batch of as many unrelated tokens")
    print(f"{seeds_in_words(found)}; +- is the standard error over the seeds")


def least_even_gamma(found: Runs | None = None) -> str:
    """Of the bias's three gammas, the one whose last batches were furthest from an even load."""
    ends = last_violation(found or runs())
    return max((v for v in ends if v.startswith("bias")), key=ends.__getitem__)


def _signed(gap: float, error: float | None) -> str:
    return f"{gap:+.3f}" + (f" +- {error:.3f}" if error is not None else "")


def seeds_in_words(found: Runs) -> str:
    """How many seeds stand behind each variant: "3 seeds each"."""
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
    lowest = min(_over_steps(seeds, "loss")[1].min() for seeds in found.values())
    right.set_ylim(lowest - 0.1, lowest + 2.5)  # the fall from 8 bits would hide the rest
    ends = last_violation(found)
    best, worst = best_balanced(found), least_balanced(found)
    apart = max(loss.values()) - min(loss.values())
    title = f"MaxVio at the end: {ends[worst]:.2f} ({worst})\nto {ends[best]:.2f} ({best})"
    finish(fig, left, title, f"steps (means of {EVERY})", "MaxVio, mean over layers", legend=False)
    title = f"Held-out losses end within\n{apart:.3f} bits per byte"
    finish(fig, right, title, f"steps (means of {EVERY})", "bits per byte, batches", legend=False)
    fig.legend(
        *left.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False
    )
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


def fast_enough(found: Runs | None = None) -> dict[str, int | None]:
    """For each bias: the first recorded step with half of the MaxVio that no balancing ended at.

    None for a gamma that is not below that half over the last LAST steps, whatever it reached.
    """
    found = found or runs()
    ends = last_violation(found)
    half = ends[BASE] / 2
    arrived = {}
    for variant in (v for v in found if v.startswith("bias")):
        steps, values = _over_steps(found[variant], "max_violation")
        below = [step for step, value in zip(steps, values.mean(axis=0)) if value <= half]
        arrived[variant] = below[0] if below and ends[variant] <= half else None
    return arrived


def gammas(found: Runs | None = None) -> Figure:
    """MaxVio over the steps without balancing and with three speeds of the bias."""
    found = found or runs()
    arrived, ends = fast_enough(found), last_violation(found)
    fig, ax = figure(9, 4.8)
    for variant in (BASE, *arrived):
        _band(ax, found, variant, "max_violation")
    half = f"half of what {BASE} ended at"
    ax.axhline(ends[BASE] / 2, color=INK, linestyle=":", label=half)
    plain_log(ax.yaxis, subs=(1.0, 2.0, 5.0))
    finish(fig, ax, _speeds(arrived, ends), f"steps (means of {EVERY})", "MaxVio, mean over layers")
    ax.legend(fontsize=10, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return _captioned(fig, found)


def _speeds(arrived: dict[str, int | None], ends: dict[str, float]) -> str:
    """Which gammas halve the MaxVio of no balancing, after how many steps, and which do not."""
    short = {variant: variant.removeprefix("bias, ") for variant in arrived}
    fast = [f"{short[v]} after {step} steps" for v, step in arrived.items() if step is not None]
    slow = [f"{short[v]} ends at {ends[v]:.2f}" for v, step in arrived.items() if step is None]
    parts = [
        f"Without balancing MaxVio is {ends[BASE]:.2f}, halved by",
        ", ".join(fast) or "no gamma",
    ]
    return "\n".join(parts + ([f"({', '.join(slow)})"] if slow else []))


def balance_live(
    rows: Sequence[tuple[int, float, float]], recorded_variant: str, found: Runs | None = None
) -> Figure:
    """This machine's MaxVio, in means of EVERY steps as recorded, over the recorded seeds' band."""
    found = found or runs()
    steps, band = _over_steps(found[recorded_variant], "max_violation")
    fig, ax = figure(8, 4.2)
    low, high = band.min(axis=0), band.max(axis=0)
    label = f"{recorded_variant}, recorded"
    ax.fill_between(steps, low, high, color=COMPUTE, alpha=0.35, label=label)
    ax.plot(steps, band.mean(axis=0), color=COMPUTE, linewidth=1)
    at, values = _in_blocks(rows)
    ax.plot(at, values, "o-", color=INK, markersize=4, label="this run")
    index = min(len(steps), -(-at[-1] // EVERY)) - 1
    title = (
        f"After {at[-1]} steps here: MaxVio {values[-1]:.2f}, recorded {band[:, index].mean():.2f}"
    )
    ax.set_xlim(0, min(steps[-1], max(5 * EVERY, at[-1] * 1.3)))
    return _captioned(
        finish(fig, ax, title, f"steps (means of {EVERY})", "MaxVio, mean over layers"),
        {recorded_variant: found[recorded_variant]},
    )


def _in_blocks(rows: Sequence[tuple[int, float, float]]) -> tuple[list[int], list[float]]:
    """Each whole block of EVERY steps: its last step and its mean MaxVio; a short run is one."""
    if not rows:
        raise ValueError(
            "The live run left no step, so there is nothing to draw over the record. "
            "Run the cell that trains first: it takes one step at least."
        )
    size = min(EVERY, len(rows))
    blocks = [rows[at : at + size] for at in range(0, len(rows) - size + 1, size)]
    return [block[-1][0] for block in blocks], [mean(row[2] for row in block) for block in blocks]
