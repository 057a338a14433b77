"""What passes between the ranks of a tensor-parallel layer, forward and, reversed, backward.

A tensor is *complete* where every rank holds the same and the sum is made, *partial* where each
rank holds a summand, and cut by *tokens*, its last dimension but one, under sequence parallelism.
What a rank does with a complete input alone leaves a partial gradient of it. Megatron-LM (arXiv
1909.08053), section 3; sequence parallelism: arXiv 2205.05198, section 4.2.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

Group = dist.ProcessGroup
TOKENS = -2
# PyTorch 2.13 warns of the old names; 2.11 knows no others.
_renamed = hasattr(functional, "all_gather_single")
_all_gather = functional.all_gather_single if _renamed else functional.all_gather_tensor
_scatter_sum = functional.reduce_scatter_single if _renamed else functional.reduce_scatter_tensor


class ShareError(ValueError):
    """What the ranks of a group cannot share: other sizes, or what they share already."""


def copied(x: Tensor, group: Group) -> Tensor:
    """Complete, for products that each rank does its own part of; backward one all-reduce."""
    return _Exchange.apply(x, _same, partial(_sum, group=group))


def summed(x: Tensor, group: Group) -> Tensor:
    """Partial -> complete by one all-reduce; backward nothing."""
    return _Exchange.apply(x, partial(_sum, group=group), _same)


def gathered(x: Tensor, group: Group) -> Tensor:
    """A rank's tokens -> all tokens, for work that leaves a partial gradient: scattered back."""
    return _Exchange.apply(x, partial(_gather, group=group), partial(_scatter, group=group))


def scattered(x: Tensor, group: Group) -> Tensor:
    """Partial -> the sum, of a rank's own tokens; backward their gradients are gathered."""
    _check(x, group)
    return _Exchange.apply(x, partial(_scatter, group=group), partial(_gather, group=group))


def joined(x: Tensor, group: Group) -> Tensor:
    """A rank's tokens -> all, for work whose gradient is complete: backward only cuts it."""
    return _Exchange.apply(x, partial(_gather, group=group), partial(_own, group=group))


def split(x: Tensor, group: Group) -> Tensor:
    """Complete -> a rank's own tokens, without traffic; backward gathers their gradients.

    (B, S, D) -> (B, S / p, D). Raises ShareError where the ranks do not divide the tokens.
    """
    _check(x, group)
    return _Exchange.apply(x, partial(_own, group=group), partial(_gather, group=group))


class _Exchange(torch.autograd.Function):
    """One way forward, another backward."""

    @staticmethod
    def forward(ctx, x: Tensor, there: Callable, back: Callable) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.back(grad), None, None


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


def _sum(x: Tensor, group: Group) -> Tensor:
    return functional.wait_tensor(functional.all_reduce(x, "sum", group))


def _gather(x: Tensor, group: Group) -> Tensor:
    at = x.ndim + TOKENS
    return functional.wait_tensor(_all_gather(x.contiguous(), at, group))


def _scatter(x: Tensor, group: Group) -> Tensor:
    at = x.ndim + TOKENS
    return functional.wait_tensor(_scatter_sum(x, "sum", at, group))


def _own(x: Tensor, group: Group) -> Tensor:
    return x.chunk(group.size(), TOKENS)[group.rank()].contiguous()


def _check(x: Tensor, group: Group) -> None:
    if x.shape[TOKENS] % group.size():
        raise ShareError(
            f"{x.shape[TOKENS]} tokens cannot be shared by {group.size()} ranks: under sequence "
            "parallelism each holds as many. Pad the sequences, or use sequence=False, as to "
            "decode token by token."
        )
