"""Eight and four bits on a CPU: PyTorch's own products, the fastest that the matrix allows.

What wins hangs on the size. For one token, on one thread of a server with AVX-512 and VNNI: a
256 x 256 matrix takes 6 us in float32 and 8 in INT8, most of it calls; 1024 x 1024 takes 310 in
float32, 145 by `_weight_int8pack_mm` and 73 by fbgemm. So small matrices meet inputs in BF16
(W8A16), and large ones inputs in INT8, a scale for each token (W8A8).

Each of these gives a token the same bits whoever shares its batch. That is why inputs are scaled
token by token, and not by `linear_dynamic`, whose one scale is the whole batch's. It costs 15 us.
That holds for equal inputs alone. Where what comes before rounds otherwise, in a float32 product of
more tokens or in attention, a last bit may tip an input to the next BF16 or INT8 number: a step of
2^-8 or 1/127 of a token's largest, where float32 would have passed on 2^-24. So a whole model's
logits keep no 1e-5: in the small checkpoint they mostly move by thousandths of the largest, and by
a tenth where a choice of experts tips, which is as much as the weights' own rounding moves them.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_tutorial.weights.formats import Quantized, dequantize, spread, unpack_int4

LARGE = 2**18  # weights: from here on integer products pay (512 x 512 is a draw)
INT4_GROUPS = (128, 64, 32)  # what PyTorch's four-bit product knows
TINIEST = 1e-30  # a token of zeros is divided by it


class Product(NamedTuple):
    """One weight's product, multiply: x (M, k) -> (M, m) in x's dtype, and which one it is."""

    multiply: Callable[[Tensor], Tensor]
    name: str  # int8, int8-bf16, int4-bf16, dequantized
    owns: bool  # it holds the weight in an order of its own, so that the codes may go


def product(q: Quantized) -> Product:
    """The product that a CPU takes for this weight (m, k). Packs the weight where it has to."""
    name = path(q)
    made = {"int8": _int8, "int8-bf16": _int8_bf16, "int4-bf16": _int4_bf16}
    multiply = made.get(name, _dequantized)(q)
    return Product(multiply, name, name in ("int8", "int4-bf16"))


def path(q: Quantized) -> str:
    """Which product that is. There is none for tiles of 128 and for FP8: dequantised per call."""
    m, k = q.shape
    if q.fmt in ("int8", "int8-tensor"):
        narrow = k % 32 == 0  # with other k PyTorch's kernel reads beyond the row
        if fbgemm_is_here() and (m * k >= LARGE or not narrow):
            return "int8"
        return "int8-bf16" if narrow else "dequantized"
    return "int4-bf16" if q.fmt == "int4" and _int4_group(m, k) else "dequantized"


def fbgemm_is_here() -> bool:
    """Whether this PyTorch has the int8 product that takes its inputs' scale: x86 only."""
    return torch.backends.quantized.engine in ("x86", "fbgemm")


def unpacked(multiply: Callable[[Tensor], Tensor], shape: tuple[int, int]) -> Tensor:
    """The weight (m, k) that a product holds, float32, from what each unit vector gives."""
    units = torch.eye(shape[1]).split(1024)
    return torch.cat([multiply(some).T for some in units], dim=1)  # (m, k)


def _dequantized(q: Quantized) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, dequantize(q, x.dtype))


def _int8_bf16(q: Quantized) -> Callable[[Tensor], Tensor]:
    """The codes as they lie against BF16: W8A16."""
    codes, scale = q.codes, q.scale.expand(q.shape[0]).to(torch.bfloat16)
    return lambda x: torch._weight_int8pack_mm(_bf16(x), codes, scale).to(x.dtype)


def _int8(q: Quantized) -> Callable[[Tensor], Tensor]:
    """Integer products, W8A8. Without VNNI pairs are summed in 16 bits: inputs then take 7."""
    packed, multiply = _packed(q), torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    most = 127 if getattr(torch.cpu, "_is_vnni_supported", bool)() else 63

    def product(x: Tensor) -> Tensor:
        x32 = x.float()
        largest = torch.linalg.vector_norm(x32, torch.inf, -1, keepdim=True).clamp_min_(TINIEST)
        out = multiply(x32 / largest, 1 / most, most + 1, packed)  # unsigned: 0 lies at most + 1
        return out.mul_(largest).to(x.dtype)

    return product


def _packed(q: Quantized) -> object:
    """The weight in fbgemm's order, which takes it in a tensor type that PyTorch is giving up."""
    scale, zero = q.scale.expand(q.shape[0]).double(), torch.zeros(q.shape[0], dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = torch._make_per_channel_quantized_tensor(q.codes, scale, zero, 0)
        return torch.ops.quantized.linear_prepack(weight, None)


def _int4_bf16(q: Quantized) -> Callable[[Tensor], Tensor]:
    """Four bits against BF16. A group of 128 that the row does not fill is told in smaller ones."""
    m, k = q.shape
    group = _int4_group(m, k)
    codes = unpack_int4(q.codes, k).int() + 8
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = spread(q)[:, ::group].T  # (k / group, m)
    both = torch.stack([scales, torch.zeros_like(scales)], dim=-1).to(torch.bfloat16).contiguous()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda x: multiply(_bf16(x), packed, group, both).to(x.dtype)


def _int4_group(m: int, k: int) -> int | None:
    return next((g for g in INT4_GROUPS if m % 16 == 0 and k % g == 0), None)


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).contiguous()
