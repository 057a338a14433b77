"""Counting the FLOP of products, whatever a learner writes them with.

By what torch runs, so that matmul, linear, addmm, einsum and tensordot are all the same few
products. torch's own FlopCounterMode loads its compiler first, and a verdict would take seconds.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# the place of the first factor among the arguments; addbmm also sums over its first dimension
_PRODUCTS = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot"), 0),
    **dict.fromkeys(("addmm", "baddbmm", "addmv", "addbmm", "_addmm_activation"), 1),
}


def counted_flops(call: Callable[[], Any]) -> int:
    """FLOP of the products in call(): two for each multiply and add.

    One written with * and sum is counted where * makes more numbers than either factor has; an
    elementwise product is not.
    """
    with _Counter() as counter:
        call()
    return counter.total


class _Counter(TorchDispatchMode):
    total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's own switch: with it the first call would load the compiler

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _PRODUCTS:
            first = args[_PRODUCTS[name]]
            summed = first.shape[-1] * (len(first) if name == "addbmm" else 1)
            self.total += 2 * out.numel() * summed
        elif name == "mul" and isinstance(out, Tensor) and _outer(out, args):
            self.total += 2 * out.numel()
        return out


def _outer(out: Tensor, factors: tuple) -> bool:
    return all(isinstance(each, torch.Tensor) and each.numel() < out.numel() for each in factors)
