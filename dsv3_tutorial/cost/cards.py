"""Messages that share a network card: one after the other, at its bandwidth.

A rank has one card per tier and direction. A message leaves when its sender has posted it and that
sender's card is free, keeps the card for n / bandwidth, and reaches the other card alpha later,
which it keeps as long. What finds that one busy waits in the network; first is what left first,
then what the lower rank sent. So alone a message takes `comm.point_to_point`, ten over one card
take ten times their bytes, and no rank sends or receives faster than its cards.

Between the cards nothing is shared: no congestion in switches, no limit to what waits there, no
packets of two messages in turn. A card that waits for nobody is the whole model.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from heapq import heappop, heappush

from dsv3_tutorial.cost.comm import point_to_point
from dsv3_tutorial.cost.tiers import Network


@dataclass(frozen=True)
class Message:
    """n bytes on a network's cards: what `Schedule.timeline` takes as its `send`."""

    n: float
    network: Network


class Cards:
    """The cards of all ranks, and the messages under way between them.

    Post what can be posted, then deliver one, and so on: whoever still waits can send only later
    than the one delivered, so the order at a receiver is by departure, exactly.
    """

    def __init__(self, network: Network):
        self.network = network
        self._free: dict[tuple[str, int, bool], float] = {}  # direction, rank, inside: from when
        self._under_way: list[tuple[float, int, int, int, float, Hashable]] = []
        self._posted = 0

    def post(self, n: float, a: int, b: int, at: float, name: Hashable) -> float:
        """Send n bytes from rank a to b at a moment of a's: when a's card is free again."""
        card, busy = self._card("out", a, a, b), self._busy(n, a, b)
        leaves = max(at, self._free.get(card, 0.0))
        self._free[card] = leaves + busy
        self._posted += 1
        heappush(self._under_way, (leaves, a, self._posted, b, n, name))
        return leaves + busy

    def deliver(self) -> tuple[Hashable, float] | None:
        """The name of the message that left first, and when all of it is there; None if none is."""
        if not self._under_way:
            return None
        left, a, _, b, n, name = heappop(self._under_way)
        card, busy = self._card("in", b, a, b), self._busy(n, a, b)
        alone = left + point_to_point(n, a, b, self.network)
        there = self._free[card] = max(alone, self._free.get(card, 0.0) + busy)
        return name, there

    def _card(self, direction: str, rank: int, a: int, b: int) -> tuple[str, int, bool]:
        return direction, rank, self.network.node(a) == self.network.node(b)

    def _busy(self, n: float, a: int, b: int) -> float:
        return n / self.network.tier(a, b).bandwidth if a != b else 0.0
