"""Two panels of a plan: what lies on its fullest GPU, and what its step is spent on."""

from matplotlib.axes import Axes

from dsv3_tutorial.cost.plan import Plan
from dsv3_tutorial.learn.figures.step_parts import COLOURS, PALE, shade
from dsv3_tutorial.learn.figures.style import IDLE, INK, MEMORY, SERIES

HELD = {
    "weights": SERIES[3],
    "gradients": shade(SERIES[3], PALE),
    "optimizer": SERIES[4],
    "mtp": shade(SERIES[4], PALE),
    "activations": MEMORY,
    "logits": shade(MEMORY, PALE),
}


def memory(ax: Axes, of: Plan) -> None:
    """One column of what lies on a GPU, and lines at what may be used and at all of it."""
    bottom, whole = 0.0, of.cluster.chip.memory_bytes / 1e9
    for name, size in of.memory.items():
        if not size:
            continue
        ax.bar(0, size / 1e9, 0.6, bottom=bottom, color=HELD.get(name, IDLE), edgecolor="white")
        if size / 1e9 > 0.03 * whole:
            middle = bottom + size / 2e9
            look = {"va": "center", "fontsize": 10, "color": INK}
            ax.text(0.36, middle, f"{name} {size / 1e9:.1f}", **look)
        bottom += size / 1e9
    ax.axhline(of.room / 1e9, color=INK, linewidth=2)
    ax.axhline(whole, color=INK, linewidth=1, linestyle=":")
    share = f"{of.assume.usable_memory:.0%} may be used"
    look = {"textcoords": "offset points", "ha": "right", "va": "top", "fontsize": 9}
    ax.annotate(share, (1.6, of.room / 1e9), (0, -4), color=INK, **look)
    ax.set_xlim(-0.4, 1.6)
    ax.set_ylim(0, 1.06 * max(bottom, whole))
    ax.set_xticks([])
    ax.grid(False, axis="x")


def times(ax: Axes, of: Plan) -> None:
    """A bar a part; hatched behind it what overlap hid."""
    parts = [part for part in of.times if of.times[part] or of.hidden.get(part)]
    for row, part in enumerate(parts):
        shown, hidden = of.times[part], of.hidden.get(part, 0.0)
        ax.barh(row, shown, 0.62, color=COLOURS[part])
        look = {"color": "white", "edgecolor": COLOURS[part], "hatch": "////"}
        if hidden:
            ax.barh(row, hidden, 0.62, left=shown, **look)
        label = f"{_short(shown)}" + (f" + {_short(hidden)} hidden" if hidden else "")
        ax.annotate(
            *(label, (shown + hidden, row), (5, 0)),
            **{"textcoords": "offset points", "va": "center", "fontsize": 10, "color": INK},
        )
    ax.set_yticks(range(len(parts)), parts)
    ax.set_ylim(len(parts) - 0.4, -0.6)
    ax.set_xlim(0, 1.45 * max(of.times[p] + of.hidden.get(p, 0.0) for p in parts))
    ax.grid(False, axis="y")


def _short(seconds: float) -> str:
    return f"{seconds:.2f}" if seconds < 10 else f"{seconds:,.1f}"
