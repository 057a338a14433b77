"""The look of every figure: opaque, readable, one colour per role through the whole course.

Figures are made without pyplot, so nothing global remembers them, and show as a PNG whose text twin
is their title. Colours are Okabe and Ito's, told apart with any kind of colour vision; series also
differ by marker, for print.
"""

import base64
import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

DPI = 100
COMPUTE, MEMORY, COMMUNICATION, IDLE = "#0072B2", "#D55E00", "#009E73", "#BBBBBB"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6D00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK = "#222222"


class CourseFigure(Figure):
    """A Figure that shows itself: PNG at 100 dpi, and as text its title."""

    def png(self) -> bytes:
        """The picture in 64 colours: a quarter of the bytes, and no difference to see."""
        drawn, packed = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
        with Image.open(drawn) as picture:
            flat = picture.convert("RGB").quantize(64, dither=Image.Dither.NONE)
            flat.save(packed, format="png", optimize=True)
        return packed.getvalue()

    def __str__(self) -> str:
        titles = [axes.get_title(loc) for axes in self.axes for loc in ("left", "center")]
        if self._suptitle is not None:
            titles.insert(0, self._suptitle.get_text())
        named = " ".join(next((t for t in titles if t), "untitled").split())
        return f"Figure: {named}"

    def __repr__(self) -> str:
        return str(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        picture = base64.b64encode(self.png()).decode("ascii")
        return {"text/plain": str(self), "image/png": picture + "\n"}


def figure(
    width: float = 8.0, height: float = 4.2, rows: int = 1, columns: int = 1
) -> tuple[CourseFigure, Any]:
    """A figure of width x height inches and its axes (an array of them when there are several)."""
    made = CourseFigure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    axes = made.subplots(rows, columns)
    for one in made.axes:
        one.set_facecolor("white")
        one.grid(True, color="#DDDDDD", linewidth=0.7)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=11, colors=INK)
    return made, axes


def finish(
    fig: Figure, ax: Axes, title: str = "", xlabel: str = "", ylabel: str = "", legend: bool = True
) -> Figure:
    """Writes the title (the finding, with its number), the axes (with units) and a legend."""
    if title:
        ax.set_title(title, loc="left", fontsize=13, color=INK, fontweight="bold", wrap=True)
    ax.set_xlabel(xlabel, fontsize=12, color=INK)
    ax.set_ylabel(ylabel, fontsize=12, color=INK)
    if legend and ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize=11, frameon=False)
    return fig


def note(fig: Figure, text: str) -> None:
    """Where the numbers are from, small, under the axes."""
    fig.supxlabel(text, fontsize=9, color=INK, x=0.99, ha="right")


def plain_log(axis: Axis, base: float = 10, subs: tuple[float, ...] = (1.0,)) -> None:
    """A logarithmic axis whose ticks read 0.25, 64, 4,096 and not as powers."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(base=base, subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def series(index: int) -> dict[str, str]:
    """Colour and marker of the index-th line: `ax.plot(x, y, **series(0))`."""
    return {"color": SERIES[index % len(SERIES)], "marker": MARKERS[index % len(MARKERS)]}
