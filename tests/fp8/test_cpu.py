"""FP8 emulated fast: bit for bit what quantising and dequantising give, by quicker means."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.fp8 import cpu, gemm, quant
from dsv3_tutorial.fp8.quant import QuantizationError

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(torch.float32).max
sides = st.integers(1, 300)
seeds = st.integers(0, 999)


def bits(x):
    """What tells -0 from 0; every NaN is one, whatever its bits."""
    return x.masked_fill(x.isnan(), 12345.0).contiguous().view(torch.int32)


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def matrix(m, n, seed, spread=4.0):
    """Normal numbers over many magnitudes, with zeros of both signs among them."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(m, n, generator=made)
    x = x * torch.exp(spread * torch.randn(m, n, generator=made))
    return x * (torch.rand(m, n, generator=made) > 0.1)


def plain_tiles(x, pow2=False, tile=128):
    return quant.dequantize_tiles(*quant.quantize_tiles(x, pow2, tile, checked=False), tile=tile)


def plain_blocks(w, pow2=False, block=(128, 128)):
    stored = quant.quantize_blocks(w, block, pow2, checked=False)
    return quant.dequantize_blocks(*stored, block=block)


def restored(codes, scale):
    """What the codes stand for, by torch's own cast, and never beyond float32."""
    return (codes.float() * gemm.spread(scale, codes.shape)).clamp(-LARGEST, LARGEST)


# Rounding


def test_the_rounding_is_torchs_cast_at_every_code_every_tie_and_beside_them():
    values = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    values = values[values.isfinite()].unique()
    ties = (values[1:] + values[:-1]) / 2
    points = torch.cat([values, ties])
    points = torch.cat([points, *(points.nextafter(points.new_tensor(s * 1e9)) for s in (-1, 1))])
    points = points[points.abs() <= 448]
    for p in points.split(127):
        tile = torch.cat([p, p.new_tensor([448.0])])[None]  # its scale is 1
        assert same(cpu.round_trip_tiles(tile), tile.to(E4M3).float())


def test_the_rounding_is_torchs_cast_at_every_upper_half_of_a_float32():
    upper = torch.arange(2**16, dtype=torch.int32) << 16
    for low in (0, 1, 0x7FFF, 0x8000, 0xFFFF):
        x = (upper | low).view(torch.float32)
        x = x[x.abs() <= 448]
        x = torch.cat([x, torch.full((-len(x) % 127,), 1.0)]).view(-1, 127)
        x = torch.cat([x, torch.full((len(x), 1), 448.0)], dim=1)
        assert same(cpu.round_trip_tiles(x), x.to(E4M3).float())


@settings(max_examples=40, deadline=None)
@given(m=sides, n=sides, seed=seeds, pow2=st.booleans(), spread=st.sampled_from([0.1, 4.0, 12.0]))
def test_a_round_trip_is_bit_equal_to_quantising_and_back(m, n, seed, pow2, spread):
    x = matrix(m, n, seed, spread)
    assert same(cpu.round_trip_tiles(x, pow2), plain_tiles(x, pow2))
    assert same(cpu.round_trip_blocks(x, pow2), plain_blocks(x, pow2))
    down = plain_tiles(x.T.contiguous(), pow2).T
    assert same(cpu.round_trip_tiles(x, pow2, axis=-2), down)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, tile=st.sampled_from([1, 7, 32, 64]), block=st.tuples(sides, sides))
def test_other_sizes_of_tiles_and_blocks_are_bit_equal_too(seed, tile, block):
    x = matrix(70, 130, seed)
    assert same(cpu.round_trip_tiles(x, tile=tile), plain_tiles(x, tile=tile))
    assert same(cpu.round_trip_blocks(x, block=block), plain_blocks(x, block=block))
    assert same(cpu.round_trip(x, block), plain_blocks(x, block=block))


@pytest.mark.parametrize("pow2", [False, True])
def test_sizes_at_the_ends_of_float32_come_back_as_the_definition_says(pow2):
    sizes = torch.tensor(
        [LARGEST, 3e38, 3.3e38, 1e30, 1e-9, 1e-30, 1e-37, 1e-38, 1e-40, 1e-45, 0.0]
    )
    x = matrix(len(sizes), 256, 0, 1.0).clamp(-1, 1) * sizes[:, None]
    assert same(cpu.round_trip_tiles(x, pow2), plain_tiles(x, pow2))
    codes, scale = quant.quantize_tiles(x, pow2)
    assert same(cpu.dequantize(codes, scale), restored(codes, scale))


@pytest.mark.parametrize("axis", [-1, -2])
def test_float32_s_largest_under_a_power_of_two_comes_back_as_itself(axis):
    x = torch.ones(256, 256)
    x[7, 130], x[8, 131] = LARGEST, -LARGEST
    back = cpu.round_trip_tiles(x, pow2=True, axis=axis)
    assert same(back, plain_tiles(x.T.contiguous(), True).T if axis == -2 else plain_tiles(x, True))
    assert back[7, 130] == LARGEST and back[8, 131] == -LARGEST and back.isfinite().all()
    half = cpu.round_trip_tiles(x, pow2=True, axis=axis, dtype=torch.bfloat16)
    assert half[7, 130] == torch.finfo(torch.bfloat16).max and half.isfinite().all()
    values, codes, scale = cpu.round_trip_kept(x, (1, 128), True)
    assert same(cpu.dequantize(codes, scale), values) and scale[7, 1] == 2.0**120
    assert cpu.dequantize(codes, scale, torch.bfloat16).isfinite().all()
    assert same(cpu.round_trip_blocks(x, True), plain_blocks(x, True))


