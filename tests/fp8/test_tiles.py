"""Tiles, rows and tensors in E4M3: bit-equal to the definition, whatever the numbers are."""

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.backend import BackendError
from dsv3_tutorial.fp8 import quant
from dsv3_tutorial.fp8.quant import QuantizationError


def single(value: float) -> float:
    """The nearest float32, as the machine's C library rounds it."""
    return struct.unpack("f", struct.pack("f", value))[0]


def nearest_e4m3(value: float) -> float:
    """By search over all 254 numbers that E4M3's definition has; a tie goes to the even code."""
    magnitudes = [
        (m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7), m % 2)
        for e in range(16)
        for m in range(8)
        if (e, m) != (15, 7)
    ]
    best = min(magnitudes, key=lambda own: (abs(abs(value) - own[0]), own[1]))[0]
    return math.copysign(best, value)


@st.composite
def tiles(draw):
    """Magnitudes over many decades, with zeros, ties and repeated values; a ragged end."""
    exponent = st.integers(-40, 40)
    number = st.one_of(
        st.just(0.0),
        st.builds(
            lambda m, e, s: s * m * 2.0**e, st.floats(1, 2), exponent, st.sampled_from([-1, 1])
        ),
        st.builds(lambda m, e: (m + 0.5) / 8 * 2.0**e, st.integers(8, 15), exponent),
    )
    values = draw(st.lists(number, min_size=1, max_size=12))
    return torch.tensor(values, dtype=torch.float32), draw(st.sampled_from([3, 4, 128]))


@settings(max_examples=150, deadline=None)
@given(tiles(), st.booleans())
def test_every_tile_is_what_the_definition_says_bit_for_bit(given_tile, pow2):
    x, tile = given_tile
    stored, scale = quant.quantize_tiles(x, pow2=pow2, tile=tile)
    for i, begin in enumerate(range(0, len(x), tile)):
        own = x[begin : begin + tile].tolist()
        largest = max(map(abs, own))
        wanted = single(largest / 448) if largest else 1.0
        if pow2 and largest:
            wanted = 2.0 ** math.ceil(math.log2(wanted))
        assert scale[i].item() == wanted
        for number, found in zip(own, stored[begin : begin + tile].float().tolist()):
            assert found == nearest_e4m3(max(-448.0, min(448.0, single(number / wanted))))


@settings(max_examples=60, deadline=None)
@given(tiles())
def test_a_power_of_two_on_the_input_goes_into_the_scale_and_changes_no_code(given_tile):
    x, tile = given_tile
    stored, scale = quant.quantize_tiles(x, tile=tile)
    again, other = quant.quantize_tiles(x * 2.0**20, tile=tile)
    assert torch.equal(stored.float(), again.float())
    assert torch.equal(
        torch.where(scale == 1, scale, scale * 2.0**20), torch.where(scale == 1, scale, other)
    )


def test_what_comes_back_is_stored_times_scale_in_any_layout():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 300)
    stored, scale = quant.quantize_tiles(x)
    assert stored.shape == x.shape and scale.shape == (3, 5, 3)
    back = quant.dequantize_tiles(stored, scale)
    assert torch.equal(back[..., 256:], stored[..., 256:].float() * scale[..., 2:])
    assert (back - x).norm() / x.norm() < 0.027
    whole = quant.cast_tiles(x[..., :256])
    assert torch.equal(whole[0].float(), stored[..., :256].float())
    assert torch.equal(quant.restore_tiles(*whole), back[..., :256])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_widened_or_narrowed_to_float32_first(dtype):
    x = torch.randn(4, 256).to(dtype)
    stored, scale = quant.quantize_tiles(x)
    wanted, own = quant.quantize_tiles(x.float())
    assert torch.equal(stored.float(), wanted.float()) and torch.equal(scale, own)


def test_moving_between_tiles_of_powers_of_two_loses_nothing():
    torch.manual_seed(0)
    x = torch.randn(256, 256)
    cached = quant.dequantize_tiles(*quant.quantize_tiles(x, pow2=True))
    across = quant.dequantize_tiles(*quant.quantize_tiles(cached.T.contiguous(), pow2=True)).T
    assert (across != cached).float().mean() < 1e-4  # only what falls below its new tile's range
    cached = quant.dequantize_tiles(*quant.quantize_tiles(x))
    across = quant.dequantize_tiles(*quant.quantize_tiles(cached.T.contiguous())).T
    assert (across != cached).float().mean() > 0.5


def test_a_gradient_of_1e_9_keeps_its_digits():
    torch.manual_seed(0)
    dy = 1e-9 * torch.randn(64, 256)
    back = quant.dequantize_tiles(*quant.quantize_tiles(dy))
    assert (back - dy).norm() / dy.norm() < 0.027
    floored = 1e-4 / 448  # the floor of DeepSeek's inference code
    lost = quant.quantize_tensor(dy, scale=floored)[0].float() * floored
    assert (lost - dy).norm() / dy.norm() > 0.1


def test_zero_tiles_have_the_scale_1_and_subnormal_ones_survive():
    stored, scale = quant.quantize_tiles(torch.zeros(2, 256))
    assert (stored.float() == 0).all() and (scale == 1).all()
    tiny = torch.full((128,), 1e-40)
    stored, scale = quant.quantize_tiles(tiny)
    assert scale.item() == torch.finfo(torch.float32).tiny and stored.float().isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("pow2", [False, True])
