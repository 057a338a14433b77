"""Presets are right, impossible configs are refused with everything that is wrong in one error."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial.config import ConfigError, ModelConfig, RopeScaling, preset_names
from dsv3_tutorial.cost import params

PRESETS = {
    *("deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "moonlight-16b-a3b"),
    *("qwen2.5-72b", "llama-3.1-405b", "deepseek-67b", "tiny", "small"),
}
V3 = ModelConfig.named("deepseek-v3").to_dict()
LLAMA = ModelConfig.named("llama-3.1-405b").to_dict()


def problems_of(raw) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(raw)
    return caught.value.problems


def test_the_presets_are_those_the_course_names():
    assert set(preset_names()) == PRESETS


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_survives_the_round_trip(name):
    cfg = ModelConfig.named(name)
    written = json.loads(json.dumps(cfg.to_dict()))
    assert ModelConfig.from_dict(written) == cfg
    assert hash(cfg) == hash(ModelConfig.named(name))


@given(
    heads=st.integers(1, 8),
    rope=st.integers(1, 16).map(lambda n: 2 * n),
    query=st.none() | st.integers(1, 64),
    groups=st.integers(1, 4),
    size=st.integers(2, 5),
    data=st.data(),
)
def test_every_possible_moe_config_survives_the_round_trip(heads, rope, query, groups, size, data):
    kept = data.draw(st.integers(1, groups))
    sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 3}
    heads = {"num_attention_heads": heads, "q_lora_rank": query, "kv_lora_rank": 4}
    widths = {"qk_nope_head_dim": 6, "qk_rope_head_dim": rope, "v_head_dim": 5}
    cfg = ModelConfig(
        **{**sizes, **heads, **widths},
        n_routed_experts=groups * size,
        n_group=groups,
        topk_group=kept,
        moe_intermediate_size=4,
        num_experts_per_tok=data.draw(st.integers(1, kept * size)),
        first_k_dense_replace=data.draw(st.integers(0, 4)),
        num_nextn_predict_layers=data.draw(st.integers(0, 2)),
        model_type=data.draw(st.sampled_from(["deepseek_v2", "deepseek_v3"])),
        n_shared_experts=data.draw(st.none() | st.integers(0, 2)),
        norm_topk_prob=data.draw(st.none() | st.booleans()),
    )
    assert ModelConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_small_fits_sixteen_megabytes_and_fp8_blocks():
    cfg = ModelConfig.named("small")
    counted = params.count(cfg)
    shipped = counted.total + counted.mtp + 2 * cfg.vocab_size * cfg.hidden_size  # MTP ships copies
    assert counted.total + counted.mtp < 7.5e6
    assert 2 * shipped < 16e6
    assert cfg.num_hidden_layers == 12 and cfg.num_nextn_predict_layers == 1
    assert cfg.n_group > cfg.topk_group > 1 and cfg.n_shared_experts == 1


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_a_trainable_presets_fp8_sides_are_whole_blocks(name):
    c = ModelConfig.named(name)
    heads = c.num_attention_heads
    sides = [c.hidden_size, c.intermediate_size, c.q_lora_rank, c.kv_lora_rank]
    sides += [c.kv_lora_rank + c.qk_rope_head_dim, heads * c.qk_head_dim, heads * c.v_head_dim]
    sides += [heads * (c.qk_nope_head_dim + c.v_head_dim), c.moe_intermediate_size or 1]
    assert [side for side in sides if side > 128 and side % 128] == []


def test_softmax_scale_is_what_deepseek_computes():
    m = 0.1 * math.log(40) + 1
    assert ModelConfig.named("deepseek-v3").softmax_scale == pytest.approx(m * m / 192**0.5, rel=0)
    m = 0.1 * 0.707 * math.log(40) + 1
    assert ModelConfig.named("deepseek-v2").softmax_scale == pytest.approx(m * m / 192**0.5, rel=0)
    assert ModelConfig.named("moonlight-16b-a3b").softmax_scale == 192**-0.5
    assert ModelConfig.named("llama-3.1-405b").softmax_scale == 128**-0.5


def test_a_model_type_decides_what_a_config_leaves_open():
    small = ModelConfig.named("small")
    assert (small.scoring_func, small.topk_method, small.norm_topk_prob) == (
        *("sigmoid", "noaux_tc", True),
    )
    lite = ModelConfig.named("deepseek-v2-lite")
    assert (lite.scoring_func, lite.topk_method, lite.norm_topk_prob) == (
        *("softmax", "greedy", False),
    )
    assert not ModelConfig.named("llama-3.1-405b").rope_interleave
    assert ModelConfig.named("qwen2.5-72b").qkv_bias and not ModelConfig.named("tiny").qkv_bias


def test_without_experts_every_layer_is_dense_however_many_there_are():
    tiny = replace(ModelConfig.named("tiny"), num_hidden_layers=6)
    assert tiny.first_k_dense_replace == 6
    assert not any(tiny.is_moe_layer(layer) for layer in range(7))


def test_moe_begins_after_the_dense_layers_and_includes_the_mtp_layer():
    cfg = ModelConfig.named("deepseek-v3")
    assert [cfg.is_moe_layer(layer) for layer in (0, 2, 3, 60, 61)] == [False, False] + [True] * 3


ONE_WRONG = {
    "num_attention_heads must be positive, got 0": {"num_attention_heads": 0},
    "num_attention_heads must be positive, got -4": {"num_attention_heads": -4},
    "num_attention_heads must be int, got True": {"num_attention_heads": True},
    "hidden_size must be int, got '7168'": {"hidden_size": "7168"},
    "hidden_size must be int, got 7168.0": {"hidden_size": 7168.0},
    "hidden_size must be int, got None": {"hidden_size": None},
    "norm_topk_prob must be bool | None, got 1": {"norm_topk_prob": 1},
    "rms_norm_eps must be float, got nan": {"rms_norm_eps": math.nan},
    "rope_theta must be float, got inf": {"rope_theta": math.inf},
    "rotary positions need an even dimension, got 63": {"qk_rope_head_dim": 63},
    "300 experts a token, but only 256 exist": {"num_experts_per_tok": 300},
    "256 experts do not divide into 7 groups": {"n_group": 7},
    "topk_group 9 is more than the 8 groups": {"topk_group": 9},
    "129 experts a token do not fit in 4 groups of 32": {"num_experts_per_tok": 129},
    "noaux_tc scores a group by its best two experts, but groups have 1": {
        **{"n_group": 256, "topk_group": 256}
    },
    "n_routed_experts is set, so moe_intermediate_size is needed": {"moe_intermediate_size": None},
    "kv_lora_rank is set, so v_head_dim is needed": {"v_head_dim": None},
    "model_type 'deepseek_v3' is MLA, so kv_lora_rank is needed": {"kv_lora_rank": None},
    "MLA has a key for each of its 128 heads, not 8": {"num_key_value_heads": 8},
    "n_shared_experts must be 0 or more, got -1": {"n_shared_experts": -1},
    "first_k_dense_replace must be 0 or more, got -1": {"first_k_dense_replace": -1},
    "model_type 'gpt2' is not one of ('deepseek_v3', 'deepseek_v2', 'llama', 'qwen2')": {
        "model_type": "gpt2"
    },
    "scoring_func 'tanh' is not one of ('sigmoid', 'softmax')": {"scoring_func": "tanh"},
    "topk_method must be str | None, got ['greedy']": {"topk_method": ["greedy"]},
    "unknown field 'index_topk'": {"index_topk": 2048},
}


@pytest.mark.parametrize("problem", ONE_WRONG)
def test_one_wrong_field_is_the_one_problem_reported(problem):
    assert problems_of({**V3, **ONE_WRONG[problem]}) == [problem]


@pytest.mark.parametrize("name", ["model_type", "vocab_size", "num_hidden_layers"])
def test_a_missing_field_is_named_and_nothing_else_is_blamed(name):
    raw = {key: value for key, value in V3.items() if key != name}
    assert problems_of(raw) == [f"missing field {name!r}"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_key_value_heads": 7}, "128 heads do not divide by 7 key-value heads"),
        ({"num_attention_heads": 24}, "hidden_size 16384 does not divide by 24 heads"),
        ({"head_dim": 63}, "rotary positions need an even dimension, got 63"),
        (
            {"rope_interleave": True},
            "rope_interleave cannot be honoured: llama pairs (0, d/2), ...",
        ),
    ],
)
def test_a_plain_attention_must_divide(change, problem):
    assert problems_of({**LLAMA, **change}) == [problem]


def test_everything_wrong_is_in_one_error():
    wrong = {
        **{"num_attention_heads": 0, "qk_rope_head_dim": 63, "num_experts_per_tok": 300},
        **{"n_group": 7, "hidden_size": "wide", "rms_norm_eps": math.nan, "hidden_act": "gelu"},
        **{"index_topk": 1, "quantization_config": {"quant_method": "awq", "bits": 4}},
        "rope_scaling": {"type": "yarn", "factor": 0.5},
    }
    raw = {**V3, **wrong}
    del raw["vocab_size"], raw["max_position_embeddings"]
    found = problems_of(raw)
    for word in (*wrong, "vocab_size"):
        told = {"qk_rope_head_dim": "63", "num_experts_per_tok": "300", "n_group": "7 groups"}
        assert any(told.get(word, word) in problem for problem in found), (word, found)
    message = str(ConfigError(found))
    assert all(problem in message for problem in found)
    assert "No model can be built" in message and "Mend" in message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1, 2]", "a config is an object of fields, got a list"),
        ('"v3"', "a config is an object of fields, got a str"),
        ("null", "a config is an object of fields, got a NoneType"),
        ("{", "config.json is not JSON"),
        ("[" * 100_000, "config.json is not JSON"),
        ("\udcff", "config.json is not JSON"),
    ],
)
def test_a_file_that_holds_no_config_is_refused(tmp_path, text, told):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=told):
        ModelConfig.from_json(tmp_path)


def test_a_missing_file_and_an_unknown_preset_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no file 'nowhere\.json'"):
        ModelConfig.from_json(tmp_path / "nowhere.json")
    with pytest.raises(ConfigError, match="no preset 'v4'; there are deepseek-67b, deepseek-v2"):
        ModelConfig.named("v4")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(name=st.sampled_from([*V3, "rope_parameters", "layer_types", "head_dim"]), value=json_values)
def test_no_value_anywhere_raises_anything_but_a_config_error(name, value):
    for raw in (V3, LLAMA):
        try:
            cfg = ModelConfig.from_dict({**raw, name: value})
        except ConfigError:
            continue
        assert ModelConfig.from_dict(cfg.to_dict()) == cfg


def test_a_rope_scaling_built_by_hand_is_checked_too():
    cfg = ModelConfig.named("tiny")
    with pytest.raises(ConfigError, match="yarn needs beta_fast > beta_slow"):
        replace(cfg, rope_scaling=RopeScaling("yarn", 4.0, 1024, beta_fast=1.0))
    with pytest.raises(ConfigError, match="llama3 needs high_freq_factor > low_freq_factor"):
        replace(cfg, rope_scaling=RopeScaling("llama3", 4.0, 1024, high_freq_factor=0.5))
    with pytest.raises(ConfigError, match="rope_type 'linear' is not one of"):
        replace(cfg, rope_scaling=RopeScaling("linear", 4.0, 1024))
