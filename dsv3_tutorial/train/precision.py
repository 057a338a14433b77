"""What runs forward and backward: the model, a BF16 copy of it, the copy in FP8, or blocks twice.

Training below float32 keeps float32 masters: an update of a thousandth is lost on a BF16 weight.
The report has its weights and accumulated gradients so too (sections 3.3.1 and 3.3.3).
"""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dsv3_tutorial.fp8.scaling import DEEPSEEK, PER_TENSOR, Scaling
from dsv3_tutorial.fp8_model import fp8_weights, to_fp8

FP8_SCALINGS = {"fp8": DEEPSEEK, "fp8-tensor": PER_TENSOR}


def worker_for(model: nn.Module, precision: str | Scaling, share: bool = True) -> nn.Module:
    """The model that computes: `model` itself for "float32"; for "bf16" a copy of it in BF16.

    For "fp8", "fp8-tensor" or any Scaling, the copy's linear layers and experts compute in FP8.
    They read the masters themselves and add their gradients to them in float32; `share=False` gives
    them BF16 copies like the rest, as sharding needs, whose gradients are rounded once before they
    are added. A BF16 copy costs 2 bytes a parameter, and 2 more for its gradients. A gate's balance
    bias stays float32 in all.
    """
    if precision == "float32":
        return model
    worker = copy.deepcopy(model).to(torch.bfloat16)
    if precision == "bf16":
        return worker
    scaling = FP8_SCALINGS[precision] if isinstance(precision, str) else precision
    worker = to_fp8(worker, scaling)
    return share_masters(worker, model) if share else worker


def share_masters(worker: nn.Module, model: nn.Module) -> nn.Module:
    """Put the masters in the place of the weights that FP8 products read; nothing without those."""
    for name in sorted(fp8_weights(worker)):
        path, _, own = name.rpartition(".")
        setattr(worker.get_submodule(path), own, model.get_parameter(name))
    return worker


@torch.no_grad()
def take_weights(worker: nn.Module, model: nn.Module) -> None:
    """Round the masters into the worker, biases included; what they share needs nothing."""
    if worker is model:
        return
    for own, master in zip(worker.parameters(), model.parameters()):
        if own is not master:
            own.copy_(master)
    for own, master in zip(worker.buffers(), model.buffers()):
        own.copy_(master)


@torch.no_grad()
def give_gradients(worker: nn.Module, model: nn.Module) -> None:
    """Add the worker's BF16 gradients to the masters' in float32, and forget them there."""
    if worker is model:
        return
    for own, master in zip(worker.parameters(), model.parameters()):
        if own is not master and own.grad is not None:
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
