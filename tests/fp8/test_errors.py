"""Measures of what eight bits lose: by matrix, by token, by sum, by layer."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.fp8.errors import accumulate, lost_tokens, quantized_linear, relative_error
from dsv3_tutorial.fp8.quant import (
    dequantize_blocks,
    dequantize_tiles,
    quantize_blocks,
    quantize_tensor,
    quantize_tiles,
)


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spanning(seed, m, d, octaves):
    """Tokens each of whose sizes differs: a normal row times a power of two."""
    return drawn(seed, m, d) * torch.exp2(octaves * drawn(seed + 1, m, 1))


def test_a_relative_error_is_the_ratio_of_two_norms():
    x, y = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 1.0]])
    assert relative_error(x, y) == 3 / 5
    assert relative_error(x, x) == 0.0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.zeros(2), torch.ones(2)) == math.inf
    assert math.isnan(relative_error(x, x * torch.nan))


def test_a_relative_error_of_tiny_numbers_is_that_of_the_same_numbers_enlarged():
    x, y = drawn(0, 4, 8), drawn(1, 4, 8)
    tiny = 2.0**-120  # its square is below float32
    assert relative_error(x * tiny, y * tiny) == relative_error(x, y)


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 12), d=st.integers(1, 9), seed=st.integers(0, 999), kept=st.integers(0, 12))
def test_rows_set_to_zero_are_the_lost_ones_at_every_limit_below_one(m, d, seed, kept):
    x = drawn(seed, m, d)
    y = x.clone()
    y[kept:] = 0.0
    share = max(0, m - kept) / m
    for limit in (0.0, 0.5, 0.999):
        assert lost_tokens(x, y, limit) == pytest.approx(share, abs=1e-12)
    assert lost_tokens(x, y, 1.001) == 0.0


def test_a_token_of_zeros_is_kept_a_nan_is_lost_and_the_limit_itself_is_kept():
    x = torch.tensor([[0.0, 0.0], [1.0, 1.0], [4.0, 0.0], [4.0, 0.0]])
    y = torch.tensor([[0.0, 0.0], [torch.nan, 1.0], [2.0, 0.0], [1.99, 0.0]])
    assert lost_tokens(x, y) == 2 / 4
    assert lost_tokens(x.view(2, 2, 2), y.view(2, 2, 2)) == 2 / 4


def test_tokens_that_span_magnitudes_are_lost_by_coarse_scales_at_the_same_matrix_error():
    x = spanning(0, 256, 256, 7.0)
    tensor = (lambda codes, scale: codes.float() * scale)(*quantize_tensor(x))
    blocks, tiles = dequantize_blocks(*quantize_blocks(x)), dequantize_tiles(*quantize_tiles(x))
    lost = [lost_tokens(x, y) for y in (tensor, blocks, tiles)]
    assert lost[2] == 0.0 < 0.05 < lost[1] <= lost[0]
    errors = [relative_error(x, y) for y in (tensor, blocks, tiles)]
    assert max(errors) < 1.15 * min(errors)


def test_a_bf16_sum_of_ones_stops_at_256_and_an_fp16_one_at_2048():
    ones = [torch.ones(2)] * 2100
    assert accumulate(ones[:256], torch.bfloat16).tolist() == [256.0, 256.0]
    assert accumulate(ones[:400], torch.bfloat16).tolist() == [256.0, 256.0]
    assert accumulate(ones, torch.float16).tolist() == [2048.0, 2048.0]
    assert accumulate(ones, torch.float32).tolist() == [2100.0, 2100.0]


@settings(max_examples=40, deadline=None)
@given(parts=st.integers(1, 30), seed=st.integers(0, 999))
def test_each_addition_is_rounded_once_to_the_nearest(parts, seed):
    values = drawn(seed, parts, 3)
    total = accumulate(values, torch.bfloat16)
    by_hand = torch.zeros(3, dtype=torch.bfloat16)
    for part in values:
        exact = by_hand.double() + part.double()
        grid = torch.exp2(torch.frexp(exact)[1] - 8.0)  # BF16 keeps eight digits
        by_hand = ((exact / grid).round() * grid).bfloat16()
    # float32 rounds before BF16 does: a step of one bit where the sum lies next to a tie
    assert (total.double() - by_hand.double()).abs().max() <= 2.0**-7 * by_hand.abs().max()
    assert total.dtype == torch.bfloat16
    assert torch.equal(values, drawn(seed, parts, 3))


def test_sums_of_integers_that_fit_are_exact_in_every_format():
    parts = [torch.tensor([float(i), -2.0 * i]) for i in range(16)]
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert accumulate(iter(parts), dtype).tolist() == [120.0, -240.0]


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(1, 5),
    n=st.integers(1, 5),
    tiles=st.integers(1, 4),
    tile=st.sampled_from((1, 8, 128)),
    seed=st.integers(0, 999),
)
def test_a_quantised_layer_is_within_what_its_operands_may_err(m, n, tiles, tile, seed):
    x, w = drawn(seed, m, tiles * tile), drawn(seed + 1, n, tiles * tile)
    x[0, :tile] = 0.0
    y = quantized_linear(x, w, tile)
    # a value errs by a sixteenth, or by half of the grid's smallest step where it is tiny
    bounds = [t.abs() / 16 + t.abs().max() / 448 * 2.0**-10 for t in (x, w)]
    allowed = bounds[0] @ w.abs().T + (x.abs() + bounds[0]) @ bounds[1].T
    assert y.shape == (m, n)
    assert y.dtype == torch.float32
    assert ((y - x @ w.T).abs() <= 1.0001 * allowed + 1e-5).all()


def test_a_quantised_layer_of_numbers_on_the_grid_is_exact():
    codes = torch.tensor([448.0, -1.125, 2.0**-9, 0.0, 240.0, -26.0, 0.875, 3.0])
    x, w = torch.stack((codes, codes.flip(0))) / 4, torch.stack((codes * 2, codes.roll(3)))
    assert torch.equal(quantized_linear(x, w, 8), x @ w.T)
