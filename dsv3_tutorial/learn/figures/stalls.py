"""What a training step waited for, before and after the repair, as `bench stalls` recorded it.

Lanes are drawn to scale from the medians of a step: what was worked on, what was waited for, and
what went on behind the work. Which millisecond came first inside a step is not recorded.
"""

from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_tutorial import receipts
from dsv3_tutorial.bench.stalls import BUSIEST, EVERY, NAME, Case, cases
from dsv3_tutorial.learn.figures.style import COMPUTE, IDLE, INK, MEMORY, figure, finish, note

# which -> (the mistake, the repair, the cause, steps between two of it)
PAIRS = {
    "input": ("waits for its text", "waits for its text, prefetched", "data", 1),
    "unpacking": (
        *("unpacks longer than a step", "unpacks longer than a step, prefetched"),
        *("data", 1),
    ),
    "checkpoint": ("stops to save", "saves in the background", "checkpoint", EVERY),
}
MISSING = "not measured yet: python -m dsv3_tutorial bench stalls"


def recorded(folder: Path | None = None) -> list[receipts.Receipt]:
    """The receipts on record, the newest of each kind; none where nothing was measured."""
    return receipts.latest(NAME, folder=folder) if NAME in receipts.names(folder) else []


def timeline(which: str = "input", rows: list[receipts.Receipt] | None = None) -> Figure:
    """The step's lane and the lane behind it, before the repair and after; one of PAIRS.

    Raises KeyError for another name.
    """
    rows = recorded() if rows is None else rows
    found, (*names, cause, every) = cases(rows), _pair(which)
    fig, axes = figure(10, 3.8, rows=2)
    if missing := [name for name in names if name not in found]:
        for ax in axes:
            finish(fig, ax, "", "ms", "", legend=False)
        axes[0].set_title(f"{', '.join(missing)}: {MISSING}", loc="left", fontsize=11, wrap=True)
        return fig
    pair = [found[name] for name in names]
    for ax, name, case in zip(axes, names, pair):
        _lanes(ax, case, cause, every)
        finish(fig, ax, "", "", "", legend=False)
        ax.set_title(name, loc="left", fontsize=11, color=INK)
    end = 1.02 * max(ax.get_xlim()[1] for ax in axes)
    for ax in axes:
        ax.set_xlim(0, end)
    finish(fig, axes[1], "", "ms", "", legend=False)
    axes[0].legend(*_keys(axes), loc="upper right", ncols=3, fontsize=10, frameon=False)
    title = {"x": 0.01, "ha": "left", "fontsize": 13, "color": INK, "weight": "bold"}
    fig.suptitle(_finding(pair, cause), **title)
    note(fig, f"{_busy(pair)}; lanes drawn from medians; {receipts.caption(rows)}")
    return fig


def table(rows: list[receipts.Receipt] | None = None) -> None:
    """Print every recorded case: what a step waits, what goes on behind its work, and all of it."""
    found = cases(recorded() if rows is None else rows)
    if not found:
        print(MISSING)
        return
    print(
        f"{'ms of a step':42}{'waits':>8}{'for':>12}{'hidden':>8}{'in all*':>9}{'cores busy*':>13}"
    )
    for name, case in found.items():
        cause = max(case.waits, key=case.waits.get, default="")
        waits = f"{1e3 * case.waits.get(cause, 0):.1f}"
        hidden = f"{1e3 * sum(case.hides.values()):.0f}" if case.hides else "-"
        busy = "-" if case.busy is None else f"{case.busy:.1f} of {case.cores}"
        total = f"{1e3 * case.seconds:.0f}"
        print(f"{name:42}{waits:>8}{cause:>12}{hidden:>8}{total:>9}{busy:>13}")
    print(
        "* others kept so many cores busy meanwhile: with no core free beside the one that trains,"
    )
    print(
        "only the waits are to be trusted; all of a step is then longer, and hidden work slows it"
    )


def experts_table(rows: list[receipts.Receipt] | None = None) -> None:
    """Print what skewed routing costs the busiest rank: counted, measured, and repaired."""
    found = [row for row in (recorded() if rows is None else rows) if row.what == BUSIEST]
    if not found:
        print(MISSING)
        return
    print(f"{'skew':>5}{'MaxVio':>9}{'counted':>10}{'measured':>11}{'bias, counted':>16}")
    for row in found:
        of = row.shapes
        loads = f"{mean(of['counted']):>9.2f}x{row.value:>10.2f}x{mean(of['repaired']):>15.3f}x"
        print(f"{of['skew']:>5.1f}{mean(of['max_violation']):>9.2f}{loads}")
    of = found[0].shapes
    print(
        f"the busiest of {of['ranks']} ranks over the mean; {of['experts']} experts, "
        f"{of['tokens']:,} tokens, {len(of['seeds'])} seeds"
    )


def _pair(which: str) -> tuple:
    if which not in PAIRS:
        raise KeyError(f"no pair {which!r}: nothing can be drawn. There are {', '.join(PAIRS)}.")
    return PAIRS[which]


def _lanes(ax: Axes, case: Case, cause: str, every: int) -> None:
    """Twice `every` steps, six at least, with the wait or what is hidden at the end of each turn.

    Behind, as much of the cause as the step's work covered, from the moment it was asked for.
    """
    wait, hidden = (1e3 * every * of.get(cause, 0.0) for of in (case.waits, case.hides))
    work = max(0.0, 1e3 * case.seconds - wait / every)
    now = 0.0
    for _ in range(max(6 // every, 2)):
        if every == 1:
            now = _wait(ax, now, wait, hidden)
        for _ in range(every):
            _block(ax, now, work, 1, COMPUTE, "work")
            now += work
        if every > 1:
            now = _wait(ax, now, wait, hidden)
    ax.set_xlim(0, now)
    ax.set_yticks([1, 0], ["step", cause])
    ax.set_ylim(-0.5, 1.95)
    ax.grid(False, axis="y")


def _wait(ax: Axes, now: float, wait: float, hidden: float) -> float:
    _block(ax, now, wait, 1, IDLE, "waits")
    _block(ax, now, wait, 0, MEMORY, "what it waits for")
    _block(ax, now + wait, hidden, 0, MEMORY, "what it waits for")
    return now + wait


def _block(ax: Axes, start: float, length: float, lane: int, colour: str, label: str) -> None:
    if length > 0:
        look = {"color": colour, "edgecolor": "white", "linewidth": 0.8}
        ax.barh(lane, length, 0.6, left=start, label=label, **look)


def _keys(axes) -> tuple[list, list]:
    found = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels()):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _finding(pair: list[Case], cause: str) -> str:
    waits = [1e3 * case.waits.get(cause, 0.0) for case in pair]
    what = {"data": "text", "checkpoint": "its checkpoint"}[cause]
    return f"On average a step waits {waits[0]:.1f} ms for {what}; repaired, {waits[1]:.1f} ms"


def _busy(pair: list[Case]) -> str:
    """How many cores others had; where none was wholly free, what may be read off the lanes."""
    shares = " and ".join("?" if c.busy is None else f"{c.busy:.1f}" for c in pair)
    told = f"others kept {shares} of {pair[0].cores} cores busy"
    return told if all(c.quiet for c in pair) else f"{told}: compare the waits, not the work"