def test_more_values_than_fit_one_chunk_are_cut_where_no_part_is(monkeypatch):
    x = matrix(600, 257, 3)
    whole = cpu.round_trip_tiles(x), cpu.round_trip_tiles(x, axis=-2), cpu.round_trip_blocks(x)
    kept = cpu.round_trip_kept(x)
    monkeypatch.setattr(cpu, "_CHUNK", 1000)
    again = cpu.round_trip_tiles(x), cpu.round_trip_tiles(x, axis=-2), cpu.round_trip_blocks(x)
    assert all(same(a, b) for a, b in zip(whole, again))
    assert all(same(a.float(), b.float()) for a, b in zip(kept, cpu.round_trip_kept(x)))
    assert same(cpu.widen(kept[1]), kept[1].float())


@pytest.mark.parametrize("shape", [(200,), (3, 200), (2, 3, 5, 200)])
def test_what_lies_before_the_last_axes_is_kept_apart(shape):
    x = torch.randn(shape)
    assert same(cpu.round_trip_tiles(x), plain_tiles(x))
    if x.ndim > 2:
        assert same(cpu.round_trip_blocks(x), plain_blocks(x))
        down = plain_tiles(x.mT.contiguous()).mT
        assert same(cpu.round_trip_tiles(x, axis=-2), down)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_tile_with_nan_or_infinity_comes_back_as_nan_and_its_neighbours_do_not(bad):
    x = torch.randn(4, 300)
    x[1, 130] = bad
    back = cpu.round_trip_tiles(x)
    assert same(back, plain_tiles(x))
    assert back[1, 128:256].isnan().all() and back.isnan().sum() == 128


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floating_points_are_taken(dtype):
    x = torch.randn(9, 140).to(dtype)
    assert same(cpu.round_trip_tiles(x), plain_tiles(x))


def test_a_transposed_view_gives_the_same_without_a_copy_of_it():
    x = matrix(260, 130, 1).T
    assert same(cpu.round_trip_tiles(x), plain_tiles(x))
    assert same(cpu.round_trip_tiles(x, axis=-2), cpu.round_trip_tiles(x.contiguous(), axis=-2))
    assert cpu.round_trip_tiles(x).mT.is_contiguous()


def test_a_slice_that_is_no_contiguous_matrix_gives_the_same():
    x = matrix(40, 300, 2)[::3, 5:290:2]
    assert same(cpu.round_trip_tiles(x), plain_tiles(x))
    assert same(cpu.round_trip_blocks(x), plain_blocks(x))


def test_the_input_is_left_alone():
    x = matrix(130, 130, 5)
    before = x.clone()
    cpu.round_trip_tiles(x), cpu.round_trip_blocks(x), cpu.round_trip_kept(x)
    assert same(x, before)


def test_powers_of_two_lose_nothing_in_bfloat16_and_other_scales_do():
    x = matrix(64, 256, 7)
    exact = cpu.round_trip_tiles(x, pow2=True, dtype=torch.bfloat16)
    assert same(exact.float(), cpu.round_trip_tiles(x, pow2=True))
    rounded = cpu.round_trip_tiles(x, dtype=torch.bfloat16).float()
    assert not same(rounded, cpu.round_trip_tiles(x))


# Codes


@settings(max_examples=20, deadline=None)
@given(m=sides, n=sides, seed=seeds, pow2=st.booleans())
def test_what_is_kept_are_the_codes_and_scales_of_the_definition(m, n, seed, pow2):
    x = matrix(m, n, seed)
    for size, stored in (
        ((1, 128), quant.quantize_tiles(x, pow2)),
        ((128, 128), quant.quantize_blocks(x, pow2=pow2)),
    ):
        values, codes, scale = cpu.round_trip_kept(x, size, pow2)
        assert torch.equal(codes.view(torch.uint8), stored[0].view(torch.uint8))
        assert same(scale, stored[1])
        assert same(values, restored(*stored))


def test_codes_of_128_by_1_have_a_scale_for_each_column():
    x = matrix(300, 20, 0)
    values, codes, scale = cpu.round_trip_kept(x.T, (1, 128))
    down, codes_down, scale_down = cpu.round_trip_kept(x, (128, 1))
    assert same(values.T, down) and same(scale.T, scale_down)
    assert values.mT.is_contiguous() and codes.mT.is_contiguous()  # as x lies, not copied
    plain = quant.quantize_tiles(x.T.contiguous())
    assert torch.equal(codes.contiguous().view(torch.uint8), plain[0].view(torch.uint8))
    assert same(scale, plain[1])
    assert torch.equal(codes.T.contiguous().view(torch.uint8), codes_down.view(torch.uint8))


