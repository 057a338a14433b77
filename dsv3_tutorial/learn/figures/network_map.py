"""The same exchange on a slower network: what flat, deduplicated and two-stage ways then take.

Green is what moves inside nodes, orange what moves across. Both ask the cost model; what real
processes sent is played on another network by `network_traces`.
"""

from dataclasses import replace
from typing import NamedTuple

from matplotlib.figure import Figure

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import comm, comm_moe
from dsv3_tutorial.cost.tiers import Network
from dsv3_tutorial.learn.figures.network_bars import (
    COLOURS,
    Took,
    bars,
    h800,
    legend,
    ms,
    once,
    rows,
    speeds,
)
from dsv3_tutorial.learn.figures.style import COMMUNICATION, IDLE, INK, MEMORY, figure, finish, note

EXPERT_PARALLEL = 64  # GPUs that share a layer's experts: eight nodes of eight
WAYS = {
    "flat": ("flat", False),
    "deduplicated": ("deduplicated", False),
    "two stages": ("two_stage", False),
    "two stages,\nat most 4 nodes": ("two_stage", True),
}
RING, TREE, NODES = "flat ring", "tree", "inside nodes first"
ALGORITHMS = {RING: "ring", TREE: "tree", NODES: "hierarchical"}
RANKS = range(16)  # two nodes of eight


def all_to_all_ways(
    slower_across: float = 1.0, slower_inside: float = 1.0, tokens: int = 4096
) -> list[Took]:
    """One layer's dispatch and combine in DeepSeek-V3 for `tokens` of each of 64 GPUs."""
    network, cfg = h800(slower_across, slower_inside), ModelConfig.named("deepseek-v3")
    free = comm_moe.Layer(cfg.n_routed_experts, cfg.num_experts_per_tok, cfg.hidden_size)
    found = []
    for name, (scheme, limited) in WAYS.items():
        layer = replace(free, node_limit=cfg.topk_group) if limited else free
        asked = (tokens, layer, EXPERT_PARALLEL, network, scheme)
        sent = [comm_moe.sent_bytes(*asked, width) for width in (comm_moe.FP8, comm_moe.BF16)]
        total = {tier: sum(way[tier] for way in sent) for tier in COLOURS}
        found.append(
            Took(name, total, comm_moe.dispatch_time(*asked) + comm_moe.combine_time(*asked))
        )
    return found


def all_to_all_retimed(
    slower_across: float = 1.0, slower_inside: float = 1.0, tokens: int = 4096
) -> Figure:
    """Milliseconds of one layer's dispatch and combine, four ways; bars: each tier alone."""
    ways = all_to_all_ways(slower_across, slower_inside, tokens)
    network = h800(slower_across, slower_inside)
    fig, ax = figure(10, 4.0)
    bars(ax, ways, network)
    best, flat = min(ways, key=lambda way: way.seconds), ways[0]
    said = best.said.capitalize()
    title = f"{said}: {best.seconds * 1e3:.2f} ms a layer, flat {flat.seconds * 1e3:.2f}"
    where = f"derived: V3, EP {EXPERT_PARALLEL} on 8 nodes, {speeds(network)}"
    note(fig, f"{where}\nboth stages at once, token after token")
    legend(fig)
    label = "ms; bars and sizes: one GPU's bytes, each tier alone; the line: both, with latency"
    return finish(fig, ax, title, label, "", legend=False)


def all_to_all_retimed_in_words(
    slower_across: float = 1.0, slower_inside: float = 1.0, tokens: int = 4096
) -> str:
    """Each way's time, and what the node limit buys."""
    ways = all_to_all_ways(slower_across, slower_inside, tokens)
    said = ", ".join(f"{way.said} {way.seconds * 1e3:.2f} ms" for way in ways)
    gain = ways[0].seconds / ways[-1].seconds
    network, last = h800(slower_across, slower_inside), ways[-1].sent
    by_tier = {tier: last[tier] / getattr(network, tier).bandwidth for tier in COLOURS}
    slowest = max(by_tier, key=by_tier.__getitem__)
    return (
        f"{tokens:,} tokens a GPU, {speeds(network)}: {said}. The last is {gain:.2f} times as "
        f"fast as flat, and its bytes {slowest} decide."
    )


