"""The authors' recommendations, each as a knob that a number of our models can be turned by.

In our words, from the ISCA paper's sections 2 to 6 and the report's 3.5. A knob's `assumes` says
which size we gave it: the papers name directions, and hardly a size. `future_unpriced` has the
others.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from dsv3_tutorial import hardware, paper
from dsv3_tutorial.cost.comm_moe import FP8
from dsv3_tutorial.cost.future_world import World, today
from dsv3_tutorial.cost.precision import STORAGE


@dataclass(frozen=True)
class Knob:
    """One recommendation. apply: the world with it; base: a world to start from other than today's.

    assumes: the size that it was given, and why. measures: the figures that it can move.
    """

    name: str
    recommendation: str
    where: str
    assumes: str
    apply: Callable[[World], World]
    measures: tuple[str, ...] = ("step", "serving", "token")
    base: Callable[[World], World] = lambda world: world

    @property
    def before(self) -> World:
        return self.base(today())

    @property
    def after(self) -> World:
        return self.apply(self.before)


def _latency(fabric: str) -> Callable[[World], World]:
    seconds = paper.row(f"network.latency_{fabric}").value * 1e-6
    return lambda world: replace(world, latency=seconds)


def _unscaled(world: World) -> World:
    """One kernel on V3's own experts, with the scales of tiles and without: up twice, down once."""
    weights = {"up": 2, "down": 1}
    seconds = {
        way: sum(n / paper.row(f"future.{way}.{name}").value for name, n in weights.items())
        for way in ("tile_scaled", "unscaled")
    }
    return _products(world, seconds["tile_scaled"] / seconds["unscaled"])


def _row_scaled(world: World) -> World:
    """One library on one H100: a scale for each row needs neither promotion nor tiles' scales."""
    row, block = (paper.row(f"future.{way}_scaled").value for way in ("row", "block"))
    return _products(world, row / block)


def _products(world: World, faster: float) -> World:
    return world.with_assumed(fp8_products=min(1.0, world.assume.fp8_products * faster))


def _converged(world: World) -> World:
    up, out = (link.effective or link.bandwidth for link in _links(world))
    return world.with_chip(scale_out=up / out)


def _full_nvlink(world: World) -> World:
    whole = hardware.chip("h100-sxm").scale_up.bandwidth
    return world.with_chip(scale_up=whole / world.chip.scale_up.bandwidth)


def _links(world: World) -> tuple[hardware.Link, hardware.Link]:
    return world.chip.scale_up, world.chip.scale_out


def _combine(fmt: str) -> Callable[[World], World]:
    return lambda world: replace(world, combine=STORAGE[fmt].bits_per_value / 8)


def _all(world: World) -> World:
    for knob in KNOBS:
        if knob.name in TOGETHER:
            world = knob.apply(world)
    return world


