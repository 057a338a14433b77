"""LogFMT, against a search of every decoded value and against the paper's own formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.fp8.logfmt import RANGE, decode, encode
from dsv3_tutorial.fp8.quant import QuantizationError

each_width = pytest.mark.parametrize("bits", [8, 10])


def table(low, step, bits):
    """Every value a tile can decode to, by the formula in float64: K = 0, 1, ..., no sign."""
    steps = torch.arange(2 ** (bits - 1) - 1, dtype=torch.float64)
    return torch.cat([torch.zeros(1).double(), torch.exp(low.double() + step.double() * steps)])


@st.composite
def tiles(draw):
    """A row whose magnitudes span decades, with zeros, tiny and huge values among them."""
    n, seed = draw(st.integers(1, 300)), draw(st.integers(0, 9999))
    made = torch.Generator().manual_seed(seed)
    spread, size = draw(st.sampled_from([0.0, 0.01, 1.0, 3.0, 12.0])), draw(st.integers(-30, 20))
    x = torch.randn(n, generator=made) * torch.exp(spread * torch.randn(n, generator=made))
    x = x * 10.0**size
    if draw(st.booleans()):
        x[torch.rand(n, generator=made) < 0.3] = 0.0
    special = [1e-45, -1e-40, 3.4e38, 1.0, -1.0]
    for value in draw(st.lists(st.sampled_from(special), max_size=3)):
        x[draw(st.integers(0, n - 1))] = value
    return x


def assert_nearest(x, bits):
    """No decoded value of its own tile lies nearer to any x than the one that was chosen."""
    codes, low, step = encode(x, bits)
    back = decode(codes, low, step, bits)
    for tile in range(len(low)):
        cut = slice(128 * tile, 128 * tile + 128)
        values = table(low[tile], step[tile], bits).clamp_max(torch.finfo(torch.float32).max)
        values = torch.cat([values, -values]).float().double()
        least = (x[cut].double()[:, None] - values).abs().amin(dim=1)
        assert torch.equal((x[cut].double() - back[cut].double()).abs(), least)


@settings(max_examples=60, deadline=None)
@given(x=tiles(), bits=st.sampled_from([3, 5, 8, 10]))
def test_every_value_gets_the_decoded_value_nearest_to_it(x, bits):
    assert_nearest(x, bits)


@each_width
def test_the_middles_between_decoded_values_and_what_lies_beside_them_go_to_the_nearest(bits):
    ends = torch.tensor([0.01, 70.0])
    _, low, step = encode(ends, bits)
    values = table(low[0], step[0], bits)
    middles = ((values[1:] + values[:-1]) / 2).float()
    inf = torch.tensor(math.inf)
    for points in (middles, middles.nextafter(inf), middles.nextafter(-inf)):
        for part in points.split(120):
            assert_nearest(torch.cat([ends, part.clamp_min(0.01)]), bits)


@each_width
def test_low_step_and_codes_are_the_papers(bits):
    x = torch.tensor([0.0, -2.0, 8.0, 2.0, 0.0, 4.0, -8.0])
    codes, low, step = encode(x, bits)
    last, sign = 2 ** (bits - 1) - 1, 2 ** (bits - 1)
    assert low.item() == pytest.approx(math.log(2), rel=1e-6)
    assert step.item() == pytest.approx(
        (math.log(8) - math.log(2)) / (2 ** (bits - 1) - 2), rel=1e-6
    )
    middle = 1 + (last - 1) // 2  # log 4 lies halfway, and the steps are an even number
    assert codes.tolist() == [0, sign | 1, last, 1, 0, middle, sign | last]
    torch.testing.assert_close(decode(codes, low, step, bits), x, rtol=1e-6, atol=0)


@each_width
def test_rounding_is_to_the_nearest_number_not_to_the_nearest_logarithm(bits):
    x = torch.tensor([1.0, 1000.0])
    _, low, step = encode(x, bits)
    values = table(low[0], step[0], bits)
    k = 2 ** (bits - 2)
    between = (values[k] * values[k + 1]).sqrt(), (values[k] + values[k + 1]) / 2
    probe = (between[0] * 0.4 + between[1] * 0.6).float()  # above the middle of the logarithms
    assert probe > between[0] and encode(torch.cat([x, probe[None]]), bits)[0][2] == k


def test_rounding_on_the_number_line_does_not_enlarge_on_average():
    ends = torch.tensor([1e-4, 1e4])
    _, low, step = encode(ends)
    below, above = table(low[0], step[0], 8)[63:65].tolist()
    x = torch.linspace(below, above, 126 * 50).view(50, 126)  # evenly between two values
    codes, lows, steps = encode(F.pad(x, (2, 0), value=1e-4).index_fill(1, torch.tensor(1), 1e4))
    bias = (decode(codes, lows, steps)[:, 2:].mean() / x.mean() - 1).item()
    logs = ((x.log() - low) / step).round()  # the nearest logarithm instead
    enlarged = (torch.exp(low + step * logs).mean() / x.mean() - 1).item()
    assert abs(bias) < 1e-4 and enlarged > 2e-3


@each_width
def test_a_tiny_number_cannot_stretch_the_range_beyond_two_to_the_32(bits):
    x = torch.tensor([1.0, 1e-30, 2.0**-33 * 1.01, 2.0**-33 * 0.99, -(2.0**-32)])
    codes, low, step = encode(x, bits)
    assert low.item() == pytest.approx(-RANGE, rel=1e-6)
    assert step.item() == pytest.approx(RANGE / (2 ** (bits - 1) - 2), rel=1e-6)
    assert codes.tolist() == [2 ** (bits - 1) - 1, 0, 1, 0, 2 ** (bits - 1) | 1]
    assert low.item() >= -math.log(2.0**32) * (1 + 1e-6)


@each_width
def test_tiles_of_zeros_and_of_one_magnitude_have_the_step_zero(bits):
    x = torch.zeros(300)
    x[128:256] = torch.tensor([5.0, -5.0]).repeat(64)
    codes, low, step = encode(x, bits)
    assert step.tolist() == [0.0] * 3 and low.tolist()[::2] == [0.0] * 2
    assert codes[:128].eq(0).all() and codes[256:].eq(0).all()
    assert codes[128:256].tolist() == [1, 2 ** (bits - 1) | 1] * 64
    torch.testing.assert_close(decode(codes, low, step, bits), x, rtol=1e-6, atol=0)


@each_width
def test_tiles_do_not_know_each_other_and_a_short_one_ends_the_row(bits):
    x = torch.randn(2, 3, 300) * torch.exp(3 * torch.randn(2, 3, 1))
    codes, low, step = encode(x, bits)
    assert codes.shape == (2, 3, 300) and low.shape == step.shape == (2, 3, 3)
    assert codes.dtype == (torch.uint8 if bits == 8 else torch.int16)
    alone, own, own_step = encode(x[1, 2, 256:], bits)
    assert torch.equal(codes[1, 2, 256:], alone)
    assert low[1, 2, 2] == own[0] and step[1, 2, 2] == own_step[0]
    assert 2 ** (bits - 1) <= codes.int().max() < 2**bits and codes.int().min() >= 0


@each_width
def test_the_relative_error_on_normal_tiles_is_below_e4m3s(bits):
    x = torch.randn(2000, 128)
    back = decode(*encode(x, bits), bits)
    lost = 100 * ((back - x).norm(dim=-1) / x.norm(dim=-1)).mean()
    assert lost == pytest.approx({8: 1.38, 10: 0.34}[bits], abs=0.02 if bits == 8 else 0.01)


def test_the_largest_float32_comes_back_finite_though_its_logarithm_was_rounded_up():
    largest = torch.finfo(torch.float32).max
    for x in (torch.tensor([largest, -largest]), torch.tensor([1e30, -largest])):
        torch.testing.assert_close(decode(*encode(x)), x, rtol=1e-5, atol=0)


def test_other_floats_go_in():
    x = torch.randn(130).bfloat16()
    for kind in (torch.bfloat16, torch.float64):
        assert all(torch.equal(a, b) for a, b in zip(encode(x.to(kind)), encode(x.float())))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_without_a_finite_logarithm_is_refused(value):
    with pytest.raises(QuantizationError, match=r"NaN or infinity.*Find the step"):
        encode(torch.tensor([1.0, value]))


@pytest.mark.parametrize("x", [torch.arange(4), torch.tensor(1.0), torch.ones(3, 0)], ids=str)
def test_what_has_no_tiles_is_refused(x):
    with pytest.raises(QuantizationError, match=r"has no tiles of 128.*Give a floating-point"):
        encode(x)


@pytest.mark.parametrize("bits", [2, 16, 8.5, 8.0, "8", None])
def test_widths_without_a_step_or_a_code_are_refused(bits):
    with pytest.raises(QuantizationError, match="Give 3 to 15"):
        encode(torch.ones(4), bits)
    with pytest.raises(QuantizationError, match="Give 3 to 15"):
        decode(*encode(torch.ones(4)), bits)


def test_codes_of_another_width_and_ranges_of_other_tiles_are_refused():
    codes, low, step = encode(torch.randn(2, 200))
    wrong = [
        (codes, low, step, 10),
        (codes, low[:, :1], step, 8),
        (codes[:, :100], low, step, 8),
        (codes.int(), low, step, 8),
    ]
    for codes_, low_, step_, bits in wrong:
        with pytest.raises(QuantizationError, match=r"are not tiles of LogFMT-\d+.*Give"):
            decode(codes_, low_, step_, bits)
