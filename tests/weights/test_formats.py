"""Weight formats: what each scale covers, how far a weight can move, and what that does outside."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.fp8.checks import QuantizationError
from dsv3_tutorial.weights import formats
from dsv3_tutorial.weights.formats import FORMATS, dequantize, predicted_error, quantize, spacing

ROUNDING = 1 + 1e-5  # of a division and a product in float32


@st.composite
def weights(draw):
    """Matrices and stacks of them, of odd sizes, with rows far apart, zeros and tiny numbers."""
    m, k = draw(st.integers(1, 140)), draw(st.sampled_from([1, 2, 7, 127, 128, 129, 260]))
    lead = draw(st.sampled_from([(), (3,)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    made = torch.randn(*lead, m, k, generator=generator)
    made *= 10.0 ** draw(st.integers(-30, 20))
    if draw(st.booleans()):
        made[..., draw(st.integers(0, m - 1)), :] = 0
    if draw(st.booleans()):
        made[..., 0, 0] *= 1000
    return made


@settings(max_examples=40, deadline=None)
@given(weight=weights(), fmt=st.sampled_from(FORMATS))
def test_no_weight_moves_by_more_than_half_a_step_and_zero_not_at_all(weight, fmt):
    q = quantize(weight, fmt)
    back = dequantize(q)
    assert back.shape == weight.shape == torch.Size(q.shape)
    moved, step = (back - weight).abs(), spacing(q)
    assert (moved <= step / 2 * ROUNDING).all()
    assert (back[weight == 0] == 0).all()
    assert torch.isfinite(q.scale).all() and (q.scale > 0).all()


@settings(max_examples=40, deadline=None)
@given(weight=weights(), fmt=st.sampled_from(FORMATS))
def test_what_is_quantised_once_stays_as_it_is(weight, fmt):
    once = quantize(weight, fmt)
    twice = quantize(dequantize(once), fmt)
    assert torch.equal(once.codes.view(torch.uint8), twice.codes.view(torch.uint8))
    torch.testing.assert_close(once.scale, twice.scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "fmt,codes,scale",
    [
        ("int8", (5, 3, 200), (5, 3)),
        ("int8-tensor", (5, 3, 200), (5,)),
        ("int8-tile", (5, 3, 200), (5, 3, 2)),
        ("fp8", (5, 3, 200), (5, 1, 2)),
        ("int4", (5, 3, 100), (5, 3, 2)),
    ],
)
def test_each_format_has_its_scales_and_bytes(fmt, codes, scale):
    q = quantize(torch.randn(5, 3, 200), fmt)
    assert (tuple(q.codes.shape), tuple(q.scale.shape)) == (codes, scale)
    assert q.codes.dtype.itemsize == 1 and q.scale.dtype == torch.float32
    assert q.nbytes == math.prod(codes) + 4 * math.prod(scale)


def test_the_largest_of_a_row_becomes_127_and_ties_go_to_the_even_code():
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -2.5], [0.0, -254.0, 1.0, 3.0, 5.0]])
    codes, scale = formats.quantize_int8(weight)
    assert scale.tolist() == [1.0, 2.0]
    assert codes.tolist() == [[127, 0, 2, 2, -2], [0, -127, 0, 2, 2]]


def test_the_largest_of_either_sign_gives_127_and_never_minus_128():
    weight = torch.randn(64, 50, generator=torch.Generator().manual_seed(1))
    codes, _ = formats.quantize_int8(weight)
    assert (codes.int().abs().amax(dim=-1) == 127).all()
    assert formats.unpack_int4(quantize(weight, "int4").codes, 50).abs().amax() == 7


def test_one_outlier_coarsens_what_shares_its_scale_and_nothing_else():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(4, 256, generator=generator)
    outlier = weight.clone()
    outlier[0, 0] = 1000.0
    for fmt, hurt in {
        "int8": (slice(0, 1), slice(1, None)),
        "int8-tile": (slice(0, 1), slice(1, 128)),
        "int4": (slice(0, 1), slice(1, 128)),
    }.items():
        one, two = dequantize(quantize(weight, fmt)), dequantize(quantize(outlier, fmt))
        changed = one != two
        assert changed[hurt].any()
        changed[0, : 256 if fmt == "int8" else 128] = False
        assert not changed.any(), fmt
    assert (dequantize(quantize(outlier, "int8-tensor"))[1:] == 0).all()


@settings(max_examples=30, deadline=None)
@given(
    codes=st.lists(st.integers(-8, 7), min_size=1, max_size=41).map(
        lambda values: torch.tensor(values, dtype=torch.int8)
    )
)
def test_two_codes_in_a_byte_come_back_and_the_even_one_lies_low(codes):
    packed = formats.pack_int4(codes)
    assert packed.dtype == torch.uint8 and len(packed) == math.ceil(len(codes) / 2)
    assert torch.equal(formats.unpack_int4(packed, len(codes)), codes)
    assert int(packed[0]) % 16 == int(codes[0]) + 8


def test_a_round_trip_through_bf16_weights_rounds_once():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    for fmt in FORMATS:
        q = quantize(weight, fmt)
        assert torch.equal(dequantize(q, torch.bfloat16), dequantize(q).to(torch.bfloat16))


def test_the_spacing_of_e4m3_is_the_gap_to_its_neighbours():
    every = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)  # 0 .. 448, ascending
    gap = every.float().diff()
    weight = every.float()[None, :]
    q = formats.Quantized("fp8", every[None], torch.ones(1, 1), (1, 127))
    assert torch.equal(spacing(q)[0, :-1], gap)  # each number's gap to the next above it
    assert torch.equal(dequantize(q), weight)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_predicted_error_of_outputs_is_the_measured_one(fmt):
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(192, 384, generator=generator)
    x = torch.randn(64, 384, generator=generator)
    q = quantize(weight, fmt)
    measured = (x @ (dequantize(q) - weight).T).square().mean().sqrt()
    predicted = ((x.square() @ spacing(q).square().T) / 12).mean().sqrt()
    assert abs(measured / predicted - 1) < 0.06
    if fmt == "int8":
        assert torch.allclose(
            predicted_error(x, q.scale), ((x.square() @ spacing(q).square().T) / 12).sqrt()
        )


def test_a_fair_error_budget_holds_for_each_output_and_not_only_on_average():
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(64, 512, generator=generator) * torch.logspace(-2, 1, 64)[:, None]
    x = torch.randn(400, 512, generator=generator)
    q = quantize(weight, "int8")
    error = x @ (dequantize(q) - weight).T
    ratio = (error / predicted_error(x, q.scale)).square().mean(dim=0).sqrt()  # by output
    assert ((ratio > 0.8) & (ratio < 1.2)).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad):
    weight = torch.ones(4, 8)
    weight[2, 3] = bad
    for fmt in FORMATS:
        with pytest.raises(QuantizationError, match="NaN or infinity"):
            quantize(weight, fmt)


def test_an_unknown_format_and_what_is_no_matrix_are_refused():
    with pytest.raises(QuantizationError, match=r"no weight format 'int3'.*int8-tile"):
        quantize(torch.ones(4, 8), "int3")
    with pytest.raises(QuantizationError, match="matrix"):
        quantize(torch.ones(8), "int8")
    with pytest.raises(QuantizationError, match="matrix"):
        quantize(torch.ones(4, 8, dtype=torch.int8), "int8")
