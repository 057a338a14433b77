"""A pipeline at work: a Schedule's operations on real ranks, each in its device's order.

The objects are those that cost/schedule.py counts, so what is drawn is what runs. An overlapped
pair runs as its F, then its B: on one process there is nothing to overlap them with. Written to be
read, and for DualPipe, which PyTorch lacks; training uses torch.distributed.pipelining.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv3_tutorial.cost.schedule import Op, Schedule, Slot, Times
from dsv3_tutorial.cost.schedule_orders import BACKWARD, FORWARD, WEIGHT
from dsv3_tutorial.cost.schedule_timeline import Result, needs, result
from dsv3_tutorial.parallel.clock import Mark
from dsv3_tutorial.parallel.pipeline_backward import LaterGradients, backward
from dsv3_tutorial.parallel.pipeline_copies import CopiedStages, check_copies
from dsv3_tutorial.parallel.pipeline_messages import Post, directions
from dsv3_tutorial.parallel.traffic import Seen

Batches = Sequence[Tensor]  # one tensor for each micro-batch


@dataclass
class Step:
    """What a step gave. loss: the mean over the micro-batches, float64, the same on every rank.

    losses: by micro-batch, where the last stage is; slots: this device's, in seconds of its clock;
    kept: micro-batches whose activations it held at once, at most.
    """

    loss: Tensor | None = None
    losses: dict[int, Tensor] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)
    kept: int = 0


class Pipeline:
    """One device of a schedule: `modules` are the stages that its placement names, in that order.

    A module maps a tensor to a tensor, and loss_fn(output, target) gives a scalar. Rank d of the
    group is device d. Copies of a stage must start with equal weights, which `check` compares once,
    and get equal gradients. Raises ValueError for what does not fit, and for orders that would
    hang, before anything runs; WeightsDiffer where copies are none.
    """

    def __init__(
        self,
        schedule: Schedule,
        modules: Sequence[nn.Module],
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        group: dist.ProcessGroup | None = None,
        check: bool = True,
    ):
        self.schedule, self.loss_fn = schedule, loss_fn
        self.group = group or dist.group.WORLD
        self.device = dist.get_rank(self.group)
        _check(schedule, modules, self.device, dist.get_world_size(self.group))
        self.modules = dict(zip(schedule.placement[self.device], modules, strict=True))
        if check:
            check_copies(schedule, self.modules, self.group)
        weights = [weight for module in modules for weight in module.parameters()]
        self.lies_on = weights[0].device if weights else torch.device("cpu")
        self.directions = directions(self.group)

    def step(
        self,
        inputs: Batches | None,
        targets: Batches | None,
        activation: Tensor | Batches,
        seen: Seen | None = None,
        times: Times | None = None,
    ) -> Step:
        """Every micro-batch forwards and backwards; gradients of the mean loss add up in .grad.

        inputs, targets: by micro-batch; None where this device has no first or no last stage.
        activation: a tensor like those between stages (meta will do), or one per micro-batch. seen:
        `record`'s, to place marks for `virtual_timeline`; times: what operations take on its clock,
        told in seconds: record with rate=1 and matmuls=False. Every rank calls it.
        """
        run = _Run(self, inputs, targets, activation)
        copies = CopiedStages(self.schedule, self.modules, self.group)
        for place, op in enumerate(self.schedule.orders[self.device]):
            try:
                run.operation(place, op, seen, times)
            except Exception as error:
                error.add_note(f"In {op} of stage {op.stage}, on device {self.device}.")
                raise
        run.post.close()
        copies.sum_gradients()
        total = torch.zeros((), dtype=torch.float64, device=self.lies_on)
        run.step.loss = sum(run.step.losses.values(), total) / self.schedule.micro_batches
        dist.all_reduce(run.step.loss, group=self.group)
        return run.step


def _check(schedule: Schedule, modules: Sequence[nn.Module], device: int, ranks: int) -> None:
    held = schedule.placement[device] if ranks == schedule.devices else ()
    if len(modules) != len(held) or not held:
        raise ValueError(
            f"{ranks} ranks, {len(modules)} modules on rank {device}: {schedule.name!r} places its "
            f"stages on {schedule.devices} devices, on each as {schedule.placement} says. A stage "
            "is run where it is placed. Give as many ranks, and one module for each of its stages."
        )
    schedule.timeline(Times())  # raises where the orders wait for each other


class _Run:
    """One step on one device: what has arrived, what is kept for a backward, what is put off."""

    def __init__(
        self,
        pipeline: Pipeline,
        inputs: Batches | None,
        targets: Batches | None,
        activation: Tensor | Batches,
    ):
        self.of, self.schedule = pipeline, pipeline.schedule
        self.inputs = self._batches(inputs, 0, "inputs")
        self.targets = self._batches(targets, self.schedule.stages - 1, "targets")
        if isinstance(activation, Tensor):
            activation = [activation] * self.schedule.micro_batches
        self.post = Post(self.schedule, pipeline.directions, activation, pipeline.lies_on)
        self.step = Step()
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.put_off: dict[tuple[int, int], LaterGradients] = {}

    def _batches(self, given: Batches | None, stage: int, name: str) -> Batches | None:
        if stage in self.of.modules and (
            given is None or len(given) != self.schedule.micro_batches
        ):
            raise ValueError(
                f"{'no' if given is None else len(given)} {name} for the "
                f"{self.schedule.micro_batches} micro-batches that stage {stage} works on: the "
                "schedule names each of them. Give one tensor for each."
            )
        return given

    def operation(self, place: int, op: Op, seen: Seen | None, times: Times | None) -> None:
        """Wait for the inputs, compute, pass on. A pair waits for both, and passes both on."""
        arrived = {
            made: self._receive(made) for part in op.parts for made in self._from_others(part)
        }
        if seen:
            seen.mark(f"starts {place}")
        start, made = time.perf_counter(), []
        for part in op.parts:
            made.append((result(part), self._compute(part, arrived)))
            self.step.kept = max(self.step.kept, len(self.kept) + len(self.put_off))
        if seen and times:
            seen.compute(times.of(op))
        if seen:
            seen.mark(f"ends {place}")
        self.step.slots.append(Slot(self.of.device, start, time.perf_counter(), op))
        for key, value in made:
            self.post.send(key, value)

    def _from_others(self, part: Op) -> list[Result]:
        return [made for made in needs(part, self.schedule.stages) if made[2] != part.stage]

    def _receive(self, made: Result) -> Tensor:
        return self.post.receive(made, self.schedule.device_of(made[1], made[2]))

    def _compute(self, part: Op, arrived: dict[Result, Tensor]) -> Tensor | None:
        """What the operation makes for others: an output, an input's gradient, or nothing."""
        i, stage = part.micro_batch, part.stage
        if part.kind == FORWARD:
            x = (
                arrived[FORWARD, i, stage - 1].requires_grad_()
                if stage
                else self.inputs[i].detach()
            )
            return self._forward(i, stage, x)
        if part.kind == WEIGHT:
            return self.put_off.pop((i, stage)).finish()
        (x, root), gradient = self.kept.pop((i, stage)), arrived.get(("G", i, stage + 1))
        if part.kind == BACKWARD:
            return backward(root, gradient, x)
        later = self.put_off[i, stage] = LaterGradients(root, gradient, x)
        return later.input_gradient

    def _forward(self, i: int, stage: int, x: Tensor) -> Tensor:
        root = output = self.of.modules[stage](x)
        if stage == self.schedule.stages - 1:
            loss = self.of.loss_fn(output, self.targets[i])
            self.step.losses[i] = loss.detach()
            root = loss / self.schedule.micro_batches
        self.kept[i, stage] = x, root
        return output.detach()


def measured_timeline(step: Step, group: dist.ProcessGroup | None = None) -> list[Slot]:
    """Every device's slots as they ran, in seconds from the first: on one machine's clock.

    All ranks call it, outside of `record`. An operation's length is its own; the waiting is real.
    """
    everyones: list[list[Slot]] = [[]] * dist.get_world_size(group)
    dist.all_gather_object(everyones, step.slots, group=group)
    slots = [slot for slots in everyones for slot in slots]
    begin = min(slot.start for slot in slots)
    return [replace(slot, start=slot.start - begin, end=slot.end - begin) for slot in slots]


def virtual_timeline(schedule: Schedule, seen: Seen, ranks: Sequence[int] = ()) -> list[Slot]:
    """The slots of a recorded step on the virtual clock, as `Schedule.timeline` gives them.

    ranks: the global rank of each device, unless they are the first ones. Of several steps in the
    recorded block the last.
    """
    slots = []
    for device, rank in enumerate(ranks or range(schedule.devices)):
        marks = {s.event.name: s.end for s in seen.timelines[rank] if isinstance(s.event, Mark)}
        for place, op in enumerate(schedule.orders[device]):
            slots.append(Slot(device, marks[f"starts {place}"], marks[f"ends {place}"], op))
    return slots
