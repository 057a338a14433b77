"""Sparse attention's cost: the search is still quadratic, and what is found is a constant."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import attention, sparse, successors
from dsv3_tutorial.cost.sparse import V32, Indexer
from dsv3_tutorial.hardware import chip

V3 = ModelConfig.named("deepseek-v3")


def test_what_v3_looks_at_is_what_the_cost_of_attention_counts():
    whole = attention.decode_step(V3, 5000)
    dense = sparse.decode(V3, 5000, None, "bf16")
    assert dense.core_flops == whole.cache_flops and dense.bytes == whole.cache_bytes
    assert dense.index_flops == dense.index_bytes == 0


def test_a_context_that_is_kept_whole_costs_the_search_on_top():
    dense, chosen = sparse.decode(V3, V32.topk, None), sparse.decode(V3, V32.topk)
    assert (chosen.core_flops, chosen.core_bytes) == (dense.core_flops, dense.core_bytes)
    assert chosen.index_flops == V32.topk * 2 * 64 * 128
    assert chosen.index_bytes == V32.topk * 132
    assert chosen.seconds(chip("h800")) > dense.seconds(chip("h800"))


def test_beyond_it_only_the_search_grows():
    near, far = sparse.decode(V3, 10_000), sparse.decode(V3, 110_000)
    assert (near.core_flops, near.core_bytes) == (far.core_flops, far.core_bytes)
    assert far.index_bytes - near.index_bytes == 100_000 * 132


def test_decoding_reads_less_from_the_context_that_the_closed_form_gives():
    # 656 T > 132 T + 656 x 2048
    assert sparse.worth_it_from(V3) == 2048 * 656 // (656 - 132) + 1 == 2564


@pytest.mark.parametrize("tokens", [1, 5, 12, 40])
def test_a_prompts_arithmetic_is_the_sum_over_its_queries(tokens):
    few = Indexer(heads=2, width=8, topk=12)
    seen = [min(i, few.topk) for i in range(1, tokens + 1)]
    index = sum(range(1, tokens + 1)) * 2 * 2 * 8
    core = sum(seen) * 2 * 128 * (2 * 512 + 64)
    assert sparse.prefill_flops(V3, tokens, few) == index + core
    expanded = sum(range(1, tokens + 1)) * 2 * 128 * (128 + 64 + 128)
    assert sparse.prefill_flops(V3, tokens, None) == expanded


def test_a_prompt_gains_arithmetic_only_when_it_is_long():
    from_ = sparse.worth_it_from(V3, phase="prefill")
    assert 16_000 < from_ < 17_000
    for tokens, sparse_wins in ((from_ - 1, False), (from_, True), (4096, False)):
        ours, theirs = (sparse.prefill_flops(V3, tokens, indexer) for indexer in (V32, None))
        assert (ours < theirs) == sparse_wins


@given(st.integers(1, 200_000), st.integers(1, 200_000), st.integers(1, 4096))
def test_a_longer_context_never_costs_less_and_keeping_less_never_more(one, other, topk):
    short, long = sorted((one, other))
    few = Indexer(topk=topk)
    look = sparse.decode(V3, long, few)
    assert sparse.decode(V3, short, few).seconds(chip("h800")) <= look.seconds(chip("h800"))
    assert look.seconds(chip("h800")) <= sparse.decode(V3, long, Indexer(topk=4096)).seconds(
        chip("h800")
    )


def test_sparse_attention_makes_the_cache_larger():
    assert sparse.cache_bytes(V3) - sparse.cache_bytes(V3, None) == 61 * 132
    assert sparse.cache_bytes(V3, None) == 61 * 656


def test_what_cannot_be_chosen_is_refused():
    with pytest.raises(ValueError, match="choose nothing"):
        Indexer(topk=0)
    with pytest.raises(ValueError, match="decode or prefill"):
        sparse.worth_it_from(V3, phase="training")


def test_kimi_k2_has_the_parameters_that_its_makers_print():
    effects = {effect.what: effect for effect in successors.effects("Kimi K2")}
    assert round(effects["parameters"].after / 1000) == 1  # "1T"
    assert round(effects["activated"].after) == 32  # "32B"
    assert effects["attention's arithmetic a cached byte"].ratio == 0.5


def test_every_successor_says_whose_word_it_is_and_what_it_changes():
    for model in successors.SUCCESSORS:
        assert model.source and model.confidence == "published"
        found = successors.effects(model.name)
        assert found and any(effect.ratio != 1 for effect in found)
    with pytest.raises(KeyError, match="no successor 'V9'"):
        successors.effects("V9")


def test_scales_of_one_byte_weigh_a_quarter():
    bits, share = successors.effects("DeepSeek-V3.1")
    assert (bits.before, bits.after) == (8.25, 8.0625)
    assert share.ratio == 0.25
