"""What runs forward and backward: the model itself, a BF16 copy of it, or blocks that run twice.

BF16 training keeps float32 masters: an update of a thousandth is lost on a BF16 weight. The report
has its weights, gradients and moments so too (sections 3.3.1 and 3.3.3).
"""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def worker_for(model: nn.Module, precision: str) -> nn.Module:
    """The model that computes: `model` for "float32"; for "bf16" a copy of it in BF16.

    The copy costs 2 bytes a parameter, and 2 more for its gradients. A gate's balance bias stays
    float32 in both.
    """
    return model if precision == "float32" else copy.deepcopy(model).to(torch.bfloat16)


@torch.no_grad()
def take_weights(worker: nn.Module, model: nn.Module) -> None:
    """Round the masters into the worker, biases included; nothing where they are one model."""
    if worker is model:
        return
    for own, master in zip(worker.parameters(), model.parameters()):
        own.copy_(master)
    for own, master in zip(worker.buffers(), model.buffers()):
        own.copy_(master)


@torch.no_grad()
def give_gradients(worker: nn.Module, model: nn.Module) -> None:
    """Add the worker's BF16 gradients to the masters' in float32, and forget them there."""
    if worker is model:
        return
    for own, master in zip(worker.parameters(), model.parameters()):
        if own.grad is not None:
            given = own.grad.to(master.dtype)
            master.grad = given if master.grad is None else master.grad.add_(given)
            own.grad = None


def recompute_blocks(model: nn.Module) -> None:
    """Keep a block's input only, run the block again in backward: less memory, a third more work.

    Nothing is drawn at random in a block, so the second run is the first one again.
    """
    for block in model.model.layers:
        block.forward = _Recomputed(block.forward)


class _Recomputed:
    def __init__(self, forward: Callable):
        self.forward = forward

    def __call__(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        again = {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(self.forward, *args, **again, **kwargs)
