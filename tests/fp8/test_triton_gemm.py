"""The FP8 product kernel equals the scaled matrices' product; on a GPU or interpreted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial.backend import BackendError
from dsv3_tutorial.fp8.gemm_blocks import (
    FEW_TOKENS,
    OWN_SCALES,
    SHARED_SCALES,
    WITHOUT_TMA,
    choose_blocks,
    tiles_of,
)

pytest.importorskip("triton", reason="Triton is not installed")
from dsv3_tutorial.fp8 import triton_gemm, triton_gemm_kernels, triton_quant

E4M3 = torch.float8_e4m3fn
H100 = (132, 232_448)  # SMs, bytes of shared memory a program may take
L4 = (58, 101_376)
KINDS = ("tile", "block", "row", "tensor")


def operand(rows, k, kind, seed):
    """Random codes, NaN left out, and scales over ten octaves, one for what `kind` says."""
    made = torch.Generator().manual_seed(seed)
    codes = (torch.randn(rows, k, generator=made) * 20).clamp(-448, 448).to(E4M3)
    tiles = -(-k // 128)
    shape = {"tile": (rows, tiles), "block": (-(-rows // 128), tiles), "row": (rows, 1)}
    scale = torch.exp2(10 * torch.rand(shape.get(kind, ()), generator=made) - 5)
    return codes, scale


def spread(scale, rows, k):
    """Each value's own scale in float64, by looking each up: (rows, k)."""
    scale = scale.double().reshape(1, 1) if scale.ndim == 0 else scale.double()
    i, j = torch.arange(rows)[:, None], torch.arange(k)[None, :] // 128
    i = i if scale.shape[0] == rows else i // 128
    return scale.cpu()[i.clamp_max(scale.shape[0] - 1), j.clamp_max(scale.shape[1] - 1)]


def exact(a, a_scale, b, b_scale):
    """The product in float64, and the sum of its terms' magnitudes, which bounds its rounding."""
    a = a.cpu().double() * spread(a_scale, *a.shape)
    b = b.cpu().double() * spread(b_scale, *b.shape)
    return a @ b.T, a.abs() @ b.T.abs()


def assert_product(found, inputs, device):
    """Within float32's rounding of the terms; on a GPU, whose sums keep 14 bits, within those."""
    wanted, terms = exact(*inputs)
    steps = 2.0**-12 if device.type == "cuda" else 2.0**-20
    bound = terms * steps + wanted.abs() * torch.finfo(found.dtype).eps
    assert found.shape == wanted.shape
    assert ((found.cpu().double() - wanted).abs() <= bound).all()


def case(m, n, k, a_kind="tile", b_kind="block", device="cpu"):
    inputs = [*operand(m, k, a_kind, 1), *operand(n, k, b_kind, 2)]
    return [t.to(device) for t in inputs]


@pytest.mark.parametrize("b_kind", KINDS)
@pytest.mark.parametrize("a_kind", KINDS)
def test_each_kind_of_scales_meets_each_other(kernel_device, a_kind, b_kind):
    inputs = case(130, 136, 160, a_kind, b_kind, kernel_device)
    assert_product(triton_gemm.matmul(*inputs), inputs, kernel_device)


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (1, 300, 128), (3, 5, 7), (17, 130, 400), (200, 1, 130)]
)
def test_sides_need_be_no_multiple_of_anything(kernel_device, m, n, k):
    inputs = case(m, n, k, device=kernel_device)
    assert_product(triton_gemm.matmul(*inputs), inputs, kernel_device)


ALL_BLOCKS = [*SHARED_SCALES, *OWN_SCALES, *FEW_TOKENS, *WITHOUT_TMA]


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("blocks", ALL_BLOCKS, ids=str)
def test_the_blocks_that_are_launched_agree_whole_and_split(kernel_device, blocks, splits):
    """k of 3 steps in 2 parts: the second has one, which ends in the middle."""
    inputs = case(70, 136, 272, "tile", "block", kernel_device)
    found = triton_gemm_kernels.launch(*inputs, torch.float32, blocks, splits)
    assert_product(found, inputs, kernel_device)


