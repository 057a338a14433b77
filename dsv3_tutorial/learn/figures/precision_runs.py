"""The recorded pairs of runs in BF16 and FP8, and a live run: what can be told apart, and when.

Every difference is between two runs of one seed: loss over BF16's loss, less 1. The receipts and
their pairs come from `precision_records`.
"""

from statistics import mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from dsv3_tutorial import paper, receipts
from dsv3_tutorial.bench.precision import EVERY, VARIANTS
from dsv3_tutorial.bench.precision_pairs import (
    APART,
    BASE,
    INTERVAL,
    PROMISE,
    TYPICAL,
    Pairs,
    apart,
    by_chance,
    factor,
)
from dsv3_tutorial.learn.figures.precision_live import live as live
from dsv3_tutorial.learn.figures.precision_records import (
    Runs,
    differences,
    look,
    nested,
    pairs,
    runs,
)
from dsv3_tutorial.learn.figures.style import (
    IDLE,
    INK,
    MARKERS,
    SERIES,
    figure,
    finish,
    note,
)

SHORT = 100  # steps of a run that is over before it says anything
FAR = 0.02  # of the loss: what nobody needs pairs for


def told_apart(found: Runs | None = None) -> int:
    """How many of the benchmark's variants differ from BF16; those asked for on top do not count.

    One does whose mean lies beyond 3 of its errors (Student's t: 19 with three pairs, 4.5 with
    eight), or whose every pair lies, on one side, beyond what FP8's pairs do by chance as rarely.
    """
    return sum(variant in VARIANTS for variant in apart(pairs(found)))


def short_pairs(found: Runs | None = None, variant: str = "fp8", steps: int = SHORT) -> Figure:
    """One variant against BF16 over the first steps, seed by seed: which learns faster?"""
    found = found or runs()
    at, gaps = differences(found, variant)
    shown = [index for index, step in enumerate(at) if step <= steps] or [0]
    fig, (left, right) = figure(11, max(4.2, 1.8 + 0.36 * len(gaps)), columns=2)
    for index, gap in enumerate(gaps.values()):
        style = _seed_look(index)
        left.plot([at[i] for i in shown], 100 * gap[shown], linewidth=1.4, markersize=6, **style)
        right.plot([100 * gap[i] for i in shown], [index] * len(shown), "|", color=style["color"])
        right.plot([100 * gap[shown[-1]]], [index], markersize=10, linestyle="none", **style)
    left.axhline(0, color=INK, linewidth=1.2)
    right.axvline(0, color=INK, linewidth=1.2)
    right.set_yticks(range(len(gaps)), [f"seed {seed}" for seed in gaps])
    for index, label in enumerate(right.get_yticklabels()):
        label.set_color(_seed_look(index)["color"])
    right.set_ylim(len(gaps) - 0.4, -0.6)
    finish(fig, left, "", f"steps (means of {EVERY})", f"loss of {variant} over {BASE}, %")
    label = f"{variant} over {BASE}, %: ticks all the way, mark at the end"
    finish(fig, right, "", label, "", legend=False)
    title = _short_title(gaps, variant, at[shown[-1]], shown)
    fig.suptitle(title, x=0.01, ha="left", fontsize=13, color=INK, weight="bold")
    return _captioned(fig, found)


def _seed_look(index: int) -> dict:
    """A seed's colour and marker; beyond the colours there are the marks are hollow."""
    again = index >= len(SERIES)
    colour, marker = SERIES[index % len(SERIES)], MARKERS[(index + again) % len(MARKERS)]
    return {"color": colour, "marker": marker, "fillstyle": "none" if again else "full"}


def _short_title(gaps: dict[int, np.ndarray], variant: str, last: int, shown: list[int]) -> str:
    worse = sum(gap[shown[-1]] > 0 for gap in gaps.values())
    turned = sum(len(set(np.sign(gap[shown]))) > 1 for gap in gaps.values())
    if len(gaps) == 1:
        side, sign = "behind" if worse else "ahead of", "changed" if turned else "did not change"
        return (
            f"After {last} steps {variant} is {side} {BASE} with one seed; the sign {sign} before"
        )
    count = {0: "none", len(gaps): "all"}
    return (
        f"After {last} steps {variant} is behind {BASE} with {count.get(worse, worse)} "
        f"of {len(gaps)} seeds; with {count.get(turned, turned)} the sign changed on the way"
    )


def curves(found: Runs | None = None) -> Figure:
    """The losses of all variants, as they are, and the pairs' differences with their interval."""
    found = found or runs()
    fig, (left, right) = figure(11.5, 4.8, columns=2)
    steps, means = _means(found)
    for index, (variant, losses) in enumerate(means.items()):
        style = {**look(variant), **nested(index, len(means), len(steps))}
        left.plot(steps, losses, label=variant, **style)
    finish(fig, left, _alike(found), f"steps (means of {EVERY})", "bits per byte, batches")
    left.legend(fontsize=10, frameon=False)
    _differences(right, pairs(found))
    label = "held-out loss over BF16, % (band: the paper's)"
    finish(fig, right, _verdict(found), label, "", legend=False)
    for ax in (left, right):
        ax.title.set_fontsize(11)
    return _captioned(fig, found)


