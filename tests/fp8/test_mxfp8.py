"""MXFP8, against the standard's rule followed one group at a time in Python's own floats."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.fp8.formats import FORMATS
from dsv3_tutorial.fp8.mxfp8 import dequantize_mx, quantize_mx
from dsv3_tutorial.fp8.quant import QuantizationError

E4M3 = torch.float8_e4m3fn


def by_hand(group):
    """X = 2^(floor(log2 amax) - 8), not below 2^-127; each element the value nearest to x / X."""
    largest = max(abs(v) for v in group)
    exponent = max(math.frexp(largest)[1] - 1 - 8, -127) if largest else -127
    values = [FORMATS["e4m3"].magnitude(code) for code in range(127)]
    stored = []
    for v in group:
        size = abs(v) / 2.0**exponent
        code = min(range(127), key=lambda code: (abs(values[code] - size), code % 2))
        stored.append(math.copysign(values[code], v))
    return stored, exponent


@st.composite
def rows(draw):
    """Rows of any length: decades apart, with ties, zeros, and the ends of float32."""
    n = draw(st.integers(1, 70))
    spread, size = draw(st.sampled_from([0.0, 1.0, 8.0])), draw(st.integers(-38, 30))
    made = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    x = torch.randn(n, generator=made) * torch.exp(spread * torch.randn(n, generator=made))
    x = (x * 10.0**size).nan_to_num(posinf=3e38, neginf=-3e38)
    special = [0.0, -0.0, 1e-45, 2.0**-126, 1.0, 1.0625, 511.9, 480.0, 464.0, 3.4e38]
    for value in draw(st.lists(st.sampled_from(special), max_size=4)):
        x[draw(st.integers(0, n - 1))] = value
    return x


@settings(max_examples=50, deadline=None)
@given(x=rows())
def test_any_row_is_stored_as_the_standard_says_bit_for_bit(x):
    stored, scale = quantize_mx(x)
    assert stored.dtype == E4M3 and scale.dtype == torch.float8_e8m0fnu
    wanted = [by_hand(group.tolist()) for group in x.split(32)]
    assert stored.float().tolist() == [value for values, _ in wanted for value in values]
    assert scale.view(torch.uint8).tolist() == [exponent + 127 for _, exponent in wanted]
    back = torch.tensor([v * 2.0**exponent for values, exponent in wanted for v in values])
    assert torch.equal(dequantize_mx(stored, scale), back)


def test_every_finite_code_survives_under_a_power_of_two():
    values = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    values = F.pad(values[~values.isnan()], (0, 25)).view(9, 31)
    x = F.pad(values, (1, 0), value=448.0) * 2.0**-20  # 448 lays each group on the same power
    stored, scale = quantize_mx(x)
    assert torch.equal(stored.float(), x * 2.0**20)
    assert torch.equal(dequantize_mx(stored, scale), x)


def test_the_largest_lands_between_256_and_512_and_saturates_above_448():
    x = torch.tensor([[256.0], [300.0], [448.0], [464.0], [511.0], [512.0]]) / 1024
    stored, scale = quantize_mx(x)
    assert stored.float().flatten().tolist() == [256.0, 288.0, 448.0, 448.0, 448.0, 256.0]
    assert scale.float().flatten().tolist() == [2.0**-10] * 5 + [2.0**-9]
    worst = 1 - dequantize_mx(stored, scale)[4] / x[4]
    assert 0.12 < worst < 0.125


def test_a_group_of_zeros_has_the_smallest_scale_and_stays_zero():
    x = torch.zeros(2, 40)
    x[1, 39] = 3.0
    stored, scale = quantize_mx(x)
    assert scale.float().tolist() == [[2.0**-127] * 2, [2.0**-127, 2.0**-7]]
    assert torch.equal(dequantize_mx(stored, scale), x)


def test_an_outlier_costs_its_own_group_only():
    x = torch.full((96,), 0.01)
    x[40] = 1000.0
    back = dequantize_mx(*quantize_mx(x))
    near, far = (back[41] - x[41]).abs(), (back[[0, 95]] - x[[0, 95]]).abs().amax()
    assert near > 1e-3 and far < 0.01 / 16


def test_shapes_dtypes_and_the_error_on_normal_rows():
    x = torch.randn(2, 50, 320)
    stored, scale = quantize_mx(x)
    assert stored.shape == (2, 50, 320) and scale.shape == (2, 50, 10)
    assert dequantize_mx(stored, scale, torch.bfloat16).dtype == torch.bfloat16
    lost = (dequantize_mx(stored, scale) - x).norm() / x.norm()
    assert 0.025 < lost < 0.031  # 2.9 %: saturated largest values come on top of E4M3's 2.6 %
    assert torch.equal(quantize_mx(x.double())[0].float(), stored.float())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_no_scale_brings_back_is_refused(value):
    with pytest.raises(QuantizationError, match=r"NaN or infinity.*Find the step"):
        quantize_mx(torch.tensor([1.0, value]))


@pytest.mark.parametrize("x", [torch.arange(4), torch.tensor(1.0), torch.ones(3, 0)], ids=str)
def test_what_has_no_groups_is_refused(x):
    with pytest.raises(QuantizationError, match=r"has no tiles of 32.*Give a floating-point"):
        quantize_mx(x)


def test_scales_that_are_not_one_a_group_are_refused():
    stored, scale = quantize_mx(torch.randn(3, 64))
    wrong = [(stored, scale.float()), (stored.float(), scale), (stored, scale[:, :1])]
    for stored_, scale_ in [*wrong, (stored[:, :20], scale), (stored[0, 0], scale)]:
        with pytest.raises(QuantizationError, match=r"are not MXFP8.*Give float8_e4m3fn"):
            dequantize_mx(stored_, scale_)


def test_rounded_up_nothing_saturates_and_normal_rows_lose_less():
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    x[0, :32] = 0
    errors = {}
    for up in (False, True):
        stored, scale = quantize_mx(x, up=up)
        errors[up] = ((dequantize_mx(stored, scale) - x).norm() / x.norm()).item()
    assert errors[True] < 0.027 < 0.028 < errors[False]
    ratio = x.abs().view(64, 8, 32).amax(-1) / scale.float()
    assert (ratio <= 448).all() and (ratio[1:] > 224).all()
    assert scale[0, 0].float() == 2.0**-127
