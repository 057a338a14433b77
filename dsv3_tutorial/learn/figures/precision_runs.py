"""The recorded pairs of runs in BF16 and FP8, and a live run: what can be told apart, and when.

A run is one receipt of `bench precision`. What is compared is always a pair with the same seed,
that is, the same weights at the start and the same text: loss over BF16's loss, less 1.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from dsv3_tutorial import paper, receipts
from dsv3_tutorial.bench.precision import EVERY, MORE, NAME, VARIANTS
from dsv3_tutorial.bench.precision_pairs import BASE, PROMISE, Pairs, paired
from dsv3_tutorial.learn.figures.style import (
    IDLE,
    INK,
    MARKERS,
    SERIES,
    figure,
    finish,
    note,
    series,
)

Runs = dict[str, dict[int, receipts.Receipt]]
ORDER = [*VARIANTS, *MORE]
SHORT = 100  # steps of a run that is over before it says anything
APART = 0.02  # of the loss: what nobody needs pairs for


def runs(folder: Path | None = None) -> Runs:
    """The longest recorded runs, in the benchmark's order: variant -> seed -> its receipt.

    Raises LookupError where nothing is recorded yet.
    """
    recorded = receipts.latest(NAME, folder=folder) if NAME in receipts.names(folder) else []
    for length in sorted({r.shapes["length"] for r in recorded}, reverse=True):
        found: Runs = {variant: {} for variant in ORDER}
        for receipt in (r for r in recorded if r.shapes["length"] == length):
            found.setdefault(receipt.shapes["variant"], {})[receipt.shapes["seed"]] = receipt
        found = {variant: seeds for variant, seeds in found.items() if seeds}
        if BASE in found and len(found) > 1:
            return found
    raise LookupError(
        f"no pairs with {BASE} are recorded, so there is nothing to compare. "
        f"Run: python -m dsv3_tutorial bench {NAME}"
    )


def pairs(found: Runs | None = None) -> dict[str, Pairs]:
    """Each variant's held-out loss against BF16's, seed by seed, in the benchmark's order."""
    found = found or runs()
    made = paired([r for seeds in found.values() for r in seeds.values()])
    return {variant: made[variant] for variant in found if variant in made}


def differences(found: Runs, variant: str) -> tuple[list[int], dict[int, np.ndarray]]:
    """A variant's batches against BF16's on the same text: steps, and seed -> relative difference.

    Each number is a mean over EVERY steps; only seeds that both have.
    """
    base, seeds = found[BASE], found[variant]
    shared = [seed for seed in seeds if seed in base]
    steps = seeds[shared[0]].shapes["steps"]
    return steps, {
        seed: np.array(seeds[seed].shapes["loss"]) / np.array(base[seed].shapes["loss"]) - 1
        for seed in shared
    }


def _look(variant: str) -> dict[str, str]:
    return series(ORDER.index(variant) if variant in ORDER else len(ORDER))


def short_pairs(found: Runs | None = None, variant: str = "fp8", steps: int = SHORT) -> Figure:
    """One variant against BF16 over the first steps, seed by seed: which learns faster?"""
    found = found or runs()
    at, gaps = differences(found, variant)
    shown = [index for index, step in enumerate(at) if step <= steps] or [0]
    fig, (left, right) = figure(11, 4.2, columns=2)
    for index, (seed, gap) in enumerate(gaps.items()):
        look = {"color": SERIES[index % len(SERIES)], "marker": MARKERS[index % len(MARKERS)]}
        left.plot([at[i] for i in shown], 100 * gap[shown], label=f"seed {seed}", **look)
        right.plot([100 * gap[i] for i in shown], [index] * len(shown), "|", color=look["color"])
        right.plot([100 * gap[shown[-1]]], [index], markersize=10, linestyle="none", **look)
    left.axhline(0, color=INK, linewidth=1.2)
    right.axvline(0, color=INK, linewidth=1.2)
    right.set_yticks(range(len(gaps)), [f"seed {seed}" for seed in gaps])
    right.set_ylim(len(gaps) - 0.4, -0.6)
    finish(fig, left, "", f"steps (means of {EVERY})", f"loss of {variant} over {BASE}, %")
    label = f"{variant} over {BASE}, %: ticks all the way, mark at the end"
    finish(fig, right, "", label, "", legend=False)
    title = _short_title(gaps, variant, at[shown[-1]], shown)
    fig.suptitle(title, x=0.01, ha="left", fontsize=13, color=INK, weight="bold")
    return _captioned(fig, found)


