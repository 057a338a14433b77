"""A whole step of a layout: exposed and hidden seconds by part, on the slowest device."""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import stage_links, stage_sends, stage_split, stage_time, stage_work
from dsv3_tutorial.cost.assumptions import Assumptions
from dsv3_tutorial.cost.layout import Job, Layout
from dsv3_tutorial.cost.stage_time import Chunk, Rates
from dsv3_tutorial.cost.stage_work import Work
from dsv3_tutorial.cost.tiers import Network
from dsv3_tutorial.hardware import Cluster, chip

PARTS = (
    *("products", "attention", "memory traffic", "recomputation", "dispatch", "combine"),
    *("tensor parallel", "pipeline sends", "bubble", "uneven stages", "gradients", "optimizer"),
)


WEIGHTS = (0.0, 0.15, 0.6)  # what a layer's sending may add to its computing where it shows
Held = tuple[tuple[Work, ...], ...]


@cache
def devices(
    cfg: ModelConfig, seq_len: int, mtp: bool, shape: tuple[int, bool, str]
) -> tuple["Dealt", ...]:
    """Ways to deal stages out to devices, each good for one weight of the experts' sending.

    shape: stages, whether a device holds two of them, the products' precision. Cut for an H800 and
    the default assumptions whatever the chip, so that a faster chip never meets a worse cut.
    """
    stages, folded, precision = shape
    units = stage_work.parts(cfg, seq_len, mtp)
    costs = _costs(units, seq_len, precision)
    cuts = {
        stage_split.cut(
            tuple(c * (1 + weight * (unit.exchanges > 0)) for c, unit in zip(costs, units)),
            *(stages, folded),
        )
        for weight in WEIGHTS
    }
    return tuple(_dealt(units, each, folded) for each in sorted(cuts))


class Dealt(NamedTuple):
    """One way: each device's stages, their mean on each kind of device there is, and over all."""

    held: Held
    kinds: tuple[tuple[Work, ...], ...]
    means: tuple[Work, ...]
    mean: Work


