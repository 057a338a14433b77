"""Two tiers of links, `inside` a node (NVLink) and `across` (InfiniBand): a latency and a rate.

A node is a scale-up domain. Bandwidths are bytes/s in one direction and per rank: of a chip the
rate that the papers say is reached, or, where nobody says, the peak, and then the tier's note
tells. Latencies are the ISCA paper's, of 64 bytes from one CPU's program to the other's.
"""

import math
from dataclasses import dataclass, replace

from dsv3_tutorial import hardware, paper
from dsv3_tutorial.hardware import Link

# What the latency across depends on; rows of data/paper/network.json.
FABRICS = ("infiniband", "infiniband_cross_leaf", "roce", "roce_cross_leaf")


class NetworkError(ValueError):
    """A network, a group of ranks or a message of which no time can be computed."""


@dataclass(frozen=True)
class Tier:
    """One kind of link. alpha: seconds a message; bandwidth: bytes/s, one direction, per rank."""

    name: str
    alpha: float
    bandwidth: float
    note: str = ""  # where the two are from

    def __post_init__(self) -> None:
        wrong = []
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            wrong.append(f"alpha is {self.alpha} s, and no message arrives before it is sent")
        if not self.bandwidth > 0:  # infinite is allowed: a link of latency only
            wrong.append(f"the bandwidth is {self.bandwidth} bytes/s, and nothing would arrive")
        if wrong:
            raise NetworkError(f"tier {self.name!r}: {'; '.join(wrong)}. Mend what is named.")

    def time(self, n: float) -> float:
        """Seconds of one message of n bytes: alpha + n / bandwidth."""
        return self.alpha + n / self.bandwidth


@dataclass(frozen=True)
class Network:
    """Nodes of `ranks_per_node` ranks, numbered through: rank 9 of nodes of 8 is the second's 1."""

    inside: Tier
    across: Tier
    ranks_per_node: int

    def __post_init__(self) -> None:
        if not whole(self.ranks_per_node, 1):
            raise NetworkError(
                f"a node of {self.ranks_per_node!r} ranks: which ranks share one cannot be said. "
                "Give a whole number of 1 or more."
            )

    def node(self, rank: int) -> int:
        """The node that holds a rank."""
        return checked_rank(rank) // self.ranks_per_node

    def tier(self, a: int, b: int) -> Tier:
        """The link between two ranks."""
        return self.inside if self.node(a) == self.node(b) else self.across

    def slower(self, inside: float = 1.0, across: float = 1.0) -> "Network":
        """The same network with its bandwidths divided; latencies stay."""
        if not (0 < inside < math.inf and 0 < across < math.inf):
            raise NetworkError(
                f"bandwidths divided by {inside} and {across}: no link remains. Give factors above "
                "0; below 1 makes a link faster."
            )
        return replace(
            self,
            inside=replace(self.inside, bandwidth=self.inside.bandwidth / inside),
            across=replace(self.across, bandwidth=self.across.bandwidth / across),
        )


def network(spec: str, fabric: str = "infiniband") -> Network:
    """The network of a chip in data/hardware.json: `network("h800")` is 160 and 40 GB/s.

    fabric: what is crossed between nodes, one of FABRICS; the default is InfiniBand under one leaf
    switch, 2.8 us, NVLink 3.33 us (ISCA table 5). Latencies are published for this one cluster
    and assumed of every other. Raises NetworkError for a chip without links of a known rate.
    """
    chip = hardware.chip(spec)
    if fabric not in FABRICS:
        raise NetworkError(f"no fabric {fabric!r}: its latency is unknown. Take one of {FABRICS}.")
    if not (chip.scale_up.bandwidth and chip.scale_out.bandwidth and chip.scale_up.domain):
        raise NetworkError(
            f"{chip.title} is no part of a network of known rates: its links are "
            f"{chip.scale_up.kind} and {chip.scale_out.kind}. Take h800, or build a Network."
        )
    inside, across = _tier("nvlink", chip.scale_up), _tier(fabric, chip.scale_out)
    return Network(inside, across, chip.scale_up.domain)


def _tier(latency: str, link: Link) -> Tier:
    alpha = paper.row(f"network.latency_{latency}").value * 1e-6
    if link.effective:
        return Tier(link.kind, alpha, link.effective, "the rate that is reached")
    return Tier(link.kind, alpha, link.bandwidth, "the peak: nobody publishes what is reached")


def whole(value: object, least: int) -> bool:
    """Whether a value is a whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def checked_rank(rank: int) -> int:
    """The rank, if there can be one of that number."""
    if not whole(rank, 0):
        raise NetworkError(f"rank {rank!r}: no node holds it. Ranks are whole numbers from 0 on.")
    return rank
