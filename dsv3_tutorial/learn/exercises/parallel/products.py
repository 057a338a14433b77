"""Counting the FLOP of matrix products, whatever a learner writes them with.

By the calls of torch's functions, not by what they run: torch's own FlopCounterMode loads its
compiler first, and a verdict would take seconds.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

_PRODUCTS = {"matmul", "__matmul__", "mm", "bmm", "mv", "linear"}


def counted_flops(call: Callable[[], Any]) -> int:
    """FLOP of the matrix products in call(): two for each multiply and add.

    Products with @, matmul, mm, bmm, linear and einsum are counted; one written with * and sum is
    not, so that nobody is accused of what is not there.
    """
    with _Counter() as counter:
        call()
    return counter.total


class _Counter(TorchFunctionMode):
    total = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _PRODUCTS and isinstance(out, Tensor):
            self.total += 2 * out.numel() * args[0].shape[-1]
        elif name == "einsum" and "->" in args[0]:
            self.total += 2 * out.numel() * _summed(*args)
        return out


def _summed(equation: str, *operands: Any) -> int:
    """How many products an einsum adds up for each number of its result."""
    inputs, _, output = equation.replace(" ", "").partition("->")
    tensors = (
        operands[0] if len(operands) == 1 and not isinstance(operands[0], Tensor) else operands
    )
    sizes: dict[str, int] = {}
    for spec, tensor in zip(inputs.split(","), tensors, strict=True):
        first, _, last = spec.partition("...")
        sizes.update(zip(first, tensor.shape, strict=False))
        sizes.update(zip(reversed(last), reversed(tensor.shape), strict=False))
    return math.prod(size for letter, size in sizes.items() if letter not in output)
