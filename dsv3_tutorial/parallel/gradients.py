"""What ranks must tell each other between the backward pass and the optimizer's step.

Two kinds of weights: replicated ones, whose gradient each rank has from its own tokens alone, and
experts that live on one rank only, whose gradient the dispatch's backward has already summed over
everybody's tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def synchronised(
    replicated: Tensor,
    expert: Tensor,
    counts: Tensor,
    bias: Tensor,
    gamma: float,
    max_norm: float,
    world: int,
    all_reduce: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped gradients and the gates' new bias of a step with experts split over the ranks.

    replicated (n,) from this rank's tokens; expert (m,) of this rank's experts from all tokens;
    counts (E,) of this rank's tokens; bias (E,). The loss is the mean over ranks. all_reduce sums.
    Returns both gradients, clipped by the norm of the whole model's, and the bias.
    """
    replicated = all_reduce(replicated) / world
    expert = expert / world
    squares = replicated.square().sum() + all_reduce(expert.square().sum())
    shrink = (max_norm / squares.sqrt()).clamp(max=1.0)
    counts = all_reduce(counts).to(bias.dtype)
    bias = bias + gamma * torch.sign(counts.mean() - counts)
    return replicated * shrink, expert * shrink, bias


def flat_gradient(module: nn.Module) -> Tensor:
    """All gradients of a module as one vector (n,), whole where they are shared over ranks.

    Then every rank of the mesh must call it: each part comes from another.
    """
    grads = [weight.grad for weight in module.parameters()]
    whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in grads]
    return torch.cat([gradient.flatten() for gradient in whole])