def test_nan_and_infinity_are_refused_or_spoil_exactly_their_own_part(bad, pow2):
    x = torch.ones(2, 256)
    x[1, 5] = bad
    for cast in (quant.quantize_tiles, quant.quantize_rows, quant.quantize_tensor):
        with pytest.raises(QuantizationError, match="NaN or infinity"):
            cast(x, pow2=pow2)
    back = quant.dequantize_tiles(*quant.quantize_tiles(x, pow2=pow2, checked=False))
    assert back[1, :128].isnan().all() and (back[0] == 1).all() and (back[1, 128:] == 1).all()
    stored, scale = quant.quantize_blocks(x, pow2=pow2, checked=False)
    back = quant.dequantize_blocks(stored, scale)
    assert back[:, :128].isnan().all() and (back[:, 128:] == 1).all()


def test_rows_and_tensors_have_one_scale_each():
    torch.manual_seed(0)
    x = torch.randn(6, 300)
    stored, scale = quant.quantize_rows(x)
    assert torch.equal(scale[:, 0], x.abs().amax(dim=1) / 448)
    assert (stored.float() * scale - x).norm() / x.norm() < 0.03
    stored, scale = quant.quantize_tensor(x, pow2=True)
    assert scale.ndim == 0 and math.log2(scale.item()).is_integer()
    assert stored.float().abs().max() <= 448
    clamped = quant.quantize_tensor(torch.tensor([1.0, 1000.0]), scale=1.0)[0]
    assert clamped.float().tolist() == [1.0, 448.0]


@pytest.mark.parametrize(
    "bad",
    [
        torch.ones(4, dtype=torch.int32),
        torch.tensor(1.0),
        torch.ones(3, 0),
        torch.ones(4, 128).to(torch.float8_e4m3fn),
        torch.ones(4, 128).to(torch.float8_e5m2),
    ],
)
def test_what_has_no_tiles_is_refused(bad):
    with pytest.raises(QuantizationError, match="Give a floating-point vector"):
        quant.quantize_tiles(bad)


LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("n", [256, 200])
def test_float32_s_largest_comes_back_as_itself_under_a_power_of_two(n):
    """256 of 2^120 would be 2^128; codes and scales stay those of the definition."""
    x = torch.full((2, n), 1.0)
    x[0, :3] = torch.tensor([LARGEST, -LARGEST, 1.9 * 2.0**127])
    x[1, :2] = torch.tensor([1.75, -1.75]) * 2.0**127  # 448 * 2^119: no clamp is needed
    stored, scale = quant.quantize_tiles(x, pow2=True)
    assert scale[:, 0].tolist() == [2.0**120, 2.0**119]
    assert stored[0, :3].float().tolist() == [256, -256, 240]
    back = quant.dequantize_tiles(stored, scale)
    assert back[0, :3].tolist() == [LARGEST, -LARGEST, 240 * 2.0**120]
    assert back[1, :2].tolist() == x[1, :2].tolist() and back.isfinite().all()
    half = quant.dequantize_tiles(stored, scale, torch.bfloat16)
    assert half[0, :2].tolist() == [torch.finfo(torch.bfloat16).max * s for s in (1, -1)]
    blocks = quant.quantize_blocks(x, pow2=True)
    assert blocks[1][0, 0] == 2.0**120
    assert quant.dequantize_blocks(*blocks)[0, :2].tolist() == [LARGEST, -LARGEST]


def test_float32_s_largest_is_exact_under_a_scale_of_its_own():
    x = torch.tensor([LARGEST, -LARGEST, torch.tensor(LARGEST).nextafter(torch.tensor(0.0)).item()])
    for size in x:
        stored, scale = quant.quantize_tiles(size[None])
        assert (stored.float() * scale).isfinite().all()
    assert quant.dequantize_tiles(*quant.quantize_tiles(x))[:2].tolist() == [LARGEST, -LARGEST]


def test_nan_is_not_clamped_away_beside_a_scale_that_clamps():
    x = torch.full((2, 128), LARGEST)
    x[1, 0] = torch.nan
    back = quant.dequantize_tiles(*quant.quantize_tiles(x, pow2=True, checked=False))
    assert (back[0] == LARGEST).all() and back[1].isnan().all()


def test_scales_of_another_shape_are_refused():
    stored, scale = quant.quantize_tiles(torch.ones(4, 256))
    with pytest.raises(QuantizationError, match=r"scales of shape \(4, 2\)"):
        quant.dequantize_tiles(stored, scale[:, :1])


def test_triton_cannot_be_forced_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="cannot run here"):
        quant.quantize_tiles(torch.ones(2, 128), backend="triton")


def test_an_old_gpu_takes_the_reference_unless_the_kernel_is_forced(monkeypatch):
    pytest.importorskip("triton")
    from dsv3_tutorial.fp8 import triton_quant

    monkeypatch.setattr(quant, "pick", lambda x, backend: "triton")
    monkeypatch.setattr(triton_quant, "fp8_problem", lambda device: "compute capability 8.0")
    assert quant.pick_fp8(torch.ones(1, 128)) == "reference"
    assert quant.pick_fp8(torch.ones(1, 128), "triton") == "triton"
    stored, scale = quant.quantize_tiles(torch.ones(1, 128))
    assert stored.float().unique().item() == 448 and scale.shape == (1, 1)


def test_the_kernel_forced_onto_other_blocks_is_refused(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(quant, "pick", lambda x, backend: "triton")
    with pytest.raises(QuantizationError, match="no blocks of 64 x 64"):
        quant.quantize_blocks(torch.ones(64, 64), block=(64, 64), backend="triton")
