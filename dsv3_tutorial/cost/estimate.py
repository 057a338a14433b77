"""A training step on the back of an envelope: four formulas that a planner must agree with.

Seconds, FLOP, bytes and shares; no layout and no model, so that each can be checked by hand.
"""

from collections.abc import Sequence


def mfu(tokens_per_second: float, flops_per_token: float, gpus: int, peak: float) -> float:
    """The share of its peak that a run uses: model FLOPs utilisation.

    tokens_per_second: of the whole run; flops_per_token: useful ones, forward and backward; peak:
    of one GPU, FLOP/s. DeepSeek-V3: 0.389, counted causally over the BF16 peak (ISCA, table 4).
    """
    return tokens_per_second * flops_per_token / (gpus * peak)


def gain(compute: float, network: float, overlapped: float, factor: float) -> float:
    """How many times as fast a step becomes when the network is `factor` times as fast.

    compute, network: seconds of a step. overlapped: the share of the network's time that may run
    beside the arithmetic; it is hidden as far as there is arithmetic to hide it. Where all of it is
    hidden already, a faster network buys nothing.
    """

    def step(network: float) -> float:
        hidden = min(overlapped * network, compute)
        return compute + network - hidden

    return step(network) / step(network / factor)


def fit_efficiency(flops: Sequence[float], seconds: Sequence[float], peak: float) -> float:
    """The share of `peak` that explains measured times best: seconds = flops / (share * peak).

    Least squares in the seconds, on a line through zero: no work takes no time. Long measurements
    weigh more, as their errors are the larger ones.
    """
    slope = sum(f * t for f, t in zip(flops, seconds)) / sum(f * f for f in flops)
    return 1 / (slope * peak)


def step_seconds(
    total: float,
    activated: float,
    tokens: float,
    gpus: int,
    peak: float,
    sent: float,
    link: float,
    stages: int,
    micro_batches: int,
) -> float:
    """Seconds of a training step: the longer of arithmetic and messages, and the 1F1B bubble.

    total, activated: parameters; tokens: of a step; peak: FLOP/s that a GPU reaches; sent: bytes
    that a GPU sends, all of them beside arithmetic; link: a GPU's, in gigabits a second, as network
    cards are sold. Attention's own products, uneven stages and the optimizer are left out.
    """
    compute = 6 * activated * tokens / (gpus * peak)
    network = 8 * sent / (link * 1e9)
    busy = max(compute, network)
    bubble = busy * (stages - 1) / micro_batches
    return busy + bubble
