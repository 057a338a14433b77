"""V3 unbuilt: what each of seven decisions saves in training and adds in serving, in two orders."""

import math
from collections.abc import Sequence
from functools import cache

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_tutorial import hardware, paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import decisions, plan_text
from dsv3_tutorial.cost.decisions import Outcome, Row, Tornado
from dsv3_tutorial.cost.plan import Job
from dsv3_tutorial.hardware import Cluster
from dsv3_tutorial.learn.figures.planner import FEW
from dsv3_tutorial.learn.figures.step_parts import PALE, shade
from dsv3_tutorial.learn.figures.style import (
    COMMUNICATION,
    COMPUTE,
    INK,
    figure,
    finish,
    note,
)

ORDERS = ("given up alone", "made alone")
UNIT = 1e6  # GPU hours of a drawn one
# No tensor parallelism, as V3 was trained: a halved matrix is hardly as fast as the whole.
CHOICES = FEW.only(micro_batches=(1, 2), tps=(1,))
NONE = "does not fit"
_WIDTHS = (12, 12, 12, 11, 11, 12, 12)


@cache
def unbuilt(chip: str = "h800", gpus: int | None = None) -> Tornado:
    """Every decision in both orders on V3's cluster, each plan the fastest of few: some seconds."""
    many = gpus or int(paper.row("training_cost.gpus").value)
    where = (ModelConfig.named("deepseek-v3"), Cluster(hardware.chip(chip), many), Job())
    return decisions.tornado(*where, choices=CHOICES)


def tornado(found: Tornado | None = None) -> Figure:
    """GPU hours that each decision saves, and tokens a second that it adds in serving."""
    found = found or unbuilt()
    fig, (left, right) = figure(12, 5.2, columns=2)
    _bars(left, [_hours(row) for row in found.rows], COMPUTE, "{:+.2f}")
    _bars(right, [_served(row) for row in found.rows], COMMUNICATION, "{:+,.0f}")
    for ax in (left, right):
        ax.set_yticks(range(len(found.rows)), [row.decision for row in found.rows])
    finish(fig, left, "", "million GPU hours that it saves in training", legend=False)
    finish(fig, right, "", "tokens/s and GPU that it adds in serving", legend=False)
    for ax in (left, right):
        handles = ax.containers[: len(ORDERS)]
        ax.legend(handles, ORDERS, loc="lower right", fontsize=10, frameon=False)
    title = {"x": 0.01, "ha": "left", "fontsize": 13, "color": INK, "weight": "bold"}
    fig.suptitle(finding(found), **title)
    note(
        fig,
        "derived: each bar is the difference of two plans, the fastest of few layouts without TP",
    )
    return fig


def finding(found: Tornado) -> str:
    """Hours with all and with none, what saves most, and how much the order matters."""
    whole, bare = found.whole, found.bare
    first = found.rows[0]
    saved = f"{first.decision} saves most"
    if math.isfinite(first.hours[0]):
        saved = f"{first.decision} saves most ({first.hours[0] / UNIT:.2f} million"
        alone = first.hours[1]
        saved += f", made alone {alone / UNIT:.2f})" if math.isfinite(alone) else ")"
    return (
        f"With all decisions {_trained(whole)}, with none {_trained(bare)};\n{saved}; "
        f"serving {rate(whole)} and {rate(bare)} tokens/s and GPU"
    )


def table(found: Tornado | None = None) -> None:
    """Print each decision's bars, and what it saves more in the whole than alone."""
    found = found or unbuilt()
    print(
        f"{'':<12}{'million GPU hours saved':>36}{'times as many':>22}{'tokens/s, GPU added':>24}"
    )
    heads = ("given up", "made", "difference", "given up", "made", "given up", "made")
    print(f"{'decision':<12}" + _joined(heads))
    for row in found.rows:
        hours = (*_hours(row), _hours(row)[0] - _hours(row)[1])
        cells = [_cell(each, "{:+.3f}") for each in hours]
        cells += [_cell(each, "{:.3f}") for each in row.factors]
        cells += [_cell(each, "{:+,.0f}") for each in _served(row)]
        print(f"{row.decision:<12}" + _joined(cells))
    for name, each in (("all made", found.whole), ("none made", found.bare)):
        print(f"{name}: {_trained(each)}; serves {rate(each)} tokens/s and GPU")


def notes(found: Tornado | None = None) -> None:
    """Print what stands in the place of each decision."""
    for line in plan_text.bullets((found or unbuilt()).bare.notes):
        print(line)


def _joined(cells: Sequence[str]) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))


def _hours(row: Row) -> tuple[float, float]:
    return row.hours[0] / UNIT, row.hours[1] / UNIT


def _served(row: Row) -> tuple[float, float]:
    """Tokens that the decision adds: a Row counts what is lost."""
    return 0.0 - row.serving[0], 0.0 - row.serving[1]


def _bars(ax: Axes, pairs: list[tuple[float, float]], colour: str, form: str) -> None:
    """A bar for each order, the removal above; words where a plan does not fit."""
    finite = [each for pair in pairs for each in pair if math.isfinite(each)]
    low, high = min(0.0, *finite), max(0.0, *finite)
    span = (high - low) or 1.0
    for order, (strength, shift) in enumerate(((1.0, -0.19), (PALE, 0.19))):
        sizes = [pair[order] if math.isfinite(pair[order]) else 0.0 for pair in pairs]
        rows = [row + shift for row in range(len(pairs))]
        bars = ax.barh(rows, sizes, 0.36, color=shade(colour, strength))
        labels = [_cell(pair[order], form) for pair in pairs]
        ax.bar_label(bars, labels, padding=3, fontsize=10, color=INK)
    ax.axvline(0, color=INK, linewidth=1)
    ax.set_xlim(low - 0.16 * span * (low < 0), high + 0.16 * span)
    ax.set_ylim(len(pairs) - 0.4, -0.6)
    ax.grid(False, axis="y")


def _cell(value: float, form: str) -> str:
    if not math.isfinite(value):
        return NONE
    said = form.format(value)
    return said.lstrip("+-") if not float(said.replace(",", "")) else said


def _trained(of: Outcome) -> str:
    return f"{of.gpu_hours / UNIT:.2f} million GPU hours" if of.fits else NONE


def rate(of: Outcome) -> str:
    """Tokens a second for each GPU that are served; 0: no unit keeps the promised rate."""
    return f"{of.serving_tokens_per_second_per_gpu:,.0f}"