class Parts(NamedTuple):
    """One all-reduce, in seconds: latency on either wire, and what its bytes take on each."""

    name: str
    latency: float
    inside: float
    across: float

    @property
    def total(self) -> float:
        return self.latency + self.inside + self.across


SHOWN = {
    "latency": (IDLE, "latency of the steps"),
    "inside": (COMMUNICATION, "bytes inside nodes"),
    "across": (MEMORY, "bytes across"),
}


def all_reduce_parts(
    slower_across: float = 1.0, slower_inside: float = 1.0, mb: float = 64.0
) -> list[Parts]:
    """An all-reduce of `mb` MB among 16 GPUs on two nodes, three ways; parts add to comm's time."""
    network, n = h800(slower_across, slower_inside), mb * 1e6
    return [
        _by_node(n, network) if name == NODES else _flat(name, n, network) for name in ALGORITHMS
    ]


def _flat(name: str, n: float, network: Network) -> Parts:
    """Ring or tree: in every step all wait for its slowest link."""
    total = comm.all_reduce(n, RANKS, network, ALGORITHMS[name])
    size = n / len(RANKS) if name == RING else n
    near, far = network.inside, network.across
    slowest = near if near.time(size) > far.time(size) else far
    moving = total * (size / slowest.bandwidth) / slowest.time(size)
    sent = (moving, 0.0) if slowest is near else (0.0, moving)
    return Parts(name, total - moving, *sent)


def _by_node(n: float, network: Network) -> Parts:
    """Inside nodes first: what an exchange of nothing takes is latency."""
    g = network.ranks_per_node

    def took(n: float) -> tuple[float, float]:
        inside = 2 * comm.reduce_scatter(n, RANKS[:g], network)
        return inside, comm.all_reduce(n, RANKS, network, ALGORITHMS[NODES]) - inside

    waits, times = took(0.0), took(n)
    return Parts(NODES, sum(waits), *(time - wait for time, wait in zip(times, waits)))


def all_reduce_retimed(
    slower_across: float = 1.0, slower_inside: float = 1.0, mb: float = 64.0
) -> Figure:
    """Milliseconds of one all-reduce, three ways: its latencies, and its bytes by tier."""
    parts = all_reduce_parts(slower_across, slower_inside, mb)
    fig, ax = figure(10, 3.2)
    for place, one in enumerate(parts):
        left = 0.0
        for part, (colour, label) in SHOWN.items():
            width = getattr(one, part) * 1e3
            ax.barh(place, width, 0.6, left, color=colour, label=once(label, place))
            left += width
        ax.text(left, place, f" {ms(one.total)}", va="center", fontsize=10, color=INK)
    rows(ax, [one.name for one in parts])
    ax.set_xlim(0, max(one.total for one in parts) * 1e3 * 1.15 or 1)
    network, total = h800(slower_across, slower_inside), _totals(parts)
    gain = total[RING] / total[NODES]
    note(fig, f"derived: {mb:g} MB, 16 GPUs on 2 nodes of 8, {speeds(network)}")
    title = f"{NODES.capitalize()}: {ms(total[NODES])}, {gain:.2f} times as fast as a ring"
    legend(fig)
    return finish(fig, ax, title, "ms of one all-reduce", "", legend=False)


def all_reduce_retimed_in_words(
    slower_across: float = 1.0, slower_inside: float = 1.0, mb: float = 64.0
) -> str:
    """Which way is fastest, and how much of it is latency."""
    parts = all_reduce_parts(slower_across, slower_inside, mb)
    best = min(parts, key=lambda one: one.total)
    said = ", ".join(f"{name} {ms(seconds)}" for name, seconds in _totals(parts).items())
    network = h800(slower_across, slower_inside)
    return (
        f"{mb:g} MB, {speeds(network)}: {said}. Fastest is {best.name}: "
        f"{best.latency / best.total:.0%} of it is latency, the rest bytes."
    )


def _totals(parts: list[Parts]) -> dict[str, float]:
    return {one.name: one.total for one in parts}
