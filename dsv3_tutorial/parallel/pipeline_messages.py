"""What the devices of a pipeline send each other: activations on, gradients back.

The order in which a device sends follows from its schedule, so each receiver knows it. It asks for
messages in that order, which needs no tags and cannot lock: whatever stands in front of the message
that it needs was sent earlier.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_tutorial.cost.schedule import Schedule
from dsv3_tutorial.cost.schedule_timeline import Result, result

TIMEOUT = timedelta(minutes=5)  # after which a device that waits in vain ends the job


def destination(schedule: Schedule, made: Result) -> int | None:
    """The device that needs an output ("F") or an input's gradient ("G"); None if nobody does."""
    kind, micro_batch, stage = made
    wanted = {"F": stage + 1, "G": stage - 1}.get(kind, -1)
    return schedule.device_of(micro_batch, wanted) if 0 <= wanted < schedule.stages else None


def sent_in_order(schedule: Schedule, source: int, to: int) -> Iterator[Result]:
    """What a device sends another in a step, in the order in which it computes it."""
    for op in schedule.orders[source]:
        for made in map(result, op.parts):
            if source != to == destination(schedule, made):
                yield made


def directions(group: dist.ProcessGroup) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The group for messages to later devices and the one for those to earlier ones.

    Under NCCL two ranks share one queue for both ways, and two sends that face each other would
    lock: there each way gets a group of its own. gloo's sends run beside each other.
    """
    if dist.get_backend(group) == "gloo":
        return group, group
    ranks = dist.get_process_group_ranks(group)
    later, earlier = (
        dist.new_group(ranks, timeout=TIMEOUT, use_local_synchronization=True) for _ in range(2)
    )
    return later, earlier


class Post:
    """One device's messages in one step.

    likes: for each micro-batch a tensor of the shape and dtype that its messages have. Memory: what
    is sent is kept until `close`, a message or two for each micro-batch and stage.
    """

    def __init__(
        self,
        schedule: Schedule,
        groups: tuple[dist.ProcessGroup, dist.ProcessGroup],
        likes: Sequence[Tensor],
        lies_on: torch.device,
    ):
        self.schedule, self.groups, self.likes, self.lies_on = schedule, groups, likes, lies_on
        self.device = dist.get_rank(groups[0])
        self._expected = {
            source: deque(sent_in_order(schedule, source, self.device))
            for source in range(schedule.devices)
        }
        self._here: dict[Result, Tensor] = {}
        self._coming: dict[Result, tuple[dist.Work, Tensor]] = {}
        self._going: list[tuple[dist.Work, Tensor]] = []

    def send(self, made: Result, value: Tensor) -> None:
        """Hand a result to the device that needs it, and go on at once.

        Raises ValueError for a value unlike the announced ones: its receiver would read past it.
        """
        to = destination(self.schedule, made)
        if to is None:
            return
        if to == self.device:
            self._here[made] = value
            return
        like = self.likes[made[1]]
        if (value.shape, value.dtype) != (like.shape, like.dtype):
            raise ValueError(
                f"Stage {made[2]} passes on {tuple(value.shape)} {value.dtype}, and "
                f"{tuple(like.shape)} {like.dtype} was announced as `activation`. The receiver has "
                "room for that only. Give `activation` as the stages make it."
            )
        value = value.contiguous()
        work = dist.isend(value, group=self.groups[to < self.device], group_dst=to)
        self._going.append((work, value))  # gloo tells only at the end that it was taken

    def receive(self, made: Result, source: int) -> Tensor:
        """A result that another device, or this one, has computed; waits until it is here."""
        if source == self.device:
            return self._here.pop(made)
        while made not in self._coming:
            nearer = self._expected[source].popleft()
            like = self.likes[nearer[1]]
            room = torch.empty(like.shape, dtype=like.dtype, device=self.lies_on)
            work = dist.irecv(room, group=self.groups[source > self.device], group_src=source)
            self._coming[nearer] = work, room
        work, room = self._coming.pop(made)
        work.wait()
        return room

    def close(self) -> None:
        """Wait until all that was sent has been taken."""
        for work, _ in self._going:
            work.wait()
        self._going = []
