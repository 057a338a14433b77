"""The planner beside published runs: each error is within what is stated of it, and is an error."""

import pytest

from dsv3_tutorial import paper
from dsv3_tutorial.cost import validation
from dsv3_tutorial.cost.step_time import printed, tokens_per_step

CHECKS = {check.row.id: check for check in validation.checks()}


def test_every_stated_error_belongs_to_a_check_and_every_check_has_one():
    assert set(CHECKS) == set(validation.STATED)


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_a_prediction_is_as_near_as_is_stated_and_the_statement_is_not_padded(name):
    off, stated = abs(CHECKS[name].off), validation.STATED[name]
    assert off <= stated
    assert off > stated - 0.04


def test_every_prediction_is_too_fast_as_what_is_left_out_can_only_slow_a_run():
    for name, check in CHECKS.items():
        faster_is_more = "mfu" in name or "tokens" in name or "tflops" in name
        assert (check.off > 0) == faster_is_more, name


def test_v3_is_predicted_too_fast_and_less_so_with_the_kernels_of_its_time():
    now, then = validation.deepseek_v3(), validation.as_trained()
    assert now.step_time_s < then.step_time_s < printed("step")
    assert then.step_time_s / printed("step") == pytest.approx(0.90, abs=0.01)
    assert now.tokens_per_step == pytest.approx(tokens_per_step(), rel=1e-3)


def test_v3s_parts_add_up_to_its_step_and_the_pairs_are_where_it_is_off():
    parts = {name: (ours, theirs) for name, ours, theirs in validation.beside_table_4()}
    assert sum(ours for ours, _ in parts.values()) == pytest.approx(
        validation.deepseek_v3().step_time_s
    )
    for name in ("forward", "optimizer"):
        ours, theirs = parts[name]
        assert ours == pytest.approx(theirs, rel=0.04)
    missing = {name: theirs - ours for name, (ours, theirs) in parts.items()}
    assert max(missing, key=missing.get) == "overlapped"
    assert missing["overlapped"] > 0.7 * sum(missing.values())


def test_a_layout_fits_the_gpus_it_was_run_on():
    runs = (validation.deepseek_v3, validation.deepseek_v2, validation.deepseek_67b)
    for found in (*(run() for run in runs), validation.moonlight()):
        assert found.fits, found.layout


def test_multi_token_prediction_costs_its_share_of_the_step():
    with_it, without = validation.deepseek_v3(), validation.without_mtp()
    saved = 1 - without.step_time_s / with_it.step_time_s
    assert 0.03 < saved < 0.08  # a block and a head: 4 % of the FLOPs
    assert without.memory["mtp"] == 0
    assert without.flops_per_token == with_it.flops_per_token  # useful FLOPs leave it out


def test_the_savings_of_v2_over_the_67b_are_predicted_larger_than_they_were():
    ours = 1 - validation.hours_per_trillion(validation.deepseek_v2()) / (
        validation.hours_per_trillion(validation.deepseek_67b())
    )
    assert ours > paper.row("v2.training_saving").value / 100


def test_a_model_of_moonlights_size_costs_between_its_flops_at_the_peak_and_five_times_that():
    found = validation.moonlight()
    peak = 3600 * found.cluster.chip.rate("bf16")
    at_the_peak = found.flops_per_token * found.job.tokens / peak
    assert at_the_peak < found.gpu_hours < 5 * at_the_peak


def test_what_the_model_does_not_know_is_said_in_sentences():
    assert len(validation.UNKNOWN) >= 8
    assert all(said.endswith(".") and len(said) > 40 for said in validation.UNKNOWN)
