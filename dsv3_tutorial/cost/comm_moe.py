"""What an expert-parallel layer sends: copies of a token by tier, and the time they take.

Expected values for experts that are chosen evenly and ranks that send alike; a rank's own share
never travels. DeepSeek-V3 report, section 3.2.2: a token's copy crosses once to each node that
holds one of its experts, and is forwarded inside to the ranks that do.
"""

import math
from dataclasses import dataclass

from dsv3_tutorial.cost.comm import Network, Tier
from dsv3_tutorial.cost.precision import SCALE_BYTES, TILE
from dsv3_tutorial.cost.routing import expected_nodes

FP8 = 1 + SCALE_BYTES / TILE  # bytes an element in dispatch: E4M3 and its share of a scale
BF16 = 2  # bytes an element in combine
SCHEMES = ("flat", "deduplicated", "two_stage")


@dataclass(frozen=True)
class Layer:
    """A layer's routed experts and a token's width; node_limit: nodes a token may reach at most."""

    n_experts: int = 256
    top_k: int = 8
    hidden: int = 7168
    node_limit: int | None = None
    n_group: int | None = None  # given, the limit is of so many groups of experts, not of nodes


def nodes_reached(layer: Layer, nodes: int) -> float:
    """Nodes that hold at least one of a token's experts, on average; its own node counts.

    Under a limit the nodes with the best single experts are kept, and the experts are chosen anew
    within them: then the number is min(limit, nodes of the free choice), exactly. V3's gate keeps
    those with the best two (3.95 in a simulation). 8 of 256 on 8 nodes: 5.29, limited to 4: 3.98.
    """
    if layer.n_group and layer.node_limit:
        return parts_reached(layer, nodes)
    limit = nodes if layer.node_limit is None else layer.node_limit
    if limit >= nodes:
        return expected_nodes(layer.n_experts, layer.top_k, nodes)
    odds = [_odds_of_exactly(j, layer, nodes) for j in range(nodes + 1)]
    return sum(p * min(j, limit) for j, p in enumerate(odds))


def ranks_reached(layer: Layer, ranks: int, nodes: int) -> float:
    """Ranks that hold at least one of a token's experts, on average; its own rank counts.

    Under a limit: as if top_k were drawn evenly from the experts of `node_limit` whole nodes.
    """
    if layer.n_group and layer.node_limit:
        return parts_reached(layer, ranks)
    limit = min(nodes, layer.node_limit or nodes)
    return expected_nodes(layer.n_experts * limit // nodes, layer.top_k, ranks * limit // nodes)


def parts_reached(layer: Layer, parts: int) -> float:
    """Of `parts` equal shares of the experts, those that a token limited to some groups reaches.

    A share of whole groups is reached if a kept group is in it, and nearly every kept group has an
    expert. Shares smaller than a group: as if drawn evenly from the kept groups, 7 % too few for
    V3's on 16 nodes (5.32, simulated 5.73) and 3 % on 64 ranks.
    """
    groups, limit = layer.n_group, min(layer.n_group, layer.node_limit)
    if parts < groups:
        return expected_nodes(groups, limit, parts)
    if parts == groups:
        odds = [_odds_of_exactly(j, layer, groups) for j in range(groups + 1)]
        return sum(p * min(j, limit) for j, p in enumerate(odds))
    kept = layer.n_experts * limit // groups, parts * limit // groups
    return expected_nodes(kept[0], layer.top_k, kept[1])


def copies(
    layer: Layer, ranks: int, network: Network, scheme: str = "two_stage"
) -> dict[str, float]:
    """Copies of one token that travel on each tier, on average over tokens of all ranks.

    flat: one for each expert. deduplicated: one for each rank, whose partial sum comes back.
    two_stage: across one for each node, inside one for each rank, forwarded by the rank of the
    sender's own place. Raises ValueError for ranks that fill no whole nodes.
    """
    g = min(ranks, network.ranks_per_node)
    if ranks < 1 or ranks % g:
        raise ValueError(
            f"{ranks} ranks on nodes of {g}: the last node would hold fewer, and its ranks more "
            f"experts' traffic than counted here. Take a multiple of {g}."
        )
    nodes = ranks // g
    away, beside = 1 - 1 / nodes, (g - 1) / g  # shares outside the own node, off the own place
    if scheme == "two_stage":
        inside = ranks_reached(layer, ranks, nodes) * beside
        return {"inside": inside, "across": nodes_reached(layer, nodes) * away}
    if scheme not in SCHEMES:
        raise ValueError(f"no scheme {scheme!r}: copies cannot be counted. Take one of {SCHEMES}.")
    rows = layer.top_k if scheme == "flat" else ranks_reached(layer, ranks, nodes)
    return {"inside": rows / nodes * beside, "across": rows * away}


def sent_bytes(
    tokens: float,
    layer: Layer,
    ranks: int,
    network: Network,
    scheme: str = "two_stage",
    bytes_per_element: float = FP8,
) -> dict[str, float]:
    """Bytes that one rank sends by tier for its own `tokens`; combine sends them back in BF16."""
    number = copies(layer, ranks, network, scheme)
    return {tier: tokens * layer.hidden * bytes_per_element * n for tier, n in number.items()}


def exchange_time(
    tokens: float,
    layer: Layer,
    ranks: int,
    network: Network,
    scheme: str = "two_stage",
    bytes_per_element: float = FP8,
) -> float:
    """Seconds of one dispatch or combine: both tiers work at once, and the slower one decides.

    One latency, the larger of the tiers in use; two in two stages, as a token crosses both.
    """
    sent = sent_bytes(tokens, layer, ranks, network, scheme, bytes_per_element)
    tiers = [(tier, sent[name]) for name, tier in _tiers(network) if sent[name]]
    latency = sum if scheme == "two_stage" else max
    alpha = latency([tier.alpha for tier, _ in tiers]) if tiers else 0.0
    return alpha + max((n / tier.bandwidth for tier, n in tiers), default=0.0)


def dispatch_time(
    tokens: float, layer: Layer, ranks: int, network: Network, scheme: str = "two_stage"
) -> float:
    """Seconds to send every rank's `tokens` to their experts, in FP8 with scales."""
    return exchange_time(tokens, layer, ranks, network, scheme, FP8)


def combine_time(
    tokens: float, layer: Layer, ranks: int, network: Network, scheme: str = "two_stage"
) -> float:
    """Seconds to bring the experts' outputs back, in BF16."""
    return exchange_time(tokens, layer, ranks, network, scheme, BF16)


def experts_for_free(network: Network) -> float:
    """Ranks of a node that get a token inside while its one copy crosses: 4, at 160 and 40 GB/s.

    The report has 3.2, as it takes InfiniBand's full 50 GB/s; so 4 nodes could hold 13 of a
    token's experts at the cost of 8 (section 3.2.2).
    """
    return network.inside.bandwidth / network.across.bandwidth


def _odds_of_exactly(j: int, layer: Layer, nodes: int) -> float:
    """That top_k experts drawn evenly lie on exactly j nodes: inclusion and exclusion."""
    each = layer.n_experts // nodes
    ways = sum(
        (-1) ** (j - i) * math.comb(j, i) * math.comb(i * each, layer.top_k) for i in range(j + 1)
    )
    return math.comb(nodes, j) * ways / math.comb(layer.n_experts, layer.top_k)


def _tiers(network: Network) -> tuple[tuple[str, Tier], ...]:
    return (("inside", network.inside), ("across", network.across))
