"""Tokens times a quantised weight, whose codes are all that is read of it.

A decode step multiplies every weight with a handful of tokens, so the time is the time to read the
weights: half of BF16's bytes in INT8 and FP8, a quarter in INT4. A kernel that first wrote the
dequantised weight would read and write more than BF16 does. m outputs, k inputs, M tokens.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_tutorial.backend import pick
from dsv3_tutorial.fp8.checks import QuantizationError
from dsv3_tutorial.fp8.quant import pick_fp8
from dsv3_tutorial.weights.formats import GROUP, Quantized, check_format, dequantize
from dsv3_tutorial.weights.matmul_blocks import FEW_TOKENS


def quantized_matmul(x: Tensor, q: Quantized, backend: str | None = None) -> Tensor:
    """x times the transpose of the weight that q stands for, accumulated in float32.

    x (..., k) floating point, q of one matrix (m, k) in any format -> (..., m) in x's dtype. The
    reference dequantises; on CUDA up to 64 tokens run in Triton, which keeps codes as they are and
    multiplies sums by scales, and more go through a dequantised copy and the vendor's product.
    Differentiable in x. float64 always runs in the reference, in float64, unless Triton is forced.
    Raises QuantizationError for what does not fit, BackendError for a forced backend that cannot
    run. On a CPU `weights.cpu` is faster.
    """
    _check(x, q)
    flat, args = x.reshape(-1, x.shape[-1]), (q.codes, q.scale, q.fmt, *q.shape, backend)
    if torch.compiler.is_compiling() or (x.is_cuda and _needs_gradient(x)):
        out = torch.ops.dsv3.quantized_matmul(flat, *args)
    else:
        out = _run(flat, *args)
    return out.view(*x.shape[:-1], q.shape[0])  # (..., m)


def quantized_matmul_reference(x: Tensor, q: Quantized) -> Tensor:
    """`quantized_matmul` in plain PyTorch: the weight is made, multiplied with, and dropped."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.linear(x.to(wide), dequantize(q, wide)).to(x.dtype)


def _run(
    x: Tensor, codes: Tensor, scale: Tensor, fmt: str, m: int, k: int, backend: str | None
) -> Tensor:
    q = Quantized(fmt, codes, scale, (m, k))
    if backend is None and x.dtype == torch.float64:
        backend = "reference"  # tensor cores take no part in a float64 check
    if len(x) == 0:
        return x.new_empty((0, m))
    choose = pick_fp8 if fmt == "fp8" else pick
    if choose(x, backend) == "reference":
        return quantized_matmul_reference(x, q)
    if backend is None and len(x) > FEW_TOKENS:
        return F.linear(x, dequantize(q, x.dtype))
    from dsv3_tutorial.weights import triton_matmul  # Triton is imported here and nowhere else

    return triton_matmul.quantized_matmul(x, codes, scale, fmt, (m, k))


def _check(x: Tensor, q: Quantized) -> None:
    check_format(q.fmt)
    problem = _problem(x, q)
    if problem is not None:
        raise QuantizationError(
            f"quantized_matmul: {problem}. Codes would meet inputs or scales that are not theirs. "
            "Pass x (..., k) and one matrix (m, k) as weights.formats.quantize returns it, on one "
            "device."
        )


def _problem(x: Tensor, q: Quantized) -> str | None:
    if len(q.shape) != 2 or 0 in q.shape:
        return f"the weight is of shape {tuple(q.shape)}, which is not one matrix"
    if x.ndim < 1 or x.shape[-1] != q.shape[1] or not x.is_floating_point():
        return f"x is {x.dtype} {tuple(x.shape)}, and the weight takes {q.shape[1]} real inputs"
    kind, columns = _stored(q.fmt, q.shape[1])
    if q.codes.dtype != kind or tuple(q.codes.shape) != (q.shape[0], columns):
        return (
            f"the codes are {q.codes.dtype} {tuple(q.codes.shape)}, and {q.fmt} keeps a weight "
            f"{tuple(q.shape)} as {kind} {(q.shape[0], columns)}"
        )
    if q.scale.dtype != torch.float32 or tuple(q.scale.shape) != _scales(q.fmt, *q.shape):
        wanted = _scales(q.fmt, *q.shape)
        return f"the scales are {q.scale.dtype} {tuple(q.scale.shape)}, not float32 {wanted}"
    if not x.device == q.codes.device == q.scale.device:
        return f"x is on {x.device}, codes on {q.codes.device}, scales on {q.scale.device}"
    return None


def _stored(fmt: str, k: int) -> tuple[torch.dtype, int]:
    """What a row's codes are stored as, and how many of them."""
    if fmt == "int4":
        return torch.uint8, math.ceil(k / 2)
    return (torch.float8_e4m3fn if fmt == "fp8" else torch.int8), k


def _scales(fmt: str, m: int, k: int) -> tuple[int, ...]:
    """The shape of a weight's scales."""
    groups = math.ceil(k / GROUP)
    shapes = {"int8": (m,), "int8-tensor": (), "fp8": (math.ceil(m / GROUP), groups)}
    return shapes.get(fmt, (m, groups))


def _needs_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


# As one operator, so that torch.compile keeps it whole, and Triton's result has a gradient.


@torch.library.custom_op("dsv3::quantized_matmul", mutates_args=())
def _operator(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    fmt: str,
    m: int,
    k: int,
    backend: str | None = None,
) -> Tensor:
    return _run(x, codes, scale, fmt, m, k, backend)


@_operator.register_fake
def _(x, codes, scale, fmt, m, k, backend=None):
    return x.new_empty((x.shape[0], m))


@torch.library.custom_op("dsv3::quantized_matmul_backward", mutates_args=())
def _backward_operator(
    grad: Tensor, codes: Tensor, scale: Tensor, fmt: str, m: int, k: int
) -> Tensor:
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    weight = dequantize(Quantized(fmt, codes, scale, (m, k)), wide)
    return (grad.to(wide) @ weight).to(grad.dtype)  # (M, k)


@_backward_operator.register_fake
def _(grad, codes, scale, fmt, m, k):
    return grad.new_empty((grad.shape[0], k))


def _save(ctx, inputs, output) -> None:
    _, codes, scale, *ctx.kind, _ = inputs
    ctx.save_for_backward(codes, scale)


def _backward(ctx, grad: Tensor):
    grad_x = torch.ops.dsv3.quantized_matmul_backward(grad, *ctx.saved_tensors, *ctx.kind)
    return grad_x, None, None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_save)