def test_nothing_is_widened_to_nothing():
    assert cpu.widen(torch.empty(0, 3, dtype=E4M3)).shape == (0, 3)


def test_all_256_codes_are_widened_as_torch_does():
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3)
    assert same(cpu.widen(codes), codes.float())
    assert same(cpu.widen(codes.view(16, 16).T), codes.view(16, 16).T.float())
    assert cpu.widen(codes).isnan().sum() == 2


@settings(max_examples=30, deadline=None)
@given(m=sides, n=sides, seed=seeds, pow2=st.booleans())
def test_codes_are_scaled_as_the_reference_product_does(m, n, seed, pow2):
    x = matrix(m, n, seed)
    for stored in (
        quant.quantize_tiles(x, pow2),
        quant.quantize_blocks(x, pow2=pow2),
        quant.quantize_rows(x, pow2),
        quant.quantize_tensor(x, pow2),
    ):
        wanted = restored(*stored)
        assert same(cpu.dequantize(*stored), wanted)
        assert same(
            cpu.dequantize(*stored, dtype=torch.bfloat16).float(), wanted.bfloat16().float()
        )


def test_a_scale_of_nan_makes_its_tile_nan_again():
    x = torch.randn(3, 256)
    x[2, 5] = torch.inf
    stored = quant.quantize_tiles(x, checked=False)
    assert same(cpu.dequantize(*stored), restored(*stored))
    assert cpu.dequantize(*stored).isnan().sum() == 128


def test_a_code_of_nan_is_nan_under_any_scale():
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).view(2, 128)
    scale = torch.tensor([[0.5], [3.0]])
    assert same(cpu.dequantize(codes, scale), restored(codes, scale))
    assert cpu.dequantize(codes, scale).isnan().sum() == 2


# When to multiply in bfloat16


@pytest.mark.parametrize(
    ("pow2", "out", "hardware", "wanted"),
    [
        (True, torch.bfloat16, True, torch.bfloat16),
        (True, torch.bfloat16, False, torch.float32),
        (True, torch.float32, True, torch.float32),  # the result would be rounded
        (False, torch.bfloat16, True, torch.float32),  # the operands would be
    ],
)
def test_operands_are_bfloat16_only_where_that_is_exact_and_in_hardware(
    monkeypatch, pow2, out, hardware, wanted
):
    monkeypatch.setattr(cpu, "has_bf16_products", lambda: hardware)
    assert cpu.operand_dtype(pow2, out) is wanted


def test_a_torch_that_cannot_say_what_the_cpu_has_gets_float32(monkeypatch):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert not cpu.has_bf16_products()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert cpu.has_bf16_products()


def test_bfloat16_operands_give_the_float32_product_rounded_once():
    x, w = torch.randn(64, 256), torch.randn(32, 256)
    a, b = cpu.round_trip_tiles(x, pow2=True), cpu.round_trip_blocks(w, pow2=True)
    exact = a.double() @ b.double().T
    product = (a.bfloat16() @ b.bfloat16().T).double()
    size = a.double().abs() @ b.double().abs().T  # what rounding inside the sum can amount to
    assert ((product - exact).abs() <= exact.abs() / 256 + 256 * 2.0**-23 * size).all()


# What is no matrix of real numbers


@pytest.mark.parametrize(
    ("call", "x"),
    [
        (cpu.round_trip_tiles, torch.ones(4, 128, dtype=torch.int32)),
        (cpu.round_trip_tiles, torch.tensor(1.0)),
        (cpu.round_trip_tiles, torch.ones(4, 0)),
        (cpu.round_trip_tiles, torch.ones(4, 128).to(E4M3)),
        (cpu.round_trip_blocks, torch.ones(128)),
        (cpu.round_trip_blocks, torch.ones(0, 128)),
        (cpu.round_trip_kept, torch.ones(128)),
        (lambda x: cpu.round_trip_tiles(x, axis=-2), torch.ones(128)),
    ],
)
def test_what_has_no_parts_of_real_numbers_is_refused(call, x):
    with pytest.raises(QuantizationError, match="cannot be cut into parts"):
        call(x)


@pytest.mark.parametrize("tile", [0, -1, 2.5])
def test_a_tile_of_no_whole_number_of_values_is_refused(tile):
    with pytest.raises(QuantizationError, match="holds no whole number"):
        cpu.round_trip_tiles(torch.ones(4, 128), tile=tile)
    with pytest.raises(QuantizationError, match="holds no whole number"):
        cpu.round_trip_blocks(torch.ones(4, 128), block=(4, tile))


def test_an_axis_that_no_product_sums_over_is_refused():
    with pytest.raises(QuantizationError, match="axis=0"):
        cpu.round_trip_tiles(torch.ones(128, 128), axis=0)


def test_only_e4m3_codes_are_widened():
    with pytest.raises(QuantizationError, match="not float8_e4m3fn"):
        cpu.widen(torch.ones(4, dtype=torch.uint8))
