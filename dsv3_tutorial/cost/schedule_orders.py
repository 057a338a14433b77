"""In which order a device of a pipeline works: every published schedule as a list of operations.

An order says nothing about time. Who waits for whom follows from the operations themselves, so the
same lists are counted (cost/schedule.py), drawn, and run on real ranks (parallel/pipeline.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

FORWARD, BACKWARD, INPUT, WEIGHT, PAIR = "F", "B", "I", "W", "FB"


@dataclass(frozen=True)
class Op:
    """One piece of work of one stage on one micro-batch.

    F forward; B the full backward, or in two parts: I gradients of the stage's input, W gradients
    of its weights; FB a forward that overlaps with the backward of another micro-batch.
    """

    kind: str
    micro_batch: int
    stage: int
    backward: "Op | None" = None  # an FB's second half; its first is micro_batch and stage

    @property
    def parts(self) -> tuple["Op", ...]:
        """The operations it consists of: itself, or an overlapped pair's F and B."""
        if self.kind != PAIR:
            return (self,)
        return (Op(FORWARD, self.micro_batch, self.stage), self.backward)

    def __str__(self) -> str:
        if self.kind == PAIR:
            return "&".join(map(str, self.parts))
        return f"{self.kind}{self.micro_batch}"


def gpipe_order(stage: int, micro_batches: int) -> list[Op]:
    """All forwards, then all backwards: simple, and every micro-batch's activations are kept."""
    return [Op(kind, i, stage) for kind in (FORWARD, BACKWARD) for i in range(micro_batches)]


def one_f_one_b_order(stage: int, stages: int, micro_batches: int) -> list[str]:
    """One forward, one backward in turn, once the pipeline is full: at most `stages` are kept.

    Named F0, B0, ...: the stage first runs as many forwards ahead as there are stages behind it.
    Idle time is GPipe's. Source: PipeDream-Flush (Narayanan et al. 2021).
    """
    ahead = min(stages - 1 - stage, micro_batches)
    order = [f"F{i}" for i in range(ahead)]
    for i in range(ahead, micro_batches):
        order += [f"F{i}", f"B{i - ahead}"]
    return order + [f"B{i}" for i in range(micro_batches - ahead, micro_batches)]


def zb1p_order(stage: int, stages: int, micro_batches: int) -> list[Op]:
    """1F1B with the backward in two: stage s puts off s weight gradients to fill its last wait.

    The gradient that the stage before waits for is sent t_w earlier. Memory stays 1F1B's, reached
    on every device. Source: ZB-H1 (Qi et al. 2023), what the V3 report calls ZB1P.
    """
    order, inputs_done = [], 0
    for name in one_f_one_b_order(stage, stages, micro_batches):
        kind, i = name[0], int(name[1:])
        order.append(Op(INPUT if kind == BACKWARD else kind, i, stage))
        if kind == BACKWARD:
            inputs_done += 1
            if inputs_done > stage:
                order.append(Op(WEIGHT, inputs_done - 1 - stage, stage))
    left = range(max(0, micro_batches - stage), micro_batches)
    return order + [Op(WEIGHT, i, stage) for i in left]


class Streams:
    """Two streams of micro-batches, 0 and 1, on one device: each one's next operation.

    stages: the stage that serves each stream; first: the first micro-batch of each.
    """

    def __init__(self, stages: tuple[int, int], first: tuple[int, int]):
        self.stages = stages
        self.forwards = [count(first[0]), count(first[1])]
        self.backwards = [count(first[0]), count(first[1])]
        self.put_off: list[Op] = []  # weight gradients to do, the oldest first

    def forward(self, stream: int) -> Op:
        return Op(FORWARD, next(self.forwards[stream]), self.stages[stream])

    def backward(self, stream: int, split: bool = False) -> Op:
        i, stage = next(self.backwards[stream]), self.stages[stream]
        if split:
            self.put_off.append(Op(WEIGHT, i, stage))
        return Op(INPUT if split else BACKWARD, i, stage)

    def pair(self, forward: int, backward: int) -> Op:
        first = self.forward(forward)
        return Op(PAIR, first.micro_batch, first.stage, self.backward(backward))

    def weight(self) -> Op:
        return self.put_off.pop(0)


def dual_pipe_order(
    device: Streams, depth: int, half: int, stream_size: int, overlap_middle: bool = False
) -> list[Op]:
    """DualPipe's eight phases on one device, whose two stages serve two streams.

    depth 0 .. half - 1: how far from the ends the device stands (the streams meet at half - 1);
    stream_size micro-batches in each. Source: V3 report, section 3.2.1, and the order that DeepSeek
    published with it; for overlap_middle see cost.schedule.dual_pipe.
    """
    after = half - 1 - depth
    order = [device.forward(0) for _ in range(2 * after)]  # 1: stream 0 fills up
    for _ in range(depth + 1):  # 2: stream 1 has arrived
        order += [device.forward(0), device.forward(1)]
    for _ in range(after):  # 3: stream 1 comes back; the backward is split, so that it passes on
        order += [device.backward(1, split=True), device.weight(), device.forward(1)]
    for i in range(stream_size - 2 * half + depth + 1):  # 4: the steady state, two pairs a round
        if i == 0 and after == 0 and not overlap_middle:  # apart: B is wanted by the others
            order += [device.forward(0), device.backward(1)]
        else:
            order.append(device.pair(0, 1))
        order.append(device.pair(1, 0))
    for _ in range(after):  # 5: stream 0 has no forwards left
        order += [device.backward(1), device.pair(1, 0)]
    return order + list(_drain(device, depth, after))


def _drain(device: Streams, depth: int, after: int) -> Iterator[Op]:
    """Backwards only: the later half of them split, and their weight gradients fill the waits."""
    backwards = 2 * (depth + 1)
    for i in range(backwards):  # 6
        yield device.backward((i + 1) % 2, split=i >= backwards // 2)
    for _ in range(after):  # 7
        yield device.weight()
        yield device.backward(0, split=True)
    while device.put_off:  # 8
        yield device.weight()
