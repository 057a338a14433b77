"""config.json as published, as transformers 5 writes it, and as transformers reads ours."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3

from dsv3_tutorial.config import ConfigError, ModelConfig, RopeScaling, preset_names
from dsv3_tutorial.huggingface import MODEL_TYPES

YARN = {
    **{"type": "yarn", "factor": 4, "beta_fast": 32, "beta_slow": 1, "mscale": 0.9},
    **{"mscale_all_dim": 0.707, "original_max_position_embeddings": 1024},
}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 1024,
}
SIZES = {
    **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
}
MLA = {
    **{"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8},
    **{"v_head_dim": 10, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3},
    **{"moe_intermediate_size": 20, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2},
    **{"num_key_value_heads": 4},
}
CLASSES = {
    "deepseek_v3": transformers.DeepseekV3Config,
    "deepseek_v2": transformers.DeepseekV2Config,
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
}


def theirs(kind: str, **changes):
    sizes = {**SIZES, **(MLA if kind.startswith("deepseek") else {"num_key_value_heads": 2})}
    return CLASSES[kind](**copy.deepcopy({**sizes, **changes}))  # it writes into what it is given


ROPES = {"deepseek_v3": YARN, "deepseek_v2": YARN, "llama": LLAMA3, "qwen2": None}
QUANTIZED = {
    **{"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "activation_scheme": "dynamic",
}


@pytest.mark.parametrize("stretched", [False, True], ids=["plain", "stretched"])
@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_what_transformers_writes_is_read_to_the_same_numbers(kind, stretched, tmp_path):
    config = theirs(kind, **({"rope_scaling": ROPES[kind]} if stretched and ROPES[kind] else {}))
    ours = ModelConfig.from_dict(config.to_dict())
    config.save_pretrained(tmp_path)
    assert ModelConfig.from_json(tmp_path) == ours
    for name, value in {**SIZES, **(MLA if ours.is_mla else {})}.items():
        assert getattr(ours, name) == value, name
    assert (ours.rope_scaling is not None) == (stretched and ROPES[kind] is not None)
    if ours.rope_scaling is not None:
        for name, value in ROPES[kind].items():
            field = "rope_type" if name == "type" else name
            assert getattr(ours.rope_scaling, field) == value, name


@pytest.mark.parametrize("name", preset_names())
def test_transformers_reads_our_presets_to_the_same_numbers(name):
    ours = ModelConfig.named(name)
    written = ours.to_dict()
    config = CLASSES[ours.model_type].from_dict(json.loads(json.dumps(written)))
    rope = config.rope_parameters
    for field, value in written.items():
        if field not in ("rope_scaling", "rope_theta", "quantization_config"):
            assert getattr(config, field) == value, field
    assert rope["rope_theta"] == ours.rope_theta
    for field, value in written.get("rope_scaling", {}).items():
        assert rope[field] == value, field
    if ours.is_mla and not ours.q_lora_rank:
        assert config.q_lora_rank is None
    back = ModelConfig.from_dict(config.to_dict())
    if ours.n_routed_experts is None and ours.is_mla:  # their class cannot say "no experts"
        assert not any(back.is_moe_layer(layer) for layer in range(ours.num_hidden_layers))
    else:
        assert replace(back, head_dim=ours.head_dim) == ours  # transformers writes it out
        assert back.head_size == ours.head_size


@pytest.mark.parametrize("rope", [None, YARN], ids=["plain", "yarn"])
def test_softmax_scale_equals_transformers(rope):
    pairs = [("deepseek_v3", modeling_deepseek_v3.DeepseekV3Attention)]
    if hasattr(modeling_deepseek_v2, "yarn_apply_mscale"):  # older releases forgot it for V2
        pairs.append(("deepseek_v2", modeling_deepseek_v2.DeepseekV2Attention))
    for kind, attention in pairs:
        config = theirs(kind, **({"rope_scaling": rope} if rope else {}))
        with torch.device("meta"):
            expected = attention(config, 0).scaling
        assert ModelConfig.from_dict(config.to_dict()).softmax_scale == pytest.approx(expected)


def test_v3s_own_quantization_is_kept():
    cfg = ModelConfig.from_dict(theirs("deepseek_v3", quantization_config=QUANTIZED).to_dict())
    assert cfg.quantization_config.weight_block_size == (128, 128)
    assert cfg.to_dict()["quantization_config"] == QUANTIZED


REFUSED = {
    "quantization_config: 'awq' cannot be honoured": {"quant_method": "awq", "bits": 4},
    "quantization_config: 'gptq' cannot be honoured": {"quant_method": "gptq", "bits": 4},
    "quantization_config: None cannot be honoured": {},
    "quantization_config: 'fp8' with fmt 'e5m2' cannot": {"quant_method": "fp8", "fmt": "e5m2"},
    "quantization_config must be an object": "int4",
    "quantization_config.scale_fmt = 'ue8m0' cannot": {**QUANTIZED, "scale_fmt": "ue8m0"},
    r"quantization_config.modules_to_not_convert = \['lm_head'\]": {
        **{**QUANTIZED, "modules_to_not_convert": ["lm_head"]}
    },
    "activation_scheme 'static' is not 'dynamic'": {**QUANTIZED, "activation_scheme": "static"},
    "weight_block_size must be two positive": {**QUANTIZED, "weight_block_size": [128, 0]},
}


@pytest.mark.parametrize("told", REFUSED)
def test_any_other_quantization_is_refused_by_name(told):
    with pytest.raises(ConfigError, match=told):
        ModelConfig.from_dict(
            {**ModelConfig.named("tiny").to_dict(), "quantization_config": REFUSED[told]}
        )


NOT_HONOURED = {
    "hidden_act = 'gelu' cannot be honoured: only 'silu'": {"hidden_act": "gelu"},
    "attention_dropout = 0.1 cannot be honoured": {"attention_dropout": 0.1},
    "mlp_bias = True cannot be honoured": {"mlp_bias": True},
    "moe_layer_freq = 2 cannot be honoured": {"moe_layer_freq": 2},
    "use_sliding_window = True cannot be honoured": {"use_sliding_window": True},
    "layer_types cannot be honoured": {"layer_types": ["sliding_attention"]},
    "partial_rotary_factor = 0.5 cannot be honoured": {"partial_rotary_factor": 0.5},
    "rope_type 'linear' cannot be honoured": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "rope_scaling.attention_factor cannot": {"rope_scaling": {**YARN, "attention_factor": 1.5}},
    "rope_scaling.truncate cannot": {"rope_scaling": {**YARN, "truncate": False}},
    "rope_scaling.mrope_section is not understood for 'default'": {
        "rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}
    },
    "rope_scaling.full_attention is not understood": {
        "rope_parameters": {"full_attention": {"rope_theta": 1e4}}
    },
    "rope_scaling.low_freq_factor is not understood for 'yarn'": {
        "rope_scaling": {**YARN, "low_freq_factor": 1.0}
    },
    "rope_scaling.factor is missing": {"rope_scaling": {"type": "yarn"}},
    "rope_scaling must be an object": {"rope_scaling": "yarn"},
    "rope_parameters and rope_scaling disagree": {"rope_parameters": YARN, "rope_scaling": LLAMA3},
}


@pytest.mark.parametrize("told", NOT_HONOURED)
def test_what_cannot_be_honoured_is_refused_by_name(told):
    with pytest.raises(ConfigError, match=told):
        ModelConfig.from_dict({**ModelConfig.named("tiny").to_dict(), **NOT_HONOURED[told]})


def test_qwen2_with_a_bias_on_the_output_is_refused():
    raw = {**ModelConfig.named("qwen2.5-72b").to_dict(), "attention_bias": True}
    with pytest.raises(ConfigError, match="attention_bias cannot be honoured"):
        ModelConfig.from_dict(raw)


def test_yarn_without_its_original_length_takes_the_longest_as_transformers_does():
    rope = {"type": "yarn", "factor": 2.0}
    cfg = ModelConfig.from_dict({**ModelConfig.named("tiny").to_dict(), "rope_scaling": rope})
    assert cfg.rope_scaling == RopeScaling("yarn", 2.0, cfg.max_position_embeddings)