def test_more_parts_than_steps_leave_some_empty_and_change_nothing(kernel_device):
    inputs = case(5, 70, 256, device=kernel_device)
    found = triton_gemm_kernels.launch(*inputs, torch.float32, FEW_TOKENS[2], 4)
    assert_product(found, inputs, kernel_device)


def test_more_than_one_band_of_tiles_is_covered_once(kernel_device):
    """Eight tiles make a band: nine of 64 rows, two columns of them."""
    inputs = case(9 * 64 - 5, 130, 16, "row", "row", kernel_device)
    blocks = OWN_SCALES[1]
    found = triton_gemm_kernels.launch(*inputs, torch.float32, blocks)
    assert_product(found, inputs, kernel_device)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_sum_is_float32_and_rounded_once(kernel_device, out_dtype):
    inputs = case(20, 40, 512, "row", "tensor", kernel_device)
    inputs[1] /= 1024  # within FP16
    found = triton_gemm.matmul(*inputs, out_dtype)
    assert found.dtype == out_dtype
    assert torch.equal(found, triton_gemm.matmul(*inputs).to(out_dtype))
    assert_product(found, inputs, kernel_device)


def test_a_step_s_scales_are_its_own(kernel_device):
    """Powers of two, so that every product and sum is exact: 2^i in step i, and nothing beside."""
    k = 5 * 128
    a = torch.ones(3, k, device=kernel_device).to(E4M3)
    scale = torch.exp2(torch.arange(5.0, device=kernel_device)).expand(3, 5)
    found = triton_gemm.matmul(a, scale, a, scale)
    assert found.eq(128 * (1 + 4 + 16 + 64 + 256)).all()


def test_a_scale_of_nan_spoils_its_row_or_its_columns_and_no_other(kernel_device):
    inputs = case(140, 300, 300, device=kernel_device)
    inputs[1][7, 1] = torch.nan
    inputs[3][1, 2] = torch.nan
    found = triton_gemm.matmul(*inputs).isnan().cpu()
    wanted = torch.zeros(140, 300, dtype=torch.bool)
    wanted[7], wanted[:, 128:256] = True, True
    assert torch.equal(found, wanted)


def test_operands_and_scales_are_read_where_they_lie_or_copied(kernel_device):
    a, a_scale, b, b_scale = inputs = case(20, 130, 256, device=kernel_device)
    wide = torch.cat([a.view(torch.uint8)] * 2, 1).view(E4M3)
    for left in (wide[:, 256:], wide[:, 3:259], a.T.contiguous().T):
        scale = a_scale.T.contiguous().T
        given = (left, scale, b, torch.stack([b_scale, b_scale], -1)[..., 0])
        assert_product(triton_gemm.matmul(*given), given, kernel_device)
    one = a[:1].expand(20, 256), a_scale[:1].expand(20, 2), b, b_scale
    assert_product(triton_gemm.matmul(*one), one, kernel_device)
    assert_product(triton_gemm.matmul(*inputs), inputs, kernel_device)


def test_what_is_quantised_is_multiplied(kernel_device):
    """The two kernels together stay within the codes' rounding of the exact product."""
    x, w = torch.randn(70, 200, device=kernel_device), torch.randn(150, 200, device=kernel_device)
    inputs = [*triton_quant.quantize_tiles(x), *triton_quant.quantize_blocks(w)]
    found = triton_gemm.matmul(*inputs).double()
    wanted = x.double() @ w.double().T
    assert (found - wanted).norm() < 0.05 * wanted.norm()
    assert_product(found.float(), inputs, kernel_device)


