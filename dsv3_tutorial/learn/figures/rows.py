"""Where narrow weights slow a CPU down: each product's time against the rows that share it."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_tutorial import receipts
from dsv3_tutorial.learn.figures.inference_records import missing, products
from dsv3_tutorial.learn.figures.style import INK, MEMORY, figure, finish, note, plain_log, series
from dsv3_tutorial.receipts import Receipt

PATHS = {
    "bf16": ("BF16", series(0)),
    "int8 weight-only": ("INT8 weight-only", series(1)),
    "int8 fbgemm": ("INT8 arithmetic:\nfbgemm", series(2)),
    "int8 _int_mm": ("INT8 arithmetic:\n_int_mm", series(4)),
    "int4": ("INT4 weight-only", series(3)),
    "int8 chosen": ("what this package\ntakes for INT8", {"color": INK, "linestyle": "--"}),
}
TOLD = "int8 weight-only"  # what a title speaks of
ARITHMETIC = ("int8 fbgemm", "int8 _int_mm")
WHAT = "products with narrow weights by rows"
Ratios = dict[str, dict[int, float]]  # path, rows: time over float32's


def int8_by_rows(folder: Path | None = None) -> Figure:
    """Time over float32's against the rows, a panel a matrix: above 1 narrow weights are slower."""
    by = products(folder)
    if not by:
        return missing("inference", WHAT)
    fig, _axes = figure(2.8 + 3.2 * len(by), 4.9, columns=len(by))
    ratios = {side: over_float32(times) for side, times in by.items()}
    for ax, (side, of) in zip(fig.axes, ratios.items(), strict=True):
        _panel(ax, side, of)
    shown = [ratio for of in ratios.values() for path in of.values() for ratio in path.values()]
    for ax in fig.axes:
        ax.set_ylim(0.85 * min(shown), 1.35 * max(1.0, *shown))
        ax.axhspan(1, ax.get_ylim()[1], color=MEMORY, alpha=0.10, linewidth=0)
    fig.axes[0].set_ylabel("time, float32 = 1 (shaded: slower)", fontsize=12, color=INK)
    fig.suptitle(finding(ratios), x=0.01, ha="left", fontsize=13, color=INK, fontweight="bold")
    handles = {label: line for ax in fig.axes for line, label in _handles(ax)}
    fig.legend(handles.values(), handles, loc="outside right center", frameon=False, fontsize=10)
    rows = [row for times in by.values() for path in times.values() for row in path.values()]
    what = (
        "weight-only: codes are widened before the product; INT8 arithmetic: inputs are rounded too"
    )
    note(fig, f"{what}\nweights come from memory, not from a cache; {receipts.caption(rows)}")
    return fig


def over_float32(times: dict[str, dict[int, Receipt]]) -> Ratios:
    """Each path's time over float32's, by rows."""
    wide = times["float32"]
    return {
        path: {n: row.value / wide[n].value for n, row in sorted(times[path].items()) if n in wide}
        for path in PATHS
        if path in times
    }


def finding(by: dict[int, Ratios]) -> str:
    """What becomes of both kinds of INT8 at the most rows, over all matrices."""
    most = max(n for ratios in by.values() for of in ratios.values() for n in of)
    only = [of[TOLD][most] for of in by.values() if most in of.get(TOLD, {})]
    real = [least for of in by.values() if (least := _arithmetic(of, most)) is not None]
    if not only or not real:
        return "Time of a product against the rows that share its weights"
    once = [min(of[TOLD].values()) for of in by.values() if TOLD in of]
    gone = ": its gain is gone" if min(only) > 0.9 > max(once) else ""
    left = ": it keeps its gain" if max(real) < 0.9 else ""
    return (
        f"At {most} rows INT8 weight-only takes {_span(only)} times as long as float32{gone};\n"
        f"INT8 arithmetic, the faster of two ways, {_span(real)} times as long{left}"
    )


def _arithmetic(ratios: Ratios, rows: int) -> float | None:
    """The better way to multiply whole numbers, None if none was timed."""
    found = [ratios[path][rows] for path in ARITHMETIC if rows in ratios.get(path, {})]
    return min(found, default=None)


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _panel(ax: Axes, side: int, ratios: Ratios) -> None:
    for path, of in ratios.items():
        label, look = PATHS[path]
        ax.plot(list(of), list(of.values()), label=label, **look)
    ax.axhline(1, color=INK, linewidth=1)
    plain_log(ax.xaxis, 2)
    plain_log(ax.yaxis, subs=(1.0, 2.0, 5.0))
    finish(ax.figure, ax, _title(side, ratios), "rows", legend=False)


def _title(side: int, ratios: Ratios) -> str:
    said = no_faster(ratios[TOLD]) if TOLD in ratios else "not measured"
    return f"{side:,} x {side:,}: weight-only\n{said}"


def no_faster(ratios: dict[int, float]) -> str:
    """From how many rows on a product takes at least as long as float32's."""
    late = [n for n, ratio in ratios.items() if ratio >= 1]
    if not late:
        return f"faster up to {max(ratios)} rows"
    if len(late) == len(ratios):
        return f"no faster from {min(ratios)} row to {max(ratios)}"
    rest = [n for n in ratios if n not in late]
    if max(rest) < min(late) < max(late):
        return f"no faster from {min(late)} rows on"
    return f"no faster at {', '.join(map(str, late))} {'row' if late == [1] else 'rows'}"


def _handles(ax: Axes) -> list[tuple]:
    return list(zip(*ax.get_legend_handles_labels(), strict=True))
