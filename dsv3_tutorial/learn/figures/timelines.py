"""Pipelines drawn: what each device does when, and what it waits for.

Times are in units of one forward (t_f) unless seconds are given. The orders are those of
cost/schedule.py, which parallel/pipeline.py runs.
"""

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from dsv3_tutorial.cost import schedule_table
from dsv3_tutorial.cost.schedule import SCHEDULES, Schedule, Times
from dsv3_tutorial.cost.schedule_orders import PAIR
from dsv3_tutorial.cost.schedule_timeline import Slot
from dsv3_tutorial.learn.figures.style import INK, figure, finish, note

TITLES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "zb1p": "ZB1P",
    "dualpipe": "DualPipe",
    "dualpipev": "DualPipeV",
}
LOOKS = {
    "F": ("#0072B2", "forward"),
    "B": ("#D55E00", "backward, whole"),
    "I": ("#E69F00", "backward, for the inputs"),
    "W": ("#009E73", "backward, for the weights"),
    "FB": ("#CC79A7", "forward and backward overlapped"),
}
FORMULAS = {  # V3 report, table 2
    "1f1b": "(p - 1)(F + B)",
    "zb1p": "(p - 1)(F + B - 2W)",
    "dualpipe": "(p/2 - 1)(FB + B - 3W)",
}
LEGIBLE = 0.012  # of the axis: in a narrower box no number can be read
UNITS = (("seconds", 1), ("milliseconds", 1e3), ("microseconds", 1e6))
NAMED = 40  # up to here an operation carries its micro-batch's number


def made(name: str, stages: int, micro_batches: int) -> Schedule:
    """The schedule of a name. Raises ValueError where it needs more micro-batches, or others."""
    return SCHEDULES[name](stages, micro_batches)


def draw_lanes(ax: Axes, slots: Sequence[Slot], devices: int, numbers: bool) -> None:
    """One row a device, device 0 on top; the white between operations is time spent waiting."""
    for kind, (colour, _) in LOOKS.items():  # one collection a kind: thousands of patches are slow
        boxes = [
            Rectangle((slot.start, slot.device - 0.43), slot.end - slot.start, 0.86)
            for slot in slots
            if slot.op.kind == kind and slot.end > slot.start
        ]
        look = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.4}
        ax.add_collection(PatchCollection(boxes, **look))
    length = max(slot.end for slot in slots)
    for slot in slots if numbers else ():
        said = "/".join(str(part.micro_batch) for part in slot.op.parts)
        place = {"ha": "center", "va": "center", "fontsize": 7, "color": "white"}
        middle = (slot.start + slot.end) / 2
        if slot.end - slot.start > LEGIBLE * length:
            ax.text(middle, slot.device, said, **place).set_in_layout(False)
    ax.set_xlim(0, length)
    ax.set_yticks(range(devices))
    ax.set_ylim(devices - 0.4, -0.6)
    ax.grid(False, axis="y")
    ax.set_facecolor("#F2F2F2")


def _legend(fig: Figure, slots: Sequence[Slot]) -> None:
    kinds = [kind for kind in LOOKS if any(slot.op.kind == kind for slot in slots)]
    patches = [Patch(color=LOOKS[kind][0], label=LOOKS[kind][1]) for kind in kinds]
    patches.append(Patch(facecolor="#F2F2F2", edgecolor="#999999", label="waiting"))
    fig.legend(handles=patches, loc="outside lower left", ncols=4, fontsize=10, frameon=False)


def timeline(
    schedule: str = "1f1b",
    stages: int = 4,
    micro_batches: int = 8,
    t_f: float = 1.0,
    t_b: float = 2.0,
    t_w: float = 1.0,
    pair: float = 3.0,
) -> Figure:
    """One schedule's step, device by device, its bubble in the title."""
    return drawn(made(schedule, stages, micro_batches), Times(t_f, t_b, t_w, pair))


def drawn(schedule: Schedule, times: Times) -> Figure:
    """Any schedule's step: a reader's own orders too, as long as they are a Schedule."""
    slots = schedule.timeline(times)
    fig, ax = figure(10, 1.6 + 0.32 * schedule.devices)
    draw_lanes(ax, slots, schedule.devices, schedule.stages * schedule.micro_batches <= NAMED)
    _legend(fig, slots)
    idle, length, name = schedule.bubble(times), schedule.length(times), schedule.name
    name = TITLES.get(name) or name[:1].upper() + name[1:]
    title = f"{name}: the worst device waits {idle:g} of {length:g} ({idle / length:.0%})"
    return finish(fig, ax, title, "time, in forwards", "device", legend=False)


def timeline_in_words(
    schedule: str = "1f1b",
    stages: int = 4,
    micro_batches: int = 8,
    t_f: float = 1.0,
    t_b: float = 2.0,
    t_w: float = 1.0,
    pair: float = 3.0,
) -> str:
    """What a schedule waits for, holds and keeps, and what the report's formula says."""
    chosen, times = made(schedule, stages, micro_batches), Times(t_f, t_b, t_w, pair)
    idle, printed = chosen.bubble(times), schedule_table.table_bubble(schedule, stages, times)
    copies = chosen.parameters()
    return (
        f"{TITLES[schedule]}, {stages} stages on {chosen.devices} devices, {micro_batches} "
        f"micro-batches: the worst device waits {idle:g} of a step of {chosen.length(times):g}; "
        f"the closed form says {printed:g}. The fullest device keeps {max(chosen.memory())} "
        f"micro-batches of activations and {copies} stage{'s' if copies > 1 else ''} of weights."
    )


