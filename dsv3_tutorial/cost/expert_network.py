"""How long a step's tokens travel to experts on other devices and back: over which links, how many.

A token is copied once to each of its experts. Two of them in one node could share a copy over the
slow link, as DeepSeek's own dispatch does: that saving is *not* counted here.
"""

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import limits, storage
from dsv3_tutorial.cost.comm_moe import BF16, FP8
from dsv3_tutorial.hardware import Chip, HardwareError, Link


def step_s(
    cfg: ModelConfig, chip: Chip, devices: int, tokens: float, bandwidth: float | None = None
) -> float:
    """Seconds of a step in which each of `devices` sends `tokens`: the slower link's, by `routes`.

    `limits.Decode` with the model's own sizes: FP8 out, BF16 back, two micro-batches take turns.
    """
    return max(
        (
            limits.Decode(
                bandwidth=rate,
                tokens=tokens / 2,  # of one micro-batch
                copies=cfg.num_experts_per_tok * share,
                hidden=cfg.hidden_size,
                layers=storage.moe_layers(cfg),
                dispatch=FP8,
                combine=BF16,
            ).per_token
            for share, rate in routes(chip, devices, bandwidth)
        ),
        default=0.0,
    )


def routes(chip: Chip, devices: int, bandwidth: float | None = None) -> list[tuple[float, float]]:
    """For each link that is used: its share of all copies, and its bytes/s. They work at once.

    Of n devices' experts 1 / n lie where the token is, the rest of its domain is reached by
    scale-up and all others by scale-out, at the effective rate where one is known, at the peak
    elsewhere. With a `bandwidth` all that leaves a device takes that. Raises HardwareError.
    """
    if bandwidth is not None:
        return [((devices - 1) / devices, bandwidth)] if devices > 1 else []
    near = min(devices, chip.scale_up.domain or 1)
    links = ((near - 1, chip.scale_up), (devices - near, chip.scale_out))
    return [(there / devices, _rate(chip, link, devices)) for there, link in links if there]


def _rate(chip: Chip, link: Link, devices: int) -> float:
    rate = link.effective or link.bandwidth
    if rate is None:
        raise HardwareError(
            f"{chip.title} has no link of a known rate ({link.kind}) for {devices} devices: what "
            "crosses takes an unknown time. Give a bandwidth in bytes/s, or another chip."
        )
    return rate
