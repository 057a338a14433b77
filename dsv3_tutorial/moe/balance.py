"""Keeping the experts busy: what the load is, and the bias that evens it out without a loss.

E experts, M tokens, K experts per token. The losses that V3 mostly does without are in
`balance_losses`. DeepSeek-V3 report, section 2.1.2; loss-free balancing, arXiv 2408.15664.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dsv3_tutorial.moe.gate import Gate, Routing


def expert_counts(indices: Tensor, n_experts: int) -> Tensor:
    """How many tokens each expert got. indices (M, K) -> (E,) int64, summing to M K."""
    return torch.bincount(indices.flatten(), minlength=n_experts)


def max_violation(counts: Tensor) -> Tensor:
    """How far the busiest expert lies above an even load: 0 is even. counts (..., E) -> (...).

    MaxVio of the loss-free paper, (max - mean) / mean; at most E / K - 1, as a token cannot choose
    an expert twice. Without any token it is 0.
    """
    counts = counts.to(torch.promote_types(counts.dtype, torch.float32))
    mean = counts.mean(dim=-1)
    return (counts.amax(dim=-1) - mean) / mean.clamp(min=torch.finfo(counts.dtype).tiny)


def update_bias(bias: Tensor, counts: Tensor, gamma: float, zero_mean: bool = False) -> Tensor:
    """The bias after a step: up by gamma for experts below the mean load, down for those above.

    bias (E,) float32, counts (E,) over the *whole* batch: all micro-batches, all ranks. Only the
    sign of the gap counts. `zero_mean` keeps the biases' sum where it was (Moonlight's variant).
    Loss-free balancing, algorithm 1; V3: gamma 0.001 for 14.3T tokens, then 0.
    """
    # In whole numbers: a float32 mean of many tokens is rounded, and even loads would look uneven.
    step = (counts.sum() - len(counts) * counts).sign().to(bias.dtype)  # (E,)
    return bias + gamma * (step - step.mean() if zero_mean else step)


def balanced_step(
    micro_batches: list[Tensor],
    bias: Tensor,
    gamma: float,
    n_group: int,
    topk_group: int,
    top_k: int,
) -> tuple[list[Tensor], Tensor]:
    """One optimizer step's routing in one layer, as V3 defines it, written out.

    micro_batches: each one's scores (M, E); bias (E,). Returns each one's weights (M, K), and the
    bias for the next step. Gate and update_biases do the same in parts.
    """
    weights, counts = [], torch.zeros_like(bias)
    for scores in micro_batches:
        grouped = (scores + bias).unflatten(-1, (n_group, -1))  # (M, G, E / G)
        worth = grouped.topk(2, dim=-1).values.sum(dim=-1)  # (M, G)
        chosen = worth.topk(topk_group, dim=-1).indices  # (M, topk_group)
        kept = (chosen[..., None] == torch.arange(n_group)).any(dim=1)  # (M, G)
        limited = grouped.masked_fill(~kept[..., None], -math.inf).flatten(-2)  # (M, E)
        indices = limited.topk(top_k, dim=-1).indices  # (M, K)
        picked = scores.gather(1, indices)  # (M, K)
        weights.append(picked / picked.sum(dim=-1, keepdim=True))
        counts += torch.bincount(indices.flatten(), minlength=len(bias))
    return weights, bias + gamma * (counts.mean() - counts).sign()


class Watch:
    """What the gates of a model decided in their last forward pass."""

    def __init__(self, names: list[str]) -> None:
        self.names = names  # of the gates, in the model's order, whichever of them runs first
        self.routings: dict[str, Routing] = {}  # by module name

    def counts(self) -> Tensor:
        """Tokens per expert of each layer, in the model's order -> (layers, E) int64.

        A gate that did not run, as a draft module's without drafts, has counted none: its row is 0,
        and an update leaves its bias where it is.
        """
        if not self.routings:
            raise ValueError(
                "No gate has run yet, so there is no load to count. Run the model inside "
                "`with watch(model) as seen:` first; a model without experts has no gates at all."
            )
        ran = {
            name: expert_counts(r.indices, r.scores.shape[-1]) for name, r in self.routings.items()
        }
        idle = torch.zeros_like(next(iter(ran.values())))
        return torch.stack([ran.get(name, idle) for name in self.names])


@contextmanager
def watch(model: nn.Module) -> Iterator[Watch]:
    """See every gate's routing while `model` runs inside; the model itself keeps nothing.

    A gate that runs again, as recomputation in backward makes it, replaces its own entry: a count
    taken after the forward pass holds each token once.
    """
    gates = [(name, part) for name, part in model.named_modules() if isinstance(part, Gate)]
    seen = Watch([name for name, _ in gates])
    hooks = [gate.register_forward_hook(_keeper(seen, name)) for name, gate in gates]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _keeper(seen: Watch, name: str):
    def keep(module: nn.Module, inputs: tuple, routing: Routing) -> None:
        seen.routings[name] = routing

    return keep


@torch.no_grad()
def update_biases(model: nn.Module, counts: Tensor, gamma: float, zero_mean: bool = False) -> None:
    """Move the bias of every gate of `model` by one step. counts (layers, E), over the whole batch.

    Once per optimizer step, after gradient accumulation and after the counts of all ranks are
    summed: per micro-batch it would move faster and follow noise. A gate without a bias stays.
    """
    gates = [part for part in model.modules() if isinstance(part, Gate)]
    n_experts = gates[0].cfg.n_routed_experts if gates else 0
    if tuple(counts.shape) != (len(gates), n_experts):
        raise ValueError(
            f"The model has {len(gates)} gates of {n_experts} experts, and the counts have shape "
            f"{tuple(counts.shape)}. A bias would follow another layer's load. Take the counts "
            "from watch(model) of the same model, MTP modules run (drafts=True) if it has any."
        )
    for gate, load in zip(gates, counts):
        if gate.e_score_correction_bias is not None:
            gate.e_score_correction_bias.copy_(
                update_bias(gate.e_score_correction_bias, load, gamma, zero_mean)
            )
