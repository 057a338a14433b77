"""Stages that two devices hold, as DualPipe's are: each copy sees half, and both get the sum."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv3_tutorial.cost.schedule import Schedule
from dsv3_tutorial.parallel.same_weights import check_same


def check_copies(
    schedule: Schedule, modules: dict[int, nn.Module], group: dist.ProcessGroup
) -> None:
    """Raise WeightsDiffer, on every device, where copies of a stage do not start out equal."""
    if any(len(schedule.holders(stage)) > 1 for stage in range(schedule.stages)):
        check_same({f"stage {stage}": module for stage, module in modules.items()}, group)


class CopiedStages:
    """Sums one step's gradients over the copies of each stage. Made before the step.

    What a .grad held before is set aside and added at the end: it is a sum over copies already.
    Cost: a stage's gradients sent once to each other holder, and twice their memory.
    """

    def __init__(self, schedule: Schedule, modules: dict[int, nn.Module], group: dist.ProcessGroup):
        self.group, self.device = group, dist.get_rank(group)
        self.stages = [
            (schedule.holders(stage), [w for w in module.parameters() if w.requires_grad])
            for stage, module in sorted(modules.items())
            if len(schedule.holders(stage)) > 1
        ]
        self.before = {w: w.grad for _, weights in self.stages for w in weights}
        for weight in self.before:
            weight.grad = None

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Exchange and add, in the order of the devices: every copy ends with the same bits."""
        for holders, weights in self.stages:
            if weights:
                self._sum(holders, weights)
        for weight, earlier in self.before.items():
            if earlier is not None:
                weight.grad = weight.grad + earlier

    def _sum(self, holders: tuple[int, ...], weights: list[Tensor]) -> None:
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        mine = torch.cat([gradient.flatten() for gradient in grads])  # (all weights of the stage,)
        parts = {device: torch.empty_like(mine) for device in holders if device != self.device}
        exchange = [
            dist.P2POp(way, tensor, group=self.group, group_peer=device)
            for device, room in parts.items()
            for way, tensor in ((dist.isend, mine), (dist.irecv, room))
        ]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        total = sum({**parts, self.device: mine}[device] for device in holders)
        sizes = [weight.numel() for weight in weights]
        for weight, gradient in zip(weights, total.split(sizes), strict=True):
            weight.grad = gradient.view_as(weight).clone()
