"""The virtual clock: when each rank would reach each step, on a network that need not exist.

A rank's trace is what it did, in order: computing, communicating, waiting. Played on a network, the
traces of all ranks give every rank's time, in seconds from 0, by `cost.comm` and `cost.cards` and
nothing else; the same traces can be played on a slower network without running again.

A collective starts when the last of its ranks reaches it and the one before it is over, and ends
for all at once. A message needs its sender's card and then its receiver's, as `cost.cards` says:
alone it takes `comm.point_to_point`, and several over one card come one after the other. A sender
that waits goes on when its card is free again, a receiver when all has arrived, whenever it asked.
A rank's clock stands still for what it started, and moves on where it waits for it: what is
computed in between is hidden. What nobody waited for is waited for at the end.

Not modelled: contention of ranks for links inside the network, and congestion; a collective and a
message beside it, which do not slow each other, nor do collectives of groups that share no rank;
room at the receiver, as a message travels also if nobody has asked for it yet; and the time that a
processor or a copy takes to start one.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dsv3_tutorial.cost.cards import Cards
from dsv3_tutorial.cost.comm import Network
from dsv3_tutorial.parallel.calls import Call, seconds


class TraceError(ValueError):
    """Traces that cannot be those of one run, or a communication whose time is not modelled."""


@dataclass(frozen=True)
class Compute:
    """Arithmetic: so many FLOP."""

    flops: float


@dataclass(frozen=True)
class Wait:
    """The rank goes on only when its communication number `call` is over."""

    call: int


@dataclass(frozen=True)
class Mark:
    """A moment with a name, to read the clock at."""

    name: str


Event = Call | Compute | Wait | Mark
Trace = Sequence[Event]


@dataclass(frozen=True)
class Span:
    """An event with its start and end in seconds; a Call's end is when it is over."""

    event: Event
    start: float
    end: float


def retime(traces: Sequence[Trace], network: Network, rate: float | None = None) -> list[float]:
    """Each rank's clock at its end, had the same run been on this network: seconds, by rank.

    traces: of all ranks of the world, in rank order. rate: FLOP/s; None: computing takes no time.
    """
    return [spans[-1].end if spans else 0.0 for spans in timeline(traces, network, rate)]


def timeline(
    traces: Sequence[Trace], network: Network, rate: float | None = None
) -> list[list[Span]]:
    """Every event of every rank with its times. The last span of a rank, a Mark, is its end.

    Raises TraceError where ranks would wait for each other for ever, as a trace is missing or cut,
    and where two ranks give one communication other bytes or another dtype.
    """
    if rate is not None and not rate > 0:
        raise TraceError(f"{rate} FLOP/s: nothing would be computed. Give a rate above 0, or None.")
    players = [_Player(rank, trace) for rank, trace in enumerate(traces)]
    meetings = _Meetings(players, network)
    while any(player.play(meetings, rate) for player in players) or meetings.deliver():
        pass
    stuck = [player.waits_for() for player in players if player.position < len(player.events)]
    if stuck:
        raise TraceError(
            f"The traces do not end: {'; '.join(stuck)}. They are not those of one run of "
            f"{len(traces)} ranks. Give the whole traces of all its ranks, in rank order."
        )
    return [player.spans() for player in players]


class _Player:
    """One rank's trace on its way: the clock, and when each communication was over."""

    def __init__(self, rank: int, events: Trace):
        self.rank = rank
        calls = sum(isinstance(event, Call) for event in events)
        self.events = (*events, *(Wait(i) for i in range(calls)), Mark("end"))
        self.position, self.clock, self.link = 0, 0.0, 0.0
        self.times: list[tuple[Event, float, float]] = []
        self.calls: list[Call] = []
        self.over: dict[int, float] = {}

    def play(self, meetings: "_Meetings", rate: float | None) -> bool:
        """As far as this rank comes alone; whether it moved."""
        before = self.position
        while self.position < len(self.events):
            event, start = self.events[self.position], self.clock
            if isinstance(event, Wait):
                if event.call not in self.over:
                    break
                self.clock = max(self.clock, self.over[event.call])
            elif isinstance(event, Compute):
                self.clock += event.flops / rate if rate else 0.0
            elif isinstance(event, Call):
                self.calls.append(event)
                meetings.enter(self, len(self.calls) - 1)
            self.times.append((event, start, self.clock))
            self.position += 1
        return self.position > before

    def waits_for(self) -> str:
        call = self.calls[self.events[self.position].call]
        return f"rank {self.rank} waits in {call.kind} among {list(call.ranks)}"

    def spans(self) -> list[Span]:
        """The events, calls with their ends; the waits added at the end are not listed."""
        over = iter(range(len(self.calls)))
        found = []
        for event, start, end in self.times:
            end = self.over[next(over)] if isinstance(event, Call) else end
            found.append(Span(event, start, end))
        return [*found[: len(found) - 1 - len(self.calls)], found[-1]]


