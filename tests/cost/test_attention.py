"""One attention layer's decode step: the known ratios, the closed forms, the crossover."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import attention, flops, memory, params

V3 = ModelConfig.named("deepseek-v3")
QWEN = ModelConfig.named("qwen2.5-72b")
MLA_FORMS = ("expanded", "reexpanded", "absorbed")
SMALL = ModelConfig(
    **{"vocab_size": 256, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 4},
    **{"num_attention_heads": 8, "kv_lora_rank": 128, "qk_nope_head_dim": 64},
    **{"qk_rope_head_dim": 32, "v_head_dim": 64},
)


def per_cached_token(cfg, form, what, **how):
    one, two = (attention.decode_step(cfg, t, form=form, **how) for t in (1000, 2000))
    return (getattr(two, what) - getattr(one, what)) / 1000


def test_absorbed_does_3_4_times_the_arithmetic_and_reads_71_times_fewer_bytes():
    work = [per_cached_token(V3, form, "flops") for form in ("absorbed", "expanded")]
    read = [per_cached_token(V3, form, "bytes") for form in ("absorbed", "expanded")]
    assert work[0] / work[1] == pytest.approx(3.4) and work[0] == 2 * 128 * 1088
    assert read == [2 * 576, 2 * 40_960]
    assert read[1] / read[0] == pytest.approx(71.1, abs=0.05)


def test_rebuilding_every_step_costs_120_times_the_arithmetic_of_absorbing():
    rebuilt = per_cached_token(V3, "reexpanded", "cache_flops")
    assert rebuilt == 2 * 128 * (512 * 256 + 320)
    up = rebuilt - per_cached_token(V3, "expanded", "cache_flops")
    assert up / per_cached_token(V3, "absorbed", "cache_flops") == pytest.approx(120, abs=0.5)
    assert per_cached_token(V3, "reexpanded", "cache_bytes") == 2 * 576


def test_the_crossover_is_171_queries_for_v3_and_128_for_the_small_one():
    assert round(attention.crossover_queries(V3)) == 171
    assert attention.crossover_queries(SMALL) == 128


@given(heads=st.integers(1, 256))
def test_the_crossover_does_not_depend_on_the_heads(heads):
    cfg = ModelConfig.from_dict(
        {**SMALL.to_dict(), "num_attention_heads": heads, "num_key_value_heads": heads}
    )
    assert attention.crossover_queries(cfg) == 128


@pytest.mark.parametrize("cfg", [V3, SMALL], ids=["V3", "small"])
def test_the_crossover_is_where_the_counted_work_crosses(cfg):
    at = attention.crossover_queries(cfg)
    for queries, cheaper in ((int(at * 0.9), "absorbed"), (int(at * 1.1), "reexpanded")):
        work = {
            form: per_cached_token(cfg, form, "flops", queries=queries)
            for form in ("absorbed", "reexpanded")
        }
        assert min(work, key=work.get) == cheaper


@pytest.mark.parametrize("form", MLA_FORMS)
def test_the_forms_read_the_same_weights(form):
    step = attention.decode_step(V3, 4096, batch=8, form=form)
    assert step.weight_bytes == 2 * params.attention(V3)[0]


@pytest.mark.parametrize("queries", [1, 7])
def test_with_nothing_cached_before_rebuilding_is_just_projecting(queries):
    steps = [
        attention.decode_step(V3, queries, queries=queries, form=form)
        for form in ("expanded", "reexpanded")
    ]
    assert steps[0].flops == steps[1].flops


@pytest.mark.parametrize(("cfg", "absorb"), [(V3, True), (V3, False), (QWEN, True)])
def test_a_layers_step_adds_up_to_the_models_decode_flops(cfg, absorb):
    form = ("absorbed" if absorb else "expanded") if cfg.is_mla else "heads"
    step = attention.decode_step(cfg, 4096, form=form)
    layers = cfg.num_hidden_layers
    model = flops.decode_flops_per_token(cfg, 4096, absorb)
    attended = model - flops.decode_flops_per_token(cfg, 0)
    assert layers * step.cache_flops == attended
    assert step.weight_flops == 2 * params.attention(cfg)[0]


@given(
    context=st.integers(1, 10**5),
    batch=st.integers(1, 64),
    queries=st.integers(1, 4),
    form=st.sampled_from(MLA_FORMS),
)
def test_work_and_cache_grow_with_the_batch_and_weights_are_read_once(
    context, batch, queries, form
):
    one = attention.decode_step(V3, context, 1, queries, form)
    many = attention.decode_step(V3, context, batch, queries, form)
    assert many.flops == batch * one.flops
    assert many.cache_bytes == batch * one.cache_bytes
    assert many.weight_bytes == one.weight_bytes


@pytest.mark.parametrize("cfg", [V3, QWEN], ids=["V3", "Qwen"])
def test_the_step_reads_the_cache_that_memory_counts(cfg):
    step = attention.decode_step(cfg, 1, bytes_per_element=1)
    assert step.cache_bytes == memory.kv_elements_per_token_and_layer(cfg)
    assert step.temporary_bytes == 0
    assert step.intensity == step.flops / step.bytes


def test_gqa_reads_each_head_once_for_all_the_queries_that_share_it():
    assert attention.decode_step(QWEN, 1000).cache_bytes == 2 * 1000 * 2 * 8 * 128
    work = attention.decode_step(QWEN, 1000).cache_flops
    assert work == 2 * 1000 * 64 * (128 + 128)


@pytest.mark.parametrize(("cfg", "form"), [(V3, "heads"), (QWEN, "absorbed"), (V3, "folded")])
def test_a_form_that_the_model_cannot_take_is_refused(cfg, form):
    with pytest.raises(ValueError, match=f"form '{form}' does not exist for this"):
        attention.decode_step(cfg, 10, form=form)
