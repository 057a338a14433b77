"""The way of rows to the experts and back, on the ranks: sent as they are chosen, or once each.

M tokens of this rank, K experts per token, D hidden, E experts, p ranks, R rows that arrive here.
`dispatch` says what goes where, `exchange` sends it. Each step is a collective: all ranks of the
group take it, with 0 tokens too. A GPU is waited for once a hop, to learn how many rows come.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dsv3_tutorial.moe import experts
from dsv3_tutorial.parallel.dispatch import Pairs, pack, starts
from dsv3_tutorial.parallel.exchange import AS_IS, Wire, exchange, swap_counts, transfer

# rows (R, D), expert of each row (R,), weight of each row (R,) -> weight times expert, (R, D)
Compute = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Route:
    """How rows reach the experts: over which groups, deduplicated or not, in which form.

    One group, or two: the ranks of one place in all nodes, then the ranks of one node. `divisor`
    is what gradients of experts are divided by.
    """

    mesh: DeviceMesh
    groups: tuple[dist.ProcessGroup, ...]
    deduplicated: bool
    to_experts: Wire = AS_IS
    from_experts: Wire = AS_IS
    divisor: int = 1

    def __deepcopy__(self, memo: dict) -> "Route":
        return self  # a copy of a model is reached over the same groups


def flat(
    x: Tensor, indices: Tensor, weights: Tensor, n_experts: int, route: Route, compute: Compute
) -> Tensor:
    """A row for every pair: sorted by expert and so by rank, sent, computed, sent back, summed.

    x (M, D), indices and weights (M, K) -> (M, D). M K rows of D go out and come back.
    """
    (group,) = route.groups
    order, counts = experts.dispatch(indices, n_experts)
    announced = counts.view(dist.get_world_size(group), -1)  # (p, E / p)
    coming = swap_counts(announced, group)  # (p, E / p)
    sent, received = announced.sum(1).tolist(), coming.sum(1).tolist()
    rows = experts.permute(x, order, indices.shape[1])  # (M * K, D)
    rows = exchange(rows, sent, received, group, route.to_experts)  # (R, D)
    own = torch.arange(coming.shape[1], device=x.device).repeat(len(coming))
    expert = own.repeat_interleave(coming.flatten())  # (R,)
    out = compute(rows, expert, weights.new_ones(len(rows)))
    back = exchange(out, received, sent, group, route.from_experts)  # (M * K, D)
    return experts.combine(back, order, weights).clone()  # FSDP2 hooks what is returned: no view


def visit(
    x: Tensor,
    pairs: Pairs,
    n_experts: int,
    route: Route,
    compute: Compute,
    groups: tuple[dist.ProcessGroup, ...],
) -> Tensor:
    """Each row's weighted sum over its pairs, whose experts lie behind `groups`. (M, D) -> (M, D).

    A row goes once to each destination that any of its pairs needs; there the same is done over the
    groups that are left, and what comes back is a partial sum. With no group left, compute.
    """
    if not groups:
        out = compute(x.index_select(0, pairs.row), pairs.expert, pairs.weight)
        return _add_rows(out, pairs.row, len(x))
    group, *left = groups
    size = dist.get_world_size(group)
    behind = n_experts // size  # experts behind each destination
    parcel = pack(pairs.row, pairs.expert // behind, size, len(x))
    coming = swap_counts(parcel.counts, group)  # (p, 2)
    (sent, told), (received, heard) = parcel.counts.T.tolist(), coming.T.tolist()
    rows = exchange(x.index_select(0, parcel.row), sent, received, group, route.to_experts)
    named = torch.stack([parcel.place, pairs.expert[parcel.order] % behind], dim=1).int()
    place, expert = transfer(named, told, heard, group).long().unbind(1)
    weight = exchange(pairs.weight[parcel.order], told, heard, group)
    place = place + starts(coming[:, 0]).repeat_interleave(coming[:, 1])
    out = visit(rows, Pairs(place, expert, weight), behind, route, compute, tuple(left))
    back = exchange(out, received, sent, group, route.from_experts)
    return _add_rows(back, parcel.row, len(x))


def _add_rows(rows: Tensor, into: Tensor, n: int) -> Tensor:
    """Rows that belong together, summed in float32 at least. (R, D), into (R,) -> (n, D)."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = torch.zeros(n, rows.shape[1], dtype=wide, device=rows.device)
    return total.index_add(0, into, rows.to(wide)).to(rows.dtype)
