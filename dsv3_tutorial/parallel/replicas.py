"""What ranks that hold copies of the same weights owe each other in a step: gradients and updates.

Most parameters have a copy in every data parallel replica. An expert that is split over ep has one
in each of the dp / ep ranks of "outer" only: dispatch has already brought it the tokens of all the
others. ZeRO: arXiv 1910.02054; DeepSeek-V3 trained with its first stage (the report, section 3.2).
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from dsv3_tutorial.parallel.data import Ranks

BUCKET = 1 << 25  # bytes sent in one message: few messages, and little memory beside the gradients


class Replicas:
    """The parameters of a rank's part of a model, by who else holds them.

    zero 0: gradients are averaged, and every replica makes the same update. zero 1: each parameter
    has one owner, to whom its gradients are sent, who alone keeps moments of it, and who sends the
    new weights back: the same bytes as an all-reduce, moments / dp. With FSDP2 (zero 3) there is
    nothing left to do here but the norm. One process alone owes nobody anything.

    All is sent after the backward pass: simple, but not hidden behind it as FSDP2's messages are.
    torch's ZeroRedundancyOptimizer knows one group of ranks for all, and no distributed tensors.
    """

    def __init__(self, model: nn.Module, ranks: Ranks):
        self.ranks, self.count = ranks, ranks.replica[1]
        copy = getattr(model, "copy", None)  # of another stage's weight, which is updated there
        self.parameters = [p for p in model.parameters() if p is not copy]
        self.shared: dict[str, list[nn.Parameter]] = {"dp": [], "outer": []}
        for p in self.parameters if ranks.grid is not None else ():
            if "dp" not in _mesh_axes(p):  # FSDP2 has reduced those
                self.shared["outer" if "ep" in _mesh_axes(p) else "dp"].append(p)
        self.owners: dict[nn.Parameter, int] | None = None
        if ranks.grid is not None and ranks.grid.layout.zero == 1:
            self.owners = {}
            for axis, held in self.shared.items():
                self.owners |= zip(held, owners(held, ranks.grid.size(axis)))

    def owned(self) -> list[nn.Parameter]:
        """The parameters that this rank's optimizer updates."""
        return [p for p in self.parameters if self._is_mine(p)]

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Make each gradient the mean over the replicas, where it is used; it goes elsewhere."""
        for p in self.parameters if self.ranks.size > 1 else ():
            p.grad = settled(p.grad, p)
        if self.count == 1:
            return
        for axis, held in self._messages(lambda p: p.grad is not None):
            group = self.ranks.grid.group(axis)
            grads = [_own(p.grad) for p in held]
            flat = torch.cat([g.flatten() for g in grads])
            if group is not None and self.owners is not None:
                dist.reduce(flat, group=group, group_dst=self.owners[held[0]])
            elif group is not None:
                dist.all_reduce(flat, group=group)
            _spread(flat.div_(self.count), grads)
            for p in held:
                p.grad = p.grad if self._is_mine(p) else None

    @torch.no_grad()
    def share_weights(self) -> None:
        """After an update: every owner's new weights, to all that hold a copy. zero 1 only."""
        for axis, held in self._messages(lambda p: True) if self.owners is not None else ():
            group = self.ranks.grid.group(axis)
            if group is not None:
                weights = [_own(p) for p in held]
                flat = torch.cat([w.flatten() for w in weights])
                dist.broadcast(flat, group=group, group_src=self.owners[held[0]])
                _spread(flat, weights)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """The length of the whole model's gradient, each of its numbers counted once. Scalar."""
        if self.ranks.size == 1:
            return get_total_norm(_gradients(self.parameters), foreach=True)
        total = torch.zeros((), dtype=torch.float64, device=self.ranks.device)
        for axes, held in sorted(self._by_split().items()):
            square = get_total_norm(_gradients(held), foreach=True).to(total) ** 2
            for axis in axes:
                square = self.ranks.sum(square, axis)
            total += square
        return self.ranks.sum(total, "pp").sqrt()

    @torch.no_grad()
    def clip_gradients(self, longest: float, norm: Tensor) -> None:
        """Scale all gradients, so that the `norm` that they have becomes at most `longest`."""
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for grad in _gradients(self.parameters):
            kinds.setdefault(grad.dtype, []).append(grad)
        factor = (longest / (norm + 1e-6)).clamp(max=1)  # as torch's clip_grads_with_norm_ has it
        for dtype, grads in kinds.items():
            torch._foreach_mul_(grads, factor.to(dtype))

    def _is_mine(self, p: nn.Parameter) -> bool:
        if self.owners is None or p not in self.owners:
            return True
        return self.owners[p] == self.ranks.grid.index(self._axis(p))

    def _axis(self, p: nn.Parameter) -> str:
        return "outer" if "ep" in _mesh_axes(p) else "dp"

    def _messages(self, wanted: Callable) -> Iterator[tuple[str, list[nn.Parameter]]]:
        """The shared parameters in buckets of one dtype, and of one owner where there are any."""
        for axis, shared in self.shared.items():
            kinds: dict[tuple, list[nn.Parameter]] = {}
            for p in filter(wanted, shared):
                owner = self.owners[p] if self.owners is not None else 0
                kinds.setdefault((owner, p.dtype), []).append(p)
            for held in kinds.values():
                yield from ((axis, bucket) for bucket in buckets(held))

    def _by_split(self) -> dict[tuple[str, ...], list[nn.Parameter]]:
        """The parameters by the axes over which the parts of their gradients lie."""
        found: dict[tuple[str, ...], list[nn.Parameter]] = {}
        for p in self.parameters:
            axes = _split_axes(p)
            if self.owners is not None and p in self.owners:
                axes = (*axes, self._axis(p))
            found.setdefault(axes, []).append(p)
        return found


def owners(parameters: list[nn.Parameter], ranks: int) -> list[int]:
    """A rank for each parameter, so that all keep about as many numbers: the largest go first."""
    loads, chosen = [0] * ranks, [0] * len(parameters)
    for i in sorted(range(len(parameters)), key=lambda i: -parameters[i].numel()):
        chosen[i] = loads.index(min(loads))
        loads[chosen[i]] += parameters[i].numel()
    return chosen


def buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in order, in lists of at most BUCKET bytes, or of one that is larger."""
    held, size = [], 0
    for p in parameters:
        own = _own(p).nbytes
        if held and size + own > BUCKET:
            yield held
            held, size = [], 0
        held.append(p)
        size += own
    if held:
        yield held


def settled(grad: Tensor | None, parameter: nn.Parameter) -> Tensor | None:
    """A gradient laid out as its parameter is: sums that are still spread over tp are made."""
    placements = getattr(grad, "placements", None)
    if placements is None or placements == parameter.placements:
        return grad
    return grad.redistribute(placements=parameter.placements)


def _own(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, without a copy."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [_own(p.grad) for p in parameters if p.grad is not None]


def _spread(flat: Tensor, into: list[Tensor]) -> None:
    parts = flat.split([t.numel() for t in into])
    for target, part in zip(into, parts):
        target.copy_(part.view_as(target))


def _mesh_axes(p: Tensor) -> tuple[str, ...]:
    """The names of the axes that a distributed tensor is laid out over."""
    return p.device_mesh.mesh_dim_names or () if hasattr(p, "device_mesh") else ()


def _split_axes(p: Tensor) -> tuple[str, ...]:
    if not hasattr(p, "placements"):
        return ()
    return tuple(axis for axis, kind in zip(_mesh_axes(p), p.placements) if not kind.is_replicate())
