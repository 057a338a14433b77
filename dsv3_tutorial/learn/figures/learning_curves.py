"""The recorded runs of five attentions on real text, and a live run drawn over them."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from dsv3_tutorial import receipts
from dsv3_tutorial.learn.figures.style import COMPUTE, INK, figure, finish, note, series

Runs = dict[str, dict[int, list[receipts.Receipt]]]
LIVE = "MLA, latent 96 + 32"


def runs() -> Runs:
    """The recorded curves: variant -> step -> one receipt a seed."""
    found: Runs = {}
    for receipt in receipts.latest("learning"):
        steps = found.setdefault(receipt.shapes["variant"], {})
        steps.setdefault(receipt.shapes["step"], []).append(receipt)
    return found


def final(found: Runs | None = None) -> dict[str, list[float]]:
    """Held-out bits per byte after the last step: variant -> one number a seed."""
    return {v: [r.value for r in steps[max(steps)]] for v, steps in (found or runs()).items()}


def best_learner() -> str:
    """The variant with the lowest mean held-out loss at the end."""
    ends = final()
    return min(ends, key=lambda variant: mean(ends[variant]))


def paired(found: Runs | None = None, base: str = "MHA") -> dict[str, tuple[float, float]]:
    """Each variant's loss at the end minus `base`'s with the same seed: mean and standard error."""
    ends = {v: {r.shapes["seed"]: r.value for r in s[max(s)]} for v, s in (found or runs()).items()}
    gaps = {v: [ends[v][seed] - ends[base][seed] for seed in ends[v]] for v in ends if v != base}
    return {v: (mean(gap), stdev(gap) / len(gap) ** 0.5) for v, gap in gaps.items()}


def spreads(ends: dict[str, list[float]]) -> tuple[float, float]:
    """How far the seeds of one variant lie apart at most, and how far the variants' means do."""
    seeds = max(max(values) - min(values) for values in ends.values())
    means = [mean(values) for values in ends.values()]
    return seeds, max(means) - min(means)


def learning() -> Figure:
    """Curves with the band of their seeds, and the end of each run against its cache."""
    found = runs()
    ends = final(found)
    fig, (left, right) = figure(11, 4.4, columns=2)
    for index, (variant, steps) in enumerate(found.items()):
        look, at = series(index), sorted(steps)
        values = [[r.value for r in steps[step]] for step in at]
        left.plot(at, [mean(v) for v in values], label=variant, markersize=4, **look)
        left.fill_between(
            at, [min(v) for v in values], [max(v) for v in values], color=look["color"], alpha=0.2
        )
        cache = steps[at[-1]][0].shapes["cache_elements_per_token"]
        right.plot([cache] * len(ends[variant]), ends[variant], linestyle="", **look)
    last = max(next(iter(found.values())))
    left.set_ylim(min(map(min, ends.values())) - 0.05, 3.6)
    right.set_xscale("log", base=2)
    right.set_xticks([256, 512, 1024, 2048], ["256", "512", "1,024", "2,048"])
    seeds, means = spreads(ends)
    finish(fig, left, f"Held-out loss over {last:,} steps", "steps", "bits per byte")
    title = f"Seeds up to {seeds:.2f} apart, means {means:.2f}"
    finish(fig, right, title, "numbers cached a token, all layers", "bits per byte", legend=False)
    return _with_caption(fig, [r for s in found.values() for r in s[max(s)]])


def learning_table() -> None:
    """Print each variant's cache and held-out loss, best first, and its paired gap to MHA."""
    found = runs()
    ends, gaps = final(found), paired(found)
    shapes = {v: steps[max(steps)][0].shapes for v, steps in found.items()}
    print(f"{'attention':22}{'cached':>7}{'parameters':>12}{'bits/byte':>11}   minus MHA, paired")
    for variant in sorted(ends, key=lambda v: mean(ends[v])):
        shape = shapes[variant]
        sizes = f"{shape['cache_elements_per_token']:>7,}{shape['parameters']:>12,}"
        gap = "" if variant not in gaps else "   {:+.3f} +- {:.3f}".format(*gaps[variant])
        print(f"{variant:22}{sizes}{mean(ends[variant]):>11.3f}{gap}")
    print(f"{len(ends['MHA'])} seeds each; +- is the standard error over the seeds")


def gap_over_steps(variant: str = LIVE, base: str = "MHA") -> None:
    """Print how far a variant lies behind `base` as training goes on, mean over paired seeds."""
    found = runs()
    by_step = {}
    for step in sorted(found[variant]):
        mine, other = (
            {r.shapes["seed"]: r.value for r in found[name][step]} for name in (variant, base)
        )
        by_step[step] = mean(mine[seed] - other[seed] for seed in mine)
    told = [step for step in (100, 300, 600, 1200) if step in by_step]
    gaps = ", ".join(f"{by_step[step]:+.3f} after {step:,} steps" for step in told)
    print(f"{variant} minus {base}: {gaps}")


def learning_live(rows: Sequence[Any]) -> Figure:
    """This machine's run, batches smoothed and held out, over the recorded band."""
    fig, ax = figure(8, 4.2)
    steps = runs()[LIVE]
    at = sorted(steps)
    band = [[r.value for r in steps[step]] for step in at]
    low, high = [min(v) for v in band], [max(v) for v in band]
    ax.fill_between(at, low, high, color=COMPUTE, alpha=0.35, label=f"{LIVE}, recorded seeds")
    ax.plot(at, [mean(v) for v in band], color=COMPUTE, linewidth=1)
    smooth = _smoothed([row.loss for row in rows])
    ax.plot([r.step for r in rows], smooth, color=INK, label="this run, batches (smoothed)")
    held = [(row.step, row.held_out) for row in rows if row.held_out is not None]
    ax.plot(*zip(*held, strict=True), "D", color="#D55E00", label="this run, held out")
    ax.set_xlim(0, max(2 * at[0], rows[-1].step * 1.3))
    ax.set_ylim(min(low) - 0.1, max(smooth) + 0.2)
    step, value = held[-1]
    return finish(
        fig, ax, f"{step:,} steps here: {value:.2f} bits per byte", "steps", "bits per byte"
    )


def _smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """A running mean that forgets: each value counts for a tenth of what follows."""
    smooth = [values[0]]
    for value in values[1:]:
        smooth.append(weight * smooth[-1] + (1 - weight) * value)
    return smooth


def _with_caption(fig: Figure, found: list[receipts.Receipt]) -> Figure:
    note(fig, receipts.caption(found))
    return fig
