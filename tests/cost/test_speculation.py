"""What guessing ahead gains: the law, and the two bounds that part a dense model from experts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import roofline, serving, speculation
from dsv3_tutorial.hardware import chip

V3, LLAMA = ModelConfig.named("deepseek-v3"), ModelConfig.named("llama-3.1-405b")
H100 = chip("h100-sxm")


@given(st.floats(0, 0.999), st.integers(0, 8))
def test_tokens_a_pass_are_the_geometric_sum(acceptance, drafts):
    closed = (1 - acceptance ** (drafts + 1)) / (1 - acceptance)
    assert speculation.tokens_per_pass(acceptance, drafts) == pytest.approx(closed)
    each = [acceptance] * drafts
    assert speculation.tokens_per_pass(each) == pytest.approx(closed)


def test_tokens_a_pass_at_the_ends():
    assert speculation.tokens_per_pass(0.0, 5) == 1
    assert speculation.tokens_per_pass(1, 5) == 6
    assert speculation.tokens_per_pass([0.5, 1.0, 0.5]) == pytest.approx(1 + 0.5 + 0.5 + 0.25)


def test_the_law_divides_by_what_passes_and_drafts_cost():
    assert speculation.speedup(0.9, 1, 1.07, 0.25) == pytest.approx(1.90 / 1.32)
    assert speculation.speedup([0.9, 0.8], 7, 1.15, 0.25) == pytest.approx(2.62 / 1.65)


def test_v3s_bound_is_1_2_at_batch_1_and_1_8_at_128():
    bounds = [speculation.expert_bytes_bound(V3, batch, 0.85) for batch in (1, 128)]
    assert [round(bound, 2) for bound in bounds] == [1.20, 1.82]
    pair = [serving.experts_touched(256, 8, tokens) for tokens in (1, 2)]
    assert pair[1] / pair[0] == pytest.approx(1.97, abs=0.005)


def test_in_between_the_bound_first_falls_to_1_07_at_batch_5():
    bounds = {b: speculation.expert_bytes_bound(V3, b, 0.85) for b in range(1, 129)}
    worst = min(bounds, key=bounds.get)
    assert worst == 5 and bounds[worst] == pytest.approx(1.07, abs=0.005)


@given(st.integers(1, 2000), st.floats(0, 1), st.integers(1, 4), st.integers(0, 50_000))
def test_the_bound_never_passes_the_tokens_and_reaches_them_where_all_is_read(b, a, k, context):
    bound = speculation.expert_bytes_bound(V3, b, a, k, context)
    assert bound <= speculation.tokens_per_pass(a, k) + 1e-9
    free = speculation.expert_bytes_bound(LLAMA, b, a, k)
    assert free == pytest.approx(speculation.tokens_per_pass(a, k), rel=1e-3 * b)
    if b >= 500:
        assert bound == pytest.approx(speculation.tokens_per_pass(a, k), rel=0.002)


def test_a_draft_that_reads_its_module_costs_some_of_the_gain():
    free, paid = (
        speculation.expert_bytes_bound(V3, 1, 0.85, drafted=drafted) for drafted in (False, True)
    )
    assert free / paid == pytest.approx(1.03, abs=0.005)


def test_a_dense_models_gain_is_whole_until_arithmetic_binds_and_then_halves():
    ridge = roofline.ridge(H100)
    for batch in (1, 64, int(ridge / 2) - 5):
        assert speculation.dense_bound(LLAMA, H100, batch, 0.85) == pytest.approx(1.85)
    for batch in (math.ceil(ridge) + 5, 2000):
        assert speculation.dense_bound(LLAMA, H100, batch, 0.85) == pytest.approx(0.925)
    falling = [speculation.dense_bound(LLAMA, H100, b, 0.85) for b in range(140, 300, 10)]
    assert falling == sorted(falling, reverse=True) and falling[0] > falling[-1]


def test_experts_gain_where_a_dense_model_loses_and_the_reason_is_named():
    moe = [speculation.gain(V3, H100, batch, 0.85) for batch in (1, 256)]
    assert moe[0].value < 1.2 < 1.8 < moe[1].value
    assert moe[0].reason == "routed experts: bytes"
    dense = [
        speculation.gain(LLAMA, H100, batch, 0.85, context=1, drafted=False) for batch in (1, 600)
    ]
    assert dense[0].value == pytest.approx(1.85, rel=1e-3)
    assert dense[1].value == pytest.approx(0.925, rel=1e-2)
    assert (dense[0].verify, dense[1].verify) == ("bandwidth", "compute")
    assert dense[1].reason == "dense MLP: arithmetic"


@pytest.mark.parametrize("acceptance, drafts", [(1.1, 1), (-0.1, 1), (math.nan, 1), (0.5, -1)])
def test_what_is_no_acceptance_is_refused(acceptance, drafts):
    with pytest.raises(ValueError, match="probabilities from 0 to 1"):
        speculation.tokens_per_pass(acceptance, drafts)