class _Meetings:
    """Where ranks find their partners: the k-th communication of a group meets the others' k-th."""

    def __init__(self, players: list[_Player], network: Network):
        self.players, self.network, self.cards = players, network, Cards(network)
        self.entered: Counter[tuple] = Counter()
        self.open: dict[tuple, dict[int, tuple[int, float]]] = {}
        self.arrived: dict[tuple, float] = {}

    def enter(self, player: _Player, index: int) -> None:
        """One rank reaches its communication `index`; the last of a collective sets all ends."""
        call = player.calls[index]
        self._check(player.rank, call)
        message = call.kind in ("send", "recv")
        group = call.ranks, message, call.tag
        self.entered[group, player.rank] += 1
        key = *group, self.entered[group, player.rank]
        met = self.open.setdefault(key, {})
        met[player.rank] = index, player.clock
        if call.kind == "send":
            player.over[index] = self.cards.post(call.n, *call.ranks, player.clock, key)
        if len(met) == len(set(call.ranks)):
            views = [self.players[rank].calls[met[rank][0]] for rank in call.ranks]
            _check_views(views)
            if message:
                self._hand_over(key)
            else:
                self._settle(views, self.open.pop(key))

    def deliver(self) -> bool:
        """Let the message arrive that left first; False if none is under way."""
        found = self.cards.deliver()
        if found:
            self.arrived[found[0]] = found[1]
            self._hand_over(found[0])
        return found is not None

    def _hand_over(self, key: tuple) -> None:
        """Tell the receiver when its message is there, once it has both asked and arrived."""
        receiver = key[0][1]
        if key in self.arrived and receiver in self.open[key]:
            index, _ = self.open.pop(key)[receiver]
            self.players[receiver].over[index] = self.arrived.pop(key)

    def _check(self, rank: int, call: Call) -> None:
        if call.kind == "recv_any":
            raise TraceError(
                "A message was received from anyone: its sender is not in the trace, so no time "
                "can be given. Receive from a named rank."
            )
        if any(r >= len(self.players) for r in call.ranks):
            raise TraceError(
                f"rank {rank} met ranks {list(call.ranks)}, and {len(self.players)} traces "
                "are here. Give those of the whole world, in rank order."
            )

    def _settle(self, views: list[Call], met: dict[int, tuple[int, float]]) -> None:
        members = [self.players[rank] for rank in views[0].ranks]
        reached = max(max(at for _, at in met.values()), max(m.link for m in members))
        end = reached + seconds(views[0], views, self.network)
        for member in members:
            member.link = member.over[met[member.rank][0]] = end


def _check_views(views: list[Call]) -> None:
    """Raise TraceError unless the ranks of a communication mean the same one, of the same size."""
    first, ranks = views[0], views[0].ranks
    kinds = [view.kind for view in views]
    if kinds != ["send", "recv"] and len(set(kinds)) > 1:
        raise TraceError(
            f"ranks {list(ranks)} met in {kinds}: each is in another collective. Give the traces "
            "of one run."
        )
    for rank, view in zip(ranks, views):
        if view.content != first.content:
            raise TraceError(
                f"One {'message' if kinds[0] == 'send' else first.kind}, and rank {ranks[0]} has "
                f"{first.said} for it, rank {rank} {view.said}: bytes would be missing, or read as "
                "other numbers. Give both a tensor of the same dtype and number of elements."
            )