def _short_title(gaps: dict[int, np.ndarray], variant: str, last: int, shown: list[int]) -> str:
    worse = sum(gap[shown[-1]] > 0 for gap in gaps.values())
    turned = sum(len(set(np.sign(gap[shown]))) > 1 for gap in gaps.values())
    return (
        f"After {last} steps {variant} is behind {BASE} with {worse} of {len(gaps)} seeds; "
        f"with {turned} the sign changed on the way"
    )


def curves(found: Runs | None = None) -> Figure:
    """The losses of all variants, as they are, and the pairs' differences with their error."""
    found = found or runs()
    fig, (left, right) = figure(11, 4.6, columns=2)
    for variant, seeds in found.items():
        losses = np.array([r.shapes["loss"] for r in seeds.values()])  # (seeds, steps)
        steps = next(iter(seeds.values())).shapes["steps"]
        left.plot(
            steps, losses.mean(axis=0), label=variant, markersize=5, markevery=5, **_look(variant)
        )
    finish(fig, left, _alike(found), f"steps (means of {EVERY})", "bits per byte, batches")
    left.legend(fontsize=10, frameon=False)
    _differences(right, pairs(found))
    finish(fig, right, _verdict(found), "held-out loss against BF16, %", "", legend=False)
    for ax in (left, right):
        ax.title.set_fontsize(11)
    return _captioned(fig, found)


