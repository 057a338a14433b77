"""Bars for exchanges over two tiers: what each tier's bytes alone take, and a line at the end.

Green is what moves inside nodes, orange what moves across.
"""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_tutorial.cost import tiers
from dsv3_tutorial.cost.tiers import Network
from dsv3_tutorial.learn.figures.style import COMMUNICATION, INK, MEMORY

COLOURS = {"inside": COMMUNICATION, "across": MEMORY}
PLACES = {"inside": "inside nodes", "across": "across, between nodes"}


class Took(NamedTuple):
    """One way to exchange. sent: bytes of the busiest rank by tier; seconds: until all are done.

    latency: the seconds that it would take if bytes took none.
    """

    name: str
    sent: dict[str, float]
    seconds: float
    latency: float = 0.0

    @property
    def said(self) -> str:
        """The name on one line, as titles write it."""
        return self.name.replace("\n", " ").replace("_", " ")


def h800(slower_across: float, slower_inside: float) -> Network:
    """DeepSeek-V3's network with its bandwidths divided."""
    return tiers.network("h800").slower(inside=slower_inside, across=slower_across)


def speeds(network: Network) -> str:
    """Both bandwidths in words."""
    inside, across = (getattr(network, tier).bandwidth / 1e9 for tier in COLOURS)
    return f"inside {inside:.4g}, across {across:.4g} GB/s"


def size(n: float) -> str:
    """Bytes as a label carries them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if n >= scale:
            return f"{n / scale:,.3g} {unit}" if n < 1000 * scale else f"{n / scale:,.0f} {unit}"
    return f"{n / 1e3:.3g} KB"


def ms(seconds: float) -> str:
    """Milliseconds as a title carries them."""
    return f"{seconds * 1e3:,.0f} ms" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def once(label: str, place: int) -> str:
    """A label for the legend, of the first row only."""
    return label if place == 0 else ""


def legend(fig: Figure) -> None:
    """Below the axes, where no line can cross it."""
    handles, labels = fig.axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower left", ncols=2, fontsize=10, frameon=False)


def rows(ax: Axes, names: Sequence[str]) -> None:
    """One named row for each way, the first on top."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(False, axis="y")


def bars(ax: Axes, ways: Sequence[Took], network: Network) -> None:
    """Two bars a way, its bytes on each tier alone, and a line where all ranks are done."""
    reach = max(way.seconds for way in ways) * 1e3
    for place, way in enumerate(ways):
        end = way.seconds * 1e3
        for shift, (tier, colour) in zip((-0.19, 0.19), COLOURS.items()):
            alone = way.sent[tier] / getattr(network, tier).bandwidth * 1e3
            ax.barh(place + shift, alone, 0.34, color=colour, label=once(PLACES[tier], place))
            near = end - 0.1 * reach < alone <= end  # the line would cross what is written here
            said, look = f" {size(way.sent[tier])}", {"va": "center", "fontsize": 9, "color": INK}
            ax.text(end if near else alone, place + shift, said, **look)
        ax.plot([end, end], [place - 0.4, place + 0.4], color=INK, linewidth=2)
    rows(ax, [way.name.replace("_", " ") for way in ways])
    ax.set_xlim(0, reach * 1.15 or 1)
