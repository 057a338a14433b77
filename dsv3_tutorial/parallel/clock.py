"""The virtual clock: when each rank would reach each step, on a network that need not exist.

A rank's trace is what it did, in order: computing, communicating, waiting. Played on a network, the
traces of all ranks give every rank's time, in seconds from 0, by `cost.comm` and nothing else; the
same traces can be played on a slower network without running again.

A collective starts when the last of its ranks reaches it and the one before it is over, and ends
for all at once. A message is under way from its sending on; the sender goes on at once. A rank's
clock stands still for what it started, and moves on where it waits for it: what is computed in
between is hidden. What nobody waited for is waited for at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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

    Raises TraceError where ranks would wait for each other for ever: a trace is missing, or cut.
    """
    if rate is not None and not rate > 0:
        raise TraceError(f"{rate} FLOP/s: nothing would be computed. Give a rate above 0, or None.")
    players = [_Player(rank, trace) for rank, trace in enumerate(traces)]
    meetings = _Meetings(players, network)
    while any(player.play(meetings, rate) for player in players):
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
        self.players, self.network = players, network
        self.entered: dict[tuple, int] = {}
        self.open: dict[tuple, dict[int, tuple[int, float]]] = {}

    def enter(self, player: _Player, index: int) -> None:
        """One rank reaches its communication `index`; the last to do so sets all ends."""
        call = player.calls[index]
        message = call.kind in ("send", "recv")
        if call.kind == "recv_any":
            raise TraceError(
                "A message was received from anyone: its sender is not in the trace, so no time "
                "can be given. Receive from a named rank."
            )
        if any(r >= len(self.players) for r in call.ranks):
            raise TraceError(
                f"rank {player.rank} met ranks {list(call.ranks)}, and {len(self.players)} traces "
                "are here. Give those of the whole world, in rank order."
            )
        key = (call.ranks, message, call.tag)
        turn = self.entered[(*key, player.rank)] = self.entered.get((*key, player.rank), -1) + 1
        met = self.open.setdefault((*key, turn), {})
        met[player.rank] = index, player.clock
        if call.kind == "send":
            player.over[index] = player.clock
        if len(met) == len(set(call.ranks)):
            self._settle(call, self.open.pop((*key, turn)), message)

    def _settle(self, call: Call, met: dict[int, tuple[int, float]], message: bool) -> None:
        views = [self.players[rank].calls[met[rank][0]] for rank in call.ranks]
        if not message and len({view.kind for view in views}) > 1:
            raise TraceError(
                f"ranks {list(call.ranks)} met in {[view.kind for view in views]}: each is in "
                "another collective. Give the traces of one run."
            )
        if message:
            (sender, receiver), time = call.ranks, seconds(views[0], views, self.network)
            self.players[receiver].over[met[receiver][0]] = met[sender][1] + time
            return
        members = [self.players[rank] for rank in call.ranks]
        reached = max(max(at for _, at in met.values()), max(m.link for m in members))
        end = reached + seconds(call, views, self.network)
        for member in members:
            member.link = member.over[met[member.rank][0]] = end
