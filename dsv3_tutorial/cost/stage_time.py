"""Seconds of one stage for one micro-batch, and of a step: computing, sending, waiting.

Communication that no schedule hides is added. In DualPipe a forward and a backward of two
micro-batches run as a pair: their computing on the SMs that sending leaves, or their sending,
whichever is longer.
"""

from dataclasses import dataclass

from dsv3_tutorial.cost import schedule_table
from dsv3_tutorial.cost.assumptions import Assumptions
from dsv3_tutorial.cost.layout import Layout
from dsv3_tutorial.cost.schedule import Times
from dsv3_tutorial.cost.stage_split import slowest_stage
from dsv3_tutorial.cost.stage_work import Work
from dsv3_tutorial.hardware import Chip

__all__ = ["Chunk", "Rates", "chunk", "slowest_stage"]

BACKWARD_ATTENTION = 2.5  # FLOP of its backward over its forward's, as kernels are measured
COMPUTING = ("products", "attention", "memory traffic", "recomputation")


@dataclass(frozen=True)
class Rates:
    """What a chip reaches: FLOP/s by kind, bytes/s."""

    linear: float
    high: float
    attention: float
    attention_back: float
    memory: float

    @classmethod
    def of(cls, chip: Chip, precision: str, assume: Assumptions) -> "Rates":
        share = assume.fp8_products if precision == "fp8" else assume.bf16_products
        peak = chip.rate("bf16")
        return cls(
            chip.rate(precision) * share,
            peak * assume.bf16_products,
            peak * assume.attention_forward,
            peak * assume.attention_backward,
            chip.bandwidth() * assume.memory_bandwidth,
        )


@dataclass(frozen=True)
class Chunk:
    """Seconds of one stage for one micro-batch, by part and pass; weight: dW's of `back`."""

    ahead: dict[str, float]
    back: dict[str, float]
    dispatch: float  # of one pass; the other's is as long
    combine: float
    weight: float
    passes: int = 2  # in which tokens are sent: 3 where the forward is run again

    @property
    def forward(self) -> float:
        return sum(self.ahead.values())

    @property
    def backward(self) -> float:
        return sum(self.back.values())

    @property
    def sending(self) -> float:
        """Seconds of dispatch and combine in one pass."""
        return self.dispatch + self.combine


def chunk(
    work: Work,
    rates: Rates,
    layout: Layout,
    tokens: float,
    exchange: tuple[float, float],
    load: float,
) -> Chunk:
    """The seconds of a stage's `work` for `tokens` of one GPU; exchange: a layer's two."""
    fp8 = layout.precision == "fp8"
    products = tokens * ((work.linear + load * work.routed) / rates.linear + work.high / rates.high)
    once = max(products, _weights(work, layout, tokens) / rates.memory)
    moved = work.forward_bytes + fp8 * work.forward_casts
    back = work.backward_bytes + fp8 * work.backward_casts
    kept = 8 * (work.dense / layout.tp + work.experts / layout.ep) / rates.memory
    ahead = {
        "products": once,
        "attention": tokens * work.attention / rates.attention,
        "memory traffic": tokens * moved / rates.memory,
        "recomputation": 0.0,
    }
    behind = {
        "products": once + products,
        "attention": tokens * BACKWARD_ATTENTION * work.attention / rates.attention_back,
        "memory traffic": tokens * back / rates.memory + kept,
        "recomputation": _again(work, rates, layout, tokens, sum(ahead.values())),
    }
    dispatch, combine = (load * work.exchanges * seconds for seconds in exchange)
    return Chunk(
        ahead, behind, dispatch, combine, products + kept, 2 + (layout.recompute == "full")
    )


def _weights(work: Work, layout: Layout, tokens: float) -> float:
    """Bytes of weights that a pass of `tokens` reads at least: each once, experts as they are hit.

    What binds where a GPU has a few hundred tokens or less.
    """
    experts = min(work.experts / layout.ep, tokens * work.routed / 2)
    narrow = 1 if layout.precision == "fp8" else 2
    return narrow * (work.linear / 2 / layout.tp + experts) + 2 * work.high / 2 / layout.tp


def _again(work: Work, rates: Rates, layout: Layout, tokens: float, forward: float) -> float:
    if layout.recompute == "full":
        return forward
    if layout.recompute == "none":
        return 0.0
    return tokens * (work.again_linear / rates.linear + work.again_bytes / rates.memory)


def unpaired(pp: int) -> float:
    """Forwards that a device of DualPipe runs alone in a step, on average; as many backwards."""
    half = pp // 2
    alone = [pp + max(1, half - 1 - depth) for depth in range(half)]
    return sum(alone) / half


def pair(one: Chunk, sms: float) -> float:
    """Seconds of a forward and a backward together, overlapped where that pays.

    Computing on the SMs that sending leaves, or sending, whichever is longer; or one after the
    other on all of them, where there is little to send.
    """
    stretch, shown = overlap(one, sms)
    return (one.forward + one.backward) * stretch + one.passes * one.sending * shown


def overlap(one: Chunk, sms: float) -> tuple[float, float]:
    """How many times longer a pair computes than alone, and the share of its sending that shows."""
    computing, sending = one.forward + one.backward, one.passes * one.sending
    stretched = computing / (1 - sms)
    together = max(stretched, sending)
    if together >= computing + sending:
        return 1.0, 1.0
    return 1 / (1 - sms), (together - stretched) / sending


def bubble(layout: Layout, one: Chunk, sms: float) -> float:
    """Seconds that a device waits in a step: the report's table 2, never below 0."""
    if layout.pp == 1:
        return 0.0
    paired = pair(one, sms) if layout.overlaps else None
    times = Times(one.forward + one.sending, one.backward + one.sending, one.weight, paired)
    return max(0.0, schedule_table.table_bubble(layout.schedule, layout.stages, times))
