"""How long a step's tokens travel to experts on other devices and back: over which links, how many.

Unless another `Exchange` is asked for, a token is copied once to each of its experts, as in
DeepSeek's own decoding (report, section 3.4.2): two of them in one node share no copy.
"""

import math
from dataclasses import dataclass

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import comm_moe, limits, storage
from dsv3_tutorial.cost.comm_moe import BF16, FP8
from dsv3_tutorial.cost.tiers import Network, Tier
from dsv3_tutorial.hardware import Chip, HardwareError, Link

_FREE = Tier("of no interest where copies are counted", 0.0, math.inf)


@dataclass(frozen=True)
class Exchange:
    """How tokens travel: one of comm_moe.SCHEMES, bytes a number, the busiest device's load.

    load: over the mean, 1.0 where experts are chosen evenly. It multiplies what the busiest device
    receives and what its own experts compute; all wait for it.
    """

    scheme: str = "flat"
    dispatch: float = FP8
    combine: float = BF16
    load: float = 1.0


FLAT = Exchange()


def step_s(
    cfg: ModelConfig,
    chip: Chip,
    devices: int,
    tokens: float,
    bandwidth: float | None = None,
    exchange: Exchange = FLAT,
) -> float:
    """Seconds of a step in which each of `devices` sends `tokens`: the slower link's.

    `limits.Decode` with the model's own sizes; two micro-batches take turns.
    """
    return max(
        (
            limits.Decode(
                bandwidth=rate,
                tokens=tokens / 2,  # of one micro-batch
                copies=copies * exchange.load,
                hidden=cfg.hidden_size,
                layers=storage.moe_layers(cfg),
                dispatch=exchange.dispatch,
                combine=exchange.combine,
            ).per_token
            for copies, rate in copies_by_link(cfg, chip, devices, bandwidth, exchange.scheme)
        ),
        default=0.0,
    )


def copies_by_link(
    cfg: ModelConfig,
    chip: Chip,
    devices: int,
    bandwidth: float | None = None,
    scheme: str = "flat",
) -> list[tuple[float, float]]:
    """For each link that is used: copies of a token, and bytes/s.

    flat: by `routes`. The other schemes: `comm_moe.copies` on nodes of the chip's domain, under the
    model's own limit of groups. Raises ValueError for devices that fill no whole nodes.
    """
    ways = routes(chip, devices, bandwidth)
    if scheme == "flat" or not ways:
        return [(cfg.num_experts_per_tok * share, rate) for share, rate in ways]
    if cfg.n_routed_experts % devices:
        raise ValueError(
            f"{cfg.n_routed_experts} experts on {devices} devices: who shares a copy cannot be "
            "counted where they do not divide. Take the scheme 'flat', or devices that divide them."
        )
    limit = (cfg.topk_group, cfg.n_group) if cfg.n_group and cfg.n_group > 1 else (None, None)
    routed = (cfg.n_routed_experts, cfg.num_experts_per_tok, cfg.hidden_size)
    nodes = Network(_FREE, _FREE, min(devices, chip.scale_up.domain or 1))
    sent = comm_moe.copies(comm_moe.Layer(*routed, *limit), devices, nodes, scheme)
    if bandwidth is not None:
        return [(sum(sent.values()), bandwidth)]
    used = [copies for copies in sent.values() if copies]  # inside, across: as routes has them
    return [(copies, rate) for copies, (_, rate) in zip(used, ways, strict=True)]


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
