"""Grouped products for experts: one launch multiplies every expert's rows by its own weights.

A loop over experts starts E small products; here a program takes one tile of the result and finds
on the device whose rows these are, so nothing waits for the counts. Two products close the family:
rows times a group's matrix (the forward, the input's gradient), and a group's rows against each
other (the weights' gradient).

Imported by moe/experts.py alone, and only where Triton is to run.
"""

import torch
from torch import Tensor

from dsv3_tutorial.backend import BackendError, pick
from dsv3_tutorial.moe.grouped_blocks import Blocks, choose_blocks
from dsv3_tutorial.moe.triton_grouped_kernels import launch_rows, launch_weights

INTERPRETED = (4, 232_448)  # SMs and shared memory per program that the interpreter stands in for
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each expert's rows by that expert's weight: y[rows of e] = x[rows of e] @ W_e^T.

    x (M, k) sorted by expert; weight (E, n, k); ends (E,) int32, where each expert's rows end: the
    `offs` of `torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=ends)`, which this
    equals. Returns (M, n) in x's dtype: BF16, FP16 or float32, summed in float32. Differentiable.
    Costs 2 M n k FLOPs, and E * n * k weights read. ends[-1] must be M and no group's end before
    the last one's; that is checked on a CPU only, because a GPU would have to be waited for.
    Raises ValueError for inputs that do not fit, BackendError where Triton cannot run.
    """
    _check(x, weight, ends)
    return torch.ops.dsv3.grouped_matmul(x, weight, ends)


def _device(x: Tensor) -> tuple[int, int]:
    """SMs, and bytes of shared memory one program may take."""
    if not x.is_cuda:
        return INTERPRETED
    properties = torch.cuda.get_device_properties(x.device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def _check(x: Tensor, weight: Tensor, ends: Tensor) -> None:
    problem = _shape_problem(x, weight, ends) or _value_problem(x, weight, ends)
    if problem is not None:
        raise ValueError(
            f"grouped_matmul: {problem}. Rows would meet another expert's weights, or none. "
            "Pass x (M, k) sorted by expert, weight (E, n, k) and ends (E,) int32, ends[-1] = M."
        )
    pick(x, "triton")


def _shape_problem(x: Tensor, weight: Tensor, ends: Tensor) -> str | None:
    shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, ends {tuple(ends.shape)}"
    if (x.ndim, weight.ndim, ends.ndim) != (2, 3, 1):
        return f"expected 2, 3 and 1 dimensions, got {shapes}"
    if x.shape[1] != weight.shape[2] or weight.shape[0] != ends.shape[0]:
        return f"the sizes do not match: {shapes}"
    if 0 in weight.shape:
        return f"there is nothing to multiply with: {shapes}"
    return None


def _value_problem(x: Tensor, weight: Tensor, ends: Tensor) -> str | None:
    if not x.device == weight.device == ends.device:
        return f"x is on {x.device}, weight on {weight.device}, ends on {ends.device}"
    if ends.dtype != torch.int32:
        return f"ends is {ends.dtype}, not int32"
    if x.dtype != weight.dtype:
        return f"x is {x.dtype} and weight {weight.dtype}: one floating-point type is needed"
    if ends.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = [0, *ends.tolist()]
        if bounds != sorted(bounds) or bounds[-1] != x.shape[0]:
            return f"ends {bounds[1:]} do not rise from 0 to M = {x.shape[0]}"
    return None


def _blocks(x: Tensor, groups: int, rows: int, columns: int) -> Blocks:
    """The blocks for `groups` results of this many rows and columns each."""
    if x.dtype not in _FLOATS:
        raise BackendError(
            f"the grouped kernel has no {x.dtype}: tensor cores would not run it. Nothing else was "
            "run in its place. Use the engine 'sorted', or cast to bfloat16."
        )
    return choose_blocks(groups, rows, columns, x.element_size(), *_device(x))


# As operators, so that torch.compile keeps them whole. Each one's gradient is made of the two: the
# family is closed, and a second derivative works as the first does.


@torch.library.custom_op("dsv3::grouped_matmul", mutates_args=())
def _matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    n_groups, n_columns, _ = weight.shape
    mean_rows = -(-x.shape[0] // n_groups)  # the counts are on the device, their mean is not
    return launch_rows(x, weight, ends, _blocks(x, n_groups, mean_rows, n_columns))


@_matmul.register_fake
def _(x, weight, ends):
    return x.new_empty((x.shape[0], weight.shape[1]))


@torch.library.custom_op("dsv3::grouped_outer", mutates_args=())
def _outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return launch_weights(a, b, ends, _blocks(a, len(ends), a.shape[1], b.shape[1]))


@_outer.register_fake
def _(a, b, ends):
    return a.new_empty((ends.shape[0], a.shape[1], b.shape[1]))


def _matmul_backward(ctx, grad: Tensor):
    x, weight, ends = ctx.saved_tensors
    needs_x, needs_weight, _ = ctx.needs_input_grad
    grad_x = torch.ops.dsv3.grouped_matmul(grad, weight.mT, ends) if needs_x else None
    grad_weight = torch.ops.dsv3.grouped_outer(grad, x, ends) if needs_weight else None
    return grad_x, grad_weight, None


def _outer_backward(ctx, grad: Tensor):
    a, b, ends = ctx.saved_tensors
    grad_a = torch.ops.dsv3.grouped_matmul(b, grad, ends)
    grad_b = torch.ops.dsv3.grouped_matmul(a, grad.mT, ends)
    return grad_a, grad_b, None


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


_matmul.register_autograd(_matmul_backward, setup_context=_save)
_outer.register_autograd(_outer_backward, setup_context=_save)
