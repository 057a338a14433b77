"""The model of `comm_moe` against what DeepEP, DeepSeek's own library, publishes of H800s.

Nothing is fitted: the rates are the ISCA paper's 160 and 40 GB/s, the latencies its table 5. Rows
are named deepep.FAMILY.WAY.RANKS. What the model leaves out (kernels, the SMs that copy, what is
lost between messages) shows as an error, and is largest where links hardly matter: inside a node.
"""

from dataclasses import dataclass, replace

from dsv3_tutorial import paper
from dsv3_tutorial.cost.checks import Check
from dsv3_tutorial.cost.comm import Network, network
from dsv3_tutorial.cost.comm_moe import (
    BF16,
    FP8,
    Layer,
    copies,
    exchange_time,
    nodes_reached,
    ranks_reached,
)


@dataclass(frozen=True)
class Family:
    """One published table: tokens a rank, how they are sent, and what its numbers count."""

    title: str
    tokens: int
    scheme: str
    pure_rdma: bool = False  # ranks of one node, too, meet over InfiniBand
    limit: int | None = None


FAMILIES = {
    "latency": Family("low latency, RDMA only (first README)", 128, "flat", pure_rdma=True),
    "latency_nvlink": Family("low latency, with NVLink (June 2025)", 128, "flat"),
    "rate": Family("training kernels (first README)", 4096, "two_stage", limit=4),
    "rate_april": Family("training kernels (April 2025)", 4096, "two_stage", limit=4),
    "figure_7": Family("training kernels, multi-plane (ISCA figure 7)", 4096, "two_stage", limit=4),
}
BYTES = {"dispatch": FP8, "combine": BF16}


def checks(on: Network | None = None) -> list[Check]:
    """Every published row beside our prediction; `on`: another network than the H800's."""
    on = on or network("h800")
    return [Check(row, predict(row.id, on), _parts(row.id)[0].title) for row in published()]


def published() -> list[paper.Row]:
    """The rows that can be predicted, in the order of the file."""
    return [row for row in paper.rows("deepep") if row.id.split(".")[1] in FAMILIES]


def predict(id: str, on: Network) -> float:
    """Our number for a row: microseconds for a latency, GB/s *as DeepEP counts them* for a rate."""
    family, way, ranks = _parts(id)
    on = replace(on, ranks_per_node=1) if family.pure_rdma else on
    layer = Layer(node_limit=family.limit)
    seconds = exchange_time(family.tokens, layer, ranks, on, family.scheme, BYTES[way])
    if family.scheme == "flat":
        return seconds * 1e6
    counted = counted_copies(layer, ranks, on) * layer.hidden * BYTES[way]
    return family.tokens * counted / seconds / 1e9


def counted_copies(layer: Layer, ranks: int, on: Network) -> float:
    """What DeepEP's test divides by the time: copies a token, those for its own node included.

    That is why rates above the line rate appear: on 2 nodes half of the counted copies never
    leave a node, on 4 a quarter. Within one node it counts ranks, the own one included.
    """
    nodes = ranks // on.ranks_per_node
    return nodes_reached(layer, nodes) if nodes > 1 else ranks_reached(layer, ranks, 1)


def on_the_wire(id: str, on: Network | None = None) -> dict[str, float]:
    """GB/s that a published rate means on each tier, once what never left is taken out.

    ISCA's 58.02 GB/s on 32 GPUs is 43.5 over InfiniBand, below the line rate of 50; on 16 GPUs
    NVLink carries 122 and InfiniBand only 21.5: there the inside is what limits.
    """
    on, (family, _, ranks) = on or network("h800"), _parts(id)
    layer = Layer(node_limit=family.limit)
    counted = counted_copies(layer, ranks, on)
    sent = copies(layer, ranks, on, family.scheme)
    return {tier: paper.row(id).value * n / counted for tier, n in sent.items()}


def with_measured_inside(on: Network | None = None) -> Network:
    """A network whose inside is as fast as DeepEP's run in one node was: 134, not 160 GB/s.

    What it says of other rows is a forecast: on 16 GPUs the error falls from 29 to 8 %.
    """
    on = on or network("h800")
    reached = on_the_wire("deepep.rate.dispatch.8", on)["inside"] * 1e9
    return replace(on, inside=replace(on.inside, bandwidth=reached, note="DeepEP's own, in a node"))


def _parts(id: str) -> tuple[Family, str, int]:
    _, family, way, ranks = id.split(".")
    return FAMILIES[family], way, int(ranks)
