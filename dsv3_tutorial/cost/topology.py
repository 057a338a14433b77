"""How many GPUs a network of switches reaches, and what it takes: ISCA table 3, counted.

Links are those between switches; one more goes to each endpoint. Prices are nobody's list price:
two unknowns, fitted on two printed costs, judged on the others.
"""

from collections.abc import Callable
from dataclasses import dataclass

from dsv3_tutorial import paper


class TopologyError(ValueError):
    """A topology that cannot be wired."""


@dataclass(frozen=True)
class Topology:
    """A network: endpoints, switches and links between switches; ports that a switch needs."""

    name: str
    endpoints: int
    switches: int
    links: int
    ports: int
    note: str = ""

    def cost(self, per_switch: float, per_link: float) -> float:
        """What the switches and the links between them cost, in the unit of the two prices."""
        return self.switches * per_switch + self.links * per_link


@dataclass(frozen=True)
class Prices:
    """US dollars for a switch, with its share of all that is not counted, and for a link."""

    per_switch: float
    per_link: float


def ft2(k: int = 64) -> Topology:
    """A fat tree of two layers: leaves of k / 2 endpoints, each wired to each of k / 2 spines."""
    _even(k)
    return Topology(f"two-layer fat tree of {k} ports", k * k // 2, 3 * k // 2, k * k // 2, k)


def mpft(k: int = 64, planes: int = 8) -> Topology:
    """`planes` fat trees of two layers that do not meet: a GPU of each node's places has its own.

    Eight times the endpoints at the price and the latency of two layers; traffic from one plane to
    another first goes over NVLink to the neighbour there (ISCA section 5.1).
    """
    if planes < 1:
        raise TopologyError(f"{planes} planes: nothing is wired. Give 1 or more.")
    one = ft2(k)
    counts = (planes * n for n in (one.endpoints, one.switches, one.links))
    return Topology(f"{planes} planes, each a {one.name}", *counts, k)


def ft3(k: int = 64) -> Topology:
    """A fat tree of three layers: k pods of two layers of k / 2 switches, (k / 2)^2 cores."""
    _even(k)
    switches = 5 * k * k // 4
    return Topology(f"three-layer fat tree of {k} ports", k**3 // 4, switches, k**3 // 2, k)


def slim_fly(q: int) -> Topology:
    """2 q^2 switches at distance 2, after the graphs of McKay, Miller and Siran (q = 4 w + d).

    Each switch has (3 q - d) / 2 links, d of -1, 0 or 1, and half as many endpoints. The graphs
    exist for prime powers: q = 28 of the paper fills 64 ports, but nobody can wire it; 27 can be.
    """
    offset = {0: 0, 1: 1, 3: -1}.get(q % 4)
    if q < 3 or offset is None:
        raise TopologyError(
            f"q = {q}: Slim Fly needs q of 3 or more that leaves 0, 1 or 3 when divided by 4. "
            "Its links could not be counted. Take 27, 28 or 29 near 64 ports."
        )
    degree = (3 * q - offset) // 2
    each, switches = -(-degree // 2), 2 * q * q
    note = "" if _prime_power(q) else f"no such graph is known: {q} is no power of a prime"
    counts = (switches * each, switches, switches * degree // 2)
    return Topology(f"Slim Fly of q = {q}", *counts, degree + each, note)


def dragonfly(p: int, a: int, h: int, g: int) -> Topology:
    """g groups of a switches, all of a group wired to each other, each with p endpoints and h more.

    At most a h + 1 groups, each joined to every other. The paper's numbers are p, a, h, g = 16,
    32, 16, 511, two short of that.
    """
    if min(p, a, h, g) < 1 or g > a * h + 1 or a * h * g % 2:
        raise TopologyError(
            f"p, a, h, g = {p}, {a}, {h}, {g}: {a * h} links leave a group, which reach at most "
            f"{a * h + 1} groups, and links have two ends. Take fewer groups, or one more or less."
        )
    links = g * a * (a - 1) // 2 + a * h * g // 2
    return Topology(f"Dragonfly of {g} groups", p * a * g, a * g, links, p + a - 1 + h)


# The columns of ISCA table 3: fat trees of 64 ports; the parameters of the last two are inferred
# from the printed counts, which they give exactly.
PRINTED: dict[str, Callable[[], Topology]] = {
    "ft2": ft2,
    "mpft": mpft,
    "ft3": ft3,
    "slim_fly": lambda: slim_fly(28),
    "dragonfly": lambda: dragonfly(16, 32, 16, 511),
}


def fit_prices(one: Topology, cost: float, other: Topology, other_cost: float) -> Prices:
    """The two prices that give two networks their costs. Raises TopologyError for a pair alike."""
    scale = one.switches * other.links - other.switches * one.links
    if not scale:
        raise TopologyError(
            f"{one.name} and {other.name} have as many links a switch: one price remains unknown. "
            "Take networks of other shapes, such as ft2 and ft3."
        )
    return Prices(
        (cost * other.links - other_cost * one.links) / scale,
        (one.switches * other_cost - other.switches * cost) / scale,
    )


def paper_prices() -> Prices:
    """Prices fitted on the printed cost of an endpoint in FT2 and FT3: about 81,900 and 550 USD.

    By endpoint, as 4.39 and 7.5 thousand are printed more finely than 9 million is.
    """
    trees = [ft2(), ft3()]
    rows = [paper.row(f"topology.{name}.cost_per_endpoint") for name in ("ft2", "ft3")]
    costs = [row.value * 1e3 * tree.endpoints for row, tree in zip(rows, trees)]
    return fit_prices(trees[0], costs[0], trees[1], costs[1])


def per_endpoint(topology: Topology, prices: Prices) -> float:
    """US dollars of network for one endpoint."""
    return topology.cost(prices.per_switch, prices.per_link) / topology.endpoints


def _even(k: int) -> None:
    if k < 2 or k % 2:
        raise TopologyError(
            f"switches of {k} ports: a fat tree gives half of them up and half down. Take an even "
            "number of 2 or more."
        )


def _prime_power(q: int) -> bool:
    prime = next((d for d in range(2, q + 1) if q % d == 0), q)
    while q % prime == 0:
        q //= prime
    return q == 1