def _means(found: Runs) -> tuple[list[int], dict[str, np.ndarray]]:
    """Each variant's mean curve, over the seeds that all of them have where there are any."""
    common = set.intersection(*(set(seeds) for seeds in found.values()))
    means = {
        variant: np.mean([r.shapes["loss"] for s, r in seeds.items() if s in (common or seeds)], 0)
        for variant, seeds in found.items()
    }  # (steps,) each
    return next(iter(found[BASE].values())).shapes["steps"], means


def _alike(found: Runs) -> str:
    """How near the variants that end alike lie over the second half, and who does not end so."""
    off = {v: each.mean for v, each in pairs(found).items() if abs(each.mean) > FAR}
    means = np.array([each for variant, each in _means(found)[1].items() if variant not in off])
    late = means[:, means.shape[1] // 2 :]
    gap = float((late.max(axis=0) / late.min(axis=0) - 1).max())
    start = f"{len(means)} of {len(found)} stay within {gap:.1%} in the second half"
    return ",\n".join([start, *(f'"{v}" ends at {gap:+.1%}' for v, gap in off.items())])


def _differences(ax: Axes, compared: dict[str, Pairs]) -> None:
    """Each variant's mean and interval, its seeds as dots, the paper's band behind."""
    limit = paper.row("fp8.loss_against_bf16").value
    ax.axvspan(-limit, limit, color="#DCEBF5", zorder=0)
    ax.axvline(0, color=INK, linewidth=1.2)
    names = []
    for row, (variant, each) in enumerate(compared.items()):
        dots = [100 * value for value in each.differences]
        ax.plot(dots, [row + 0.18] * len(dots), ".", color=IDLE, markersize=9)
        reach = 100 * (each.interval[1] - each.mean) if len(dots) > 1 else 0
        ax.errorbar(
            [100 * each.mean], [row], xerr=[reach], capsize=5, markersize=9, **look(variant)
        )
        names.append(f"{variant}\n{_gap(each)}")
    ax.set_yticks(range(len(compared)), names)
    ax.set_ylim(len(compared) - 0.4, -0.6)
    ax.grid(False, axis="y")
    reach = max(abs(number) for number in (*ax.get_xlim(), 2 * limit))
    if reach > 8 * limit:  # a straight scale up to 1 %, powers of ten beyond
        ax.set_xscale("symlog", linthresh=1.0)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        reach *= 1.5
    ax.set_xlim(-reach, reach)


def _gap(each: Pairs) -> str:
    """A mean and its standard error, in %."""
    return f"{each.mean:+.2%}" + (f" +- {each.error:.2%}" if len(each.seeds) > 1 else ", one pair")


def _verdict(found: Runs) -> str:
    """What the pairs of fp8, or of the first variant there is, say."""
    compared = pairs(found)
    each = compared.get(TYPICAL, next(iter(compared.values())))
    if len(each.seeds) < 2:
        return f"{each.variant}: {_gap(each)},\nwhich has no error without a second"
    said = each.verdict(by_chance(compared)).replace("a difference of ", "")
    return f"{each.variant}, {len(each.seeds)} pairs: {_gap(each)},\n{said}"


def precision_table(found: Runs | None = None) -> None:
    """Print each variant's held-out loss, its paired difference, the interval, and a verdict."""
    found = found or runs()
    compared = pairs(found)
    limit = f"{PROMISE:.2%} + 2 errors"
    heads = f"{'seeds':>6}{'bits/byte':>11}{'over bf16, paired':>21}{'interval':>21}"
    print(f"{'computed in':21}{heads}   {limit}")
    for variant, seeds in found.items():
        loss, cells = mean(r.value for r in seeds.values()), ""
        if variant in compared:
            cells = _cells(compared[variant])
        print(f"{variant:21}{len(seeds):>6}{loss:>11.4f}{cells}".rstrip())
    print()
    for variant, each in compared.items():
        print(f"{variant + ':':21} {each.verdict(by_chance(compared))}")
    print()
    print("\n".join(_rules(found, compared)))


def _cells(each: Pairs) -> str:
    if len(each.seeds) < 2:
        return f"{each.mean:>+11.3%}"
    low, high = each.interval
    said = "within" if each.within else "NOT within"
    gap = f"{each.mean:+.3%} +- {each.error:.3%}"
    return f"{gap:>21}{f'{low:+.2%} to {high:+.2%}':>21}   {said}"


def _rules(found: Runs, compared: dict[str, Pairs]) -> list[str]:
    """What the columns and the verdicts mean, with the numbers of errors that few pairs ask for."""
    length = next(iter(found[BASE].values())).shapes["length"]
    counts = sorted({len(each.seeds) for each in compared.values() if len(each.seeds) > 1})
    steps = f"{length:,} steps; bits/byte: of all its seeds; +-: the standard error over pairs"
    if not counts:
        return [steps]
    reach, far = (
        ", ".join(f"{n} pairs {factor(n, errors):.1f}" for n in counts)
        for errors in (INTERVAL, APART)
    )
    chance = by_chance(compared)
    also = f"; or every pair beyond {chance:.1%}, what one of {TYPICAL} does by chance"
    return [
        steps,
        f"{PROMISE:.2%} + 2 errors: met the more easily the noisier the runs",
        f"interval: {INTERVAL} errors to either side; as sure with few pairs: {reach}",
        f"differs: beyond {APART} errors; as sure with few pairs: {far}",
        *([" " * 9 + also[2:]] if chance < float("inf") else []),
    ]


def _captioned(fig: Figure, found: Runs) -> Figure:
    note(fig, receipts.caption([r for seeds in found.values() for r in seeds.values()]))
    return fig
