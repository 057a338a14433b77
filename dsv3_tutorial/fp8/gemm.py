"""Products of scaled FP8 matrices: what is summed exactly, what in 14 bits, and where scales enter.

m x n the result, k the summed axis. A tensor core multiplies E4M3 values and adds the products; it
knows nothing of scales. Scales that change along k therefore end a partial sum: every 128 products
it is multiplied with its two scales and added to a float32 sum elsewhere (DeepSeek-V3 report,
section 3.3.2 and figure 7), which also mends the narrow sum of Hopper's tensor cores.
"""

import math

import torch
from torch import Tensor

from dsv3_tutorial.fp8 import cpu
from dsv3_tutorial.fp8.accumulate import TensorCore, matmul_emulated
from dsv3_tutorial.fp8.quant import TILE, dequantize_tiles, pick_fp8

BACKENDS = ("reference", "triton", "scaled_mm")
OUT_DTYPES = (torch.float32, torch.bfloat16)


class GemmError(ValueError):
    """Operands or scales that do not fit each other: no product of them would mean anything."""


def matmul(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype = torch.float32,
    core: TensorCore | None = None,
    backend: str | None = None,
) -> Tensor:
    """a @ b^T of scaled FP8 matrices: a (m, k), b (n, k), both float8_e4m3fn -> (m, n).

    Scales, float32: one a tile (m, ceil(k / 128)), a block (ceil(m / 128), ceil(k / 128)), a row
    (m, 1) or a tensor (), for each operand on its own. The reference sums in float32; with `core`
    as that tensor core would, on the reference only. On CUDA: Triton, promoting every 128 products;
    backend="scaled_mm" is PyTorch's own (block scales: SM90).
    Raises GemmError for what does not fit, BackendError for a forced backend that cannot run.
    """
    _check(a, a_scale, b, b_scale, out_dtype)
    if core is not None:
        _check_core(core, backend)
        return _emulated(a, a_scale, b, b_scale, core).to(out_dtype)
    if backend == "scaled_mm":
        from dsv3_tutorial.fp8 import scaled_mm

        return scaled_mm.matmul(a, a_scale, b, b_scale, out_dtype)
    if pick_fp8(a, backend) == "triton":
        from dsv3_tutorial.fp8 import triton_gemm

        return triton_gemm.matmul(a, a_scale, b, b_scale, out_dtype)
    return (dequantize(a, a_scale) @ dequantize(b, b_scale).T).to(out_dtype)


def block_products(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """The product as the hardware has to do it: 128 products, then the scales, then the sum.

    a (m, k) and b (n, k) float8_e4m3fn, a_scale (m, k / 128), b_scale (n / 128, k / 128) -> (m, n)
    float32; k and n are multiples of 128.
    """
    out = torch.zeros(a.shape[0], b.shape[0])
    for i in range(a.shape[1] // 128):
        part = slice(128 * i, 128 * (i + 1))
        partial = a[:, part].float() @ b[:, part].float().T  # (m, n)
        column_scale = b_scale[:, i].repeat_interleave(128)  # (n,)
        out += partial * a_scale[:, i, None] * column_scale
    return out


def dequantize(x_fp8: Tensor, scale: Tensor) -> Tensor:
    """The matrix (m, k) in float32, whatever its scales are one of: tile, block, row or tensor.

    Clamped to float32's largest as in `quant.dequantize_tiles`, on a GPU only where the scales are
    one a whole tile: there no factor has to be spread out, which pays for the clamp's pass.
    """
    if x_fp8.device.type == "cpu":
        return cpu.dequantize(x_fp8, scale)
    (m, k), shape = x_fp8.shape, tuple(scale.shape)
    if k % TILE == 0 and shape == (m, k // TILE):
        return dequantize_tiles(x_fp8, scale)
    return x_fp8.float() * spread(scale, x_fp8.shape)


def spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """A matrix's scales as a factor for each row and value: broadcasts against (m, k).

    Scales that go along an axis in steps of 128 are repeated, one for the whole axis is left so.
    """
    if scale.ndim == 0:
        return scale
    for axis, size in enumerate(shape):
        if scale.shape[axis] not in (1, size):
            scale = scale.repeat_interleave(TILE, dim=axis).narrow(axis, 0, size)
    return scale


def _emulated(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, core: TensorCore) -> Tensor:
    """The sum of `core`: over all of k where the scales allow, else every 128, with its scales."""
    one_scale_along_k = all(s.ndim == 0 or s.shape[1] == 1 for s in (a_scale, b_scale))
    step = a.shape[1] if one_scale_along_k else TILE
    out = torch.zeros(a.shape[0], b.shape[0], device=a.device)
    for i, begin in enumerate(range(0, a.shape[1], step)):
        part = slice(begin, begin + step)
        partial = matmul_emulated(a[:, part].float(), b[:, part].float(), core)
        out += partial * _column(a_scale, i, a.shape[0])[:, None] * _column(b_scale, i, b.shape[0])
    return out


def _column(scale: Tensor, i: int, rows: int) -> Tensor:
    """Each row's scale in the i-th tile of k: (rows,)."""
    if scale.ndim == 0:
        return scale.expand(rows)
    own = scale[:, i if scale.shape[1] > 1 else 0]
    if len(own) in (1, rows):
        return own.expand(rows)
    return own.repeat_interleave(TILE)[:rows]


def _check_core(core: TensorCore, backend: str | None) -> None:
    if not isinstance(core, TensorCore):
        raise GemmError(
            f"core={core!r} is no tensor core: nothing says how it would sum. Pass a TensorCore of "
            "fp8.accumulate, HOPPER for one, or None for a sum in float32."
        )
    if backend not in (None, "reference"):
        raise GemmError(
            f"core=... with backend={backend!r}: a tensor core is emulated by the reference alone, "
            "the real one sums as it does. Leave out one of the two."
        )


def _check(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype) -> None:
    problems = [
        *_operand_problems("a", a, a_scale),
        *_operand_problems("b", b, b_scale),
    ]
    if not problems and a.shape[1] != b.shape[1]:
        problems.append(
            f"a {tuple(a.shape)} and b {tuple(b.shape)} differ in k, their last axis: b is (n, k)"
        )
    if len({t.device for t in (a, a_scale, b, b_scale)}) > 1:
        problems.append("the four tensors are not on one device")
    if out_dtype not in OUT_DTYPES:
        problems.append(f"out_dtype is {out_dtype}: float32 and bfloat16 can hold the result")
    if problems:
        raise GemmError(
            f"fp8.gemm.matmul: {'; '.join(problems)}. Values would meet scales that are not "
            "theirs. Pass what quantize_tiles and quantize_blocks return, a (m, k) and b (n, k)."
        )


def _operand_problems(name: str, x: Tensor, scale: Tensor) -> list[str]:
    if x.ndim != 2 or x.dtype != torch.float8_e4m3fn or 0 in x.shape:
        return [f"{name} is {x.dtype} {tuple(x.shape)}, not a float8_e4m3fn matrix"]
    rows, tiles = x.shape[0], math.ceil(x.shape[1] / TILE)
    allowed = {(), (1, 1), (rows, 1), (rows, tiles), (math.ceil(rows / TILE), tiles)}
    if scale.dtype != torch.float32 or tuple(scale.shape) not in allowed:
        return [
            f"the scales of {name} {tuple(x.shape)} are {scale.dtype} {tuple(scale.shape)}, not "
            f"float32 of one of {sorted(allowed)}"
        ]
    return []