def test_the_operator_passes_opcheck(kernel_device):
    """Save its test of the schema, which cannot compare FP8: nothing is written, as seen here."""
    inputs = case(5, 40, 130, device=kernel_device)
    before = [t.clone() for t in inputs]
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    operator = torch.ops.dsv3.fp8_matmul.default
    results = torch.library.opcheck(operator, (*inputs, torch.bfloat16), test_utils=tests)
    assert set(results.values()) == {"SUCCESS"}
    for a, b in zip(inputs, before, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


WRONG = {
    "a of three dimensions": lambda a, s, b, t: (a[None], s, b, t),
    "integers": lambda a, s, b, t: (a.view(torch.int8), s, b, t),
    "another k": lambda a, s, b, t: (a[:, 1:], s, b, t),
    "no rows": lambda a, s, b, t: (a[:0], s[:0], b, t),
    "a tile without a scale": lambda a, s, b, t: (a, s[:, :2], b, t),
    "scales the other way round": lambda a, s, b, t: (a, s.T, b, t),
    "scales of 64 bits": lambda a, s, b, t: (a, s, b, t.double()),
    "another device": lambda a, s, b, t: (a, s.to("meta"), b, t),
    "a result of eight bits": lambda a, s, b, t: (a, s, b, t, E4M3),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_inputs_that_do_not_fit_are_refused_in_three_parts(wrong):
    inputs = WRONG[wrong](*case(20, 140, 300))
    with pytest.raises(ValueError, match=r"(?s)^fp8 matmul: .*\. Values would .*\. Pass what "):
        triton_gemm.matmul(*inputs)


def test_a_cpu_without_the_interpreter_and_a_device_without_fp8_are_refused(monkeypatch):
    inputs = case(2, 2, 16)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match="CUDA devices"):
        triton_gemm.matmul(*inputs)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_quant, "fp8_problem", lambda device: "it is an SM80")
    with pytest.raises(BackendError, match=r"an SM80\. Nothing else .* backend='reference'"):
        triton_gemm.matmul(*inputs)


def test_two_parts_refuse_a_scale_for_each_column():
    inputs = case(2, 130, 16, "tile", "tile")
    with pytest.raises(ValueError, match="must share one"):
        triton_gemm_kernels.launch(*inputs, torch.float32, SHARED_SCALES[0])


# How the work is cut


@given(
    m=st.integers(1, 9000),
    n=st.integers(1, 40_000),
    k=st.integers(1, 40_000),
    share=st.sampled_from([1, 128]),
    device=st.sampled_from([(*H100, True), (*L4, False), (*L4, True)]),
)
def test_blocks_fit_the_device_cover_the_result_and_leave_no_part_short(m, n, k, share, device):
    n_sms, limit, tma = device
    blocks, splits = choose_blocks(m, n, k, share, tma, n_sms, limit)
    assert blocks.shared <= limit and blocks.tma == tma
    assert blocks.parts == 1 or share == 128
    assert splits == 1 or splits * 4 * 128 < k + 128
    rows, columns = (n, m) if blocks.swapped else (m, n)
    width = blocks.columns * blocks.parts
    tiles = tiles_of(blocks, m, n)
    assert tiles * blocks.rows * width >= m * n
    assert tiles <= (rows // blocks.rows + 1) * (columns // width + 1)


@pytest.mark.parametrize(
    ("m", "n", "k", "share", "chosen"),
    [
        (4096, 7168, 2048, 128, SHARED_SCALES[0]),
        (8192, 24576, 1536, 128, SHARED_SCALES[0]),
        (7168, 18432, 4096, 1, OWN_SCALES[0]),
        (64, 7168, 2048, 128, FEW_TOKENS[0]),
        (30, 7168, 2048, 128, FEW_TOKENS[1]),
        (1, 7168, 18432, 128, FEW_TOKENS[2]),
    ],
)
def test_large_products_get_large_blocks_and_few_tokens_narrow_ones(m, n, k, share, chosen):
    assert choose_blocks(m, n, k, share, True, *H100)[0] == chosen


def test_k_is_split_where_the_result_has_too_few_tiles_for_the_sms():
    blocks, splits = choose_blocks(1, 2048, 7168, 128, True, *H100)
    assert splits > 1 and splits * tiles_of(blocks, 1, 2048) <= H100[0]
    assert choose_blocks(4096, 7168, 16384, 128, True, *H100)[1] == 1


def test_a_device_without_the_memory_is_refused():
    with pytest.raises(BackendError, match=r"needs 30720 bytes .* has 20000\. The kernel would"):
        choose_blocks(1, 1, 1, 1, False, 4, 20_000)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 63, 64, 1000, 4096])
@pytest.mark.parametrize("kinds", [("tile", "block"), ("tile", "tile"), ("tensor", "tensor")])
def test_on_a_gpu_products_of_v3_s_size_stay_within_the_hardware_s_sum(m, kinds):
    inputs = case(m, 2112, 7168, *kinds, device="cuda")
    assert_product(triton_gemm.matmul(*inputs), inputs, torch.device("cuda"))
