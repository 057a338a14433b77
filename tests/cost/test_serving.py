"""Bytes over bandwidth: the experts that a batch touches, and a real service held against sums."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial import paper
from dsv3_tutorial.cost import serving


def served(name: str) -> float:
    return paper.row(f"serving.{name}").value


def test_touched_experts_are_the_mean_over_all_choices():
    choices = list(itertools.combinations(range(5), 2))
    for tokens in (1, 2, 3):
        each = [len(set().union(*sets)) for sets in itertools.product(choices, repeat=tokens)]
        assert serving.experts_touched(5, 2, tokens) == pytest.approx(sum(each) / len(each))


def test_from_batch_1_to_32_expert_bytes_a_token_fall_1_57x_and_not_32x():
    touched = serving.experts_touched(256, 8, 32)
    assert touched == pytest.approx(163.3, abs=0.05)
    assert 8 / (touched / 32) == pytest.approx(1.57, abs=0.005)


@given(st.integers(1, 300), st.data())
def test_touched_experts_grow_with_the_tokens_and_never_beyond_all(n_experts, data):
    top_k, tokens = data.draw(st.integers(1, n_experts)), data.draw(st.integers(1, 500))
    now, then = (serving.experts_touched(n_experts, top_k, t) for t in (tokens, tokens + 1))
    assert top_k - 1e-9 <= now <= then + 1e-9 <= n_experts + 2e-9
    assert serving.experts_touched(n_experts, top_k, 1) == pytest.approx(top_k)
    assert serving.experts_touched(n_experts, top_k, 0) == 0


def test_a_batch_saves_the_weights_and_not_the_caches():
    assert serving.tokens_per_second(100.0, 40.0, 10.0) == 2.0
    assert serving.tokens_per_second(100.0, 40.0, 10.0, batch=4) == 5.0
    assert serving.tokens_per_second(100.0, 40.0, 10.0, batch=10**9) == pytest.approx(10.0)


def test_the_service_spent_what_its_nodes_cost():
    hours = served("nodes") * 8 * 24
    assert hours * served("rent") == served("cost")
    assert round(100 * (served("revenue") / served("cost") - 1)) == served("margin")
    assert served("prefill_ep") == served("prefill_nodes") * 8
    assert served("decode_ep") == served("decode_nodes") * 8


def test_its_daily_tokens_over_its_rates_are_its_nodes():
    nodes = sum(
        served(f"{way}_tokens") * 1e9 / 86400 / served(f"{way}_per_node")
        for way in ("input", "output")
    )
    assert nodes == pytest.approx(served("nodes"), rel=0.005)


def test_the_gain_of_drafts_that_is_printed_lies_between_its_acceptances():
    low, high = served("mtp_acceptance_low"), served("mtp_acceptance_high")
    assert 1 + low / 100 >= served("mtp_speedup") and 1 + high / 100 > served("mtp_speedup")
    extra = served("report_extra_gpus")
    assert served("report_decode_gpus") - extra == 256  # one routed expert a GPU
