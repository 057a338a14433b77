"""When a pipeline's operations can run: a device keeps its order, and waits for its inputs."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dsv3_tutorial.cost.cards import Cards, Message
from dsv3_tutorial.cost.schedule_orders import BACKWARD, FORWARD, INPUT, WEIGHT, Op

Orders = Sequence[Sequence[Op]]
# Seconds, or seconds from one device to another, on links always free; or bytes on real cards.
Send = float | Callable[[int, int], float] | Message
Result = tuple[str, int, int]  # what is computed ("F" or "G"), micro-batch, stage


@dataclass(frozen=True)
class Slot:
    """An operation on the time axis: seconds from the start of the step."""

    device: int
    start: float
    end: float
    op: Op


def result(op: Op) -> Result:
    """What an F, B, I or W leaves: F an output, B and I the gradient "G" of their input."""
    kind = "G" if op.kind in (BACKWARD, INPUT) else op.kind
    return kind, op.micro_batch, op.stage


def needs(op: Op, stages: int) -> list[Result]:
    """The results without which an F, B, I or W cannot start, here or from another device."""
    i, stage = op.micro_batch, op.stage
    if op.kind == FORWARD:
        return [(FORWARD, i, stage - 1)] if stage else []
    if op.kind == WEIGHT:
        return [("G", i, stage)]
    behind = [("G", i, stage + 1)] if stage < stages - 1 else []
    return [(FORWARD, i, stage), *behind]


def simulate(
    orders: Orders, stages: int, duration: Callable[[Op], float], send: Send = 0
) -> list[Slot]:
    """Every operation at the earliest moment that its device's order and its inputs allow.

    Slots by device, then by time. A sender goes on at once; of a Message, all keep the device's
    cards busy in turn. Raises ValueError when devices wait for each other in a circle.
    """
    lanes: list[list[Slot]] = [[] for _ in orders]
    mail = _Mail(orders, stages, send)
    moved = True
    while moved:
        moved = False
        for device, order in enumerate(orders):
            for op in order[len(lanes[device]) :]:
                ready = mail.ready(op, device)
                if ready is None:
                    break
                start = max(ready, lanes[device][-1].end if lanes[device] else 0)
                lanes[device].append(Slot(device, start, start + duration(op), op))
                for part in op.parts:
                    mail.post(result(part), device, lanes[device][-1].end)
                moved = True
        moved = moved or mail.deliver()
    _refuse_a_circle(orders, lanes)
    return [slot for lane in lanes for slot in lane]


class _Mail:
    """When each result is at a device that needs it."""

    def __init__(self, orders: Orders, stages: int, send: Send):
        self.stages, self.send = stages, send
        self.cards = Cards(send.network) if isinstance(send, Message) else None
        self.here: dict[tuple[Result, int], float] = {}
        self.wanted: dict[Result, set[int]] = {}  # at most one of them is another device
        for device, order in enumerate(orders):
            for needed in (n for op in order for part in op.parts for n in needs(part, stages)):
                self.wanted.setdefault(needed, set()).add(device)

    def ready(self, op: Op, device: int) -> float | None:
        """When the last input of an operation is at its device; None while one is not known."""
        needed = (need for part in op.parts for need in needs(part, self.stages))
        moments = [self.here.get((need, device)) for need in needed]
        return None if None in moments else max(moments, default=0)

    def post(self, made: Result, source: int, at: float) -> None:
        """A result is computed, and on its way to the device that needs it."""
        for to in self.wanted.get(made, ()):
            if to == source:
                self.here[made, to] = at
            elif self.cards:
                self.cards.post(self.send.n, source, to, at, (made, to))
            else:
                delay = self.send(source, to) if callable(self.send) else self.send
                self.here[made, to] = at + delay

    def deliver(self) -> bool:
        """Let the message arrive that left first; False if none is under way."""
        found = self.cards and self.cards.deliver()
        if found:
            self.here[found[0]] = found[1]
        return bool(found)


def _refuse_a_circle(orders: Orders, lanes: list[list[Slot]]) -> None:
    stuck = [
        f"device {device} at {order[len(lane)]} of stage {order[len(lane)].stage}"
        for device, (order, lane) in enumerate(zip(orders, lanes, strict=True))
        if len(lane) < len(order)
    ]
    if stuck:
        raise ValueError(
            f"The orders wait for each other: {', '.join(stuck[:4])}. On real ranks this hangs. "
            "Put what the others need in front of what needs them."
        )


def problems(
    orders: Orders, placement: Sequence[Sequence[int]], stages: int, micro_batches: int
) -> Iterator[str]:
    """What keeps orders from being one step: work missing, double, or where its stage is not."""
    if len(orders) != len(placement):
        yield f"{len(orders)} orders for {len(placement)} devices"
        return
    where: dict[Result, list[int]] = {}
    kinds = Counter()
    for device, order in enumerate(orders):
        for part in (part for op in order for part in op.parts):
            where.setdefault(result(part), []).append(device)
            kinds[part.kind, part.micro_batch, part.stage] += 1
            if part.stage not in placement[device]:
                yield f"{part} of stage {part.stage} on device {device}, which does not hold it"
    for i in range(micro_batches):
        for stage in range(stages):
            yield from _problems_of(i, stage, kinds, where)
    extra = {key for key in where if not (key[1] < micro_batches and key[2] < stages)}
    yield from (
        f"{kind}{i} of stage {stage} is not of this step" for kind, i, stage in sorted(extra)
    )


def _problems_of(i: int, stage: int, kinds: Counter, where: dict) -> Iterator[str]:
    forward, whole, first, second = (kinds[kind, i, stage] for kind in "FBIW")
    if forward != 1:
        yield f"F{i} of stage {stage} stands {forward} times"
    if whole + first != 1 or first != second:
        yield f"backward {i} of stage {stage}: {whole} times whole, {first} times I, {second} W"
    devices = {d for kind in "FGW" for d in where.get((kind, i, stage), [])}
    if len(devices) > 1:
        yield f"micro-batch {i} at stage {stage} is spread over devices {sorted(devices)}"


def peak(order: Sequence[Op]) -> int:
    """Micro-batches kept at the fullest moment: from an F's start to the end of its B or W."""
    kept = fullest = 0
    for part in (part for op in order for part in op.parts):
        kept += part.kind == FORWARD
        fullest = max(fullest, kept)
        kept -= part.kind in (BACKWARD, WEIGHT)
    return fullest
