"""Scaled FP8 products on tensor cores: the scales enter every 128 products, and float32 sums them.

`fp8.gemm.matmul` on CUDA. Imported by fp8/gemm.py alone, and only where Triton is to run.
"""

import math

import torch
from torch import Tensor

from dsv3_tutorial.fp8.gemm_blocks import STEP, Blocks, choose_blocks
from dsv3_tutorial.fp8.triton_gemm_kernels import launch
from dsv3_tutorial.fp8.triton_quant import need_fp8

INTERPRETED = (4, 232_448, True)  # SMs, shared memory, descriptors: what the interpreter stands for
ALIGNED = 16  # bytes: a descriptor's rows begin at multiples of it, and so do fast copies


def matmul(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """a @ b^T of scaled FP8 matrices: a (m, k), b (n, k), both float8_e4m3fn -> (m, n).

    Scales, float32: one a tile (m, ceil(k / 128)), a block (ceil(m / 128), ceil(k / 128)), a row
    (m, 1) or a tensor (), for each operand on its own. out_dtype: float32, BF16 or FP16.
    Costs 2 m n k FLOPs; k that is no multiple of 16 costs a padded copy of both. Hopper adds 128
    products in about 14 bits, Ada in its own way; from there on the sum is float32.
    Raises ValueError for what does not fit, BackendError where there is no kernel.
    """
    problems = [*_problems("a", a, a_scale), *_problems("b", b, b_scale)]
    if not problems and a.shape[1] != b.shape[1]:
        problems = [f"a {tuple(a.shape)} and b {tuple(b.shape)} differ in k, their last axis"]
    if len({t.device for t in (a, a_scale, b, b_scale)}) > 1:
        problems.append("the four tensors are not on one device")
    if out_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        problems.append(f"out_dtype is {out_dtype}, not float32, bfloat16 or float16")
    if problems:
        raise ValueError(
            f"fp8 matmul: {'; '.join(problems)}. Values would meet scales that are not theirs. "
            "Pass what quantize_tiles and quantize_blocks return, for a (m, k) and b (n, k)."
        )
    need_fp8(a)
    return torch.ops.dsv3.fp8_matmul(a, a_scale, b, b_scale, out_dtype)


def _problems(name: str, x: Tensor, scale: Tensor) -> list[str]:
    if x.ndim != 2 or x.dtype != torch.float8_e4m3fn or 0 in x.shape:
        return [f"{name} is {x.dtype} {tuple(x.shape)}, not a float8_e4m3fn matrix"]
    rows, tiles = x.shape[0], math.ceil(x.shape[1] / STEP)
    allowed = {(), (1, 1), (rows, 1), (rows, tiles), (math.ceil(rows / STEP), tiles)}
    if scale.dtype == torch.float32 and tuple(scale.shape) in allowed:
        return []
    return [
        f"the scales of {name} {tuple(x.shape)} are {scale.dtype} {tuple(scale.shape)}, not "
        f"float32 of one of {sorted(allowed)}"
    ]


@torch.library.custom_op("dsv3::fp8_matmul", mutates_args=())
def _matmul(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype
) -> Tensor:
    a, b = _aligned(a), _aligned(b)
    blocks, splits = _blocks(a, b, b_scale)
    return launch(a, a_scale, b, b_scale, out_dtype, blocks, splits)


@_matmul.register_fake
def _(a, a_scale, b, b_scale, out_dtype):
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


def _blocks(a: Tensor, b: Tensor, b_scale: Tensor) -> tuple[Blocks, int]:
    (m, k), n = a.shape, b.shape[0]
    share = STEP if b_scale.numel() == 1 or b_scale.shape[0] != n else 1
    n_sms, limit, tma = _device(a)
    return choose_blocks(m, n, k, share, tma, n_sms, limit)


def _device(x: Tensor) -> tuple[int, int, bool]:
    """SMs, bytes of shared memory one program may take, and whether there are descriptors."""
    if not x.is_cuda:
        return INTERPRETED
    facts = torch.cuda.get_device_properties(x.device)
    return facts.multi_processor_count, facts.shared_memory_per_block_optin, facts.major >= 9


def _aligned(x: Tensor) -> Tensor:
    """x itself where its rows lie whole and begin at multiples of 16 bytes; else a copy that does.

    What is added behind a row is zero, and so are its products.
    """
    rows, k = x.shape
    if k % ALIGNED == 0 and x.stride(1) == 1 and x.stride(0) % ALIGNED == 0 and x.stride(0) >= k:
        return x if x.data_ptr() % ALIGNED == 0 else x.clone()
    whole = torch.zeros((rows, k + -k % ALIGNED), dtype=torch.uint8, device=x.device)
    whole[:, :k] = x.view(torch.uint8)
    return whole.view(x.dtype)
