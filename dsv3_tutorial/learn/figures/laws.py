"""Time of a token against what is cached: a line each, fitted, and how badly it fits."""

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_tutorial import receipts
from dsv3_tutorial.learn.figures.inference_records import LOOK, decode_steps, found, missing
from dsv3_tutorial.learn.figures.style import figure, finish, note, series
from dsv3_tutorial.receipts import Receipt

FORMS = {
    "transformers sdpa": ("transformers, default", series(4)),
    "transformers eager": ("transformers, eager", series(5)),
    "transformers static": ("transformers, static cache", series(3)),
    "float32": ("ours, float32", LOOK["float32"]),
    "fp8 cache": ("ours, FP8 cache", {**LOOK["fp8"], "fillstyle": "none"}),
    "int8": ("ours, INT8 weights", LOOK["int8"]),
}
OURS = ("float32", "fp8 cache", "int8")
WHAT = "time of a token against the cached tokens"


def lines(model: str = "wide", folder: Path | None = None) -> dict[str, Receipt]:
    """Each form's line t = fixed_s + value L at batch 1, with its r2, as `bench` fitted it."""
    rows = found("inference", "time per cached token", folder, model=model, batch=1)
    by = {row.shapes["form"]: row for row in rows}
    return {form: by[form] for form in FORMS if form in by}


def decode_laws(model: str = "wide", folder: Path | None = None) -> Figure:
    """Marks as measured, lines as fitted: what a token costs at once, and for each cached one.

    All at the left, ours alone at the right.
    """
    fitted = lines(model, folder)
    if "float32" not in fitted:
        return missing("inference", WHAT)
    fig, (left, right) = figure(12.5, 4.4, columns=2)
    steps = decode_steps(folder, model=model, batch=1)
    times = {
        form: {row.shapes["context"]: row.value for row in steps if row.shapes["form"] == form}
        for form in fitted
    }
    for form, law in fitted.items():
        at = times[form]
        for ax in (left, right) if form in OURS else (left,):
            _line(ax, form, law, at)
    for ax in (left, right):
        ax.set_ylim(bottom=0)
        ax.set_xticks(law.shapes["contexts"][-3:], [f"{n:,}" for n in law.shapes["contexts"][-3:]])
    across, ours = "cached tokens", "ms a token, ours alone"
    finish(fig, left, _title(fitted, times), across, "ms a token", legend=False)
    finish(fig, right, _ours(fitted, times), across, ours, legend=False)
    fig.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False,
               fontsize=9)  # fmt: skip
    held = next(row.shapes["weight_bytes"] for row in steps if row.shapes["form"] == "float32")
    said = "legend: lines fitted over all lengths, a fixed time only where it is beyond two errors,"
    said += "\nand how far a line misses a mark at most; titles: the marks themselves;"
    note(fig, f"{said} {held / 4e6:.0f} M weights, batch 1; {receipts.caption(fitted.values())}")
    return fig


def worst(law: Receipt, at: dict[int, float]) -> float:
    """The share of a measured time by which its line misses it at most."""
    fixed, each = law.shapes["fixed_s"], law.value
    return max(abs((fixed + each * n) / at[n] - 1) for n in law.shapes["contexts"])


def last_slope(law: Receipt, at: dict[int, float]) -> float:
    """Seconds that a cached token adds between the two longest contexts, as measured."""
    before, last = law.shapes["contexts"][-2:]
    return (at[last] - at[before]) / (last - before)


def fixed_error(law: Receipt, at: dict[int, float]) -> float:
    """Seconds of standard error of a line's fixed time, from how far its points lie from it."""
    lengths = law.shapes["contexts"]
    if len(lengths) < 3:
        return math.inf  # a line through two points leaves nothing over
    off = [at[n] - law.shapes["fixed_s"] - law.value * n for n in lengths]
    mean = sum(lengths) / len(lengths)
    wide = sum((n - mean) ** 2 for n in lengths)
    noise = sum(one**2 for one in off) / (len(lengths) - 2)
    return math.sqrt(noise * (1 / len(lengths) + mean**2 / wide))


def _line(ax: Axes, form: str, law: Receipt, at: dict[int, float]) -> None:
    name, look = FORMS[form]
    lengths, fixed = law.shapes["contexts"], law.shapes["fixed_s"]
    cost = f"{1e6 * law.value:.2f} us a cached token"
    if fixed > 2 * fixed_error(law, at):
        cost = f"{1e3 * fixed:.1f} ms + {cost}"
    label = f"{name}:\n{cost},\nR2 {law.shapes['r2']:.3f}, off by {worst(law, at):.0%} at most"
    ax.plot(lengths, [1e3 * at[n] for n in lengths], linestyle="none", label=label, **look)
    ends = lengths[0], lengths[-1]
    along = [1e3 * (fixed + law.value * n) for n in ends]
    ax.plot(ends, along, color=look["color"], linewidth=1.4)


def _title(fitted: dict[str, Receipt], times: dict[str, dict[int, float]]) -> str:
    """What one more cached token costs among the longest contexts, where all lines are steepest."""
    slopes = {form: last_slope(law, times[form]) for form, law in fitted.items()}
    ours = slopes["float32"]
    theirs = min((slopes[form] for form in fitted if form not in OURS), default=None)
    before = fitted["float32"].shapes["contexts"][-2]
    head = f"A cached token beyond {before:,}:"
    if theirs is None or ours <= 0:
        return f"{head} {1e6 * ours:.1f} us"
    both = f"{1e6 * theirs:.1f} us at\nbest in transformers, {1e6 * ours:.1f} here"
    return f"{head} {both}: {_times(theirs / ours)}"


def _times(ratio: float) -> str:
    return f"{ratio:.0f} times less" if ratio > 1.5 else f"{1 / ratio:.2g} times that"


def _ours(fitted: dict[str, Receipt], times: dict[str, dict[int, float]]) -> str:
    """What INT8 weights save at the shortest context, and an FP8 cache costs at the longest."""
    lengths, said = fitted["float32"].shapes["contexts"], []
    for form, name, n in (
        ("int8", "INT8 weights", lengths[0]),
        ("fp8 cache", "FP8 latents", lengths[-1]),
    ):
        if form in fitted:
            saved = 1e3 * (times["float32"][n] - times[form][n])
            verb = "save" if saved > 0 else "cost"
            said.append(f"{name} {verb} {abs(saved):.1f} ms at {n:,} tokens")
    return ";\n".join(said) or "Ours alone"
