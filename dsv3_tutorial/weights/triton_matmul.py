"""Products with quantised weights on a GPU: the codes are read once, and dequantised in registers.

`weights.matmul` on CUDA. Imported by that alone, and only where Triton is to run.
"""

import torch
from torch import Tensor

from dsv3_tutorial.backend import BackendError
from dsv3_tutorial.fp8.triton_quant import need_fp8
from dsv3_tutorial.weights.matmul_blocks import choose_blocks
from dsv3_tutorial.weights.triton_matmul_kernels import launch

INTERPRETED = (4, 232_448)  # SMs and shared memory per program that the interpreter stands in for
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def quantized_matmul(
    x: Tensor, codes: Tensor, scale: Tensor, fmt: str, shape: tuple[int, int]
) -> Tensor:
    """x (M, k) times the transpose of the weight (m, k) that the codes stand for: (M, m).

    Any number of tokens, of which 64 at a time share a read of the codes. BF16, FP16 or float32,
    summed in float32. Raises BackendError where it has no kernel.
    """
    if x.dtype not in _FLOATS:
        raise BackendError(
            f"the Triton kernel has no {x.dtype}: tensor cores would not run it. Nothing else was "
            "run in its place. Pass backend='reference', or cast to bfloat16."
        )
    if fmt == "fp8":
        need_fp8(x)
    n_sms, limit = _device(x)
    blocks, splits = choose_blocks(len(x), *shape, x.element_size(), n_sms, limit)
    return launch(x, codes, scale, fmt, shape, blocks, splits)


def _device(x: Tensor) -> tuple[int, int]:
    """SMs, and bytes of shared memory one program may take."""
    if not x.is_cuda:
        return INTERPRETED
    properties = torch.cuda.get_device_properties(x.device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin
