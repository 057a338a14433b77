"""The V3 report's table 2 beside what its schedules' orders give when they are simulated.

Equal for 1F1B always, for ZB1P while t_w exceeds neither t_f nor t_b - t_w, for DualPipe at
t_f = t_b - t_w >= t_w, so at t_f = t_w = t_b / 2. Elsewhere `compare` shows both.
"""

from dataclasses import dataclass

from dsv3_tutorial.cost.schedule import SCHEDULES, Times


@dataclass(frozen=True)
class Row:
    """One schedule in the report's table and in the simulation: seconds and micro-batches."""

    name: str
    table_bubble: float
    bubble: float  # of the device that waits longest
    mean_bubble: float
    table_memory: int
    memory: int  # of the device that keeps most
    parameters: int
    devices: int


def table_bubble(name: str, stages: int, times: Times) -> float:
    """Seconds that a device waits in a step: V3 report, table 2 (GPipe: Huang et al. 2019).

    t_b is the whole backward. DualPipeV's is DualPipe's (README of DeepSeek's DualPipe).
    """
    _check(name)
    if name in ("gpipe", "1f1b"):
        return (stages - 1) * (times.t_f + times.t_b)
    if name == "zb1p":
        return (stages - 1) * (times.t_f + times.t_b - 2 * times.t_w)
    return (stages - 2) * (times.pair + times.t_b - 3 * times.t_w) / 2


def table_memory(name: str, stages: int, micro_batches: int) -> int:
    """Micro-batches whose activations a device keeps at most: V3 report, table 2; all in GPipe."""
    _check(name)
    if name == "gpipe":
        return micro_batches
    return stages + (name in ("dualpipe", "dualpipev"))


def order_bubble(name: str, stages: int, times: Times) -> float:
    """What the simulation of the published order gives, in closed form, where pairs gain nothing.

    For ZB1P and DualPipe found by simulating and exact in every case tried: at least `stages`
    micro-batches (DualPipe 2 x stages). Raises ValueError for a pair unlike t_f + t_b.
    """
    if name in ("gpipe", "1f1b"):
        return table_bubble(name, stages, times)
    _check(name)
    t_f, t_w, t_i = times.t_f, times.t_w, times.t_b - times.t_w
    if name == "zb1p":
        return (stages - 1) * max(t_i, t_f + max(0, t_i - t_w))
    if times.pair != t_f + times.t_b:
        raise ValueError(
            f"A pair of {times.pair} gains or loses {t_f + times.t_b - times.pair}: then devices "
            "wait unequally long, and no closed form is known here. Simulate: Schedule.idle."
        )
    rounds = stages // 2 - 1
    # The device where the streams meet runs one F and B apart, not as a pair: B is passed on
    # sooner, by that F at most.
    sooner = min(t_f, rounds * max(0, t_i - t_f))
    return rounds * (t_f + max(t_f, t_i) + max(0, t_i - t_w)) - sooner


def compare(stages: int, micro_batches: int, times: Times) -> list[Row]:
    """Every schedule's row: the report's closed forms beside the simulated order's numbers."""
    rows = []
    for name, make in SCHEDULES.items():
        schedule = make(stages, micro_batches)
        idle = schedule.idle(times)
        rows.append(
            Row(
                name,
                table_bubble(name, stages, times),
                max(idle),
                sum(idle) / len(idle),
                table_memory(name, stages, micro_batches),
                max(schedule.memory()),
                schedule.parameters(),
                schedule.devices,
            )
        )
    return rows


def _check(name: str) -> None:
    if name not in SCHEDULES:
        raise ValueError(
            f"no schedule {name!r}: nothing is known about its order. Take one of "
            f"{', '.join(SCHEDULES)}."
        )
