"""FLOP per token: the paper's numbers, and the closed forms they follow from."""

import pytest

from dsv3_tutorial.config import ModelConfig, preset_names
from dsv3_tutorial.cost import flops, params

V3 = ModelConfig.named("deepseek-v3")

TABLE = {  # GFLOP per trained token at 4096, causal and not (2 heads' products a position more)
    "deepseek-v2": (155.31, 185.51),
    "deepseek-v3": (250.46, 281.16),
    "deepseek-v2-lite": (16.41, 18.11),
    "moonlight-16b-a3b": (17.17, 18.87),
    "qwen2.5-72b": (444.87, 460.98),
    "llama-3.1-405b": (2473.25, 2523.98),
}


@pytest.mark.parametrize("name", TABLE)
def test_training_flops_are_those_of_the_table(name):
    cfg = ModelConfig.named(name)
    causal, full = (flops.training_flops_per_token(cfg, 4096, c) / 1e9 for c in (True, False))
    assert (round(causal, 2), round(full, 2)) == TABLE[name]


@pytest.mark.parametrize("name", preset_names())
def test_training_is_three_forwards_and_a_short_sequence_is_two_per_parameter(name):
    cfg = ModelConfig.named(name)
    forward = flops.forward_flops_per_token(cfg, 512)
    assert flops.training_flops_per_token(cfg, 512) == 3 * forward
    assert flops.forward_flops_per_token(cfg, 0) == 2 * params.count(cfg).activated


def test_attention_over_a_sequence_is_quadratic_and_per_token_linear():
    rest = flops.forward_flops_per_token(V3, 0)
    one, two = (flops.forward_flops_per_token(V3, length) - rest for length in (4096, 8192))
    assert two == 2 * one
    assert 8192 * two == 4 * (4096 * one)


def test_decoding_expanded_at_the_middle_of_a_sequence_is_its_average_forward():
    expanded = flops.decode_flops_per_token(V3, 2048, absorb=False)
    assert expanded == flops.forward_flops_per_token(V3, 4096)


def test_absorbing_multiplies_the_context_s_arithmetic_by_three_point_four():
    rest = flops.decode_flops_per_token(V3, 0)
    assert rest == flops.decode_flops_per_token(V3, 0, absorb=False)
    absorbed = flops.decode_flops_per_token(V3, 1000) - rest
    expanded = flops.decode_flops_per_token(V3, 1000, absorb=False) - rest
    assert absorbed / expanded == pytest.approx(1088 / 320)


def test_absorb_means_nothing_without_a_latent():
    llama = ModelConfig.named("llama-3.1-405b")
    whole, half = (flops.decode_flops_per_token(llama, 4096, absorb) for absorb in (True, False))
    assert whole == half
