"""Pipeline schedules as data: what they make a device wait, hold and keep, simulated exactly.

A Schedule is its devices' orders and nothing else. parallel/pipeline.py runs the same objects. The
report's closed forms are in cost/schedule_table.py.
"""

from dataclasses import dataclass
from functools import cached_property

from dsv3_tutorial.cost import schedule_orders as published
from dsv3_tutorial.cost import schedule_timeline
from dsv3_tutorial.cost.schedule_orders import BACKWARD, FORWARD, INPUT, PAIR, WEIGHT, Op
from dsv3_tutorial.cost.schedule_timeline import Send, Slot


@dataclass(frozen=True)
class Times:
    """Seconds that one stage takes for one micro-batch. Raises ValueError for impossible ones.

    t_f forward; t_b the whole backward; t_w its weight part (t_b / 2 unless given); pair an
    overlapped forward and backward together (t_f + t_b unless given: no gain).
    """

    t_f: float = 1
    t_b: float = 2
    t_w: float | None = None
    pair: float | None = None

    def __post_init__(self):
        if self.t_w is None:
            object.__setattr__(self, "t_w", self.t_b / 2)
        if self.pair is None:
            object.__setattr__(self, "pair", self.t_f + self.t_b)
        if min(self.t_f, self.t_w, self.pair) < 0 or self.t_w > self.t_b:
            raise ValueError(
                f"{self}: no time is negative, and the weight part t_w is a part of the whole "
                "backward t_b. Give 0 <= t_w <= t_b, t_f >= 0 and pair >= 0."
            )

    def of(self, op: Op) -> float:
        """How long an operation keeps its device busy."""
        if op.kind == INPUT:
            return self.t_b - self.t_w
        return {FORWARD: self.t_f, BACKWARD: self.t_b, WEIGHT: self.t_w, PAIR: self.pair}[op.kind]


@dataclass(frozen=True)
class Schedule:
    """The order of work on every device of a pipeline, and the stages each of them holds.

    Raises ValueError if an operation is missing, done twice or on a device without its stage.
    """

    name: str
    stages: int
    micro_batches: int
    orders: tuple[tuple[Op, ...], ...]
    placement: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        found = list(
            schedule_timeline.problems(self.orders, self.placement, self.stages, self.micro_batches)
        )
        if found:
            raise ValueError(
                f"Schedule {self.name!r}: {'; '.join(found[:4])}. Unless each gradient is there "
                "exactly once, this is not the step of one process. Repair the orders."
            )

    @property
    def devices(self) -> int:
        return len(self.orders)

    def holders(self, stage: int) -> tuple[int, ...]:
        """The devices that hold a stage's weights: two in DualPipe, whose gradients are summed."""
        return tuple(d for d, held in enumerate(self.placement) if stage in held)

    def device_of(self, micro_batch: int, stage: int) -> int:
        """The device that takes a micro-batch through a stage."""
        return self._devices[micro_batch, stage]

    @cached_property
    def _devices(self) -> dict[tuple[int, int], int]:
        parts = (
            (d, part) for d, order in enumerate(self.orders) for op in order for part in op.parts
        )
        return {(part.micro_batch, part.stage): d for d, part in parts}

    def timeline(self, times: Times, send: Send = 0) -> list[Slot]:
        """When each operation runs if a device starts it once it is free and its input is there.

        send: seconds between devices, or a function (from, to) -> seconds, both on links that are
        always free; or a `cards.Message`, whose kind leave and reach a device one after the other,
        as on the virtual clock. A sender goes on at once. Slots by device, then by time. Raises
        ValueError for orders that wait for each other.
        """
        return schedule_timeline.simulate(self.orders, self.stages, times.of, send)

    def length(self, times: Times, send: Send = 0) -> float:
        """Seconds from the first operation's start to the last one's end, over all devices."""
        return max(slot.end for slot in self.timeline(times, send))

    def idle(self, times: Times, send: Send = 0) -> tuple[float, ...]:
        """Seconds that each device waits in a step: its length less the device's own work."""
        length = self.length(times, send)
        return tuple(length - sum(times.of(op) for op in order) for order in self.orders)

    def bubble(self, times: Times, send: Send = 0, of: str | int = "max") -> float:
        """Seconds that a device waits: of the worst ("max"), on average ("mean"), or of device i.

        They differ only where pairs gain time: devices do not all run equally many.
        """
        idle = self.idle(times, send)
        if of == "mean":
            return sum(idle) / len(idle)
        return max(idle) if of == "max" else idle[of]

    def memory(self) -> tuple[int, ...]:
        """Micro-batches whose activations each device keeps at its fullest moment.

        Kept from the start of F to the end of B or W: I alone frees nothing that counts here.
        """
        return tuple(schedule_timeline.peak(order) for order in self.orders)

    def parameters(self) -> int:
        """Stages whose weights a device holds: the report's 1x or 2x."""
        return max(map(len, self.placement))


