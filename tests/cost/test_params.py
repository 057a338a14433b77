"""Parameters: exact against published totals, and against models that transformers builds."""

import pytest
import torch
import transformers

from dsv3_tutorial.config import ModelConfig, preset_names
from dsv3_tutorial.cost import params

TOTALS = {  # total, activated (head in, input embedding out)
    "deepseek-v3": (671_026_419_200, 36.626e9),
    "deepseek-v2": (235_741_434_880, 20.852e9),
    "deepseek-v2-lite": (15_706_484_224, 2.451e9),
    "moonlight-16b-a3b": (15_960_110_208, 2.579e9),
    "qwen2.5-72b": (72_706_203_648, 71.460e9),
    "llama-3.1-405b": (405_853_388_800, 403.752e9),
}


@pytest.mark.parametrize("name", TOTALS)
def test_published_models_are_counted_to_the_last_parameter(name):
    counted = params.count(ModelConfig.named(name))
    total, activated = TOTALS[name]
    assert counted.total == total
    assert counted.activated == pytest.approx(activated, abs=0.5e6)


@pytest.mark.parametrize("name", preset_names())
def test_parts_sum_to_the_total(name):
    counted = params.count(ModelConfig.named(name))
    assert sum(counted.by_part.values()) == counted.total
    assert list(counted.by_part) == [
        *("embedding", "head", "attention", "dense_ffn"),
        *("shared_experts", "routed_experts", "gate", "norms"),
    ]


def test_v3s_parts_are_those_of_the_report():
    cfg = ModelConfig.named("deepseek-v3")
    counted = params.count(cfg)
    billions = {name: round(number / 1e9, 2) for name, number in counted.by_part.items()}
    assert billions == {
        **{"embedding": 0.93, "head": 0.93, "attention": 11.41, "dense_ffn": 1.19},
        **{"shared_experts": 2.55, "routed_experts": 653.91, "gate": 0.11, "norms": 0.0},
    }
    assert round(params.expert(cfg) / 1e6, 3) == 44.040
    assert round(params.attention(cfg)[0] / 1e6, 3) == 187.105  # 187.107 with its two norms
    assert round(sum(params.attention(cfg)) / 1e6, 3) == 187.107


def test_the_gates_correction_bias_is_counted():
    # One number an expert and MoE layer; without them the 671,026,419,200 is missed by 14,848.
    cfg = ModelConfig.named("deepseek-v3")
    weights = cfg.n_routed_experts * cfg.hidden_size
    assert params.layer_parts(cfg, moe=True)["gate"] == weights + 256
    assert params.count(cfg).by_part["gate"] == 58 * (weights + 256)


def test_multi_token_prediction_stands_apart():
    v3 = params.count(ModelConfig.named("deepseek-v3"))
    assert round(v3.mtp / 1e9, 2) == 11.61
    # the repository's 685B: main model, MTP, and its own copies of embedding and head
    assert round((v3.total + v3.mtp + 2 * v3.by_part["embedding"]) / 1e9, 1) == 684.5
    assert params.count(ModelConfig.named("moonlight-16b-a3b")).mtp == 0


SIZES = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3}
MLA = {
    **{"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8},
    **{"num_experts_per_tok": 3, "moe_intermediate_size": 7, "n_group": 2, "topk_group": 1},
}
BUILT = {
    "V3": ("deepseek_v3", {**MLA, "q_lora_rank": 9, "first_k_dense_replace": 1}),
    "V3, two shared experts, tied": (
        "deepseek_v3",
        {**MLA, "q_lora_rank": 9, "n_shared_experts": 2, "tie_word_embeddings": True},
    ),
    "V3, biases": ("deepseek_v3", {**MLA, "q_lora_rank": 9, "attention_bias": True}),
    "V3, queries whole, biases": (
        "deepseek_v3",
        {**MLA, "q_lora_rank": None, "attention_bias": True, "first_k_dense_replace": 2},
    ),
    "V2": ("deepseek_v2", {**MLA, "q_lora_rank": 9, "first_k_dense_replace": 1}),
    "V2, queries whole": ("deepseek_v2", {**MLA, "q_lora_rank": None}),
    "Llama": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "Llama, wide heads, biases": (
        "llama",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 10,
            "attention_bias": True,
        },
    ),
    "Qwen2": ("qwen2", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "Qwen2, tied": ("qwen2", {"num_attention_heads": 4, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", BUILT)
def test_the_count_equals_a_model_that_transformers_builds(name):
    kind, changes = BUILT[name]
    changes = {"num_key_value_heads": changes["num_attention_heads"], **changes}
    theirs = transformers.AutoConfig.for_model(kind, **{**SIZES, **changes})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    held = sum(parameter.numel() for parameter in model.parameters())
    held += sum(
        b.numel() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")
    )
    ours = ModelConfig.from_dict(theirs.to_dict())
    assert params.count(ours).total == held


def test_activated_leaves_out_what_a_token_does_not_meet():
    cfg = ModelConfig.from_dict(
        transformers.AutoConfig.for_model(
            "deepseek_v3", **{**SIZES, **MLA, "first_k_dense_replace": 1}
        ).to_dict()
    )
    counted = params.count(cfg)
    resting = 2 * (8 - 3) * params.expert(cfg)
    assert counted.total - counted.activated == resting + counted.by_part["embedding"]


def test_a_tied_embedding_is_met_once_as_the_head():
    sizes = {**SIZES, "num_attention_heads": 4, "model_type": "llama"}
    tied, untied = (
        params.count(ModelConfig(**sizes, tie_word_embeddings=tie)) for tie in (True, False)
    )
    assert tied.activated == untied.activated
    assert untied.total - tied.total == SIZES["vocab_size"] * SIZES["hidden_size"]