KNOBS = (
    Knob(
        "accumulator",
        "Tensor cores that keep float32 sums and take the scales of tiles themselves",
        "ISCA 3.1.2, report 3.5.2",
        "FP8 products gain what DeepGEMM gains on V3's experts without tiles' scales: 1.10",
        _unscaled,
        ("step",),
    ),
    Knob(
        "accumulator, at most",
        "The same, from a kernel that loses more by its scales",
        "ISCA 3.1.2, report 3.5.2",
        "FP8 products gain what FBGEMM's row-scaled kernel has over its block-scaled: 1.29",
        _row_scaled,
        ("step",),
    ),
    Knob(
        "fused quantisation",
        "Quantise on the way into the tensor core, or close to memory",
        "report 3.5.2",
        "quantising reads and writes nothing of its own; nothing else gets faster",
        lambda world: replace(world, casts=0.0),
        ("step",),
    ),
    Knob(
        "communication off the SMs",
        "A co-processor that moves, forwards and adds what now 20 of 132 SMs do",
        "ISCA 4.4.2, report 3.5.1",
        "products have all SMs while others' tokens travel",
        lambda world: world.with_assumed(communication_sms=0.0),
        ("step",),
    ),
    Knob(
        "scale-up as on an H100",
        "A better ratio of bandwidths: here the NVLink that the H800 was cut from",
        "ISCA 4.1, 4.3",
        "450 GB/s for 200, the same share of it reached",
        _full_nvlink,
    ),
    Knob(
        "scale-out doubled",
        "A better ratio of bandwidths: a faster card for each GPU",
        "ISCA 4.3",
        "800 Gb/s for 400, the same share of it reached",
        lambda world: world.with_chip(scale_out=2),
    ),
    Knob(
        "one network",
        "One adapter for both networks, so that scale-out is as good as scale-up",
        "ISCA 4.4.2",
        "160 GB/s reached everywhere",
        _converged,
    ),
    Knob(
        "domain of 64",
        "A larger scale-up domain, at the H800's own 160 GB/s",
        "ISCA 2.3.2",
        "a rack of 72, of which 64 are used, as experts divide by 64",
        lambda world: world.with_chip(domain=64),
    ),
    Knob(
        "domain of 256",
        "A scale-up domain for all experts of a layer (of 320 GPUs, as the report decodes on)",
        "ISCA 2.3.2, report 3.4.2",
        "256 GPUs reach each other at 160 GB/s, with NVLink's latency",
        lambda world: _latency("nvlink")(world.with_chip(domain=256)),
    ),
    Knob(
        "in-network multicast and reduce",
        "Switches copy a token to its experts, and add what comes back",
        "ISCA 6.5, 4.4.2, report 3.5.1",
        "a dispatch and a combine are always in flight at once; without that it buys nothing",
        lambda world: replace(world, in_network=True),
    ),
    Knob(
        "logfmt-10 combine",
        "Compress in the network's hardware: LogFMT of 10 bits on the way back",
        "ISCA 3.2.2, 6.5",
        "free of time on the SMs, which now take longer than they save",
        _combine("logfmt-10"),
    ),
    Knob(
        "logfmt-8 combine",
        "The same with 8 bits",
        "ISCA 3.2.2, 6.5",
        "as above; what it costs in quality is lesson 2's",
        _combine("logfmt-8"),
    ),
    Knob(
        "fp8 combine",
        "The same in plain FP8, a float32 scale each 128",
        "ISCA 3.2.2",
        "the report keeps BF16 here for quality: a price without the quality",
        lambda world: replace(world, combine=FP8),
    ),
    Knob(
        "ordering in hardware",
        "The network keeps order, so that a flag needs no fence and no round trip before it",
        "ISCA 6.4",
        "one fence an exchange today, of two latencies of table 5",
        lambda world: replace(world, fences=0),
        ("token",),
    ),
    Knob(
        "low-latency Ethernet",
        "RoCE switches as fast as InfiniBand's",
        "ISCA 5.2.2",
        "table 5 across leaf switches: from 5.6 to 3.7 us",
        _latency("infiniband_cross_leaf"),
        ("token",),
        _latency("roce_cross_leaf"),
    ),
    Knob(
        "CPU on the scale-up network",
        "CPU and GPU joined by NVLink or the like",
        "ISCA 4.5.2, 6.2",
        "NVLink's 160 GB/s for a PCIe 5 x16's 64; the CPU's memory keeps up",
        lambda world: replace(world, host=world.chip.scale_up.effective),
        ("return",),
    ),
    Knob(
        "stacked memory",
        "DRAM on the logic die",
        "ISCA 6.6",
        "twice the bandwidth: the paper names no size",
        lambda world: world.with_chip(memory_bandwidth=2),
        ("step", "serving"),
    ),
    Knob(
        "nothing lost",
        "Failures and silent errors found by hardware",
        "ISCA 6.1",
        "5 % of the time lost, then none: the paper prints no rate, so read it as a slope",
        lambda world: world.with_assumed(lost=0.0),
        ("hours",),
        lambda world: world.with_assumed(lost=0.05),
    ),
)
# One of each kind, which do not contradict each other.
TOGETHER = (
    *("accumulator", "fused quantisation", "communication off the SMs", "one network"),
    *("domain of 256", "logfmt-8 combine", "ordering in hardware", "stacked memory"),
)
EVERYTHING = Knob(
    "all together",
    "One knob of each kind at once",
    "all of the above",
    ", ".join(TOGETHER),
    _all,
)
