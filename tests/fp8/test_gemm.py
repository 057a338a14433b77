"""Products of scaled FP8: equal to float64 on the stored values, and refusing what does not fit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.backend import BackendError
from dsv3_tutorial.fp8 import quant
from dsv3_tutorial.fp8.accumulate import HOPPER, TensorCore
from dsv3_tutorial.fp8.gemm import GemmError, block_products, dequantize, matmul
from dsv3_tutorial.fp8.scaling import quantized

PARTS = ("tile", "block", "row", "tensor")


def operands(m: int, n: int, k: int, part_a: str, part_b: str, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(m, k, generator=draw) * torch.logspace(-3, 3, m)[:, None]
    b = torch.randn(n, k, generator=draw)
    return quantized(a, part_a).kept, quantized(b, part_b).kept


def exact(a, b) -> torch.Tensor:
    """Every stored value times its scale, summed in float64."""
    return dequantize(*a).double() @ dequantize(*b).double().T


def assert_float32(found: torch.Tensor, a, b) -> None:
    """Within float32's rounding of the terms that are summed."""
    sizes = dequantize(*a).abs().double() @ dequantize(*b).abs().double().T
    assert ((found - exact(a, b)).abs() <= 2e-6 * sizes).all()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(1, 400),
    st.sampled_from(PARTS),
    st.sampled_from(PARTS),
)
def test_any_shape_and_any_scales_give_the_exact_product_to_float32(m, n, k, part_a, part_b):
    a, b = operands(m, n, k, part_a, part_b)
    found = matmul(*a, *b)
    assert found.shape == (m, n) and found.dtype == torch.float32
    assert_float32(found, a, b)


def test_the_blocks_of_the_hardware_give_the_same_sum():
    a, b = operands(40, 256, 384, "tile", "block")
    assert_float32(block_products(*a, *b), a, b)


def test_bfloat16_out_is_the_float32_sum_rounded_once():
    a, b = operands(16, 24, 200, "tile", "tile")
    assert torch.equal(matmul(*a, *b, torch.bfloat16), matmul(*a, *b).bfloat16())


def test_a_core_that_sums_exactly_is_the_reference():
    a, b = operands(20, 130, 300, "tile", "block")
    assert_float32(matmul(*a, *b, core=TensorCore(bits=None)), a, b)


def test_scales_along_k_promote_hopper_s_sum_every_128_products():
    draw = torch.Generator().manual_seed(1)
    a, b = torch.rand(8, 4096, generator=draw), torch.rand(8, 4096, generator=draw)
    per_tensor = quantized(a, "tensor").kept, quantized(b, "tensor").kept
    tiles = quantized(a, "tile").kept, quantized(b, "tile").kept

    def error(pair, core):
        off = matmul(*pair[0], *pair[1], core=core) - exact(*pair)
        return (off.norm() / exact(*pair).norm()).item()

    assert error(per_tensor, HOPPER) > 0.05
    assert error(tiles, HOPPER) < 0.001
    promoted = TensorCore(promote=128)
    assert error(per_tensor, promoted) < 0.001


BAD = {
    "integers": (lambda a, b: (a[0].view(torch.uint8), a[1], *b), "a is torch.uint8"),
    "k differs": (lambda a, b: (a[0][:, :64], a[1][:, :1], *b), "differ in k"),
    "scales": (lambda a, b: (a[0], a[1][:, :1].T.contiguous(), *b), "the scales of a"),
    "bf16 scales": (lambda a, b: (*a, b[0], b[1].bfloat16()), "the scales of b"),
    "three axes": (lambda a, b: (a[0][None], a[1], *b), "not a float8_e4m3fn matrix"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_said(case):
    change, message = BAD[case]
    a, b = operands(16, 130, 256, "tile", "block")
    with pytest.raises(GemmError, match=message):
        matmul(*change(a, b))


def test_a_third_dtype_out_and_two_ways_to_sum_are_refused():
    a, b = operands(16, 16, 128, "tile", "tile")
    with pytest.raises(GemmError, match="out_dtype"):
        matmul(*a, *b, out_dtype=torch.float16)
    with pytest.raises(GemmError, match="emulated by the reference alone"):
        matmul(*a, *b, core=HOPPER, backend="scaled_mm")


@pytest.mark.parametrize("core", [1, "hopper", 13.0, False, TensorCore])
def test_a_core_that_is_none_is_refused(core):
    a, b = operands(16, 16, 128, "tile", "tile")
    with pytest.raises(GemmError, match=r"is no tensor core: nothing says.*Pass a TensorCore"):
        matmul(*a, *b, core=core)


@pytest.mark.parametrize("part", PARTS)
def test_float32_s_largest_under_a_power_of_two_is_restored_finite(part):
    largest = torch.finfo(torch.float32).max
    x = torch.ones(130, 200)
    x[3, 5] = -largest
    assert dequantize(*quantized(x, part, pow2=True).kept)[3, 5] == -largest


def test_a_kernel_cannot_be_forced_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    a, b = operands(16, 16, 128, "tile", "tile")
    with pytest.raises(BackendError):
        matmul(*a, *b, backend="triton")
    with pytest.raises(ValueError, match="does not exist"):
        matmul(*a, *b, backend="cublas")


@pytest.mark.gpu
def test_the_kernel_agrees_with_the_reference_on_a_device():
    a, b = operands(300, 260, 500, "tile", "block")
    here = matmul(*(t.cuda() for t in (*a, *b))).cpu()
    torch.testing.assert_close(here, matmul(*a, *b), rtol=1e-4, atol=1e-3)
    assert quant.quantize_tiles(torch.randn(4, 128).cuda())[0].is_cuda
