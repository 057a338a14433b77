"""A live run of the precision benchmark's variants, side by side."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from dsv3_tutorial.bench.precision import EVERY
from dsv3_tutorial.bench.precision_pairs import BASE
from dsv3_tutorial.learn.figures.precision_records import look, nested
from dsv3_tutorial.learn.figures.style import INK, figure, finish

LIVE = 10  # steps below which a live run is compared with nothing


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
    for index, (variant, values) in enumerate(losses.items()):
        style = {**look(variant), **nested(index, len(losses), len(steps))}
        left.plot(steps, values, label=variant, **style)
        if variant != BASE:
            right.plot(steps, 100 * (values / losses[BASE] - 1), label=variant, **style)
    right.axhline(0, color=INK, linewidth=1.2)
    for ax in (left, right):
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlim(*((0, 2) if len(steps) == 1 else (None, None)))
    finish(fig, left, "", "steps", "bits per byte, batches")
    finish(fig, right, "", "steps", f"over {BASE} on the same batch, %")
    title = _live_title(losses, steps[-1])
    fig.suptitle(title, x=0.01, ha="left", fontsize=13, color=INK, weight="bold")
    return fig


def _live_title(losses: dict[str, np.ndarray], last: int) -> str:
    """The largest difference over the last steps, and how much one batch differs from the next."""
    base = losses[BASE][-EVERY:]
    between = np.abs(np.diff(base) / base[:-1]).mean() if len(base) > 1 else 0.0
    noise = f"one batch differs from the next by {between:.1%}"
    if last < LIVE:
        why = noise if len(base) > 1 else "all begin with the same weights"
        return f"{last} step{'s' * (last > 1)}: nothing to tell yet; {why}"
    gaps = {v: (each[-EVERY:] / base - 1).mean() for v, each in losses.items() if v != BASE}
    widest = max(gaps, key=lambda variant: abs(gaps[variant]))
    over = f"means of {len(base)} steps; {noise}"
    return f"After {last} steps {widest} is furthest from {BASE}: {gaps[widest]:+.2%}\n({over})"
