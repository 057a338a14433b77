"""How many nodes a token's copies travel to, what capping them keeps, and what replicas even out.

Scores are drawn at random, seeded: a trained gate has favourites, and its numbers differ. The
`correlation` of a node's experts is the share of a score's spread that they have in common.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.learn.figures.style import (
    COMMUNICATION,
    COMPUTE,
    IDLE,
    INK,
    figure,
    finish,
    note,
    series,
)
from dsv3_tutorial.moe import placement
from dsv3_tutorial.moe.gate import choose_experts

EXPERTS, NODES, TOP_K, CAP = 256, 8, 8, 4  # DeepSeek-V3, one group a node
MANY, FEW = 20_000, 4_000  # tokens drawn for the table, and for the explorer
GPUS, EXTRA = 32, (0, 32, 64, 128)


def drawn_scores(tokens: int, correlation: float = 0.0) -> Tensor:
    """Seeded sigmoid scores (tokens, 256) whose logits correlate within a node."""
    if not 0 <= correlation <= 1:
        raise ValueError(
            f"correlation is {correlation}, so the experts' spread cannot be shared out. "
            "Give a number from 0 (nothing in common) to 1 (all experts of a node alike)."
        )
    random = np.random.default_rng(3)
    own = random.normal(size=(tokens, NODES, EXPERTS // NODES))
    common = random.normal(size=(tokens, NODES, 1))
    logits = np.sqrt(1 - correlation) * own + np.sqrt(correlation) * common
    return torch.from_numpy(1 / (1 + np.exp(-logits))).flatten(1)


def nodes_reached(indices: Tensor) -> float:
    """How many different nodes hold a token's experts, on average. indices (M, K)."""
    node = indices // (EXPERTS // NODES)  # (M, K)
    return torch.nn.functional.one_hot(node, NODES).amax(dim=1).sum(dim=1).double().mean().item()


@cache
def measured(cap: int, correlation: float = 0.0, tokens: int = FEW) -> tuple[float, float]:
    """Nodes reached by a choice capped at `cap`, and the share of the free choice's affinity."""
    scores = drawn_scores(tokens, correlation)
    capped = choose_experts(scores, NODES, cap, TOP_K)
    best = scores.topk(TOP_K).values.sum()
    return nodes_reached(capped), (scores.gather(1, capped).sum() / best).item()


def affinity_share(cap: int, correlation: float = 0.0) -> float:
    """The share of the unlimited choice's summed affinity that `cap` nodes keep: at most 1."""
    return measured(cap, correlation)[1]


def best_kept(cap: int, correlation: float = 0.0) -> float:
    """How many of a token's K best experts it still gets when only `cap` nodes are allowed."""
    scores = drawn_scores(FEW, correlation)
    capped = choose_experts(scores, NODES, cap, TOP_K)
    best = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(TOP_K).indices, True)
    return best.gather(1, capped).sum(dim=1).double().mean().item()


def copies_table(expected_nodes: Callable[[int, int, int], float]) -> None:
    """Print a V3 token's copies: one an expert, one a node as expected, and capped, measured."""
    cfg = ModelConfig.named("deepseek-v3")
    free, capped = (measured(cap, tokens=MANY)[0] for cap in (NODES, CAP))
    rows = [
        ("a copy for every expert", TOP_K, "exact"),
        ("a copy for every node", expected_nodes(EXPERTS, TOP_K, NODES), "expected_nodes"),
        ("", free, f"measured, {MANY:,} tokens"),
        (f"at most {CAP} nodes", capped, f"measured, {MANY:,} tokens"),
    ]
    print(f"{'one token, one layer':26}{'copies':>8}{'bytes, FP8':>13}   how")
    for text, copies, how in rows:
        print(f"{text:26}{copies:>8.2f}{copies * cfg.hidden_size:>13,.0f}   {how}")
    print(f"{EXPERTS} experts on {NODES} nodes, top-{TOP_K}, hidden {cfg.hidden_size:,}; ", end="")
    print("even random scores, scales not counted")


