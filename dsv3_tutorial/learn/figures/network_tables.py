"""What the papers print about networks, beside what our own code makes of it."""

from collections.abc import Collection
from dataclasses import replace

from dsv3_tutorial import paper
from dsv3_tutorial.cost import deepep, limits, step_time, tiers, topology
from dsv3_tutorial.cost.schedule import Times, dual_pipe
from dsv3_tutorial.cost.topology import Topology

LINKS = {
    "nvlink": "NVLink",
    "infiniband": "InfiniBand, one switch",
    "infiniband_cross_leaf": "InfiniBand, three switches",
    "roce": "RoCE, one switch",
    "roce_cross_leaf": "RoCE, three switches",
}
UNIT = Times(1, 2, 1, 3)
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
    print(f"{'':28}{'latency':>8}{'GB/s reached':>14}{'bytes that take that long':>27}")
    for link, title in LINKS.items():
        beta = rate.get(link, network.across.bandwidth)
        size = _latency(link) * 1e-6 * beta
        print(f"{title:28}{_latency(link):>8.2f}{beta / 1e9:>14.0f}{size / 1e3:>24,.0f} KB")


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


def bubble_measured(stages: int = 16, micro_batches: int = 120) -> None:
    """Print table 4's bubble beside what its own times give in the published order."""
    schedule, step = dual_pipe(stages, micro_batches), step_time.printed("step")
    both = [step_time.operation_times(schedule, whole) for whole in (True, False)]
    waits = [schedule.bubble(times) for times in both]
    formula = schedule.bubble(UNIT) / schedule.length(UNIT)
    print(
        f"bubble in ISCA table 4: {step_time.printed('bubble'):.2f} s, "
        f"{step_time.shares()['bubble']:.1%} of the step; {formula:.1%} with F 1, B 2 and W 1\n"
        f"simulated with table 4's own times, {stages} stages and {micro_batches} micro-batches "
        f"(assumed):\n{waits[0]:.2f} to {waits[1]:.2f} s, {waits[0] / step:.1%} to "
        f"{waits[1] / step:.1%}, by what its 1B counts. The rest is unexplained: uneven\n"
        "stages or messages in the open could be it; neither is tested here"
    )


def decode_limits() -> None:
    """Print the paper's bound on decoding speed, and what it becomes with its own other numbers."""
    paper_ib, paper_nvl = limits.infiniband(), limits.nvl72()
    alpha = _latency("nvlink")
    cases = [
        ("InfiniBand, 50 GB/s, 7K = 7000", paper_ib, "67"),
        ("    with 7,168 and FP8's scales", limits.exact(paper_ib), ""),
        ("    that, at section 4.3's 40 GB/s", limits.effective(limits.exact(paper_ib)), ""),
        ("NVL72, 900 GB/s, 7K = 7000", paper_nvl, "about 1200"),
        ("    with 7,168 and FP8's scales", limits.exact(paper_nvl), ""),
        (f"    7K = 7000, and {alpha} us four times", replace(paper_nvl, alpha=alpha * 1e-6), ""),
        (
            "    7K = 7000, 257 experts on 72 GPUs",
            replace(paper_nvl, experts_per_device=257 / 72),
            "",
        ),
    ]
    print(f"{'ISCA section 2.3.2':38}{'us a layer':>11}{'ms a token':>11}{'tokens/s':>10}  printed")
    for title, bound, said in cases:
        print(
            f"{title:38}{bound.layer * 1e6:>11.2f}{bound.per_token * 1e3:>11.2f}"
            f"{bound.tokens_per_second:>10.1f}  {said}".rstrip()
        )
    print("four times a layer: two micro-batches, dispatch and combine; table 5's NVLink latency")


def deep_ep() -> None:
    """Print DeepEP's published numbers beside the model's, which is fitted to none of them."""
    print("DeepEP's README beside ours, alpha + n / beta; the 40 GB/s are from the same cluster")
    print(f"{'GPUs':>6}{'dispatch':>11}{'ours':>8}{'off':>7}{'combine':>11}{'ours':>8}{'off':>7}")
    print("decoding, 128 tokens a GPU, all over RDMA, microseconds (first release)")
    _deep_ep_rows("latency", (8, 16, 32, 64, 128, 256))
    print("the same with NVLink within a node (June 2025): 8 GPUs are one node, kernels decide")
    _deep_ep_rows("latency_nvlink", (8, 16, 32, 64))
    print("training, 4,096 tokens a GPU, two stages, GB/s as DeepEP counts them (first release)")
    _deep_ep_rows("rate", (8, 16, 32, 64))


def _deep_ep_rows(family: str, sizes: Collection[int]) -> None:
    checks = {check.row.id: check for check in deepep.checks()}
    for ranks in sizes:
        line = f"{ranks:>6}"
        for way in ("dispatch", "combine"):
            one = checks[f"deepep.{family}.{way}.{ranks}"]
            line += f"{one.quoted:>11.0f}{one.computed:>8.0f}{one.off:>7.1%}"
        print(line)
