"""Weights in FP8: 128 x 128 blocks, a scale each, as DeepSeek-V3's checkpoints store them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.fp8.quant import (
    FP8_MAX,
    QuantizationError,
    dequantize_blocks,
    quantize_blocks,
    scale_shape,
)

E4M3 = torch.float8_e4m3fn
sides = st.integers(1, 300)


def by_hand(w, block=(128, 128)):
    """The definition, one block at a time."""
    (m, n), (rows, columns) = w.shape, block
    stored = torch.empty(m, n, dtype=E4M3)
    scale = torch.empty(math.ceil(m / rows), math.ceil(n / columns))
    for i in range(0, m, rows):
        for j in range(0, n, columns):
            cut = w[i : i + rows, j : j + columns].float()
            largest = cut.abs().max()
            factor = largest / FP8_MAX if largest > 0 else torch.tensor(1.0)
            scale[i // rows, j // columns] = factor
            stored[i : i + rows, j : j + columns] = (cut / factor).clamp(-448, 448).to(E4M3)
    return stored, scale


def weights(m, n, seed, spread=2.0):
    """Normal numbers whose size differs from one block to the next."""
    made = torch.Generator().manual_seed(seed)
    sizes = torch.exp(spread * torch.randn(-(-m // 128), -(-n // 128), generator=made))
    sizes = sizes.repeat_interleave(128, 0)[:m].repeat_interleave(128, 1)[:, :n]
    return torch.randn(m, n, generator=made) * sizes


@settings(max_examples=40, deadline=None)
@given(m=sides, n=sides, seed=st.integers(0, 999))
def test_any_shape_is_stored_as_the_definition_says_bit_for_bit(m, n, seed):
    w = weights(m, n, seed)
    stored, scale = quantize_blocks(w)
    by_definition = by_hand(w)
    assert torch.equal(stored.float(), by_definition[0].float())
    assert torch.equal(scale, by_definition[1])
    assert stored.dtype == E4M3 and scale.dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(m=sides, n=sides, seed=st.integers(0, 999), spread=st.floats(0, 8))
def test_what_comes_back_is_within_a_sixteenth_of_a_value_or_a_step_of_its_block(
    m, n, seed, spread
):
    w = weights(m, n, seed, spread)
    stored, scale = quantize_blocks(w)
    back = dequantize_blocks(stored, scale)
    own = scale.repeat_interleave(128, 0)[:m].repeat_interleave(128, 1)[:, :n]
    # half a step: 2^-4 of a normal value, 2^-10 of the scale among the subnormal ones
    bound = torch.maximum(w.abs() * 2.0**-4, own * 2.0**-10) * (1 + 1e-6)
    assert ((back - w).abs() <= bound).all()


def test_a_second_round_changes_nothing():
    once = dequantize_blocks(*quantize_blocks(weights(200, 130, 0)))
    assert torch.equal(dequantize_blocks(*quantize_blocks(once)), once)


def test_a_stack_of_experts_is_each_expert_by_itself():
    w = torch.stack([weights(130, 60, seed) for seed in range(3)])
    stored, scale = quantize_blocks(w)
    assert scale.shape == (3, 2, 1)
    for e in range(3):
        alone, own = quantize_blocks(w[e])
        assert torch.equal(stored[e].float(), alone.float()) and torch.equal(scale[e], own)
    back = dequantize_blocks(stored, scale)
    assert torch.equal(back[1], dequantize_blocks(stored[1], scale[1]))


def test_an_outlier_costs_its_own_block_only():
    w = torch.full((128, 256), 0.01)
    w[0, 0] = 1000.0
    back = dequantize_blocks(*quantize_blocks(w))
    assert (back[5, 5] - 0.01).abs() > 1e-3  # swallowed: the block's step is coarse by now
    torch.testing.assert_close(back[:, 128:], w[:, 128:], rtol=1e-6, atol=0)


def test_a_block_of_zeros_has_the_scale_one_and_comes_back_as_zeros():
    w = torch.zeros(130, 130)
    w[129, 129] = 3.0
    stored, scale = quantize_blocks(w)
    assert scale.tolist()[0] == [1.0, 1.0] and scale[1, 1] == 3.0 / 448
    assert torch.equal(dequantize_blocks(stored, scale), w)


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-34, 1e30, 3.4e38])
def test_the_tiniest_and_the_largest_numbers_keep_a_usable_scale(size):
    w = torch.full((2, 3), size)
    stored, scale = quantize_blocks(w)
    assert scale.isfinite().all() and (scale > 0).all() and stored.float().isfinite().all()
    if size > 1e-35:
        torch.testing.assert_close(dequantize_blocks(stored, scale), w, rtol=1e-6, atol=0)


def test_the_largest_value_of_a_block_lands_on_448_and_never_beyond():
    w = weights(256, 256, 1)
    stored = quantize_blocks(w)[0].float()
    blocks = stored.reshape(2, 128, 2, 128).abs().amax(dim=(1, 3))
    assert (blocks == FP8_MAX).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats_go_in_and_come_out(dtype):
    w = weights(64, 64, 2).to(dtype)
    stored, scale = quantize_blocks(w)
    exact = dequantize_blocks(stored, scale)
    assert torch.equal(dequantize_blocks(stored, scale, dtype), exact.to(dtype))
    assert torch.equal(stored.float(), quantize_blocks(w.float())[0].float())


def test_blocks_of_another_size_are_possible():
    w = weights(70, 50, 3)
    stored, scale = quantize_blocks(w, (32, 16))
    assert scale.shape == scale_shape(w.shape, (32, 16)) == (3, 4)
    wanted = by_hand(w, (32, 16))
    assert torch.equal(stored.float(), wanted[0].float()) and torch.equal(scale, wanted[1])
    own = scale.repeat_interleave(32, 0)[:70].repeat_interleave(16, 1)[:, :50]
    assert torch.equal(dequantize_blocks(stored, scale, block=(32, 16)), stored.float() * own)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_no_scale_brings_back_is_refused(value):
    w = torch.ones(3, 3)
    w[1, 1] = value
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        quantize_blocks(w)


def test_a_finite_float64_beyond_float32_is_refused():
    with pytest.raises(QuantizationError, match="beyond float32"):
        quantize_blocks(torch.full((3, 3), 1e300, dtype=torch.float64))


@pytest.mark.parametrize("block", [(0, 128), (128, -1), (1.5, 4)])
def test_a_block_without_a_whole_number_of_values_is_refused(block):
    with pytest.raises(QuantizationError, match="holds no whole number"):
        quantize_blocks(torch.ones(4, 4), block)
    with pytest.raises(QuantizationError, match="holds no whole number"):
        dequantize_blocks(*quantize_blocks(torch.ones(4, 4)), block=block)


@pytest.mark.parametrize(
    "w", [torch.ones(2, 2).to(E4M3), torch.ones(5), torch.ones(2, 2, dtype=torch.int64)], ids=str
)
def test_what_has_no_blocks_is_refused(w):
    with pytest.raises(QuantizationError, match="cannot be cut into parts of real numbers"):
        quantize_blocks(w)


def test_scales_that_are_not_one_a_block_are_refused():
    stored, scale = quantize_blocks(weights(130, 60, 4))
    with pytest.raises(QuantizationError, match=r"scales of shape \(2, 1\)"):
        dequantize_blocks(stored, scale.T)
    with pytest.raises(QuantizationError, match="float32"):
        dequantize_blocks(stored.float(), scale)
