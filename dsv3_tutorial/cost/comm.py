"""How long ranks wait for one another: a latency a message, and its bytes over a bandwidth.

Times are seconds, sizes bytes, bandwidths bytes/s in one direction and per rank. A node is a
scale-up domain: ranks of one node meet over the tier `inside` (NVLink), others over `across`
(InfiniBand). Every link is free when asked for: no contention, no congestion, no start-up of
kernels. A bound with latencies, and the very clock of the virtual cluster in `parallel`, where
messages besides wait for a card that is busy: `cost.cards`.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from dsv3_tutorial.cost.tiers import Network, NetworkError, Tier, checked_rank
from dsv3_tutorial.cost.tiers import network as network

Matrix = Sequence[Sequence[float]]
ALGORITHMS = ("ring", "tree", "hierarchical")


def point_to_point(n: float, a: int, b: int, network: Network) -> float:
    """One message of n bytes from rank a to rank b; a rank needs no time to reach itself."""
    _check_size(n)
    link = network.tier(a, b)  # refuses what is no rank
    return 0.0 if a == b else link.time(n)


def ring_step(n: float, ranks: Sequence[int], network: Network) -> float:
    """All ranks pass n bytes to the next in the ring at once: the slowest pair sets the time."""
    _check(n, ranks)
    if len(ranks) < 2:
        return 0.0
    return max(network.tier(a, b).time(n) for a, b in pairwise([*ranks, ranks[0]]))


def all_gather(n: float, ranks: Sequence[int], network: Network) -> float:
    """Every rank ends with all n bytes, having begun with 1 / p: p - 1 ring steps of n / p.

    n is the WHOLE tensor's size, here and in reduce_scatter.
    """
    _check(n, ranks)
    return (len(ranks) - 1) * ring_step(n / len(ranks), ranks, network)


def reduce_scatter(n: float, ranks: Sequence[int], network: Network) -> float:
    """Every rank ends with 1 / p of the sum of p tensors of n bytes: as all_gather."""
    return all_gather(n, ranks, network)


def all_reduce(n: float, ranks: Sequence[int], network: Network, algorithm: str = "ring") -> float:
    """Every rank ends with the sum of p tensors of n bytes.

    ring: reduce_scatter and all_gather, 2 (p - 1) steps of n / p, near the least bytes a rank can
    send. tree: up and down, 2 ceil(log2 p) steps of all n bytes on the slowest tier among the
    ranks: few latencies. hierarchical: reduce_scatter in each node, a ring across for each of the
    g places in a node, all at once and of n / g bytes, all_gather in each node.
    """
    _check(n, ranks)
    if algorithm == "ring":
        return 2 * all_gather(n, ranks, network)
    if algorithm == "tree":
        return 2 * broadcast(n, ranks, network)
    if algorithm == "hierarchical":
        return _hierarchical(n, ranks, network)
    raise NetworkError(
        f"no algorithm {algorithm!r}: its steps are not known. Take one of {ALGORITHMS}."
    )


def broadcast(n: float, ranks: Sequence[int], network: Network) -> float:
    """n bytes of one rank reach all: ceil(log2 p) steps of a tree, on the slowest tier there is."""
    _check(n, ranks)
    return math.ceil(math.log2(len(ranks))) * max(t.time(n) for t in _tiers(ranks, network))


def all_to_all(sent: Matrix, ranks: Sequence[int], network: Network) -> float:
    """Every rank sends every other its own bytes: sent[i][j] from ranks[i] to ranks[j].

    The largest latency of the tiers with traffic, once, and then the busiest rank: over ranks,
    tiers and directions the most bytes / bandwidth, as the tiers and both directions work at
    once. A rank's own share is free, and without traffic there is no time.
    """
    _check_matrix(sent, ranks)
    out, into = _loads(sent, ranks, network), _loads(list(zip(*sent)), ranks, network)
    tiers = (("inside", network.inside), ("across", network.across))
    busiest = [(tier, max(load[name] for load in (*out, *into))) for name, tier in tiers]
    used = [(tier, n) for tier, n in busiest if n]
    slowest = max((tier.alpha for tier, _ in used), default=0.0)
    return slowest + max((n / tier.bandwidth for tier, n in used), default=0.0)


def all_to_all_uniform(n_per_pair: float, ranks: Sequence[int], network: Network) -> float:
    """all_to_all with the same n bytes between every two ranks."""
    return all_to_all([[n_per_pair] * len(ranks) for _ in ranks], ranks, network)


def two_stage(sent: Matrix, ranks: Sequence[int], network: Network) -> tuple[Matrix, Matrix]:
    """The hierarchical all-to-all's two matrices: first across, then forwarded inside.

    A rank sends each other node one message, to the rank of its own place in that node, and this
    one forwards inside; what stays in its own node travels in the second stage too. Fewer and
    longer messages across, and more bytes inside: DeepSeek-V3 report, section 3.2.2. Raises
    NetworkError where nodes hold unequal numbers of the ranks.
    """
    _check_matrix(sent, ranks)
    nodes = _nodes(ranks, network)
    across, inside = ([[0.0] * len(ranks) for _ in ranks] for _ in range(2))
    for mine in nodes:
        for place, i in enumerate(mine):
            for theirs in nodes:
                relay = theirs[place]
                for j in theirs:
                    inside[relay][j] += sent[i][j]
                    across[i][relay] += sent[i][j] if mine is not theirs else 0.0
    return across, inside


def all_to_all_two_stage(sent: Matrix, ranks: Sequence[int], network: Network) -> float:
    """The hierarchical all-to-all: the seconds of its two stages, one after the other.

    It sends no byte less across than a flat one. What it is good for: fewer messages, and copies
    that are the same for several ranks of a node need to cross only once (`comm_moe`).
    """
    return sum(all_to_all(stage, ranks, network) for stage in two_stage(sent, ranks, network))


def tier_bytes(sent: Matrix, ranks: Sequence[int], network: Network) -> dict[str, float]:
    """The bytes of an all-to-all by tier, of all ranks together; a rank's own share is none."""
    _check_matrix(sent, ranks)
    loads = _loads(sent, ranks, network)
    return {tier: sum(load[tier] for load in loads) for tier in ("inside", "across")}


