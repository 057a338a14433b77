"""Bugs of the field, planted from outside: each is a context manager that patches our own code.

No flag in the library turns any of them on. While one is entered, a function that training calls
is another one, which is as the bug has it; on leaving, the right one is back.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_tutorial.attention import mla
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.moe import gate
from dsv3_tutorial.train import step


@contextmanager
def replaced(place: Any, name: str, value: Any) -> Iterator[None]:
    """`place.name` is `value` inside the block, and what it was after it, whatever happens."""
    kept = vars(place)[name]
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, kept)


def bias_in_the_weight():
    """The biased scores are also what the experts are weighed with."""
    right = gate.route

    def route(x: Tensor, weight: Tensor, bias: Tensor, cfg: ModelConfig) -> gate.Routing:
        routing = right(x, weight, bias, cfg)
        how = cfg.norm_topk_prob, cfg.routed_scaling_factor
        biased = gate.combine_weights(routing.scores + bias, routing.indices, *how)
        return routing._replace(weights=biased)

    return replaced(gate, "route", route)


def bias_moves_the_wrong_way():
    """The sign of the update is turned: who is overloaded gets more."""
    right = step.update_biases

    def update_biases(model: nn.Module, counts: Tensor, gamma: float) -> None:
        right(model, counts, -gamma)

    return replaced(step, "update_biases", update_biases)


@contextmanager
def bias_moves_every_micro_batch(times: float = 1.0) -> Iterator[None]:
    """The bias follows each micro-batch's own counts, `times` gamma at a time."""
    right, update = step.losses, step.update_biases

    def losses(model: nn.Module, batch: Tensor, recipe: step.Recipe, at: int) -> step.Losses:
        found = right(model, batch, recipe, at)
        update(model, found.counts, times * recipe.gamma_at(at))
        return found

    nothing = replaced(step, "update_biases", lambda *ignored: None)
    with replaced(step, "losses", losses), nothing:
        yield


def counts_doubled():
    """Every token is counted twice, as by a hook that also sees the recomputed forward pass."""
    right = step.losses

    def losses(model: nn.Module, batch: Tensor, recipe: step.Recipe, at: int) -> step.Losses:
        found = right(model, batch, recipe, at)
        return found._replace(counts=2 * found.counts)

    return replaced(step, "losses", losses)


def groups_masked_with_zero():
    """Groups that were not chosen get 0 and not -inf, in a run whose biases have drifted below.

    The right mask does not see the drift: lowering all biases alike changes no choice.
    """

    def choose_experts(
        biased: Tensor, n_group: int, topk_group: int, top_k: int, best: int = 2
    ) -> Tensor:
        grouped = (biased - 1.0).unflatten(-1, (n_group, -1))  # (M, G, E / G)
        worth = grouped.topk(best, dim=-1).values.sum(dim=-1)  # (M, G)
        kept = torch.zeros_like(worth, dtype=torch.bool)
        kept.scatter_(-1, worth.topk(topk_group, dim=-1).indices, True)
        limited = grouped.masked_fill(~kept[..., None], 0.0).flatten(-2)  # (M, E)
        return limited.topk(top_k, dim=-1).indices

    return replaced(gate, "choose_experts", choose_experts)


def _weights_changed(change: Callable[[Tensor, float], Tensor]):
    """The gate's weights (M, K), as `change(weights, routed_scaling_factor)` has them."""
    right = gate.combine_weights

    def combine_weights(scores: Tensor, indices: Tensor, norm: bool, factor: float) -> Tensor:
        return change(right(scores, indices, norm, factor), factor)

    return replaced(gate, "combine_weights", combine_weights)


def scaled_twice():
    """The routed scaling factor is applied where the weights are made and where they are used."""
    return _weights_changed(lambda weights, factor: weights * factor)


def gate_detached():
    """The weights carry no gradient: the gate keeps the direction it was drawn with."""
    return _weights_changed(lambda weights, factor: weights.detach())


def softmax_scale(scale: Callable[[ModelConfig], float]):
    """Attention's scores are multiplied by `scale(cfg)` and not by 1 / sqrt(N + R)."""
    return replaced(ModelConfig, "softmax_scale", property(scale))


def keys_not_rotated():
    """RoPE turns the queries and forgets the one key that all heads share."""
    right = mla.rotate

    def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool = True) -> Tensor:
        return x if x.shape[2] == 1 else right(x, cos, sin, interleave)  # one head: the key

    return replaced(mla, "rotate", rotate)


def future_visible():
    """Attention has no causal mask: a position reads the byte it has to predict."""

    def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float, cache: None = None) -> Tensor:
        heads = (part.transpose(1, 2) for part in (q, keys, values))
        return F.scaled_dot_product_attention(*heads, scale=scale).transpose(1, 2)

    return replaced(mla, "attend", attend)


def target_one_too_far():
    """The target is shifted once by the data and once more by the loss."""
    right = step.nats
    return replaced(step, "nats", lambda logits, target: right(logits[:, :-1], target[:, 1:]))


def clipping_off():
    """Gradients of any size reach the optimizer."""
    return replaced(step, "CLIP", math.inf)


def decay_on_everything(decay: float = 3.0):
    """AdamW decays every parameter, norms included, and by far too much."""

    def optimizer_for(model: nn.Module, lr: float) -> torch.optim.AdamW:
        how = {"betas": step.BETAS, "weight_decay": decay, "fused": True}
        return torch.optim.AdamW(model.parameters(), lr=lr, **how)

    return replaced(step, "optimizer_for", optimizer_for)