def _dealt(units: tuple[Work, ...], cuts: tuple[int, ...], folded: bool) -> Dealt:
    stages = [total(units[a:b]) for a, b in pairwise(cuts)]
    held = tuple((one,) for one in stages)
    if folded:
        held = tuple((stages[d], stages[-1 - d]) for d in range(len(stages) // 2))
    kinds = tuple(dict.fromkeys(held))
    means = tuple(total(own, len(own)) for own in kinds)
    return Dealt(held, kinds, means, total(tuple(stages), len(stages)))


def _costs(units: tuple[Work, ...], seq_len: int, precision: str) -> tuple[float, ...]:
    """Seconds that each unit computes for a sequence; what sending adds is left out."""
    rates = Rates.of(chip("h800"), precision, Assumptions())
    plain = Layout(precision=precision, recompute="selective")
    bare = [unit._replace(dense=0.0, experts=0.0) for unit in units]
    ones = [stage_time.chunk(unit, rates, plain, seq_len, (0.0, 0.0), 1.0) for unit in bare]
    return tuple(one.forward + one.backward for one in ones)


def total(works: tuple[Work, ...], over: int = 1) -> Work:
    """The sum of works, or their mean over so many."""
    return Work(*(sum(column) / over for column in zip(*works)))


@dataclass(frozen=True)
class Step:
    """Seconds of a step by part: `times` add up to it, `hidden` is what overlap hid."""

    times: dict[str, float]
    hidden: dict[str, float]
    held: tuple[tuple[Work, ...], ...]


@dataclass(frozen=True)
class Timing:
    """What turns works into chunks: one layout on one cluster."""

    rates: Rates
    links: Network
    layout: Layout
    tokens: float
    exchange: tuple[float, float]
    load: float

    @classmethod
    def of(
        cls, cfg: ModelConfig, cluster: Cluster, job: Job, layout: Layout, assume: Assumptions
    ) -> "Timing":
        links = stage_links.network(cluster, assume.links)
        rates = Rates.of(cluster.chip, layout.precision, assume)
        tokens = job.seq_len * layout.micro_batch / layout.tp
        exchange = stage_links.exchange_seconds(cfg, layout, links, tokens)
        load = assume.expert_load if layout.ep > 1 else 1.0  # alone, a GPU has all of them
        return cls(rates, links, layout, tokens, exchange, load)

    def chunk(self, one: Work) -> Chunk:
        """Seconds of one stage's work for one micro-batch."""
        return stage_time.chunk(one, self.rates, self.layout, self.tokens, self.exchange, self.load)


def step(cfg: ModelConfig, cluster: Cluster, job: Job, layout: Layout, assume: Assumptions) -> Step:
    """The step of a layout without problems, in the fastest of the ways to deal out its stages."""
    timing = Timing.of(cfg, cluster, job, layout, assume)
    ways = devices(cfg, job.seq_len, bool(assume.mtp), _shape(layout))
    found = [_dealt_step(cfg, job, timing, way, assume.communication_sms) for way in ways]
    return min(found, key=lambda one: sum(one.times.values()))


def _dealt_step(cfg: ModelConfig, job: Job, timing: Timing, way: Dealt, sms: float) -> Step:
    """The step with its stages dealt out in one way."""
    layout = timing.layout
    number = layout.micro_batches(job) * len(way.held[0]) // layout.copies
    whole, wait = _slowest(timing, way, number, sms)
    times, hidden = computing(timing.chunk(way.mean), number, layout, sms)
    times["uneven stages"] = max(0.0, whole - wait - sum(times.values()))
    times["bubble"] = wait
    sending = sum(times[part] for part in hidden) + sum(hidden.values())
    room = sum(times.values()) - sending  # seconds in which no link is in use yet
    sent, covered = stage_sends.sends(cfg, timing.links, job, layout, way.kinds, room)
    times |= sent
    times["optimizer"] = max(optimizer(own, layout, timing.rates) for own in way.kinds)
    return Step({part: times.get(part, 0.0) for part in PARTS}, hidden | covered, way.held)


def mean_chunk(
    cfg: ModelConfig, cluster: Cluster, job: Job, layout: Layout, assume: Assumptions
) -> Chunk:
    """One micro-batch through the mean stage."""
    way = devices(cfg, job.seq_len, bool(assume.mtp), _shape(layout))[0]
    return Timing.of(cfg, cluster, job, layout, assume).chunk(way.mean)


def layer_of_a_pair(
    cfg: ModelConfig, cluster: Cluster, job: Job, layout: Layout, assume: Assumptions
) -> float:
    """Seconds that one MoE layer computes for a forward and another micro-batch's backward.

    On the SMs that sending leaves, as in DualPipe's overlapped pairs; nothing sent is counted.
    """
    one = Timing.of(cfg, cluster, job, layout, assume).chunk(
        stage_work.layer(cfg, True, job.seq_len)
    )
    return (one.forward + one.backward) / (1 - assume.communication_sms)


def _shape(layout: Layout) -> tuple[int, bool, str]:
    return layout.stages, layout.overlaps, layout.precision


def _slowest(timing: Timing, way: Dealt, number: int, sms: float) -> tuple[float, float]:
    """(seconds computing, sending and waiting, those waiting) of the device that takes longest."""
    chunks = [timing.chunk(one) for one in way.means]
    waits = [stage_time.bubble(timing.layout, one, sms) for one in chunks]
    busy = [sum(computing(one, number, timing.layout, sms)[0].values()) for one in chunks]
    return max((a + b, b) for a, b in zip(busy, waits))


def computing(
    one: Chunk, number: int, layout: Layout, sms: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of `number` forwards and backwards of a chunk: exposed, and hidden, by part."""
    alone = stage_time.unpaired(layout.stages) if layout.overlaps else number
    pairs = number - alone
    stretch, share = stage_time.overlap(one, sms)
    times = {
        part: (one.ahead[part] + one.back[part]) * (alone + pairs * stretch) for part in one.ahead
    }
    hidden = {}
    for part, seconds in (("dispatch", one.dispatch), ("combine", one.combine)):
        times[part] = one.passes * seconds * (alone + pairs * share)
        hidden[part] = one.passes * seconds * pairs * (1 - share)
    return times, hidden


def optimizer(own: tuple[Work, ...], layout: Layout, rates: Rates) -> float:
    """Seconds of the update: 22 bytes of each owned number, gradients read for their norm, zeroed.

    Read: gradient 4, master 4, moments 4; written: master 4, moments 4, weight 2.
    """
    dense = sum(work.dense for work in own) / layout.tp
    experts = sum(work.experts for work in own) / layout.ep
    holders, few = layout.holders if layout.zero else (1, 1)
    owned = dense / holders + experts / few
    return (22 * owned + 8 * (dense + experts)) / rates.memory
