"""What the papers print about networks, beside what our own code makes of it."""

from collections.abc import Collection

from dsv3_tutorial import paper
from dsv3_tutorial.cost import deepep, limits, step_time, tiers, topology
from dsv3_tutorial.cost.topology import Topology

LINKS = {
    "nvlink": "NVLink",
    "infiniband": "InfiniBand, one switch",
    "infiniband_cross_leaf": "InfiniBand, three switches",
    "roce": "RoCE, one switch",
    "roce_cross_leaf": "RoCE, three switches",
}
TOPOLOGIES = {
    "ft2": "two-layer fat tree",
    "mpft": "multi-plane, 8 of them",
    "ft3": "three-layer fat tree",
    "slim_fly": "Slim Fly",
    "dragonfly": "Dragonfly",
}


def lower_latency() -> str:
    """Which of NVLink and InfiniBand delivers 64 bytes sooner, in ISCA's table 5."""
    times = {"NVLink": _latency("nvlink"), "InfiniBand": _latency("infiniband")}
    return min(times, key=times.__getitem__)


def _latency(link: str) -> float:
    return paper.row(f"network.latency_{link}").value


def latencies() -> None:
    """Print ISCA's table 5, and the message at which latency and bytes cost the same."""
    network = tiers.network("h800")
    rate = {"nvlink": network.inside.bandwidth}
    print("quoted: ISCA table 5, 64 bytes, microseconds; derived: bytes = latency x bandwidth")
    print(f"{'':28}{'latency':>8}{'GB/s reached':>14}{'as long as its latency':>24}")
    for link, title in LINKS.items():
        beta = rate.get(link, network.across.bandwidth)
        size = _latency(link) * 1e-6 * beta
        print(f"{title:28}{_latency(link):>8.2f}{beta / 1e9:>14.0f}{size / 1e3:>21,.0f} KB")


def printed_topologies() -> dict[str, Topology]:
    """ISCA table 3's five networks, built by our code of 64-port switches."""
    return {
        "ft2": topology.ft2(),
        "mpft": topology.mpft(),
        "ft3": topology.ft3(),
        "slim_fly": topology.slim_fly(28),
        "dragonfly": topology.dragonfly(16, 32, 16, 511),
    }


def topologies(names: Collection[str] = TOPOLOGIES) -> None:
    """Print ISCA's table 3 as counted, and its costs beside a fit to two of its rows."""
    made, prices = printed_topologies(), topology.paper_prices()
    print(f"{'ISCA table 3':24}{'endpoints':>10}{'switches':>10}{'links':>10}", end="")
    print(f"{'M$ printed':>11}{'M$ by fit':>11}{'k$ an endpoint':>16}")
    agree = True
    for name in names:
        one = made[name]
        counted = {"endpoints": one.endpoints, "switches": one.switches, "links": one.links}
        agree = agree and all(_printed(name, part) == n for part, n in counted.items())
        cost = one.cost(prices.per_switch, prices.per_link)
        line = "".join(f"{n:>10,}" for n in counted.values())
        print(
            f"{TOPOLOGIES[name]:24}{line}{_printed(name, 'cost'):>11,.0f}{cost / 1e6:>11,.1f}"
            f"{cost / one.endpoints / 1e3:>16.2f}"
        )
    if "slim_fly" in names and made["slim_fly"].note:
        other = topology.slim_fly(27)
        print(
            f"{made['slim_fly'].name}: {made['slim_fly'].note}; 27: {other.endpoints:,} endpoints"
        )
    print(
        f"all counts as printed: {agree}. Fit to rows 1 and 3: ${prices.per_switch:,.0f} a switch, "
        f"${prices.per_link:,.0f} a link between switches"
    )


def _printed(name: str, part: str) -> float:
    return paper.row(f"topology.{name}.{part}").value


def step() -> None:
    """Print ISCA's table 4 beside what follows from its own other numbers and our FLOP count."""
    print(f"{'ISCA table 4, multi-plane':40}{'printed':>9}{'ours':>9}{'off':>7}   from")
    for check in step_time.checks():
        what = check.row.id.rsplit(".", 1)[1].replace("_", " ")
        how = check.how.replace(
            "15,360 sequences of 4,096 tokens a step, over its time", "the step"
        )
        print(
            f"{f'{what}, {check.row.unit}':40}{check.quoted:>9g}{check.computed:>9.2f}"
            f"{check.off:>7.1%}   {how.split(', GPUs')[0]}"
        )


def decode_limits() -> None:
    """Print the paper's bound on decoding speed, and what it becomes with its own other numbers."""
    paper_ib, paper_nvl = limits.infiniband(), limits.nvl72()
    cases = [
        ("InfiniBand, 50 GB/s, 7K = 7000", paper_ib, "67"),
        ("    with 7,168 and FP8's scales", limits.exact(paper_ib), ""),
        ("    that, at section 4.3's 40 GB/s", limits.effective(limits.exact(paper_ib)), ""),
        ("NVL72, 900 GB/s, 7K = 7000", paper_nvl, "about 1200"),
        ("    with 7,168 and FP8's scales", limits.exact(paper_nvl), ""),
    ]
    print(f"{'ISCA section 2.3.2':38}{'us a layer':>11}{'ms a token':>11}{'tokens/s':>10}  printed")
    for title, bound, said in cases:
        print(
            f"{title:38}{bound.layer * 1e6:>11.2f}{bound.per_token * 1e3:>11.2f}"
            f"{bound.tokens_per_second:>10.1f}  {said}"
        )


def deep_ep() -> None:
    """Print DeepEP's published latencies beside the model's, which is fitted to none of them."""
    checks = {check.row.id: check for check in deepep.checks()}
    print("DeepEP's first README, 128 tokens a GPU over RDMA, microseconds; ours: alpha + n / beta")
    print(f"{'GPUs':>6}{'dispatch':>11}{'ours':>8}{'off':>7}{'combine':>11}{'ours':>8}{'off':>7}")
    for ranks in (8, 16, 32, 64, 128, 256):
        line = f"{ranks:>6}"
        for way in ("dispatch", "combine"):
            one = checks[f"deepep.latency.{way}.{ranks}"]
            line += f"{one.quoted:>11.0f}{one.computed:>8.0f}{one.off:>7.1%}"
        print(line)
