"""What the papers print against what our code computes, their misprints included."""

import json

import pytest

from dsv3_tutorial import paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import attention, flops, memory

MODELS = ("deepseek-v3", "qwen2.5-72b", "llama-3.1-405b")


def printed(id: str) -> float:
    return paper.row(id).value


def cache(name: str) -> float:
    return memory.kv_cache_bytes_per_token(ModelConfig.named(name))


def trained(name: str, **how) -> float:
    return flops.training_flops_per_token(ModelConfig.named(name), **how) / 1e9


def test_every_row_says_where_it_stands_and_ids_are_unique():
    rows = [row for table in paper.tables() for row in paper.rows(table)]
    assert len({row.id for row in rows}) == len(rows)
    for row in rows:
        assert row.paper and row.where and row.unit and row.confidence in paper.CONFIDENCES, row.id


@pytest.mark.parametrize("name", MODELS)
def test_isca_table_1_is_exact_to_the_byte(name):
    assert cache(name) == printed(f"kv_cache.{name}") * 1000


def test_isca_table_1_prints_7_28_where_its_own_numbers_give_7_34():
    ratios = {name: cache(name) / cache("deepseek-v3") for name in MODELS}
    assert ratios["qwen2.5-72b"] == pytest.approx(printed("kv_cache_ratio.qwen2.5-72b"), abs=0.005)
    assert ratios["llama-3.1-405b"] == pytest.approx(7.344, abs=0.0005)
    assert printed("kv_cache_ratio.llama-3.1-405b") == 7.28


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3"])
def test_isca_table_2_holds_for_the_moe_rows(name):
    assert round(trained(name)) == printed(f"training_flops.{name}")


def test_isca_table_2_counts_the_dense_rows_by_another_rule():
    for name, ours in (("qwen2.5-72b", 444.87), ("llama-3.1-405b", 2473.25)):
        assert trained(name) == pytest.approx(ours, abs=0.005)
        assert round(trained(name)) != printed(f"training_flops.{name}")
        estimate = flops.dense_estimate(ModelConfig.named(name)) / 1e9
        assert round(estimate) == printed(f"training_flops.{name}")
    for name in ("deepseek-v2", "deepseek-v3"):  # the same rule misses the MoE rows
        estimate = flops.dense_estimate(ModelConfig.named(name)) / 1e9
        assert abs(estimate / printed(f"training_flops.{name}") - 1) > 0.05


def test_isca_table_4_gives_the_same_training_compute():
    gpus, tokens = printed("training_cost.gpus"), printed("training_rate.tokens_per_day") * 1e9
    for causal, rate in ((True, "tflops_causal"), (False, "tflops_non_causal")):
        implied = gpus * printed(f"training_rate.{rate}") * 1e12 * 86400 / tokens / 1e9
        assert implied == pytest.approx(trained("deepseek-v3", causal=causal), rel=0.004)


def test_v2s_93_3_percent_is_mla_and_a_six_bit_cache_together():
    deepseek_67b = 2 * 8 * 128 * 95  # elements: 95 layers, 8 key-value heads of 128
    latent = cache("deepseek-v2") / 2
    bits = printed("v2.kv_cache_bits")
    assert 100 * (1 - latent / deepseek_67b) == pytest.approx(82.2, abs=0.05)
    together = 100 * (1 - latent * bits / (deepseek_67b * 16))
    assert together == pytest.approx(printed("v2.kv_cache_reduction"), abs=0.05)


def test_v2s_14_percent_fits_16_heads_and_its_4_percent_does_not_fit_128():
    per_head, mla = 2 * 128, 512 + 64
    assert round(100 * mla / (16 * per_head)) == printed("v2.mla_against_mha_small")
    assert round(100 * mla / (56 * per_head)) == printed("v2.mla_against_mha_large")
    assert 100 * mla / (128 * per_head) == pytest.approx(1.76, abs=0.005)


def test_57x_is_against_128_heads_and_71x_against_mlas_own_heads():
    cfg = ModelConfig.named("deepseek-v3")
    mla = memory.kv_elements_per_token_and_layer(cfg)
    assert mla == 576
    assert round(2 * 128 * 128 / mla, 1) == printed("v3.mha_over_mla")
    expanded = attention.cached_elements(cfg, "expanded")
    assert expanded == 40_960
    assert round(expanded / mla, 1) == printed("v3.expanded_over_mla")
    assert mla / (2 * 128) == printed("v2.equal_gqa_groups")


def test_the_training_cost_adds_up():
    parts = ("pre_training", "context_extension", "post_training")
    for unit in ("hours", "dollars"):
        total = sum(printed(f"training_cost.{part}_{unit}") for part in parts)
        assert total == pytest.approx(printed(f"training_cost.total_{unit}"), rel=1e-9)
    for part in (*parts, "total"):
        hours, dollars = (printed(f"training_cost.{part}_{unit}") for unit in ("hours", "dollars"))
        assert hours * printed("training_cost.rent") / 1000 == pytest.approx(dollars, rel=1e-9)
    hours = printed("training_cost.hours_per_trillion")
    assert hours * printed("training_cost.tokens") == printed("training_cost.pre_training_hours")
    days = hours * 1000 / printed("training_cost.gpus") / 24
    assert round(days, 1) == printed("training_cost.days_per_trillion")


def test_an_unknown_row_or_table_is_answered_with_what_there_is():
    with pytest.raises(KeyError, match=r"no printed number 'x'.*kv_cache\.deepseek-v3"):
        paper.row("x")
    with pytest.raises(KeyError, match=r"no table 'x'.*kv_cache, limits, memory_wall"):
        paper.rows("x")


def test_a_row_without_a_reason_is_read_as_one_that_is_computed(tmp_path, monkeypatch):
    entry = {"id": "x.y", "value": 1, "unit": "s", "paper": "p", "where": "w", "note": ""}
    entry |= {"confidence": "read"}
    (tmp_path / "made_up.json").write_text(json.dumps([entry, entry | {"quoted": "a choice"}]))
    monkeypatch.setattr(paper, "data_path", lambda folder, *name: tmp_path.joinpath(*name))
    assert [row.quoted for row in paper.rows("made_up")] == ["", "a choice"]
    (tmp_path / "longer.json").write_text(json.dumps([entry | {"reason": ""}]))
    with pytest.raises(ValueError, match=r"longer\.json: a row has the fields"):
        paper.rows("longer")


def test_all_rows_are_those_of_all_tables():
    assert len(paper.all_rows()) == sum(len(paper.rows(table)) for table in paper.tables()) >= 440
