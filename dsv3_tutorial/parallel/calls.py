"""One communication between ranks: its time by `cost.comm`, and the bytes that each rank sends.

The kinds are torch.distributed's collectives, and messages. A ring sends to the next of its ranks,
a broadcast goes along a binomial tree, an all-to-all sends each rank its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3_tutorial.cost import comm
from dsv3_tutorial.cost.comm import Network


@dataclass(frozen=True)
class Call:
    """One communication. ranks: its group in order, global numbers; of a message (from, to).

    n: bytes, as cost.comm counts them: all_gather, reduce_scatter, all_reduce and broadcast the
    whole tensor, gather and scatter one rank's share, all_to_all what this rank sends to others.
    sent: all_to_all's bytes to each of `ranks`. root: of a broadcast, reduce, gather, scatter.
    dtype: of what is sent.
    """

    kind: str
    n: int
    ranks: tuple[int, ...]
    sent: tuple[int, ...] = ()
    root: int | None = None
    tag: int = 0
    dtype: str = ""

    @property
    def content(self) -> tuple[int, str]:
        """What the ranks of a communication must agree in; what all_to_all sends may differ."""
        return 0 if self.kind == "all_to_all" else self.n, self.dtype

    @property
    def said(self) -> str:
        """The size in words."""
        return f"{self.n} bytes" + f" of {self.dtype}" * bool(self.dtype)


def seconds(call: Call, of_all: Sequence[Call], network: Network) -> float:
    """What cost.comm asks for a communication; `of_all` are its ranks' own views, in group order.

    A message counts point_to_point, a barrier as an all_reduce of nothing, reduce as the broadcast
    that it reverses; gather and scatter as all-to-alls of which one rank has all.
    """
    kind, n, ranks = call.kind, call.n, call.ranks
    if kind in ("all_gather", "reduce_scatter", "all_reduce", "broadcast"):
        return getattr(comm, kind)(n, ranks, network)
    if kind == "barrier":
        return comm.all_reduce(0, ranks, network)
    if kind == "reduce":
        return comm.broadcast(n, ranks, network)
    if kind in ("gather", "scatter"):
        to_root = [[n * (r == call.root) for r in ranks] for _ in ranks]
        rows = to_root if kind == "gather" else list(zip(*to_root))
        return comm.all_to_all(rows, ranks, network)
    if kind == "all_to_all":
        return comm.all_to_all([each.sent for each in of_all], ranks, network)
    return comm.point_to_point(n, *ranks, network)


def sent_by(call: Call, rank: int) -> dict[int, float]:
    """The bytes that a rank sends to each other rank in a communication, as cost.comm counts it.

    A ring sends to the next of its ranks; a broadcast goes along a binomial tree from its root.
    """
    kind, n, ranks = call.kind, call.n, call.ranks
    here, p = ranks.index(rank), len(ranks)
    if kind in ("all_gather", "reduce_scatter", "all_reduce"):
        passes = (2 if kind == "all_reduce" else 1) * (p - 1)
        found = {ranks[(here + 1) % p]: passes * n / p}
    elif kind in ("broadcast", "reduce"):
        found = _along_the_tree(call, here)
    elif kind == "all_to_all":
        found = dict(zip(ranks, call.sent))
    elif kind == "send":
        found = {ranks[1]: n}
    elif kind in ("gather", "scatter"):
        sends = (rank == call.root) == (kind == "scatter")
        found = {r: n for r in ranks if sends and (kind == "scatter" or r == call.root)}
    else:  # a barrier has no bytes; a received message is its sender's
        found = {}
    return {r: int(b) if b == int(b) else b for r, b in found.items() if r != rank and b}


def _along_the_tree(call: Call, here: int) -> dict[int, float]:
    """Place v, counted from the root, reaches v + 2^k in step k; a reduce runs it backwards."""
    p, root = len(call.ranks), call.ranks.index(call.root)
    v, step, children = (here - root) % p, 1, []
    while step < p:
        if v < step and v + step < p:
            children.append(v + step)
        step *= 2
    if call.kind == "reduce":
        children = [v - 2 ** (v.bit_length() - 1)] if v else []
    return {call.ranks[(child + root) % p]: call.n for child in children}
