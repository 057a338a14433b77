"""Bytes of cache, weights and training, against published numbers and closed forms."""

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial.config import ModelConfig, preset_names
from dsv3_tutorial.cost import memory, params
from dsv3_tutorial.cost.memory import TrainingBytes

V3 = ModelConfig.named("deepseek-v3")
QWEN = ModelConfig.named("qwen2.5-72b")
PER_TOKEN = {
    **{"deepseek-v3": 70_272, "qwen2.5-72b": 327_680, "llama-3.1-405b": 516_096},
    **{"deepseek-v2": 69_120, "deepseek-v2-lite": 31_104, "moonlight-16b-a3b": 31_104},
}


@pytest.mark.parametrize("name", PER_TOKEN)
def test_the_cache_of_one_token_is_exact(name):
    assert memory.kv_cache_bytes_per_token(ModelConfig.named(name)) == PER_TOKEN[name]


@pytest.mark.parametrize("name", preset_names())
def test_the_forms_of_the_cache_agree(name):
    cfg = ModelConfig.named(name)
    elements = memory.kv_elements_per_token_and_layer(cfg)
    assert memory.kv_cache_bytes_per_token(cfg, 1) == elements * cfg.num_hidden_layers
    assert memory.cache_bytes_per_gpu(cfg, 1) == memory.kv_cache_bytes_per_token(cfg)
    assert memory.kv_cache_bytes_expanded(cfg) >= memory.kv_cache_bytes_per_token(cfg)


@given(st.integers(1, 10**6), st.integers(1, 64), st.sampled_from([0.75, 1, 2, 4]))
def test_the_cache_is_linear_in_context_and_batch(context, batch, width):
    one = memory.kv_cache_bytes(V3, 1, 1, width)
    assert memory.kv_cache_bytes(V3, context, batch, width) == context * batch * one


def test_long_contexts_are_those_of_the_facts():
    assert round(memory.kv_cache_bytes(V3, 131_072) / 1e9, 2) == 9.21
    assert round(memory.kv_cache_bytes(QWEN, 131_072) / 1e9, 1) == 42.9


def test_expanded_heads_are_71_times_the_latent():
    ratio = memory.kv_cache_bytes_expanded(V3) / memory.kv_cache_bytes_per_token(V3)
    assert memory.kv_cache_bytes_expanded(V3, 1) / 61 == 40_960
    assert ratio == pytest.approx(40_960 / 576)


def test_splitting_by_heads_shrinks_gqa_until_one_head_and_a_latent_never():
    whole = memory.kv_cache_bytes_per_token(QWEN)
    shares = [whole / memory.cache_bytes_per_gpu(QWEN, ranks) for ranks in (1, 2, 4, 8, 16, 64)]
    assert shares == [1, 2, 4, 8, 8, 8]
    assert memory.cache_bytes_per_gpu(QWEN, 3) == whole * 3 / 8  # the fullest GPU holds three
    latent = {memory.cache_bytes_per_gpu(V3, ranks) for ranks in (1, 2, 8, 128)}
    assert latent == {70_272}


def test_gqa_over_eight_gpus_needs_less_of_each_than_mla_does():
    """The honest other side: at tensor parallel 8 the 72B model's GQA holds 40,960 bytes a GPU."""
    assert memory.cache_bytes_per_gpu(QWEN, 8) == 40_960 < memory.cache_bytes_per_gpu(V3, 8)


@pytest.mark.parametrize("name", ["kv_cache_bytes_per_token", "cache_bytes_per_gpu"])
def test_a_function_that_serves_as_an_exercise_stands_alone_in_15_lines(name):
    function = getattr(memory, name)
    source = inspect.getsource(function)
    body = source.replace(function.__doc__, "").replace('""""""', "")
    assert len([line for line in body.splitlines() if line.strip()]) <= 15
    globals_used = set(function.__code__.co_names) & set(vars(memory))
    assert globals_used == set()


def test_weights_at_rest():
    total = params.count(V3).total
    assert memory.weight_bytes(V3) == 2 * total
    kept = sum(params.count(V3).by_part[part] for part in ("embedding", "head", "gate", "norms"))
    fp8 = memory.weight_bytes(V3, "fp8")
    assert fp8 - 2 * kept == (total - kept) * (1 + 4 / 16384)
    assert memory.weight_bytes(V3, mtp=True) - 2 * total == 2 * params.count(V3).mtp
    with pytest.raises(ValueError, match="no weight format 'int3'"):
        memory.weight_bytes(V3, "int3")


def test_training_holds_fourteen_bytes_a_parameter_and_eighteen_with_float32_moments():
    assert TrainingBytes().total == 14
    assert TrainingBytes(moments=8).total == 18
    assert TrainingBytes().optimizer == 8
    counted = params.count(V3)
    assert memory.training_bytes(V3) == 14 * (counted.total + counted.mtp)


def test_recomputing_keeps_fewer_activations_by_exactly_what_it_computes_again():
    tiny = ModelConfig.named("tiny")
    c, width = tiny, tiny.num_attention_heads * (2 * 64 + 32)
    again = width + c.hidden_size + c.q_lora_rank + c.kv_lora_rank  # up-projections, three norms
    again += c.hidden_size + c.intermediate_size  # the FFN's norm, SwiGLU's output
    kept, all_ = (memory.activation_bytes_per_token(c, recompute) for recompute in (True, False))
    assert all_ - kept == 2 * c.num_hidden_layers * again


def test_activations_do_not_depend_on_how_many_experts_rest():
    v3 = V3.to_dict()
    fewer = ModelConfig.from_dict({**v3, "n_routed_experts": 128})
    same = memory.activation_bytes_per_token(fewer)
    assert same == memory.activation_bytes_per_token(V3) > 0
