"""All-reduce from nothing but messages to a neighbour, and those messages between real ranks.

p ranks hold n numbers each. A ring sends 2 (p - 1) / p n of them from every rank, which no
all-reduce can beat in bytes without a switch that adds up (NVLink SHARP); it takes 2 (p - 1) steps,
so that for small n its latency decides.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

HEADER = 96  # bytes
Exchange = Callable[[Tensor], Tensor]
# Their names from torch 2.13 on, which warns of the older ones.
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def ring_all_reduce(x: Tensor, rank: int, world: int, exchange: Exchange) -> Tensor:
    """The sum of every rank's x on every rank, from messages to the next rank alone.

    x (n,), n divisible by world -> (n,), new. exchange(chunk) sends to rank + 1 and returns what
    rank - 1 sent. First each chunk travels round and is added up, then each sum travels round:
    2 (world - 1) messages of n / world. Source: Patarasuk and Yuan 2009.
    """
    chunks = list(x.chunk(world))
    for step in range(world - 1):
        held, next_one = (rank - step) % world, (rank - step - 1) % world
        chunks[next_one] = chunks[next_one] + exchange(chunks[held])
    for step in range(world - 1):
        held, next_one = (rank + 1 - step) % world, (rank - step) % world
        chunks[next_one] = exchange(chunks[held])
    return torch.cat(chunks)


def hierarchical_all_reduce(
    x: Tensor, reduce_scatter: Exchange, all_reduce: Exchange, all_gather: Exchange
) -> Tensor:
    """The sum over all ranks, with 1 / g of the bytes between nodes of g ranks.

    x (n,) -> (n,). reduce_scatter and all_gather work inside the node, (n,) -> (n / g,) and back;
    all_reduce sums over the ranks with the same place in their nodes. The g ranks of a node reduce
    g different parts across at once, each over its own network card.
    """
    return all_gather(all_reduce(reduce_scatter(x)))


def neighbour_exchange(group: dist.ProcessGroup | None = None) -> Exchange:
    """exchange(chunk) between real ranks: sent to the next of the group, from the one before.

    Both are posted at once: ranks that all sent first and received after could wait for ever. What
    arrives has the shape and dtype of what is sent, which a header of HEADER bytes in front makes
    sure of; `traffic.record` does not count it. A group of one gets its own chunk back.
    Raises ValueError where the rank before sends another shape or dtype.
    """
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    after, before = (_global(group, (rank + step) % world) for step in (1, -1))

    def passed_on(sent: Tensor) -> Tensor:
        arrived = torch.empty_like(sent)
        both = [
            dist.P2POp(dist.isend, sent, after, group),
            dist.P2POp(dist.irecv, arrived, before, group),
        ]
        for request in dist.batch_isend_irecv(both):
            request.wait()
        return arrived

    def exchange(chunk: Tensor) -> Tensor:
        sent = chunk.contiguous()
        if world == 1:
            return sent.clone()
        with _disable_current_modes():  # no recorder sees the header
            told = passed_on(_header(sent))
        _check(_kind(sent), bytes(told.tolist()).rstrip(b"\0").decode(), before)
        return passed_on(sent)

    return exchange


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"[:HEADER]


def _header(tensor: Tensor) -> Tensor:
    """A tensor's dtype and shape as (HEADER,) uint8, where the tensor lies."""
    code = _kind(tensor).encode().ljust(HEADER, b"\0")
    return torch.tensor(list(code), dtype=torch.uint8, device=tensor.device)


def _check(mine: str, theirs: str, before: int) -> None:
    if mine != theirs:
        raise ValueError(
            f"Rank {before} sends {theirs}, and this rank {mine}. What arrives is read as what is "
            "sent: it would be other numbers. Give chunks of one shape and dtype on every rank."
        )


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum of every rank's x, as a new tensor, by torch.distributed's own all-reduce."""
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def _global(group: dist.ProcessGroup | None, rank: int) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)


def node_collectives(ranks_per_node: int) -> tuple[Exchange, Exchange, Exchange]:
    """reduce_scatter and all_gather in this rank's node, all_reduce over its place in all nodes.

    As `hierarchical_all_reduce` takes them, for a world of whole nodes. Every rank calls this.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    nodes = [list(range(i, i + ranks_per_node)) for i in range(0, world, ranks_per_node)]
    rails = [list(range(i, world, ranks_per_node)) for i in range(ranks_per_node)]
    inside = [dist.new_group(ranks) for ranks in nodes][rank // ranks_per_node]
    rail = [dist.new_group(ranks) for ranks in rails][rank % ranks_per_node]

    def reduce_scatter(t: Tensor) -> Tensor:
        part = t.new_empty(len(t) // ranks_per_node)
        _REDUCE_SCATTER(part, t.contiguous(), group=inside)
        return part

    def all_gather(t: Tensor) -> Tensor:
        whole = t.new_empty(len(t) * ranks_per_node)
        _ALL_GATHER(whole, t.contiguous(), group=inside)
        return whole

    return reduce_scatter, lambda t: sum_over_ranks(t, rail), all_gather


def pass_round(x: Tensor, rank: int, world: int, exchange: Exchange) -> Tensor:
    """The same sum in half the steps, for world / 2 times the bytes: all of x goes all the way.

    Shapes as `ring_all_reduce`, any n. For vectors so small that only latency counts.
    """
    total = x
    for _ in range(world - 1):
        x = exchange(x)
        total = total + x
    return total