def _check(stages: int, micro_batches: int, multiple: int = 1, least: int = 1) -> None:
    """Raise ValueError unless stages divide by `multiple` and micro-batches are enough."""
    if stages < 1 or stages % multiple or micro_batches < least:
        raise ValueError(
            f"{stages} stages and {micro_batches} micro-batches: this schedule needs a multiple of "
            f"{multiple} stages, and at least {least} micro-batches to fill them. Change the two."
        )


def _one_stage_each(name: str, micro_batches: int, orders: list[list[Op]]) -> Schedule:
    placement = tuple((stage,) for stage in range(len(orders)))
    return Schedule(name, len(orders), micro_batches, tuple(map(tuple, orders)), placement)


def gpipe(stages: int, micro_batches: int) -> Schedule:
    """All forwards before the first backward (Huang et al. 2019)."""
    _check(stages, micro_batches)
    orders = [published.gpipe_order(s, micro_batches) for s in range(stages)]
    return _one_stage_each("gpipe", micro_batches, orders)


def one_f_one_b(stages: int, micro_batches: int) -> Schedule:
    """A backward as soon as there is one: GPipe's bubble, and `stages` micro-batches kept."""
    _check(stages, micro_batches)
    named = [published.one_f_one_b_order(s, stages, micro_batches) for s in range(stages)]
    orders = [[Op(n[0], int(n[1:]), s) for n in names] for s, names in enumerate(named)]
    return _one_stage_each("1f1b", micro_batches, orders)


def zb1p(stages: int, micro_batches: int) -> Schedule:
    """1F1B that fills its waits with weight gradients (ZB-H1, Qi et al. 2023)."""
    _check(stages, micro_batches)
    orders = [published.zb1p_order(s, stages, micro_batches) for s in range(stages)]
    return _one_stage_each("zb1p", micro_batches, orders)


def dual_pipe(stages: int, micro_batches: int, overlap_middle: bool = False) -> Schedule:
    """Half the micro-batches enter at each end: device d holds stages d and stages - 1 - d.

    Needs an even number of stages and an even one of micro-batches, at least 2 x stages, else
    ValueError. overlap_middle makes a pair of the first F and B in the steady state of the two
    middle devices, which the published order runs apart: then the report's table is exact wherever
    t_w <= t_b - t_w >= t_f; apart saves up to one t_f. Source: V3 report, section 3.2.1.
    """
    _check(stages, micro_batches, multiple=2, least=2 * stages)
    if micro_batches % 2:
        raise ValueError(
            f"{micro_batches} micro-batches: half of them enter at each end of DualPipe, and its "
            "order is for equal halves. Give an even number."
        )
    half, size, orders = stages // 2, micro_batches // 2, []
    placement = tuple((device, stages - 1 - device) for device in range(stages))
    for device, held in enumerate(placement):
        first = (0, size)
        if device >= half:  # its stream 0 is the one that entered at the other end
            held, first = held[::-1], first[::-1]
        device = published.Streams(held, first)
        depth = min(held)
        orders.append(tuple(published.dual_pipe_order(device, depth, half, size, overlap_middle)))
    return Schedule("dualpipe", stages, micro_batches, tuple(orders), placement)


def dual_pipe_v(stages: int, micro_batches: int) -> Schedule:
    """DualPipe cut in half: stages / 2 devices; the stream turns at the last and comes back.

    Device d holds stages d and stages - 1 - d, and nothing is held twice. Needs an even number of
    stages and at least as many micro-batches, else ValueError.
    """
    _check(stages, micro_batches, multiple=2, least=stages)
    half = stages // 2
    placement = tuple((device, stages - 1 - device) for device in range(half))
    orders = []
    for device, held in enumerate(placement):
        streams = published.Streams(held, (0, 0))
        orders.append(tuple(published.dual_pipe_order(streams, device, half, micro_batches)))
    return Schedule("dualpipev", stages, micro_batches, tuple(orders), placement)


SCHEDULES = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "zb1p": zb1p,
    "dualpipe": dual_pipe,
    "dualpipev": dual_pipe_v,
}
