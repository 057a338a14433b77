"""Two micro-batches that hide each other's communication, and the SMs it takes."""

from matplotlib.figure import Figure

from dsv3_tutorial.cost import step_time
from dsv3_tutorial.cost.schedule import dual_pipe
from dsv3_tutorial.cost.sharding import overlap_speedup
from dsv3_tutorial.learn.figures import mesh_map
from dsv3_tutorial.learn.figures.style import (
    COMMUNICATION,
    COMPUTE,
    IDLE,
    figure,
    finish,
    note,
)

SMS = 132
QUOTED = 1.0  # V3 report, section 3.2.1: "approximately 1:1"


def dual_micro_batch(sms: int = 20, communication: float = 1.0) -> Figure:
    """Two micro-batches through one layer, one after the other and overlapped.

    Time is in units of one micro-batch's compute on all 132 SMs; `communication` in the same.
    """
    slowed = SMS / (SMS - sms)
    fig, ax = figure(10, 3.0)
    _lane(ax, 0, [(1.0, COMPUTE), (communication, COMMUNICATION)] * 2)
    pace = max(slowed, communication)
    for place, first in ((1.2, COMPUTE), (1.8, COMMUNICATION)):
        kinds = (first, COMMUNICATION if first == COMPUTE else COMPUTE)
        busy = {COMPUTE: slowed, COMMUNICATION: communication}
        parts = [(busy[kind], kind, pace) for kind in kinds]
        left = 0.0
        for width, colour, step in parts:
            ax.barh(place, width, 0.5, left, color=colour, edgecolor="white")
            ax.barh(place, step - width, 0.5, left + width, color=IDLE, edgecolor="white")
            left += step
    for colour, label in (
        (COMPUTE, "compute"),
        (COMMUNICATION, "communication"),
        (IDLE, "waiting"),
    ):
        ax.barh(0, 0, color=colour, label=label)
    ax.set_yticks([0, 1.2, 1.8], ["one after the other", "overlapped: A", "overlapped: B"])
    ax.set_ylim(2.3, -0.5)
    ax.set_xlim(0, 2 * max(1 + communication, pace) * 1.02)
    gain = overlap_speedup(1.0, communication, SMS, sms)
    said = f"{gain:.2f} times as fast" if gain >= 1 else f"slower, {gain:.2f} times as fast"
    note(fig, "derived; both orders take two micro-batches through the layer")
    fig = finish(
        *(fig, ax, f"Overlapped, with {sms} of {SMS} SMs for communication: {said}"),
        *("time, in one micro-batch's compute", "", False),
    )
    fig.legend(loc="outside lower left", ncols=3, fontsize=10, frameon=False)
    return fig


def _lane(ax, place: float, parts: list[tuple[float, str]]) -> None:
    left = 0.0
    for index, (width, colour) in enumerate(parts):
        ax.barh(place, width, 0.5, left, color=colour, edgecolor="white")
        who = "AB"[index // 2]
        ax.text(left + width / 2, place, who, color="white", ha="center", va="center", fontsize=10)
        left += width


def counted_ratio() -> float:
    """Seconds that the experts' traffic takes over those in which a GPU computes (ISCA table 4)."""
    return _experts() / step_time.computing()


def _experts() -> float:
    return next(k.seconds for k in mesh_map.found(mesh_map.Split()) if k.name == "experts")


def ratios_table(sms: int = 20) -> None:
    """Print what overlapping buys at the quoted ratio, at the counted one, and by table 4."""
    counted = (
        f"counted: {_experts():.2f} s over table 4's {step_time.computing():.2f} s of computing"
    )
    print(f"{'':53}{'communication':>15}{f'with {sms} of {SMS} SMs':>22}")
    for said, ratio in (("quoted: V3 report, section 3.2.1", QUOTED), (counted, counted_ratio())):
        gain = overlap_speedup(1.0, ratio, SMS, sms)
        print(f"{said:53}{f'{ratio:.2f} : 1':>15}{f'{gain:.2f} times':>22}")
    schedule = dual_pipe(16, 120)
    both = (step_time.operation_times(schedule, whole) for whole in (True, False))
    least, most = ((times.t_f + times.t_b) / times.pair for times in both)
    print(
        f"by ISCA table 4's own times a pair is {least:.2f} to {most:.2f} times as fast as its "
        "parts one after the other\n(by what its 1B counts; 120 micro-batches are assumed)"
    )


def dual_micro_batch_in_words(sms: int = 20, communication: float = 1.0) -> str:
    """What overlapping buys, and when it loses."""
    gain, ceiling = overlap_speedup(1.0, communication, SMS, sms), 1 + communication
    least = sms / (SMS - sms)
    return (
        f"Communication takes {communication:g} times as long as compute. With {sms} of {SMS} SMs "
        f"spent on it, overlapping is {gain:.2f} times as fast; hiding the shorter of the two "
        f"for nothing would be {ceiling / max(1, communication):.2f}. Below {least:.2f} times the "
        "compute, communication is not worth the SMs."
    )
