"""Exchanges between real ranks, flat and by node, each beside the cost model's time for it.

What runs here runs in a rank (parallel.launch); `predicted` runs anywhere. `bytes` is what one rank
holds before: the message, the tensor to be summed, its shares for all, or the tokens of which every
other rank gets a copy.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3_tutorial.bench.attention_steps import BenchError
from dsv3_tutorial.cost import comm
from dsv3_tutorial.cost.tiers import Network

FLAT, BY_NODE = "flat", "hierarchical"
OPS = ("p2p", "all_reduce", "all_to_all", "dispatch")
# torch 2.13 renames them, and warns of the old names
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_SAMPLE = 2e-3  # seconds that a sample lasts at least, of as many exchanges as that takes


@dataclass(frozen=True)
class Case:
    """An exchange: op of OPS; form "flat" or "hierarchical", of p2p "inside" or "across"."""

    op: str
    form: str
    bytes: int


@dataclass(frozen=True)
class Place:
    """A rank's place: its number, the ranks, the ranks of a node, and its three groups."""

    rank: int
    world: int
    per_node: int
    everyone: dist.ProcessGroup
    node: dist.ProcessGroup
    rail: dist.ProcessGroup  # the ranks of the same place in every node


def place(per_node: int) -> Place:
    """This rank's place among nodes of `per_node` ranks. Every rank calls it, in the same order."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ranks = range(world)
    everyone = dist.new_group(ranks)
    nodes = [dist.new_group(ranks[i : i + per_node]) for i in range(0, world, per_node)]
    rails = [dist.new_group(ranks[i::per_node]) for i in range(per_node)]
    return Place(rank, world, per_node, everyone, nodes[rank // per_node], rails[rank % per_node])


def exchange(case: Case, here: Place) -> Callable[[], Tensor | None]:
    """One exchange of this case, ready to run on this rank; gives what the rank then holds."""
    if case.op == "p2p":
        return _ping_pong(case, here)
    made = torch.arange(case.bytes // 4, dtype=torch.int32).add(here.rank)
    flat = case.form == FLAT
    if case.op == "all_reduce":
        return lambda: (_ring_sum if flat else _sum_by_node)(made.clone(), here)
    shares = made.view(torch.uint8)
    if case.op == "dispatch":
        return lambda: (_copies if flat else _copies_by_node)(shares, here)
    return lambda: _all_to_all(shares, here.everyone) if flat else _shares_by_node(shares, here)


def sampled(
    cases: Sequence[Case], here: Place, rounds: int, seconds: float
) -> dict[Case, list[float]]:
    """This rank's seconds of each case, one sample of each in turn, for `rounds` or `seconds`.

    An exchange lasts until its last rank is done: take the largest of the ranks' values. Ranks
    agree on every number of repeats, or they would wait for each other for ever.
    """
    runs = {case: exchange(case, here) for case in cases}
    counts = {case: _count(run, rounds > 1) for case, run in runs.items()}
    found: dict[Case, list[float]] = {case: [] for case in cases}
    deadline = time.perf_counter() + seconds
    for _ in range(rounds):
        for case, run in runs.items():
            found[case].append(_seconds(run, counts[case]))
        if not _agreed(time.perf_counter() < deadline):
            break
    return found


def check(cases: Iterable[Case], here: Place) -> None:
    """Raise BenchError unless the forms of one operation leave every rank with the same bytes."""
    held: dict[tuple[str, int], Tensor] = {}
    for case in (case for case in cases if case.op != "p2p"):
        out = exchange(case, here)()
        if not torch.equal(held.setdefault((case.op, case.bytes), out), out):
            raise BenchError(
                f"{case.op} of {case.bytes} bytes, {case.form}, gives other numbers than its first "
                "form. Its time says nothing. Mend bench/exchanges.py."
            )


def predicted(case: Case, network: Network, world: int) -> float:
    """The seconds that the cost model gives an exchange between ranks 0 to world - 1."""
    ranks, n = range(world), case.bytes
    if case.op == "p2p":
        return comm.point_to_point(n, 0, _peer(case, network.ranks_per_node), network)
    if case.op == "all_reduce":
        algorithm = "ring" if case.form == FLAT else "hierarchical"
        return comm.all_reduce(n, ranks, network, algorithm)
    share = n / world if case.op == "all_to_all" else n
    if case.form == FLAT:
        return comm.all_to_all_uniform(share, ranks, network)
    if case.op == "all_to_all":
        return comm.all_to_all_two_stage([[share] * world for _ in ranks], ranks, network)
    g = network.ranks_per_node
    across = [[n * (j % g == i % g and j != i) for j in ranks] for i in ranks]
    inside = [[n * world // g * (j // g == i // g) for j in ranks] for i in ranks]
    return sum(comm.all_to_all(stage, ranks, network) for stage in (across, inside))


def _peer(case: Case, per_node: int) -> int:
    return 1 if case.form == "inside" else per_node


def _ping_pong(case: Case, here: Place) -> Callable[[], None]:
    """There and back between rank 0 and its peer; nothing on other ranks."""
    ball, peer = torch.zeros(case.bytes, dtype=torch.uint8), _peer(case, here.per_node)

    def there_and_back() -> None:
        if here.rank == 0:
            dist.send(ball, peer, group=here.everyone)
            dist.recv(ball, peer, group=here.everyone)
        elif here.rank == peer:
            dist.recv(ball, 0, group=here.everyone)
            dist.send(ball, 0, group=here.everyone)

    return there_and_back


def _ring_sum(x: Tensor, here: Place) -> Tensor:
    dist.all_reduce(x, group=here.everyone)
    return x


def _sum_by_node(x: Tensor, here: Place) -> Tensor:
    """Sum inside the node, each place a part of it across, and gather inside."""
    part = x.new_empty(len(x) // here.per_node)
    _reduce_scatter(part, x, group=here.node)
    dist.all_reduce(part, group=here.rail)
    _all_gather(x, part, group=here.node)
    return x


def _all_to_all(shares: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Share i of the first dimension, cut evenly, goes to the group's rank i.

    Of single messages: gloo's own all-to-all of two ranks took twice as long on a throttled cable.
    """
    got, size, me = torch.empty_like(shares), dist.get_world_size(group), dist.get_rank(group)
    give, take = shares.chunk(size), got.chunk(size)
    take[me].copy_(give[me])
    work = []
    for step in range(1, size):
        left, right = (me - step) % size, (me + step) % size
        work.append(dist.irecv(take[left], group=group, group_src=left))
        work.append(dist.isend(give[right], group=group, group_dst=right))
    for message in work:
        message.wait()
    return got


