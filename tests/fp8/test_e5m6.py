"""E5M6 caches, against a search of every value and bytes put together as Python integers."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.fp8.e5m6 import pack_e5m6, unpack_e5m6
from dsv3_tutorial.fp8.formats import FORMATS
from dsv3_tutorial.fp8.quant import QuantizationError

E5M6 = FORMATS["e5m6"]
MAGNITUDES = torch.tensor([E5M6.magnitude(code) for code in range(E5M6._codes)]).double()


def codes_by_hand(x, scale):
    """Sign and the number of the nearest magnitude, the even one of two: for each x of a tile."""
    size = x.double().abs() / scale
    distance = (size[:, None] - MAGNITUDES).abs()
    ties = distance == distance.amin(dim=1, keepdim=True)
    even = ties & (torch.arange(len(MAGNITUDES)) % 2 == 0)
    best = torch.where(even.any(1), even.int().argmax(1), ties.int().argmax(1))
    return (torch.signbit(x).long() * 2048 + best).tolist()


def scale_by_hand(largest):
    """The smallest power of two that brings the largest to 65,024 or below, by trying them."""
    if largest == 0:
        return 1.0
    return next(2.0**k for k in range(-126, 128) if largest <= 65024 * 2.0**k)


@st.composite
def rows(draw):
    """Rows of any length, odd ones too: decades apart, with ties, zeros, float32's ends."""
    n = draw(st.integers(1, 280))
    spread, size = draw(st.sampled_from([0.0, 1.0, 6.0])), draw(st.integers(-38, 30))
    made = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    x = torch.randn(n, generator=made) * torch.exp(spread * torch.randn(n, generator=made))
    x = (x * 10.0**size).nan_to_num(posinf=3e38, neginf=-3e38)
    special = [0.0, -0.0, 1e-45, 65024.0, 65025.0, 1 + 2.0**-7, -(1 + 3 * 2.0**-7), 3.4e38]
    for value in draw(st.lists(st.sampled_from(special), max_size=4)):
        x[draw(st.integers(0, n - 1))] = value
    return x


@settings(max_examples=40, deadline=None)
@given(x=rows())
def test_any_row_is_packed_as_the_definition_says_byte_for_byte(x):
    packed, scale = pack_e5m6(x)
    codes = []
    for tile, own in zip(x.split(128), scale.tolist()):
        assert own == scale_by_hand(tile.abs().max().item())
        codes += codes_by_hand(tile, own)
    codes += [0] * (len(codes) % 2)
    pairs = [low | high << 12 for low, high in zip(codes[::2], codes[1::2])]
    assert bytes(packed.tolist()) == b"".join(pair.to_bytes(3, "little") for pair in pairs)


def test_every_finite_code_survives():
    values = F.pad(E5M6.values().float(), (0, 97)).view(32, 127)
    x = F.pad(values, (1, 0), value=65024.0)  # which lays each tile's scale on the same power
    packed, scale = pack_e5m6(x * 2.0**-9)
    assert (scale == 2.0**-9).all() and packed.shape == (x.shape[0], 192)
    assert torch.equal(unpack_e5m6(packed, scale, 128), x * 2.0**-9)


@settings(max_examples=25, deadline=None)
@given(x=rows())
def test_what_comes_back_is_within_a_hundred_and_twenty_eighth_and_packs_to_itself(x):
    packed, scale = pack_e5m6(x)
    back = unpack_e5m6(packed, scale, len(x))
    each = scale.double().repeat_interleave(128)[: len(x)]
    error = (back.double() - x.double()).abs()
    floor = each * E5M6.min_subnormal / 2
    assert (error <= torch.maximum(x.double().abs() / 128, floor) * (1 + 1e-12)).all()
    again = unpack_e5m6(*pack_e5m6(back), len(x))
    assert torch.equal(again, back)


def test_a_power_of_two_times_x_has_the_same_bytes():
    x = torch.randn(4, 200)
    packed, scale = pack_e5m6(x)
    for k in (-40, 3, 60):
        scaled, own = pack_e5m6(x * 2.0**k)
        assert torch.equal(scaled, packed) and torch.equal(own, scale * 2.0**k)


def test_cut_the_other_way_nothing_is_rounded_again():
    x = torch.randn(256, 256) * torch.exp(2 * torch.randn(256, 1))
    once = unpack_e5m6(*pack_e5m6(x), 256)
    turned = unpack_e5m6(*pack_e5m6(once.T), 256).T  # 128 x 1 tiles, as Wgrad wants them
    assert torch.equal(turned, once)


def test_two_values_take_three_bytes_and_an_odd_one_two_bytes_of_its_own():
    assert pack_e5m6(torch.ones(5, 7, 256))[0].shape == (5, 7, 384)
    packed, scale = pack_e5m6(torch.tensor([1.0, -1.0, 2.0]))
    assert packed.shape == (6,) and packed[5] == 0 and scale.shape == (1,)
    assert unpack_e5m6(packed, scale, 3).tolist() == [1.0, -1.0, 2.0]


def test_a_tile_of_zeros_has_the_scale_one_and_other_floats_go_in_and_come_out():
    x = torch.randn(2, 200).bfloat16()
    x[0] = 0.0
    packed, scale = pack_e5m6(x)
    assert scale[0].tolist() == [1.0, 1.0]
    back = unpack_e5m6(packed, scale, 200, torch.bfloat16)
    assert back.dtype == torch.bfloat16 and back[0].eq(0).all()
    assert torch.equal(back, unpack_e5m6(packed, scale, 200).bfloat16())
    assert torch.equal(pack_e5m6(x.double())[0], packed)


def test_the_error_on_normal_tiles_is_an_eighth_of_e4m3s():
    x = torch.randn(1000, 128)
    lost = (unpack_e5m6(*pack_e5m6(x), 128) - x).norm() / x.norm()
    assert 100 * lost == pytest.approx(0.332, abs=0.005)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_no_scale_brings_back_is_refused_or_marks_its_whole_tile(value):
    x = torch.ones(256)
    x[3] = value
    with pytest.raises(QuantizationError, match=r"NaN or infinity.*Find the step"):
        pack_e5m6(x)
    packed, scale = pack_e5m6(x, checked=False)
    back = unpack_e5m6(packed, scale, 256)
    assert back[:128].isnan().all() and torch.equal(back[128:], x[128:])


@pytest.mark.parametrize("x", [torch.arange(4), torch.tensor(1.0), torch.ones(3, 0)], ids=str)
def test_what_has_no_tiles_is_refused(x):
    with pytest.raises(QuantizationError, match=r"has no tiles of 128.*Give a floating-point"):
        pack_e5m6(x)


def test_bytes_scales_and_lengths_that_do_not_belong_together_are_refused():
    packed, scale = pack_e5m6(torch.randn(3, 200))
    wrong = [
        (packed.int(), scale, 200),
        (packed, scale, 202),
        (packed, scale[:, :1], 200),
        (packed[:, :-1], scale, 200),
        (packed[:0, :0], scale[:0, :0], 0),
    ]
    for packed_, scale_, n in wrong:
        with pytest.raises(QuantizationError, match=r"are not -?\d+ values of E5M6.*Give uint8"):
            unpack_e5m6(packed_, scale_, n)