def affinity_kept(correlation: float = 0.0) -> Figure:
    """Nodes reached and affinity kept, for every cap on the nodes of a token."""
    caps = range(1, NODES + 1)
    reached, kept = zip(*(measured(cap, correlation) for cap in caps), strict=True)
    fig, (left, right) = figure(9, 4.2, columns=2)
    left.plot(caps, reached, linewidth=2, **{**series(2), "color": COMMUNICATION})
    left.plot(caps, caps, color=INK, linestyle="--", linewidth=1.2, label="the cap itself")
    left.set_ylim(0, NODES + 0.5)
    finish(fig, left, "", "nodes allowed", "nodes reached, mean of a token")
    right.plot(caps, [100 * share for share in kept], linewidth=2, **series(0))
    right.set_ylim(min(80, 100 * min(kept) - 2), 101)
    finish(fig, right, "", "nodes allowed", "affinity kept, % of the free choice")
    for ax, values, scale in ((left, reached, 1), (right, kept, 100)):
        ax.set_xticks(caps)
        ax.axvline(CAP, color=IDLE, linestyle=":", linewidth=1.5)
        at = (CAP, scale * values[CAP - 1])
        text = f"{at[1]:.1f}%" if scale == 100 else f"{at[1]:.2f}"
        ax.annotate(text, at, (8, -16), textcoords="offset points", fontsize=11)
    capped = f"capped at {CAP}: {reached[CAP - 1]:.2f}, with {kept[CAP - 1]:.1%} of the affinity"
    title = f"Free: {reached[-1]:.2f} nodes; {capped}"
    fig.suptitle(title, x=0.01, ha="left", fontsize=13, color=INK, weight="bold")
    note(fig, f"{FEW:,} tokens of random scores, {EXPERTS} experts on {NODES} nodes, top-{TOP_K}")
    return fig


def affinity_kept_in_words(correlation: float = 0.0) -> str:
    """What a cap of four nodes saves and what it costs, in words."""
    (free, _), (reached, kept) = measured(NODES, correlation), measured(CAP, correlation)
    return (
        f"With correlation {correlation:g} inside a node, a free choice reaches {free:.2f} nodes "
        f"and one capped at {CAP} reaches {reached:.2f}: {1 - reached / free:.0%} fewer copies, "
        f"and {kept:.1%} of the summed affinity is kept."
    )


def skewed_loads(layers: int = 4, exponent: float = 0.7) -> Tensor:
    """Seeded loads (layers, 256) as Zipf has them: the r-th busiest expert gets r^-exponent."""
    ranks = np.arange(1, EXPERTS + 1) ** -exponent
    random = np.random.default_rng(5)
    return torch.from_numpy(np.stack([random.permutation(ranks) for _ in range(layers)]))


@cache
def busiest_gpu(extra: int, hierarchical: bool) -> float:
    """The busiest GPU's load over the mean, over layers, with `extra` redundant experts."""
    groups, nodes = (NODES, GPUS // 8) if hierarchical else (1, 1)
    placed = placement.rebalance(skewed_loads(), EXPERTS + extra, groups, nodes, GPUS)
    return placed.imbalance.mean().item()


def eplb_gain() -> Figure:
    """The busiest GPU without and with redundant experts, hierarchical and global placement."""
    fig, ax = figure(8, 4.2)
    in_order = placement.in_order(skewed_loads(), GPUS).imbalance.mean().item()
    ax.bar(0, in_order, width=0.5, color=IDLE, label="experts in order")
    at = np.arange(1, len(EXTRA) + 1)
    looks = (("hierarchical: groups stay on a node", COMPUTE), ("global", COMMUNICATION))
    tops = [(0, in_order)]
    for index, (label, colour) in enumerate(looks):
        loads = [busiest_gpu(extra, index == 0) for extra in EXTRA]
        places = at + (index - 0.5) * 0.4
        ax.bar(places, loads, width=0.38, color=colour, label=label)
        tops += zip(places, loads, strict=True)
    for where, load in tops:
        ax.text(where, load + 0.04, f"{load:.2f}", ha="center", fontsize=10, color=INK)
    ax.axhline(1, color=INK, linestyle="--", linewidth=1.2)
    ax.set_xticks([0, *at], ["none placed", *(f"{extra} extra" for extra in EXTRA)])
    ax.grid(False, axis="x")
    ax.set_ylim(0, 1.15 * in_order)
    hierarchical, everywhere = (busiest_gpu(EXTRA[1], kind) for kind in (True, False))
    title = (
        f"{EXTRA[1]} redundant experts bring the busiest GPU from {in_order:.1f}x the mean\n"
        f"to {hierarchical:.2f}x, or to {everywhere:.2f}x when groups may part"
    )
    note(fig, f"derived: Zipf loads, {EXPERTS} experts, {GPUS} GPUs on {GPUS // 8} nodes, 4 layers")
    return finish(fig, ax, title, "redundant experts", "busiest GPU's load / mean")
