"""Expert parallel: each rank holds some of the experts, and tokens travel to those they chose.

The layer is wrapped and does not know: `forward(x, indices, weights)` and the names of the
parameters stay. M tokens of this rank (each rank its own, as many as it has, none too), D hidden,
E experts, K experts per token, p ranks. What travels: `dispatch`; how: `route`.

Every rank of the group runs the layer equally often, forward and backward: an all-to-all waits for
all of them. In serving, a rank without a request runs with 0 tokens.
"""

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dsv3_tutorial.fp8_model import Fp8Experts
from dsv3_tutorial.moe.experts import Experts, _autocast
from dsv3_tutorial.parallel.dispatch import DISPATCHES, pairs_of
from dsv3_tutorial.parallel.exchange import AS_IS, BF16_COMBINE, FP8_DISPATCH
from dsv3_tutorial.parallel.mesh import TIMEOUT
from dsv3_tutorial.parallel.route import Route, flat, visit
from dsv3_tutorial.parallel.same_weights import check_same

GRADIENTS = ("sum", "mean")


class ParallelExperts(Experts):
    """A layer's experts, this rank's own in memory. forward as `run_experts`, x the rank's tokens.

    The parameters are DTensors, Shard(0) over the route's mesh, under their old names: checkpoints
    gather them, and FSDP2 can shard them again over another dimension of the same mesh.
    """

    def __init__(self, experts: Experts, route: Route):
        nn.Module.__init__(self)
        self.route, self.engine = route, experts.engine
        self.gate_up_proj = _share(experts.gate_up_proj, route.mesh)
        self.down_proj = _share(experts.down_proj, route.mesh)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        n_experts, route = self.gate_up_proj.shape[0], self.route
        if not isinstance(self, Fp8Experts):
            (x,) = _autocast(x)  # narrow before it travels, on a rank without rows too
        gate_up, down = self._own(self.gate_up_proj), self._own(self.down_proj)

        def compute(rows: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
            if not len(rows):  # still part of the graph: the others' backward waits for this rank's
                return rows + (weight.sum() + gate_up[:0].sum() + down[:0].sum()).to(rows.dtype)
            return self.run(rows, expert[:, None], weight[:, None], gate_up, down)

        if not route.deduplicated:
            return flat(x, indices, weights, n_experts, route, compute)
        return visit(x, pairs_of(indices, weights), n_experts, route, compute, route.groups)

    def _own(self, parameter: DTensor) -> Tensor:
        own, divisor = parameter.to_local(), self.route.divisor
        if divisor != 1 and own.requires_grad:
            own.register_hook(lambda grad: grad / divisor)
        return own


class ParallelFp8Experts(ParallelExperts, Fp8Experts):
    """The same around experts that compute in FP8."""

    def __init__(self, experts: Fp8Experts, route: Route):
        super().__init__(experts, route)
        self.scaling = experts.scaling


KINDS = {Experts: ParallelExperts, Fp8Experts: ParallelFp8Experts}


def expert_parallel(
    module: nn.Module,
    over: DeviceMesh | dist.ProcessGroup | None = None,
    dispatch: str = "flat",
    ranks_per_node: int | None = None,
    fp8: bool = False,
    gradients: str = "sum",
    check: bool = True,
) -> nn.Module:
    """Spread the experts of a model, or of one MoE layer, over ranks; in place, and returned.

    over: a mesh of one dimension, a group, or None for all ranks. dispatch: one of DISPATCHES;
    "two_stage" needs `ranks_per_node`, ranks of this group to a node, a node's in a row. fp8: rows
    travel to the experts in FP8 and back in BF16, and their gradients likewise.

    gradients: each rank's loss is that of its own tokens, and an expert gathers the gradients of
    all p losses. "sum" leaves that sum, so who averages the other gradients over n ranks divides
    the experts' by n too, though they need no sum over these p. "mean" divides by p here, where
    FSDP2 or DDP average the rest and nobody else looks after the experts.

    Every rank must hold the same whole weights: afterwards 1 / p of the experts' bytes. check:
    compare them first, and the rest of the module, which reads them once. What a pass sends:
    `dispatch.messages`. Put experts in FP8 (`to_fp8`) before this and FSDP on after it.
    Raises ValueError with all that does not fit, and WeightsDiffer, before anything is changed.
    """
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, Experts)
    ]
    _check(found, over, dispatch, ranks_per_node, gradients)
    mesh = _mesh(over, found[0][2].gate_up_proj.device.type)
    if check:
        check_same({"": module}, mesh.get_group())
    wires = (FP8_DISPATCH, BF16_COMBINE) if fp8 else (AS_IS, AS_IS)
    groups = (mesh.get_group(),)
    if dispatch == "two_stage":
        groups = _node_groups(dist.get_process_group_ranks(groups[0]), ranks_per_node)
    divisor = mesh.size() if gradients == "mean" else 1
    route = Route(mesh, groups, dispatch != "flat", *wires, divisor)
    for parent, name, child in found:
        setattr(parent, name, KINDS[type(child)](child, route))
    return module


def _share(whole: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    """This rank's experts of all, in memory of their own: (E, ...) -> DTensor with E / p here."""
    own = whole.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
    spread = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
    return nn.Parameter(spread, requires_grad=whole.requires_grad)


def _mesh(over: DeviceMesh | dist.ProcessGroup | None, kind: str) -> DeviceMesh:
    if isinstance(over, DeviceMesh):
        return over
    return DeviceMesh.from_group(over or dist.group.WORLD, kind)


def _node_groups(ranks: list[int], places: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The ranks of this one's place in every node, and those of its node. Only they are asked."""
    me = ranks.index(dist.get_rank())
    node, place = divmod(me, places)
    rail = ranks[place::places]
    inside = ranks[node * places : (node + 1) * places]
    made = {"timeout": TIMEOUT, "use_local_synchronization": True}
    return dist.new_group(rail, **made), dist.new_group(inside, **made)


def _check(
    found: list, over: object, dispatch: str, ranks_per_node: int | None, gradients: str
) -> None:
    """Raises ValueError with everything that keeps experts from being spread."""
    problems = [] if found else ["there are no experts in this module"]
    if any(type(child) not in KINDS for *_, child in found):
        problems.append("its experts are spread already, or of a kind that is not known here")
    elif any(isinstance(child.gate_up_proj, DTensor) for *_, child in found):
        problems.append("its experts are sharded already: FSDP comes after this")
    if dispatch not in DISPATCHES:
        problems.append(f"dispatch={dispatch!r} is none of {', '.join(DISPATCHES)}")
    if gradients not in GRADIENTS:
        problems.append(f"gradients={gradients!r} is none of {', '.join(GRADIENTS)}")
    if isinstance(over, DeviceMesh) and over.ndim != 1:
        problems.append(f"the mesh has {over.ndim} dimensions, and experts lie along one")
    else:
        size = over.size() if isinstance(over, DeviceMesh) else dist.get_world_size(over)
        counts = sorted({len(child.gate_up_proj) for *_, child in found})
        problems += [f"{size} ranks do not divide {n} experts" for n in counts if n % size]
        problems += ["this rank is not in the group"] if size < 1 else []
        if dispatch == "two_stage" and (not ranks_per_node or size % ranks_per_node):
            problems.append(f"ranks_per_node={ranks_per_node} does not divide {size} ranks")
    if problems:
        raise ValueError(
            f"Experts cannot be spread so: {'; '.join(problems)}. Tokens would wait for an expert "
            "that no rank has. Change what is named."
        )