def _shares_by_node(shares: Tensor, here: Place) -> Tensor:
    """One message to each node along the rail, then on inside: what a flat all-to-all gives."""
    nodes, g = here.world // here.per_node, here.per_node
    arrived = _all_to_all(shares, here.rail).view(nodes, g, -1)  # from each node, for each place
    sorted_out = arrived.transpose(0, 1).contiguous()  # (places, nodes, bytes)
    got = _all_to_all(sorted_out.flatten(), here.node).view(g, nodes, -1)
    return got.transpose(0, 1).flatten()  # in the order of the ranks they are from


def _copies(tokens: Tensor, here: Place) -> Tensor:
    """Every rank gets a copy of every rank's tokens, each sent by its owner."""
    return _all_to_all(tokens.repeat(here.world), here.everyone)


def _copies_by_node(tokens: Tensor, here: Place) -> Tensor:
    """The same with one copy to each node, forwarded inside."""
    nodes, g = here.world // here.per_node, here.per_node
    arrived = _all_to_all(tokens.repeat(nodes), here.rail)
    got = _all_to_all(arrived.repeat(g), here.node).view(g, nodes, -1)
    return got.transpose(0, 1).flatten()


def _count(run: Callable, long: bool) -> int:
    """How many exchanges a sample holds, after one that warms up; the same on every rank."""
    run()
    once = _seconds(run, 1)
    return _agreed(min(200, int(_SAMPLE / once) + 1) if long else 1)


def _seconds(run: Callable, count: int) -> float:
    """Seconds of one of `count` exchanges on this rank, all ranks having begun together."""
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - begin) / count


def _agreed(number: int) -> int:
    """Rank 0's number, on every rank."""
    value = torch.tensor([int(number)])
    dist.broadcast(value, 0)
    return int(value)
