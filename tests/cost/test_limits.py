"""The paper's bound on decoding speed, and what changes with the model's own numbers."""

import math
from dataclasses import replace

import pytest

from dsv3_tutorial import paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import limits


def printed(name: str) -> float:
    return paper.row(f"limits.{name}").value


def test_the_papers_bound_over_infiniband_follows_to_the_last_digit():
    bound = limits.infiniband()
    assert bound.communication * 1e6 == pytest.approx(printed("comm_infiniband"), rel=1e-12)
    assert bound.layer * 1e6 == pytest.approx(printed("layer_infiniband"), rel=1e-12)
    assert round(bound.per_token * 1e3, 2) == printed("token_infiniband")
    assert math.floor(bound.tokens_per_second) == printed("rate_infiniband")
    assert round(bound.tokens_per_second) == 68  # the paper cuts where it would round


def test_the_papers_bound_on_an_nvl72_follows_too():
    bound = limits.nvl72()
    assert bound.communication * 1e6 == pytest.approx(printed("comm_nvl72"), rel=1e-12)
    assert round(bound.per_token * 1e3, 2) == printed("token_nvl72")
    assert bound.tokens_per_second == pytest.approx(printed("rate_nvl72"), rel=0.02)


def test_the_defaults_are_the_papers_and_the_models():
    bound, cfg = limits.Decode(), ModelConfig.named("deepseek-v3")
    assert bound.tokens == printed("tokens") and bound.hidden == printed("hidden")
    assert bound.copies == printed("copies") == cfg.num_experts_per_tok + cfg.n_shared_experts
    assert bound.layers == cfg.num_hidden_layers


def test_7168_channels_instead_of_7k_cost_a_token_and_a_half():
    true = replace(limits.infiniband(), hidden=7168)
    assert true.communication * 1e6 == pytest.approx(123.86, abs=0.005)
    assert true.per_token * 1e3 == pytest.approx(15.11, abs=0.005)
    assert true.tokens_per_second == pytest.approx(66.2, abs=0.05)
    rack = replace(limits.nvl72(), hidden=7168)
    assert rack.tokens_per_second == pytest.approx(1191, abs=0.5)


def test_the_papers_own_40_gigabytes_leave_53_tokens():
    bound = limits.effective(replace(limits.infiniband(), hidden=7168))
    assert bound.communication * 1e6 == pytest.approx(154.8, abs=0.05)
    assert bound.per_token * 1e3 == pytest.approx(18.9, abs=0.05)
    assert bound.tokens_per_second == pytest.approx(52.9, abs=0.05)


def test_scales_add_a_percent():
    without = replace(limits.infiniband(), hidden=7168)
    share = limits.exact(limits.infiniband()).communication / without.communication
    assert share == pytest.approx(1 + (4 / 128) / 3)


def test_latency_hardly_matters_over_infiniband_and_halves_the_rack():
    for bound, alpha, kept in (
        (limits.infiniband(), "infiniband", 0.956),
        (limits.nvl72(), "nvlink", 0.502),
    ):
        late = replace(bound, alpha=paper.row(f"network.latency_{alpha}").value * 1e-6)
        assert late.communication == pytest.approx(bound.communication + 2 * late.alpha)
        share = late.tokens_per_second / bound.tokens_per_second
        assert share == pytest.approx(kept, abs=0.001)


def test_computation_hides_until_it_is_longer():
    bound = limits.infiniband()
    assert replace(bound, computation=100e-6).layer == bound.layer
    assert replace(bound, computation=200e-6).layer == pytest.approx(400e-6)


def test_a_rack_holds_too_few_devices_for_the_premise():
    full = replace(limits.nvl72(), experts_per_device=257 / 72)
    assert full.per_token * 1e3 == pytest.approx(2.93, abs=0.005)


def test_the_bound_lies_above_what_the_service_reports():
    for name in ("service_rate_low", "service_rate_high"):
        assert printed(name) < limits.effective(limits.infiniband()).tokens_per_second


@pytest.mark.parametrize("field", ["bandwidth", "tokens", "layers", "alpha", "dispatch"])
def test_values_that_give_no_token_are_refused_by_name(field):
    with pytest.raises(ValueError, match=field):
        limits.Decode(**{field: -1})
    with pytest.raises(ValueError, match=field):
        limits.Decode(**{field: math.nan})
