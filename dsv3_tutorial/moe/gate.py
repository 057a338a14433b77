"""Which experts a token goes to, and with what weight.

M tokens, D hidden, E experts, K experts per token, G groups of E / G experts (one group a node).
Selection and weight part ways: the balance bias takes part in the choice and never in the weight.
DeepSeek-V3 report, section 2.1.2; DeepSeek-V2 report, section 2.2.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_tutorial.config import ModelConfig


class Routing(NamedTuple):
    """Where each token goes: indices (M, K) int64, weights (M, K), unbiased scores (M, E)."""

    indices: Tensor
    weights: Tensor
    scores: Tensor


def affinities(x: Tensor, weight: Tensor, scoring_func: str = "sigmoid") -> Tensor:
    """How well each expert suits each token, in float32. x (M, D), weight (E, D) -> (M, E).

    V3's sigmoid scores each expert alone; V2's softmax makes them compete. Report, equation 15.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = F.linear(x.to(wide), weight.to(wide))  # (M, E)
    return logits.sigmoid() if scoring_func == "sigmoid" else logits.softmax(dim=-1)


def _without_autocast(kind: str) -> AbstractContextManager:
    """Autocast would round the scores to BF16: experts 0.001 apart, one bias step, would tie."""
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


def choose_experts(
    biased: Tensor, n_group: int, topk_group: int, top_k: int, best: int = 2
) -> Tensor:
    """The K best experts of a token's best groups. biased (M, E) -> indices (M, K) int64.

    A group stands for a node: the limit caps how many nodes a token's copies travel to. A group
    is worth the sum of its `best` scores; V3's code takes two, which is K / topk_group of the
    published model, as the report has it, and V2 takes one. The other groups are masked with
    -inf and not 0: a biased score may be negative, and 0 would then win.
    """
    grouped = biased.unflatten(-1, (n_group, -1))  # (M, G, E / G)
    worth = grouped.topk(min(best, grouped.shape[-1]), dim=-1).values.sum(dim=-1)  # (M, G)
    kept = torch.zeros_like(worth, dtype=torch.bool)
    kept.scatter_(-1, worth.topk(topk_group, dim=-1).indices, True)
    limited = grouped.masked_fill(~kept[..., None], -math.inf).flatten(-2)  # (M, E)
    return limited.topk(top_k, dim=-1).indices


def combine_weights(
    scores: Tensor, indices: Tensor, norm_topk_prob: bool = True, routed_scaling_factor: float = 1.0
) -> Tensor:
    """The weights a token's experts are summed with. scores (M, E), indices (M, K) -> (M, K).

    From the unbiased scores: the bias steers the load, and must not change what the layer computes.
    Report, equations 13 and 14; the scaling factor stands in the code only.
    """
    weights = scores.gather(1, indices)  # (M, K)
    if norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * routed_scaling_factor


def route(x: Tensor, weight: Tensor, bias: Tensor | None, cfg: ModelConfig) -> Routing:
    """The routing of DeepSeek's models, as `topk_method` names it. x (M, D), weight (E, D).

    noaux_tc (V3): the bias (E,) joins the choice, groups by their two best; bias None counts as 0.
    group_limited_greedy (V2): no bias, groups by their best. greedy (V2-Lite): top-k of all.
    """
    with _without_autocast(x.device.type):
        scores = affinities(x, weight, cfg.scoring_func)
    k, biased = cfg.num_experts_per_tok, scores.detach()  # the choice has no gradient
    if bias is not None and cfg.topk_method == "noaux_tc":
        biased = biased + bias
    if cfg.topk_method == "greedy" or cfg.topk_group == cfg.n_group:
        indices = biased.topk(k, dim=-1).indices  # (M, K)
    else:
        best = 2 if cfg.topk_method == "noaux_tc" else 1
        indices = choose_experts(biased, cfg.n_group, cfg.topk_group, k, best)
    factor = cfg.routed_scaling_factor
    return Routing(indices, combine_weights(scores, indices, cfg.norm_topk_prob, factor), scores)


class Gate(nn.Module):
    """The router as a layer. forward: x (..., D) -> Routing over M = all leading positions.

    `e_score_correction_bias` (E,) is no parameter: no gradient reaches it, `moe.balance` moves it
    after each optimizer step. It stays float32 whatever the model is cast to: the published step
    of 0.001 would be lost on a BF16 value near 1.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.weight = nn.Parameter(torch.empty(cfg.n_routed_experts, cfg.hidden_size))  # e_i
        self.e_score_correction_bias: Tensor | None
        bias = torch.zeros(cfg.n_routed_experts) if cfg.topk_method == "noaux_tc" else None
        self.register_buffer("e_score_correction_bias", bias)  # b_i

    def forward(self, x: Tensor) -> Routing:
        return route(x.flatten(0, -2), self.weight, self.e_score_correction_bias, self.cfg)

    def _apply(self, fn, recurse=True):
        """Move the bias with the module, and keep it float32 through `.to(dtype)`."""
        kept = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved is not None and moved.dtype != kept.dtype:
            self.e_score_correction_bias = kept.to(moved.device)
        return self
