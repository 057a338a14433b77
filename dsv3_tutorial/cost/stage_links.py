"""A cluster's links as two tiers, and the seconds that a layout's exchanges take on them."""

import math
from functools import cache

from dsv3_tutorial import paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import comm_moe
from dsv3_tutorial.cost.layout import Layout, PlanError
from dsv3_tutorial.cost.tiers import Network, Tier
from dsv3_tutorial.hardware import Cluster, Link


def network(cluster: Cluster, share: float) -> Network:
    """The tiers of a cluster: rates that are reached, or `share` of the peak where nobody says.

    A tier that no GPU needs, as there is but one domain or one GPU a domain, takes no time. Raises
    PlanError for one that is needed and has no published rate.
    """
    domain, missing = cluster.domain, []
    inside = _tier(cluster, "scale_up", share, domain > 1, missing)
    across = _tier(cluster, "scale_out", share, cluster.gpus > domain, missing)
    if missing:
        raise PlanError(
            f"{cluster.chip.title} in a cluster of {cluster.gpus}: {' and '.join(missing)} is not "
            "known, so no exchange can be timed. Give the rate in a cluster file, or take one "
            f"domain of {cluster.chip.scale_up.domain or 1} GPUs at most."
        )
    return Network(inside, across, domain)


def _tier(cluster: Cluster, name: str, share: float, needed: bool, missing: list[str]) -> Tier:
    link: Link = getattr(cluster.chip, name)
    rate = link.effective or (link.bandwidth and share * link.bandwidth)
    if needed and not rate:
        missing.append(f"{name}.bandwidth")
    fabric = "nvlink" if name == "scale_up" else "infiniband"
    alpha = _latency(fabric)
    return Tier(link.kind, alpha if needed else 0.0, rate if needed and rate else math.inf)


@cache
def _latency(fabric: str) -> float:
    return paper.row(f"network.latency_{fabric}").value * 1e-6


def exchange_seconds(
    cfg: ModelConfig, layout: Layout, links: Network, tokens: float
) -> tuple[float, float]:
    """Seconds of one layer's dispatch and of its combine for a GPU's `tokens`, experts even.

    Dispatch travels in FP8 with scales where products run in FP8, combine in BF16.
    """
    if not cfg.n_routed_experts or layout.ep == 1:
        return 0.0, 0.0
    limited = cfg.n_group and cfg.n_group > 1
    limit = (cfg.topk_group, cfg.n_group) if limited else (None, None)
    way = comm_moe.Layer(cfg.n_routed_experts, cfg.num_experts_per_tok, cfg.hidden_size, *limit)
    number = comm_moe.copies(way, layout.ep, links, layout.dispatch)
    moved = max(
        number["inside"] / links.inside.bandwidth, number["across"] / links.across.bandwidth
    )
    alphas = [
        tier.alpha
        for name, tier in (("inside", links.inside), ("across", links.across))
        if number[name]
    ]
    latency = sum(alphas) if layout.dispatch == "two_stage" else max(alphas, default=0.0)
    widths = (comm_moe.FP8 if layout.precision == "fp8" else comm_moe.BF16, comm_moe.BF16)
    dispatch, combine = (latency + tokens * cfg.hidden_size * w * moved for w in widths)
    return dispatch, combine
