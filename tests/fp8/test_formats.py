"""Grids of numbers, against the bits that PyTorch reads and against a search of every value."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.fp8.formats import (
    FORMATS,
    neighbours,
    power_of_two,
    real_tiles,
    round_e4m3,
    round_to,
    spacing,
)
from dsv3_tutorial.fp8.quant import QuantizationError

TORCH = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
BITS = {8: torch.uint8, 16: torch.int16}
every = pytest.mark.parametrize("fmt", FORMATS.values(), ids=list(FORMATS))
in_torch = pytest.mark.parametrize("fmt", [FORMATS[name] for name in TORCH], ids=list(TORCH))
floats = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50)


def all_codes(fmt):
    """Every bit pattern of a format, as PyTorch reads it: float64, infinity and NaN among them."""
    codes = torch.arange(2**fmt.bits).to(torch.int32)
    return codes.to(BITS[fmt.bits]).view(TORCH[fmt.name]).double()


def trial_points(fmt):
    """Values, the middle of any two neighbours, and what lies a hair to each side: float32."""
    values = fmt.values()
    points = torch.cat([values, (values[1:] + values[:-1]) / 2]).float()
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    return torch.cat([points, points.nextafter(up), points.nextafter(down)])


def search(x, fmt):
    """The nearest value by comparing x with its two neighbours in the list of all values."""
    up = torch.tensor([fmt.magnitude(code) for code in range(fmt._codes)], dtype=torch.float64)
    size = x.double().clamp(-fmt.max, fmt.max)
    sign = torch.where(size < 0, -1.0, 1.0) if fmt.signed else 1.0
    size = size.abs() if fmt.signed else size
    above = torch.searchsorted(up, size).clamp(0, len(up) - 1)
    below = (above - (up[above] > size).long()).clamp_min(0)
    far, near = up[above] - size, size - up[below]
    even = below % 2 == 0 if fmt.name != "ue8m0" else torch.zeros_like(below, dtype=torch.bool)
    return sign * torch.where((near < far) | ((near == far) & even), up[below], up[above])


def same_bits(a, b):
    kind = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.element_size()]
    return torch.equal(a.view(kind), b.view(kind))


@in_torch
def test_the_values_are_those_of_every_code_that_torch_reads(fmt):
    read = all_codes(fmt)
    assert torch.equal(fmt.values(), read[read.isfinite()].unique())
    positive = read[: 2 ** (fmt.bits - 1)]
    finite = positive[positive.isfinite()].tolist()
    assert [fmt.magnitude(code) for code in range(len(finite))] == finite
    assert positive[len(finite) :].isfinite().sum() == 0
    assert positive.isinf().any().item() is fmt.has_infinity


@in_torch
def test_the_limits_are_those_of_torch(fmt):
    info = torch.finfo(TORCH[fmt.name])
    assert fmt.max == info.max and fmt.bits == info.bits
    assert fmt.min_normal == info.smallest_normal
    assert fmt.min_subnormal == info.smallest_normal * info.eps


def test_ue8m0_is_the_powers_of_two_and_nothing_else():
    fmt = FORMATS["ue8m0"]
    assert fmt.values().tolist() == [2.0**k for k in range(-127, 128)]
    read = torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu).float()
    assert torch.equal(fmt.values().float(), read)
    assert (fmt.max, fmt.min_normal, fmt.min_subnormal, fmt.bits) == (2.0**127, *[2.0**-127] * 2, 8)


def test_int8_is_the_whole_numbers_without_the_last_negative_one():
    fmt = FORMATS["int8"]
    assert fmt.values().tolist() == list(range(-127, 128))
    assert (fmt.max, fmt.min_subnormal, fmt.bits) == (127.0, 1.0, 8)
    assert fmt.min_normal > fmt.max


def test_e5m6_is_fp16_with_its_last_four_bits_at_zero():
    fmt, codes = FORMATS["e5m6"], torch.arange(-(2**15), 2**15, 16).to(torch.int16)
    read = codes.view(torch.float16).double()
    assert torch.equal(fmt.values(), read[read.isfinite()].unique())
    assert (fmt.max, fmt.bits) == (65024.0, 12)


@in_torch
def test_rounding_is_torchs_cast_at_values_middles_and_beside_them(fmt):
    x = trial_points(fmt).clamp(-fmt.max, fmt.max)
    assert same_bits(round_to(x, fmt), x.to(TORCH[fmt.name]).float())


@every
def test_rounding_finds_the_nearest_of_all_values_and_the_even_code_in_the_middle(fmt):
    x = trial_points(fmt)
    assert torch.equal(round_to(x, fmt).double(), search(x, fmt))
    assert torch.equal(round_to(x.double(), fmt), search(x, fmt))


@settings(max_examples=30, deadline=None)
@given(x=floats, name=st.sampled_from(list(FORMATS)))
def test_any_float32_lands_on_the_nearest_value(x, name):
    x, fmt = torch.tensor(x), FORMATS[name]
    assert torch.equal(round_to(x, fmt).double(), search(x, fmt))


@every
def test_every_value_stays_where_it_is(fmt):
    values = fmt.values()
    assert torch.equal(round_to(values, fmt.name), values)
    assert torch.equal(round_to(values.float(), fmt).double(), values)


@every
def test_beyond_the_ends_the_last_value_stands_and_nan_stays(fmt):
    x = torch.tensor([math.inf, 3.4e38, -math.inf, math.nan])
    least = -fmt.max if fmt.signed else fmt.min_subnormal
    assert round_to(x, fmt).double()[:3].tolist() == [fmt.max, fmt.max, least]
    assert round_to(x, fmt)[3].isnan()
    assert round_to(x[2:3].double().abs(), fmt).item() == fmt.max


def test_a_zero_keeps_its_sign_and_what_becomes_zero_too():
    x = torch.tensor([0.0, -0.0, 1e-10, -1e-10])
    for name in ("e4m3", "e5m2", "e5m6", "fp16", "int8"):
        assert torch.signbit(round_to(x, name)).tolist() == [False, True, False, True]


def test_the_half_of_the_smallest_value_becomes_zero_and_a_hair_more_does_not():
    for fmt in FORMATS.values():
        if fmt.name == "ue8m0":
            continue
        half = torch.tensor(fmt.min_subnormal / 2, dtype=torch.float64)
        more = half.nextafter(torch.tensor(1.0, dtype=torch.float64))
        assert round_to(torch.stack([half, more]), fmt).tolist() == [0.0, fmt.min_subnormal]
        assert f"{fmt.min_subnormal / 2:g}" in fmt.underflow
    tiny = torch.tensor([0.0, -3.0, 2.0**-130], dtype=torch.float64)
    assert round_to(tiny, "ue8m0").tolist() == [2.0**-127] * 3


def test_the_words_on_overflow_say_what_the_format_has():
    words = {name: fmt.overflow for name, fmt in FORMATS.items()}
    assert "448" in words["e4m3"] and "NaN" in words["e4m3"]
    assert all("gives infinity" in words[name] for name in ("e5m2", "e5m6", "bf16", "fp16"))
    assert "neither" in words["int8"] and "no zero" in FORMATS["ue8m0"].underflow


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats_are_rounded_once_and_come_back_as_they_came(dtype):
    x = (torch.randn(2000) * torch.exp(3 * torch.randn(2000))).to(dtype)
    for name in ("e4m3", "e5m2", "e5m6", "int8"):
        rounded = round_to(x, name)
        assert rounded.dtype == dtype
        assert torch.equal(rounded.double(), search(x, FORMATS[name]))


@every
def test_x_lies_between_its_neighbours_and_they_are_next_to_each_other(fmt):
    values, x = fmt.values(), trial_points(fmt).double()
    below, above = neighbours(x, fmt)
    place = torch.searchsorted(values, x, right=True)
    padded = torch.cat([torch.tensor([-math.inf]).double(), values])
    assert torch.equal(below, padded[place])
    exact = below == x
    assert torch.equal(above[exact], x[exact])
    padded = torch.cat([values, torch.tensor([math.inf]).double()])
    assert torch.equal(above[~exact], padded[place[~exact]])


@every
def test_the_spacing_is_the_distance_of_the_neighbours(fmt):
    x = trial_points(fmt).double()
    below, above = neighbours(x, fmt)
    between = below.isfinite() & above.isfinite() & (below < above)
    assert between.sum() >= len(fmt.values()) - 1
    assert torch.equal(spacing(x, fmt)[between], (above - below)[between])
    assert torch.equal(spacing(x.float(), fmt).double(), spacing(x, fmt))


def test_e4m3_has_eight_steps_from_each_power_of_two_to_the_next():
    x = torch.tensor([0.0, 2.0**-6, 1.0, 1.99, 2.0, 17.0, 448.0, 1e9])
    steps = [2.0**-9, 2.0**-9, 0.125, 0.125, 0.25, 2.0, 32.0, 32.0]
    assert spacing(x, "e4m3").tolist() == steps
    assert [v.item() for v in neighbours(torch.tensor(17.0), "e4m3")] == [16.0, 18.0]
    assert [v.item() for v in neighbours(torch.tensor(-500.0), "e4m3")] == [-math.inf, -448.0]


def test_by_hand_is_torchs_cast_bit_for_bit_at_values_middles_and_beside_them():
    x = torch.cat([trial_points(FORMATS["e4m3"]), torch.tensor([math.inf, -math.inf, 1e-45, 3e38])])
    by_cast = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert same_bits(round_e4m3(x).to(torch.float8_e4m3fn), by_cast)
    assert same_bits(round_e4m3(x), by_cast.float())
    assert round_e4m3(torch.tensor(math.nan)).isnan()


@settings(max_examples=40, deadline=None)
@given(x=floats)
def test_by_hand_rounds_any_float32_as_a_saturating_cast_does(x):
    x = torch.tensor(x)[None, :, None]
    assert same_bits(round_e4m3(x), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_powers_of_two_are_exact():
    exponents = torch.arange(-126, 128)
    assert power_of_two(exponents).tolist() == [2.0**k for k in range(-126, 128)]
    exponents = torch.arange(-1022, 1024)
    wanted = [2.0**k for k in range(-1022, 1024)]
    assert power_of_two(exponents, torch.float64).tolist() == wanted


def test_the_relative_error_on_normal_tiles_is_what_the_mantissa_leaves():
    x = torch.randn(4000, 128)
    for name, percent in {"e4m3": 2.56, "e5m2": 5.11, "bf16": 0.166, "int8": 0.645}.items():
        fmt = FORMATS[name]
        scale = x.abs().amax(-1, keepdim=True) / (1.0 if name == "bf16" else fmt.max)
        lost = (round_to(x / scale, fmt) * scale - x).norm(dim=-1) / x.norm(dim=-1)
        assert 100 * lost.mean() == pytest.approx(percent, abs=0.02 if percent > 1 else 0.01)


def test_a_short_last_tile_is_filled_with_zeros():
    tiles = real_tiles(torch.ones(3, 5, dtype=torch.float64), 4)
    assert tiles.dtype == torch.float32 and tiles.shape == (3, 2, 4)
    assert tiles[0].tolist() == [[1.0] * 4, [1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("function", [round_to, spacing, neighbours])
def test_integers_and_unknown_formats_are_refused(function):
    with pytest.raises(QuantizationError, match=r"holds no fractions.*Give float32"):
        function(torch.arange(3), "e4m3")
    with pytest.raises(QuantizationError, match=r"no format 'e3m4'.*'e4m3', 'e5m2'"):
        function(torch.ones(3), "e3m4")


@pytest.mark.parametrize(
    "dtype, name",
    [(torch.bfloat16, "fp16"), (torch.float16, "bf16"), (torch.float16, "ue8m0")],
    ids=str,
)
def test_a_dtype_that_lacks_values_of_the_format_is_refused(dtype, name):
    with pytest.raises(QuantizationError, match=r"cannot hold every value.*Give float32"):
        round_to(torch.ones(3, dtype=dtype), name)
