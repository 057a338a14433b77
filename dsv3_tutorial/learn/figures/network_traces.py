"""What real processes sent, played on a network that they never saw: virtual clocks, no new run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from dsv3_tutorial.cost.tiers import Network, NetworkError
from dsv3_tutorial.learn.figures.network_bars import (
    COLOURS,
    Took,
    bars,
    h800,
    legend,
    ms,
    size,
    speeds,
)
from dsv3_tutorial.learn.figures.style import figure, finish, note
from dsv3_tutorial.parallel.calls import Call, sent_by
from dsv3_tutorial.parallel.clock import Trace, retime

NEAR = 1.05  # so many times as long is about as long


def retimed_ways(
    traces_by_name: Mapping[str, Sequence[Trace]],
    slower_across: float = 1.0,
    slower_inside: float = 1.0,
    ranks_per_node: int = 4,
    larger: float = 1.0,
) -> list[Took]:
    """What real ranks did, on a network of nodes of `ranks_per_node` that they never saw.

    larger: every message as if so many times as long, which a virtual clock can do without memory:
    a toy's messages are all latency. Raises NetworkError for no traces or a world of other nodes.
    """
    if not traces_by_name or not all(traces_by_name.values()):
        raise NetworkError(
            "A run without traces: nothing can be timed. Run its ranks first, and keep seen.trace "
            "of every one."
        )
    network = replace(h800(slower_across, slower_inside), ranks_per_node=ranks_per_node)
    # A message's time is alpha + n / bandwidth: n times as long is bandwidth / n.
    played = network.slower(inside=larger, across=larger)
    free = network.slower(inside=1e-12, across=1e-12)  # bytes take no time
    found = []
    for name, traces in traces_by_name.items():
        if len(traces) % ranks_per_node:
            raise NetworkError(
                f"{len(traces)} ranks fill no whole nodes of {ranks_per_node}: the last would have "
                "links to itself. Take ranks_per_node that divides."
            )
        sent = [_sent(rank, trace, network) for rank, trace in enumerate(traces)]
        busiest = {tier: larger * max(one[tier] for one in sent) for tier in COLOURS}
        found.append(Took(name, busiest, max(retime(traces, played)), max(retime(traces, free))))
    return found


def retimed(
    traces_by_name: Mapping[str, Sequence[Trace]],
    slower_across: float = 1.0,
    slower_inside: float = 1.0,
    ranks_per_node: int = 4,
    larger: float = 1.0,
) -> Figure:
    """The virtual clocks of recorded runs, without running again: name -> each rank's trace."""
    asked = (traces_by_name, slower_across, slower_inside, ranks_per_node, larger)
    ways, ranks = retimed_ways(*asked), len(next(iter(traces_by_name.values())))
    network = h800(slower_across, slower_inside)
    fig, ax = figure(10, 1.6 + 0.65 * len(ways))
    bars(ax, ways, network)
    best, worst = (pick(ways, key=lambda way: way.seconds) for pick in (min, max))
    times = ms(best.seconds), ms(worst.seconds)
    title = f"{best.said.capitalize()} is done after {times[0]}, {worst.said} after {times[1]}"
    if len(ways) > 1 and worst.seconds < NEAR * best.seconds:
        title = f"All {len(ways)} take about as long, {times[0]} to {times[1]}"
    taken = f", messages taken {larger:,.0f} times as long" if larger != 1 else ""
    nodes = f"{ranks // ranks_per_node} nodes of {ranks_per_node}"
    where = f"{ranks} real ranks as {nodes}{taken}; {speeds(network)}"
    note(fig, f"{where}\na rank's exchanges follow each other: two stages do not overlap")
    legend(fig)
    label = "ms; bars and sizes: the busiest rank's bytes alone; the line: virtual clock"
    return finish(fig, ax, title, label, "", legend=False)


def retimed_in_words(
    traces_by_name: Mapping[str, Sequence[Trace]],
    slower_across: float = 1.0,
    slower_inside: float = 1.0,
    ranks_per_node: int = 4,
    larger: float = 1.0,
) -> str:
    """Each run's virtual clock, and what its busiest rank sends across."""
    ways = retimed_ways(traces_by_name, slower_across, slower_inside, ranks_per_node, larger)
    said = "; ".join(
        f"{way.said} {ms(way.seconds)}, {size(way.sent['across'])} across, "
        f"{way.latency / way.seconds:.0%} latency"
        for way in ways
    )
    where = speeds(h800(slower_across, slower_inside))
    return f"Virtual clocks, {where}; bytes are the busiest rank's: {said}."


def _sent(rank: int, trace: Trace, network: Network) -> dict[str, float]:
    """Bytes that one rank sends by tier in a trace."""
    total = dict.fromkeys(COLOURS, 0.0)
    for call in (event for event in trace if isinstance(event, Call)):
        for other, n in sent_by(call, rank).items():
            total["inside" if network.node(other) == network.node(rank) else "across"] += n
    return total
