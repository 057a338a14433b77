"""What a pass of decoding takes beside the step itself: drafts, and sums over cut matrices."""

from dsv3_tutorial.cost.deployment import Deployment
from dsv3_tutorial.hardware import HardwareError


def draft_s(placed: Deployment) -> float:
    """Seconds of one draft: the MTP module is one more layer, and the output head is used again.

    Each limit's share of a layer, and of the head by itself; the slowest binds, as in a step. The
    joining matrix M_k, under a percent of a layer's experts, is left out.
    """
    head = next(line for line in placed.lines if line.part == "output head")
    share = 1 / placed.devices if placed.cut else 1.0
    alone = {
        "bandwidth": share * head.bytes / placed.chip.bandwidth(),
        "compute": (share if placed.cut else placed.cache_share)
        * head.flops
        / placed.chip.rate("fp32" if placed.weights == "float32" else "bf16"),
        "network": 0.0,
    }
    layers = placed.cfg.num_hidden_layers
    return max((time - alone[n]) / layers + alone[n] for n, time in placed.times.items())


def sums_s(placed: Deployment) -> float:
    """Seconds of a pass in which devices that share every matrix add up their parts; else 0.

    Two all-reduces a layer of D numbers a token in BF16, as a ring's bytes over the scale-up link;
    nothing hides them. Raises HardwareError where that link's rate is not known.
    """
    n, link = placed.devices, placed.chip.scale_up
    if n == 1 or not placed.cut:
        return 0.0
    rate = link.effective or link.bandwidth
    if rate is None:
        raise HardwareError(
            f"{placed.chip.title} has no scale_up.bandwidth ({link.kind}): what {n} devices take "
            "to add up their parts is unknown. Give one device, or another chip."
        )
    numbers = placed.batch * placed.queries * placed.cfg.hidden_size * 2
    return placed.cfg.num_hidden_layers * 2 * (n - 1) / n * numbers * 2 / rate
