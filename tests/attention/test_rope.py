import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.attention.cache import LatentCache
from dsv3_tutorial.attention.rope import (
    RotationTable,
    attention_factor,
    inverse_frequencies,
    rotate,
    rotate_halves,
    rotate_pairs,
    rotation_table,
)
from dsv3_tutorial.config import ModelConfig, RopeScaling

YARN = RopeScaling("yarn", 40.0, 4096, mscale=1.0, mscale_all_dim=1.0)


def config(rope_dim=8, **changes):
    sizes = {
        "vocab_size": 16,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": 4,
    }
    return ModelConfig(**{**sizes, **changes})


def draw(*shape):
    return torch.randn(*shape, generator=torch.manual_seed(0), dtype=torch.float64)


@settings(deadline=None, max_examples=30)
@given(
    pairs=st.integers(1, 8),
    near=st.integers(0, 500),
    distance=st.integers(0, 500),
    shift=st.integers(0, 500),
    interleave=st.booleans(),
)
def test_a_score_depends_on_the_distance_alone(pairs, near, distance, shift, interleave):
    frequencies = inverse_frequencies(config(2 * pairs)).double()
    q, k = draw(2, 1, 1, 1, 2 * pairs)

    def score(query_at, key_at):
        angles = torch.tensor([[query_at], [key_at]], dtype=torch.float64) * frequencies
        turned = (
            rotate(x, a[None].cos(), a[None].sin(), interleave) for x, a in zip((q, k), angles)
        )
        return math.prod(turned).sum()

    here, there = score(near + distance, near), score(near + distance + shift, near + shift)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-10)


@pytest.mark.parametrize("turn", [rotate_pairs, rotate_halves])
def test_turning_keeps_every_length_and_position_zero_changes_nothing(turn):
    x = draw(2, 6, 3, 8)
    cos, sin = rotation_table(config(), 6, dtype=torch.float64)
    turned = turn(x, cos, sin)
    # the table is float32, so cos^2 + sin^2 is 1 to 1e-7 only
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.equal(turned[:, 0], x[:, 0])
    assert not torch.allclose(turned[:, 1:], x[:, 1:], atol=0.1)


def test_the_first_pair_turns_one_radian_a_token_counter_clockwise():
    x = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]).view(1, 1, 1, 8).expand(1, 4, 1, 8)
    cos, sin = rotation_table(config(), 4)
    angle = torch.arange(4.0)
    pairs, halves = rotate_pairs(x, cos, sin)[0, :, 0], rotate_halves(x, cos, sin)[0, :, 0]
    torch.testing.assert_close(pairs[:, :2], torch.stack([angle.cos(), angle.sin()], -1))
    torch.testing.assert_close(halves[:, [0, 4]], torch.stack([angle.cos(), angle.sin()], -1))


def test_the_two_layouts_are_one_rotation_in_two_orders():
    x, order = draw(2, 5, 3, 8), [0, 2, 4, 6, 1, 3, 5, 7]
    cos, sin = rotation_table(config(), 5, dtype=torch.float64)
    pairs, halves = rotate_pairs(x, cos, sin), rotate_halves(x[..., order], cos, sin)
    assert torch.equal(pairs[..., order], halves)
    assert not torch.allclose(rotate_halves(x, cos, sin), pairs, atol=0.1)


def test_each_sequence_may_stand_at_positions_of_its_own():
    x, table = draw(2, 3, 2, 8), RotationTable(config())
    cache = LatentCache(2, 16, 8, 8, dtype=torch.float64)
    cache.append(draw(2, 5, 8), draw(2, 5, 8))
    cache.trim([5, 2])
    cos, sin = table.next_rows(cache, 3, x)
    assert cos.shape == (2, 3, 4)
    all_cos, all_sin = rotation_table(config(), 8, dtype=torch.float64)
    ragged = rotate(x, cos, sin)
    for row, start in enumerate((5, 2)):
        at = slice(start, start + 3)
        alone = rotate(x[row : row + 1], all_cos[at], all_sin[at])
        assert torch.equal(ragged[row : row + 1], alone)


def test_yarn_keeps_fast_pairs_and_slows_the_slowest_by_its_factor():
    plain, yarn = (inverse_frequencies(config(64, rope_scaling=s)) for s in (None, YARN))
    assert torch.equal(plain[:8], yarn[:8])
    torch.testing.assert_close(yarn[-4:], plain[-4:] / 40)
    ratio = plain / yarn
    assert bool((ratio.diff() >= -1e-6).all())
    assert ((ratio > 1.001) & (ratio < 39.9)).sum() >= 5  # the ramp


def test_deepseeks_two_mscales_cancel_in_the_table():
    assert attention_factor(config()) == 1.0
    assert attention_factor(config(rope_scaling=YARN)) == 1.0
    bare = RopeScaling("yarn", 40.0, 4096)
    assert attention_factor(config(rope_scaling=bare)) == pytest.approx(0.1 * math.log(40) + 1)
    cos, _ = rotation_table(config(rope_scaling=bare), 1)
    torch.testing.assert_close(cos, torch.full_like(cos, 0.1 * math.log(40) + 1))


def test_the_table_grows_once_and_then_only_slices():
    table, x = RotationTable(config()), torch.zeros(1, 5, 1, 8)
    cos, _ = table.next_rows(None, 5, x)
    held = table.cos
    assert len(held) >= 5 and torch.equal(cos, rotation_table(config(), 5)[0])
    table.next_rows(None, 9, x)
    assert table.cos is held
    table.next_rows(None, 11, x)
    assert table.cos is not held


def test_the_table_follows_the_dtype_and_is_never_rounded_for_good():
    table, x = RotationTable(config()), torch.zeros(1, 5, 1, 8)
    exact, _ = table.next_rows(None, 5, x)
    rounded, _ = table.next_rows(None, 5, x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(table.next_rows(None, 5, x)[0], exact)


def test_a_table_made_in_inference_mode_can_be_trained_with():
    table, x = RotationTable(config()), torch.zeros(1, 5, 1, 8, requires_grad=True)
    with torch.inference_mode():
        table.next_rows(None, 5, x)
    rotate(x, *table.next_rows(None, 5, x)).sum().backward()
    assert x.grad.shape == x.shape


def test_a_width_that_does_not_fit_the_angles_is_refused():
    cos, sin = rotation_table(config(), 3)
    with pytest.raises(ValueError, match=r"10 coordinates .* by 4 angles.*8 wide"):
        rotate(torch.zeros(1, 3, 1, 10), cos, sin)
