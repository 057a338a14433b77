"""Where a number lands in a format: its two neighbours, and how far apart values lie."""

import math
from functools import cache

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_tutorial.fp8.formats import FORMATS, neighbours, round_to, spacing
from dsv3_tutorial.learn.figures.style import (
    COMPUTE,
    IDLE,
    INK,
    MEMORY,
    figure,
    finish,
    note,
    plain_log,
    series,
)

SIDE = 4  # values shown on either side of a number
COMPARED = ("e4m3", "e5m2", "int8", "bf16")


@cache
def _grid(fmt: str) -> np.ndarray:
    return FORMATS[fmt].values().numpy()


def _number(value: float) -> torch.Tensor:
    """In float64: it holds every format's values."""
    if not math.isfinite(value):
        raise ValueError(f"{value} stands on no number line. Give a finite number.")
    return torch.tensor(float(value), dtype=torch.float64)


def landing(value: float, fmt: str = "e4m3") -> tuple[float, float, float]:
    """The value below, the value above (infinite beyond the ends) and the one it is rounded to."""
    x = _number(value)
    below, above = neighbours(x, fmt)
    return below.item(), above.item(), round_to(x, fmt).item()


def around(value: float = 3.3, fmt: str = "e4m3") -> Figure:
    """All of a format's positive values, and the few around a number with the one it becomes."""
    below, above, rounded = landing(value, fmt)
    fig, (whole, near) = figure(9, 3.8, rows=2)
    fig.get_layout_engine().set(hspace=0.12)
    _whole_range(whole, value, fmt)
    shown = _window(value, fmt)
    near.plot(shown, np.zeros(len(shown)), "|", color=INK, markersize=26, markeredgewidth=1.5)
    near.plot([rounded], [0], "|", color=COMPUTE, markersize=40, markeredgewidth=5, label="becomes")
    near.plot([value], [0], "D", color=MEMORY, markersize=9, label="the number")
    bold = (below, above, rounded)
    for each, row in _label_rows(shown, value, bold).items():
        look = {"fontsize": 9, "fontweight": "bold" if each in bold else "normal"}
        near.text(each, -1.2 - 0.65 * row, f"{each:.6g}", ha="center", va="top", **look)
    near.set_ylim(-3.0, 1.9)
    corner = "upper left" if value < shown[0] else "upper right"  # away from the values
    near.legend(fontsize=10, frameon=False, loc=corner, ncols=2, markerscale=0.6)
    _bare(near)
    near.set_xticks([])
    finish(fig, near, "", f"the values of {fmt.upper()} around it", "", legend=False)
    fig.suptitle(_finding(value, fmt), x=0.01, ha="left", fontsize=13, color=INK, weight="bold")
    return fig


def _label_rows(shown: np.ndarray, value: float, bold: tuple[float, ...]) -> dict[float, int]:
    """The row of each value's label, the bold and the near first: one in which it touches no other.

    A value for which three rows have no room has none, as far from the number as 448 from 1e6.
    """
    span = max(*shown, value) - min(*shown, value)
    taken: list[list[tuple[float, float]]] = [[], [], []]
    rows = {}
    for each in sorted(shown, key=lambda x: (x not in bold, abs(x - value))):
        half = 0.006 * (len(f"{each:.6g}") + 1) * span  # a digit is about 1 % of the line
        for row, places in enumerate(taken):
            if all(each + half <= low or high <= each - half for low, high in places):
                places.append((each - half, each + half))
                rows[each] = row
                break
    return rows


