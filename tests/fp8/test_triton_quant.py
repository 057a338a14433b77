"""The quantisation kernels give the definition's very bits; on a GPU or interpreted."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.backend import BackendError
from dsv3_tutorial.fp8.quant import QuantizationError

pytest.importorskip("triton", reason="Triton is not installed")
from dsv3_tutorial.fp8 import triton_quant

E4M3 = torch.float8_e4m3fn
TINY = 2.0**-126
SIZES = [1e-45, 1e-41, 1e-38, 4e-36, 1e-30, 1e-9, 1.0, 7.3, 1e9, 1e30, 3.4e38]


def scale_of(largest, pow2):
    """One tile's scale, a Python number: exact arithmetic, then one rounding to float32."""
    if largest == 0 or not math.isfinite(largest):
        return 1.0 if largest == 0 else math.nan
    quotient = max(torch.tensor(largest / 448, dtype=torch.float64).float().item(), TINY)
    return 2.0 ** math.ceil(math.log2(quotient)) if pow2 else quotient


def by_hand(x, pow2=False, tile=128):
    """The definition, one tile after the other; the quotient is torch's IEEE division."""
    rows = x.cpu().float().reshape(-1, x.shape[-1])
    stored, scales = torch.empty(rows.shape, dtype=E4M3), []
    for i, row in enumerate(rows):
        for j in range(0, len(row), tile):
            cut = row[j : j + tile]
            scales.append(scale_of(cut.abs().max().item(), pow2))
            stored[i, j : j + tile] = (cut / torch.tensor(scales[-1])).clamp(-448, 448).to(E4M3)
    scale = torch.tensor(scales, dtype=torch.float32)
    return stored.view(x.shape), scale.view(*x.shape[:-1], -(-x.shape[-1] // tile))


def assert_bits(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        kind = torch.uint8 if a.itemsize == 1 else torch.int32
        assert torch.equal(a.cpu().view(kind), b.view(kind))


def numbers(*shape, size=1.0, seed=0):
    """Normal numbers over twelve octaves, with zeros of both signs among them."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=made) * torch.exp(2 * torch.randn(shape, generator=made))
    x[torch.rand(shape, generator=made) < 0.05] *= 0.0
    return (x / x.abs().max().clamp_min(1e-30) * size).float()


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_codes_and_scales_have_the_definition_s_bits_for_any_size(kernel_device, size, pow2):
    x = numbers(9, 256, size=size)
    found = triton_quant.quantize_tiles(x.to(kernel_device), pow2)
    assert_bits(found, by_hand(x, pow2))


@pytest.mark.parametrize("pow2", [False, True])
def test_quotients_beside_a_tie_are_rounded_as_division_rounds_them(kernel_device, pow2):
    """Every tie between two codes times a scale, and the float32 numbers on its two sides: a
    quotient that is wrong in its last bit would fall on the other side."""
    codes = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    ties = ((codes[1:] + codes[:-1]) / 2)[None]  # (1, 126), 432 the last
    largest = 448 * torch.exp2(40 * torch.rand(200, 1) - 20)
    at = ties * (scale_of_all(largest, pow2))
    for end in (None, -torch.inf, torch.inf):
        beside = at if end is None else torch.nextafter(at, torch.full_like(at, end))
        x = torch.cat([largest, -beside, torch.zeros_like(largest)], 1)  # (200, 128)
        assert_bits(triton_quant.quantize_tiles(x.to(kernel_device), pow2), by_hand(x, pow2))


def scale_of_all(largest, pow2):
    return torch.tensor([[scale_of(value, pow2)] for value in largest[:, 0].tolist()])


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 5),
    n=st.integers(1, 300),
    tile=st.sampled_from([1, 16, 100, 128, 256]),
    pow2=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_width_is_cut_as_the_definition_cuts_it(kernel_device, rows, n, tile, pow2, seed):
    x = numbers(rows, n, seed=seed)
    found = triton_quant.quantize_tiles(x.to(kernel_device), pow2, tile)
    assert_bits(found, by_hand(x, pow2, tile))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(300,), (2, 3, 140), (3, 0, 128), (65, 128)])
def test_stacks_and_other_floats_are_taken_as_float32(kernel_device, dtype, shape):
    x = torch.randn(shape).to(dtype)
    found = triton_quant.quantize_tiles(x.to(kernel_device))
    wanted = by_hand(x) if x.numel() else (x.to(E4M3), x.new_empty(3, 0, 1).float())
    assert_bits(found, wanted)


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("shape", [(128, 64), (300, 70), (5, 200), (130, 1), (1, 40)])
def test_a_transposed_matrix_is_read_where_it_lies(kernel_device, monkeypatch, shape, pow2):
    x = numbers(*shape).to(kernel_device)
    wanted = by_hand(x.T, pow2), by_hand(x.T, pow2, 32)
    if 1 not in shape:
        monkeypatch.setattr(triton_quant, "_rows", None)
    for tile, bits in zip((128, 32), wanted, strict=True):
        assert_bits(triton_quant.quantize_tiles(x.T, pow2, tile), bits)


def test_a_view_is_read_as_it_looks(kernel_device):
    x = numbers(256, 40).to(kernel_device)
    for view in (x.T, x[:, ::2], x[:, 3:], x[:1].expand(5, 40)):
        assert_bits(triton_quant.quantize_tiles(view), by_hand(view))
    assert_blocks(x.T)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pow2", [False, True])
def test_nan_and_infinity_spoil_their_own_tile_and_no_other(kernel_device, bad, pow2):
    x = numbers(3, 384)
    x[1, 130] = bad
    stored, scale = triton_quant.quantize_tiles(x.to(kernel_device), pow2)
    assert scale.isnan().nonzero().tolist() == [[1, 1]]
    assert stored.float().isnan().nonzero().tolist() == [[1, column] for column in range(128, 256)]
    x[1, 128:256] = 1.0
    wanted, _ = by_hand(x, pow2)
    fine = stored.cpu().float().isfinite()
    assert torch.equal(stored.cpu().float()[fine], wanted.float()[fine])
    weight = numbers(140, 140)
    weight[3, 139] = bad
    assert triton_quant.quantize_blocks(weight.to(kernel_device), pow2)[1].isnan().tolist() == [
        [False, True],
        [False, False],
    ]


def assert_blocks(w, pow2=False):
    """Each block of each matrix as one long tile of the definition."""
    stored, scale = triton_quant.quantize_blocks(w, pow2)
    *lead, m, n = w.shape
    assert stored.shape == w.shape and scale.shape == (*lead, -(-m // 128), -(-n // 128))
    flat = [t.flatten(0, -3) if t.ndim > 2 else t[None] for t in (w, stored, scale)]
    for one, codes, scales in zip(*flat, strict=True):
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                cut = one[part].reshape(1, -1)
                found = codes[part].reshape(1, -1), scales[i, j].reshape(1, 1)
                assert_bits(found, by_hand(cut, pow2, tile=cut.shape[1]))


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (130, 260), (2, 2, 70, 129)])
def test_blocks_are_the_definition_s_with_smaller_ones_at_the_edges(kernel_device, shape, pow2):
    assert_blocks(numbers(*shape).to(kernel_device), pow2)


def test_blocks_of_the_smallest_and_largest_numbers(kernel_device):
    for size in (1e-45, 4e-36, 3.4e38):
        assert_blocks(numbers(130, 20, size=size).bfloat16().to(kernel_device))
    zeros = triton_quant.quantize_blocks(torch.zeros(2, 2, device=kernel_device))
    assert zeros[1].item() == 1.0 and zeros[0].float().eq(0).all()


def test_the_operators_pass_opcheck(kernel_device):
    operators = torch.ops.dsv3
    for operator, inputs in (
        (operators.fp8_quantize_tiles, (numbers(130, 3).to(kernel_device).T, False, 128)),
        (operators.fp8_quantize_blocks, (numbers(130, 20).to(kernel_device), False)),
    ):
        results = torch.library.opcheck(operator.default, inputs)
        assert set(results.values()) == {"SUCCESS"}


def test_what_has_no_tiles_is_refused_in_three_parts(kernel_device):
    ones = torch.ones(4, 4, device=kernel_device)
    for wrong in (ones.long(), ones[0, 0], ones[:, :0], ones.bool()):
        with pytest.raises(
            QuantizationError, match=r"(?s)cannot be cut .*\. The codes .*\. Give a"
        ):
            triton_quant.quantize_tiles(wrong)
    with pytest.raises(QuantizationError, match="matrix, or a stack"):
        triton_quant.quantize_blocks(ones[0])
    for tile in (0, 16_385):
        with pytest.raises(QuantizationError, match=r"does not fit.*Pass tile=128"):
            triton_quant.quantize_tiles(ones, tile=tile)


def test_a_cpu_without_the_interpreter_and_a_device_without_fp8_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match="CUDA devices"):
        triton_quant.quantize_tiles(torch.ones(2, 2))
    with pytest.raises(BackendError, match="CUDA devices"):
        triton_quant.quantize_blocks(torch.ones(2, 2))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert triton_quant.fp8_problem(torch.device("cpu")) is None
    assert "SM80" in triton_quant.fp8_problem(torch.device("cuda"))
    monkeypatch.setattr(triton_quant, "fp8_problem", lambda device: "it is an SM80")
    with pytest.raises(BackendError, match=r"an SM80\. Nothing else .* backend='reference'"):
        triton_quant.quantize_tiles(torch.ones(2, 2))


def test_the_interpreter_s_fused_multiply_add_rounds_once(triton_interpreter):
    """Where the product's lost half decides: against exact fractions."""
    from fractions import Fraction

    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    made = np.random.default_rng(0)
    x, y = made.standard_normal((2, 2000)).astype(np.float32)
    z = (-x * y * made.choice([1, 1 + 2**-23, 2**24, 2**-24], 2000)).astype(np.float32)
    handles = [TensorHandle(t, tl.float32) for t in (x, y, z)]
    found = triton_interpreter.fused(None, *handles).data
    for a, b, c, r in zip(x, y, z, found, strict=True):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        sides = [np.nextafter(r, end, dtype=np.float32) for end in (-np.inf, np.inf)]
        error = abs(Fraction(float(r)) - exact)
        assert all(error <= abs(Fraction(float(side)) - exact) for side in sides)


@pytest.mark.gpu
def test_on_a_gpu_large_tensors_have_the_reference_s_bits():
    from dsv3_tutorial.fp8 import quant

    for shape, dtype in (((4096, 7168), torch.bfloat16), ((1000, 2112), torch.float32)):
        x = (torch.randn(shape) * torch.exp(4 * torch.randn(shape))).to(dtype)
        for pow2 in (False, True):
            found = triton_quant.quantize_tiles(x.cuda(), pow2)
            assert_bits(found, quant.quantize_tiles(x, pow2, backend="reference"))
            found = triton_quant.quantize_blocks(x.cuda(), pow2)
            assert_bits(found, quant.quantize_blocks(x, pow2=pow2))