def _alike(found: Runs) -> str:
    """How near the variants that end alike lie over the second half, and who does not end so."""
    off = {v: each.mean for v, each in pairs(found).items() if abs(each.mean) > APART}
    means = np.array(
        [
            np.mean([r.shapes["loss"] for r in seeds.values()], axis=0)
            for variant, seeds in found.items()
            if variant not in off
        ]
    )
    late = means[:, means.shape[1] // 2 :]
    gap = float((late.max(axis=0) / late.min(axis=0) - 1).max())
    title = f"{len(means)} of {len(found)} stay within {gap:.1%} in the second half"
    return "\n".join([title, *(f"{v}: {gap:+.1%}" for v, gap in off.items())])


def _differences(ax: Axes, compared: dict[str, Pairs]) -> None:
    """Mean and two standard errors of each variant, its seeds as dots, the paper's band behind."""
    limit = paper.row("fp8.loss_against_bf16").value
    ax.axvspan(-limit, limit, color="#DCEBF5", zorder=0)
    ax.axvline(0, color=INK, linewidth=1.2)
    for row, (variant, each) in enumerate(compared.items()):
        look = _look(variant)
        dots = [100 * value for value in each.differences]
        ax.plot(dots, [row + 0.18] * len(dots), ".", color=IDLE, markersize=9)
        error = 200 * each.error if len(dots) > 1 else 0
        ax.errorbar([100 * each.mean], [row], xerr=[error], capsize=5, markersize=9, **look)
        text = f"{100 * each.mean:+.2f}" + (f" +- {error / 2:.2f}%" if error else "%, one pair")
        ax.text(100 * each.mean, row - 0.2, text, ha="center", fontsize=10, color=INK)
    ax.set_yticks(range(len(compared)), [name.replace(", ", ",\n") for name in compared])
    ax.set_ylim(len(compared) - 0.4, -0.7)
    ax.grid(False, axis="y")
    reach = max(abs(number) for number in (*ax.get_xlim(), 2 * limit))
    if reach > 8 * limit:  # a straight scale up to 1 %, powers of ten beyond
        ax.set_xscale("symlog", linthresh=1.0)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        reach *= 6
    ax.set_xlim(-reach, reach)
    low = len(compared) - 0.45
    ax.text(0, low, f"the paper's {limit}%, either way", ha="center", fontsize=9, color=INK)


def _verdict(found: Runs) -> str:
    """What the pairs of fp8, or of the first variant there is, say."""
    compared = pairs(found)
    each = compared.get("fp8", next(iter(compared.values())))
    limit = paper.row("fp8.loss_against_bf16").value
    said = {True: "within", False: "NOT within", None: "one pair cannot say if within"}
    error = f" +- {each.error:.2%}" if len(each.seeds) > 1 else ""
    allowed = f"{limit}%" + (" + 2 errors" if error else "")
    return f"{each.variant}: {each.mean:+.2%}{error}, {said[each.within]} {allowed}"


def precision_table(found: Runs | None = None) -> None:
    """Print each variant's held-out loss, and its paired difference to BF16 with its error."""
    found = found or runs()
    compared = pairs(found)
    limit = f"{PROMISE:.2%} + 2 errors"
    heads = f"{'seeds':>6}{'bits/byte':>11}{'over bf16, paired':>22}"
    print(f"{'computed in':26}{heads}   {limit}")
    for variant, seeds in found.items():
        loss = mean(r.value for r in seeds.values())
        gap, said = "", ""
        if variant in compared:
            each = compared[variant]
            gap = f"{each.mean:+.3%}"
            if len(each.seeds) > 1:
                gap, said = f"{gap} +- {each.error:.3%}", "within" if each.within else "NOT within"
        print(f"{variant:26}{len(seeds):>6}{loss:>11.4f}{gap:>22}   {said}".rstrip())
    length = next(iter(found[BASE].values())).shapes["length"]
    print(f"{length:,} steps; +- is the standard error over the pairs of one seed")


def live(rows: Sequence[tuple[int, dict[str, float]]]) -> Figure:
    """Variants run side by side, here and now: (step, {variant: bits per byte}) of each step."""
    if not rows:
        raise ValueError(
            "The live run left no step, so there is nothing to draw. "
            "Run the cell that trains first: it takes one step at least."
        )
    steps = [step for step, _ in rows]
    losses = {variant: np.array([row[variant] for _, row in rows]) for variant in rows[0][1]}
    fig, (left, right) = figure(11, 4.2, columns=2)
    for variant, values in losses.items():
        look = {**_look(variant), "markersize": 5, "markevery": max(1, len(steps) // 10)}
        left.plot(steps, values, label=variant, **look)
        if variant != BASE:
            right.plot(steps, 100 * (values / losses[BASE] - 1), label=variant, **look)
    right.axhline(0, color=INK, linewidth=1.2)
    finish(fig, left, "", "steps", "bits per byte, batches")
    finish(fig, right, "", "steps", f"over {BASE} on the same batch, %")
    title = _live_title(losses, steps[-1])
    fig.suptitle(title, x=0.01, ha="left", fontsize=13, color=INK, weight="bold")
    return fig


def _live_title(losses: dict[str, np.ndarray], last: int) -> str:
    """The largest difference over the last steps, and how much one batch differs from the next."""
    tail = slice(-min(EVERY, len(losses[BASE])), None)
    base = losses[BASE][tail]
    gaps = {v: (values[tail] / base - 1).mean() for v, values in losses.items() if v != BASE}
    widest = max(gaps, key=lambda variant: abs(gaps[variant]))
    between = np.abs(np.diff(base) / base[:-1]).mean() if len(base) > 1 else 0.0
    return (
        f"After {last} steps {widest} is furthest from {BASE}: {gaps[widest]:+.2%}\n"
        f"(one batch differs from the next by {between:.1%})"
    )


def _captioned(fig: Figure, found: Runs) -> Figure:
    note(fig, receipts.caption([r for seeds in found.values() for r in seeds.values()]))
    return fig
