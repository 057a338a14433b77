"""ISCA table 4: its numbers follow from one another, and from our FLOPs a token."""

import pytest

from dsv3_tutorial import paper
from dsv3_tutorial.cost import step_time
from dsv3_tutorial.cost.schedule import dual_pipe

BOTH = pytest.mark.parametrize("network", step_time.NETWORKS)


@BOTH
def test_a_step_is_15360_sequences_of_4096_tokens(network):
    sequences = step_time.tokens_per_step(network) / step_time.SEQUENCE
    assert round(sequences) == step_time.SEQUENCES


@BOTH
def test_the_parts_make_the_step_but_for_26_milliseconds(network):
    missing = step_time.printed("step", network) - step_time.sum_of_parts(network)
    assert 0 < missing < 0.0265
    assert sum(step_time.shares(network).values()) == pytest.approx(0.998, abs=0.002)


def test_a_tenth_of_the_step_is_bubble():
    assert step_time.shares()["bubble"] == pytest.approx(0.103, abs=0.0005)


@BOTH
def test_what_can_be_computed_lies_within_4_per_mille(network):
    checks = {check.row.id.split(".")[-1]: check for check in step_time.checks(network)}
    assert set(checks) == {
        *("tokens_per_day", "step"),
        *(f"{what}_{way}" for what in ("tflops", "mfu") for way in ("causal", "non_causal")),
    }
    assert abs(checks["tokens_per_day"].off) < 5e-5
    assert all(abs(check.off) < 0.004 for check in checks.values())


@BOTH
def test_utilisation_is_against_the_bf16_peak(network):
    for way in ("causal", "non_causal"):
        rate, share = (step_time.printed(f"{what}_{way}", network) for what in ("tflops", "mfu"))
        assert rate / share * 100 == pytest.approx(989.4, rel=0.002)


def test_one_plane_or_eight_makes_no_difference_of_a_per_mille():
    mpft, mrft = (step_time.printed("step", network) for network in step_time.NETWORKS)
    assert mrft / mpft == pytest.approx(1.001, abs=0.00005)


def test_the_table_says_the_same_as_the_rows_of_the_training_rate():
    for name in ("tokens_per_day", "tflops_causal", "tflops_non_causal", "mfu_causal"):
        assert step_time.printed(name) == paper.row(f"training_rate.{name}").value


def test_the_tables_times_an_operation_give_its_seconds_back():
    schedule, kinds = dual_pipe(16, 120), {"F": "forward", "FB": "overlapped"}
    ran = [op for order in schedule.orders for op in order]
    for whole in (True, False):
        times = step_time.operation_times(schedule, whole)
        for kind, part in kinds.items():
            spent = sum(times.of(op) for op in ran if op.kind == kind) / 16
            assert spent == pytest.approx(step_time.printed(part))
        weights = sum(times.of(op) for op in ran if op.kind == "W") / 16
        assert weights == pytest.approx(step_time.printed("backward_weight"))
        back = times.t_b if whole else times.t_b - times.t_w
        backs = sum(op.kind in ("B", "I") for op in ran) / 16
        assert backs * back == pytest.approx(step_time.printed("backward_input"))
        # the printed bubble is about twice what waiting for the order alone would be
        assert 0.7 < schedule.bubble(times) < 1.15 < step_time.printed("bubble")
    assert step_time.computing() == pytest.approx(1.13 + 1.99 + 0.48 + 13.95)
