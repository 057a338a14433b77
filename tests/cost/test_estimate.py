"""The formulas of an envelope: identities, closed forms, and the printed step of DeepSeek-V3."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial import paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import flops, sharding, step_time
from dsv3_tutorial.cost.estimate import fit_efficiency, gain, mfu, step_seconds
from dsv3_tutorial.hardware import chip

seconds = st.floats(1e-3, 1e3)
shares = st.floats(0, 1)


def test_v3s_mfu_is_table_fours():
    a_token = flops.training_flops_per_token(ModelConfig.named("deepseek-v3"))
    rate = step_time.printed("tokens_per_day") * 1e9 / 86_400
    got = mfu(rate, a_token, 2048, chip("h800").rate("bf16"))
    assert got == pytest.approx(paper.row("step_time.mpft.mfu_causal").value / 100, rel=1e-2)


@given(seconds, seconds, shares)
def test_the_same_network_gains_nothing(compute, network, overlapped):
    assert gain(compute, network, overlapped, 1.0) == 1.0


@given(seconds, seconds, shares, st.floats(1, 100))
def test_a_faster_network_gains_at_most_its_factor_and_never_loses(compute, network, share, factor):
    got = gain(compute, network, share, factor)
    assert 1 - 1e-12 <= got <= factor * (1 + 1e-12)
    assert got <= gain(compute, network, 0.0, factor) * factor


@given(seconds, shares, st.floats(1, 100))
def test_what_is_hidden_already_gains_nothing(compute, share, factor):
    assert gain(compute, share * compute, 1.0, factor) == pytest.approx(1.0)


@given(seconds, seconds)
def test_two_endpoints_of_overlap_agree_with_lesson_threes_speedup(compute, network):
    alone, beside = (compute + network), max(compute, network)
    got = gain(compute, network, 1.0, 1e30) / gain(compute, network, 0.0, 1e30)
    assert got == pytest.approx(beside / alone, rel=1e-9)
    assert sharding.overlap_speedup(compute, network, 132, 0) == pytest.approx(alone / beside)


@given(st.lists(st.floats(1e9, 1e15), min_size=1, max_size=8), st.floats(0.05, 1.0))
def test_times_without_error_give_the_efficiency_back(work, efficiency):
    peak = 989.4e12
    times = [one / (efficiency * peak) for one in work]
    assert fit_efficiency(work, times, peak) == pytest.approx(efficiency)


def test_no_other_efficiency_has_smaller_squared_errors():
    work, times, peak = [1e12, 4e12, 9e12], [2.4e-3, 7.1e-3, 15.2e-3], 989.4e12
    best = fit_efficiency(work, times, peak)

    def errors(share):
        return sum((t - f / (share * peak)) ** 2 for f, t in zip(work, times))

    assert all(errors(best) < errors(best * other) for other in (0.99, 0.999, 1.001, 1.01))


def test_a_step_worked_out_by_hand():
    # 6 x 1e9 x 1e6 FLOP on 10 GPUs of 1e14: 6 s. 5e10 bytes over 100 Gb/s: 4 s. 3 of 12 more.
    assert step_seconds(5e9, 1e9, 1e6, 10, 1e14, 5e10, 100, 4, 12) == pytest.approx(
        6.0 * (1 + 3 / 12)
    )
    assert step_seconds(5e9, 1e9, 1e6, 10, 1e14, 1e11, 100, 1, 12) == pytest.approx(8.0)
