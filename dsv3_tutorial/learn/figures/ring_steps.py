"""A ring all-reduce, step by step: who holds how much of each chunk's sum."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dsv3_tutorial.learn.figures.style import COMMUNICATION, INK, MEMORY, figure, note

MOST = 6  # ranks that can be drawn
Held = list[list[int]]  # [rank][chunk]: of how many ranks a rank's copy is the sum


def steps(world: int) -> list[Held]:
    """What every rank holds at first and after each of the 2 (world - 1) steps of a ring."""
    if not 2 <= world <= MOST:
        raise ValueError(
            f"A ring of {world}: one rank sends nothing, and more than {MOST} cannot be read here. "
            f"Give 2 to {MOST}."
        )
    held: Held = [[1] * world for _ in range(world)]
    seen = [held]
    for step in range(2 * (world - 1)):
        held = [list(row) for row in seen[-1]]
        for rank in range(world):
            after = (rank + 1) % world
            chunk = (rank - step) % world
            arrived = seen[-1][rank][chunk]
            held[after][chunk] = arrived + 1 if step < world - 1 else arrived
        seen.append(held)
    return seen


def ring(world: int = 4) -> Figure:
    """A small grid for each step: a row a rank, a column a chunk, and how many ranks it sums."""
    seen = steps(world)
    fig, axes = figure(10, 2.3, columns=len(seen))
    for index, (ax, held) in enumerate(zip(axes, seen)):
        _grid(ax, held, seen[max(0, index - 1)], world)
        ax.set_title("before" if not index else f"step {index}", fontsize=10, color=INK)
    axes[0].set_ylabel("rank", fontsize=11, color=INK)
    axes[0].set_yticks(range(world))
    axes[0].set_xlabel("chunk", fontsize=11, color=INK)
    each = 2 * (world - 1) / world
    fig.suptitle(
        f"A ring of {world}: {len(seen) - 1} steps, {each:g} times the vector sent by each rank",
        **{"x": 0.01, "ha": "left", "fontsize": 13, "color": INK, "weight": "bold"},
    )
    note(fig, "each number: of how many ranks the copy is the sum; framed: arrived in this step")
    return fig


def _grid(ax: Axes, held: Held, before: Held, world: int) -> None:
    """A step's sums; what the step has changed is framed."""
    for rank, row in enumerate(held):
        for chunk, terms in enumerate(row):
            colour = COMMUNICATION if terms == world else "white"
            ink = "white" if terms == world else INK
            ax.add_patch(
                Rectangle(
                    (chunk - 0.5, rank - 0.5),
                    *(1, 1),
                    **{"facecolor": colour, "edgecolor": INK, "linewidth": 0.6, "clip_on": False},
                )
            )
            if terms != before[rank][chunk]:
                frame = {"fill": False, "edgecolor": MEMORY, "linewidth": 3, "zorder": 3}
                ax.add_patch(Rectangle((chunk - 0.42, rank - 0.42), 0.84, 0.84, **frame))
            ax.text(chunk, rank, terms, ha="center", va="center", fontsize=10, color=ink)
    ax.set(xlim=(-0.5, world - 0.5), ylim=(world - 0.5, -0.5), aspect="equal")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    ax.spines[:].set_visible(False)
