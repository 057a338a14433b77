"""One matrix product per expert over rows that are sorted by expert, forward and backward.

m rows in all, n outputs, k inputs, E experts. `ends` (E,) int32 says where each expert's rows end.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Multiply = Callable[[Tensor, Tensor, Tensor], Tensor]


def sorted_matmul(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows (m, k) sorted by expert, weight (E, n, k), ends (E,) -> (m, n). Runs anywhere.

    A loop over the experts that were chosen. Its backward writes every expert's gradient into one
    tensor; autograd's own, of `weight[e]`, would make E tensors as large as all experts.
    """
    return _Sorted.apply(rows, weight, ends)


def grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The same through PyTorch's grouped_mm: one kernel for all experts, no wait for the device."""
    multiply = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm
    return multiply(rows, weight.transpose(-2, -1), offs=ends)


def grouped_mm_problem(x: Tensor, *sides: int) -> str | None:
    """Why grouped_mm cannot take x and matrices with these sides, in words; None where it can."""
    if not hasattr(F, "grouped_mm") and not hasattr(torch, "_grouped_mm"):
        return "this torch has no grouped_mm"
    dtypes = (torch.bfloat16,) if x.is_cuda else (torch.bfloat16, torch.float32)
    if x.dtype not in dtypes:
        names = " or ".join(str(dtype) for dtype in dtypes)
        return f"grouped_mm takes {names} on {x.device.type}, and x is {x.dtype}"
    odd = [side for side in sides if side * x.element_size() % 16]
    if odd:
        return f"grouped_mm needs rows of whole 16 bytes, and {odd[0]} numbers of {x.dtype} are not"
    return None


def _slices(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for every expert that has rows. Waits for the device to know them."""
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            yield expert, slice(begin, end)
        begin = end


class _Sorted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.slices = list(_slices(ends))
        ctx.idle = sorted(set(range(len(weight))) - {expert for expert, _ in ctx.slices})
        ctx.save_for_backward(rows, weight)
        out = rows.new_empty(len(rows), weight.shape[1])  # (m, n)
        for expert, own in ctx.slices:
            torch.mm(rows[own], weight[expert].T, out=out[own])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, weight = ctx.saved_tensors
        grad_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
            grad_weight[ctx.idle] = 0.0  # nobody else writes there; zeros for all cost a pass more
        for expert, own in ctx.slices:
            if grad_rows is not None:
                torch.mm(grad[own], weight[expert], out=grad_rows[own])
            if grad_weight is not None:
                torch.mm(grad[own].T, rows[own], out=grad_weight[expert])
        return grad_rows, grad_weight, None