def _whole_range(ax: Axes, value: float, fmt: str) -> None:
    """The magnitudes of a format on a logarithmic line, the number's own marked."""
    values = _grid(fmt)
    positive = values[values > 0]
    label = f"the {len(positive):,} positive values of {fmt.upper()}"
    label += ", the number by its magnitude" if value < 0 else ""
    if len(positive) > 2000:  # a line as dense as that is a bar
        positive = positive[:: len(positive) // 2000]
    ax.plot(positive, np.zeros(len(positive)), "|", color=IDLE, markersize=26, markeredgewidth=1)
    if value:
        ax.plot([abs(value)], [0], "D", color=MEMORY, markersize=9)
    ax.set_xscale("log", base=2)
    ax.set_ylim(-1, 1)
    _bare(ax)
    finish(ax.figure, ax, "", label, "", legend=False)


def _bare(ax: Axes) -> None:
    ax.set_yticks([])
    ax.grid(False)
    ax.spines["left"].set_visible(False)


def _window(value: float, fmt: str) -> np.ndarray:
    values = _grid(fmt)
    at = int(np.searchsorted(values, value))
    first = min(max(at - SIDE, 0), max(len(values) - 2 * SIDE, 0))
    return values[first : first + 2 * SIDE]


def _error(value: float, rounded: float) -> float:
    return abs(rounded - value) / abs(value) if value else 0.0


def _finding(value: float, fmt: str) -> str:
    below, above, rounded = landing(value, fmt)
    name, error = fmt.upper(), _error(value, rounded)
    if rounded == value:
        return f"{value:.8g} is a value of {name}: nothing is lost"
    if math.isinf(below) or math.isinf(above):
        return f"{value:.8g} lies beyond {name}: it becomes {rounded:.8g}, {error:.1%} off"
    return f"{value:.8g} in {name} becomes {rounded:.8g}: {error:.2%} off"


def around_in_words(value: float = 3.3, fmt: str = "e4m3") -> str:
    """The neighbours, the one that is taken and the error."""
    below, above, _ = landing(value, fmt)
    kind = FORMATS[fmt]
    if math.isinf(below) or math.isinf(above):
        least = -kind.max if kind.signed else kind.min_subnormal
        between = f"The values end at {least:.8g} and {kind.max:.8g}"
    elif below == above:
        step = spacing(_number(value), fmt).item()
        between = f"The values around it lie {step:.6g} apart"
    else:
        between = f"It lies between {below:.8g} and {above:.8g}, {above - below:.6g} apart"
    return f"{_finding(value, fmt)}. {between}."


def relative_spacing(fmt: str, share: np.ndarray) -> np.ndarray:
    """Half the distance between values over the magnitude: the most that rounding can change.

    share (...): magnitudes as a share of the format's largest, where a scale lays a tile's largest.
    """
    x = torch.from_numpy(np.asarray(share, dtype=np.float64)) * FORMATS[fmt].max
    return (spacing(x, fmt) / x / 2).numpy().clip(max=1.0)


def reach(fmt: str, error: float = 1 / 16) -> float:
    """How many times smaller than the largest a value may be and still err by `error` at most.

    The smallest step is that of the format's smallest numbers; half of it is `error` of the answer.
    Raises ValueError for an error that the format exceeds even at its best.
    """
    kind = FORMATS[fmt]
    if kind.exponent_bits and error < 2.0 ** -(kind.mantissa_bits + 1):
        raise ValueError(
            f"{fmt} errs by more than {error:.3g} everywhere, so nothing is within it. "
            f"Ask for {2.0 ** -(kind.mantissa_bits + 1):g} or more."
        )
    return kind.max * 2 * error / kind.min_subnormal


def spacing_by_magnitude() -> Figure:
    """The largest rounding error against the magnitude, log-log, for four formats."""
    fig, ax = figure(9, 4.4)
    share = 2.0 ** -np.arange(0, 34, 1 / 16)
    for index, fmt in enumerate(COMPARED):
        look = {**series(index), "markevery": 48, "linewidth": 2}
        label = f"{fmt.upper()}, {FORMATS[fmt].bits} bits"
        ax.plot(share, 100 * relative_spacing(fmt, share), label=label, **look)
    plain_log(ax.yaxis, subs=(1.0,))
    ax.set_xscale("log", base=2)
    ax.invert_xaxis()
    ax.set_ylim(0.15, 190)
    title = (
        f"Within 6.25%: E4M3 down to 1/{reach('e4m3'):,.0f} of the largest value, "
        f"INT8 to 1/{reach('int8'):.0f}"
    )
    finish(fig, ax, title, "magnitude over the largest", "largest rounding error, %", legend=False)
    ax.legend(fontsize=11, frameon=False, loc="center", bbox_to_anchor=(0.6, 0.37), ncols=2)
    note(fig, "half the distance to the next value over the value; at 100% it becomes zero")
    return fig