def _hierarchical(n: float, ranks: Sequence[int], network: Network) -> float:
    nodes = [[ranks[i] for i in node] for node in _nodes(ranks, network)]
    g = len(nodes[0])
    within = max(reduce_scatter(n, node, network) for node in nodes)
    rails = max(all_reduce(n / g, rail, network) for rail in zip(*nodes))
    return within + rails + max(all_gather(n, node, network) for node in nodes)


def _nodes(ranks: Sequence[int], network: Network) -> list[list[int]]:
    """Positions in `ranks` by node, nodes in the order of their first rank; all of one size."""
    nodes: dict[int, list[int]] = {}
    for position, rank in enumerate(ranks):
        nodes.setdefault(network.node(rank), []).append(position)
    sizes = {node: len(positions) for node, positions in nodes.items()}
    if len(set(sizes.values())) > 1:
        raise NetworkError(
            f"ranks by node: {sizes}. A hierarchical exchange pairs the places of the nodes, and "
            "some would have no partner. Take equally many ranks of each node, or a flat one."
        )
    return list(nodes.values())


def _tiers(ranks: Sequence[int], network: Network) -> set[Tier]:
    """The tiers that a group spans: `across` as soon as it has two nodes."""
    nodes = {network.node(rank) for rank in ranks}
    across = {network.across} if len(nodes) > 1 else set()
    return across | ({network.inside} if len(nodes) < len(ranks) or not across else set())


def _loads(sent: Matrix, ranks: Sequence[int], network: Network) -> list[dict[str, float]]:
    """Bytes that each rank sends on each tier."""
    nodes = [network.node(rank) for rank in ranks]
    loads = []
    for i, row in enumerate(sent):
        inside = sum(n for j, n in enumerate(row) if j != i and nodes[j] == nodes[i])
        across = sum(n for j, n in enumerate(row) if nodes[j] != nodes[i])
        loads.append({"inside": inside, "across": across})
    return loads


def _check(n: float, ranks: Sequence[int]) -> None:
    _check_size(n)
    _check_group(ranks)


def _check_size(n: float) -> None:
    if not (math.isfinite(n) and n >= 0):
        raise NetworkError(f"{n} bytes: no time can be given to that. Sizes are 0 or more.")


def _check_group(ranks: Sequence[int]) -> None:
    if not ranks or len(set(ranks)) != len(ranks):
        raise NetworkError(
            f"the group {list(ranks)} is empty or names a rank twice: a ring would not close. "
            "Name each rank once."
        )
    for rank in ranks:
        checked_rank(rank)


def _check_matrix(sent: Matrix, ranks: Sequence[int]) -> None:
    _check_group(ranks)
    p = len(ranks)
    if len(sent) != p or any(len(row) != p for row in sent):
        raise NetworkError(
            f"{p} ranks and a matrix with rows of {[len(row) for row in sent]}: who sends what is "
            f"not said. Give {p} rows of {p} sizes in bytes."
        )
    for n in {n for row in sent for n in row}:
        _check_size(n)