def in_pairs(schedule: Schedule, times: Times) -> tuple[float, float]:
    """The share of its work that a device does in pairs: the least and the most of all devices."""
    shares = []
    for order in schedule.orders:
        paired = sum(times.of(op) for op in order if op.kind == PAIR)
        shares.append(paired / sum(times.of(op) for op in order))
    return min(shares), max(shares)


def three(stages: int = 8, micro_batches: int = 20) -> Figure:
    """1F1B, ZB1P and DualPipe on one time axis, t_f = t_w = 1 and t_b = 2."""
    times, names = Times(1, 2, 1, 3), ("1f1b", "zb1p", "dualpipe")
    fig, axes = figure(10, 1.6 + 3 * 0.22 * stages, rows=3)
    lanes = [(made(name, stages, micro_batches), ax) for name, ax in zip(names, axes)]
    longest = max(chosen.length(times) for chosen, _ in lanes)
    seen: list[Slot] = []
    for name, (chosen, ax) in zip(names, lanes):
        slots = chosen.timeline(times)
        draw_lanes(ax, slots, chosen.devices, numbers=False)
        ax.set_xlim(0, longest)
        ax.axvspan(chosen.length(times), longest, color="white", zorder=0.9)  # over: no waiting
        ax.set_yticks([0, stages - 1])
        finish(fig, ax, "", "", f"{TITLES[name]}\ndevice", legend=False)
        seen += slots
    axes[-1].set_xlabel("time, in forwards", fontsize=12, color=INK)
    _legend(fig, seen)
    waits = [chosen.bubble(times) for chosen, _ in lanes]
    least, most = in_pairs(lanes[-1][0], times)
    fig.suptitle(
        f"{stages} stages, {micro_batches} micro-batches: a device waits "
        f"{waits[0]:g}, {waits[1]:g} and {waits[2]:g} forwards\n"
        f"DualPipe does {least:.0%} to {most:.0%} of a device's work in pairs",
        **{"x": 0.01, "ha": "left", "fontsize": 13, "color": INK, "weight": "bold"},
    )
    return fig


def bubble_table(stages: int = 16, micro_batches: int = 120, times: Times | None = None) -> None:
    """Print the report's table 2 beside what the simulated orders give."""
    times = times or Times(1, 2, 1, 3)
    print(
        f"p = {stages} stages, {micro_batches} micro-batches; F {times.t_f:g}, B {times.t_b:g}, "
        f"of which W {times.t_w:g}; a pair FB {times.pair:g}"
    )
    unit = "in forwards" if times.t_f == 1 else "in the unit of F"
    print(f"{'':33}{'bubble, ' + unit:>25}{'of the':>9}{'activa-':>9}{'weights':>9}{'work in':>10}")
    print(f"{'':10}{'by the report':23}{'report':>12}{'simulated':>13}", end="")
    print(f"{'step':>9}{'tions':>9}{'held':>9}{'pairs':>10}")
    for name, formula in FORMULAS.items():
        chosen = made(name, stages, micro_batches)
        pairs = _range(in_pairs(chosen, times))
        printed, idle = schedule_table.table_bubble(name, stages, times), chosen.bubble(times)
        share = idle / chosen.length(times)
        print(
            f"{TITLES[name]:10}{formula:23}{printed:>12g}{idle:>13g}{share:>9.1%}"
            f"{max(chosen.memory()):>9}{chosen.parameters():>8}x{pairs:>10}"
        )


def _range(shares: tuple[float, float]) -> str:
    least, most = (f"{100 * share:.0f}" for share in shares)
    return f"{least} %" if least == most else f"{least}-{most} %"


def real(recorded: Sequence[Sequence[Slot]], name: str, virtual: bool = False) -> Figure:
    """A run of real ranks as it was recorded, each rank's slots in seconds of a clock.

    virtual: of the clock that counts messages and given times, not of this machine's.
    """
    length = max(slot.end for lane in recorded for slot in lane)
    unit, scale = next((one for one in UNITS if length * one[1] >= 1), UNITS[-1])
    recorded = [
        [replace(slot, start=slot.start * scale, end=slot.end * scale) for slot in lane]
        for lane in recorded
    ]
    slots = [slot for lane in recorded for slot in lane]
    fig, ax = figure(10, 1.6 + 0.32 * len(recorded))
    draw_lanes(ax, slots, len(recorded), len(slots) <= 2 * NAMED)
    _legend(fig, slots)
    length *= scale
    busy = [sum(slot.end - slot.start for slot in lane) for lane in recorded]
    share = 1 - min(busy) / length
    note(fig, f"{len(recorded)} processes{'' if virtual else ' of this machine'}")
    how = "on the virtual clock" if virtual else "as it ran"
    title = f"{TITLES.get(name, name)} {how}: the least busy rank waits {share:.0%} of the time"
    return finish(fig, ax, title, f"time, {unit}", "rank", legend=False)
