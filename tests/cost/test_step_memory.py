"""What a GPU holds: V3's layout by hand, and what must hold for every layout."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial import hardware
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import memory, params
from dsv3_tutorial.cost.memory import TrainingBytes
from dsv3_tutorial.cost.step_memory import held, shares
from dsv3_tutorial.cost.step_traffic import Split

V3 = ModelConfig.named("deepseek-v3")
POWERS = st.sampled_from([1, 2, 4, 8])


def test_v3s_layout_by_hand():
    """671,026,419,200 parameters, 58 layers of 256 experts of 3 x 7168 x 2048; two stages a GPU."""
    experts = 58 * 256 * 3 * 7168 * 2048 // (16 * 64)
    rest = (671_026_419_200 - experts * 16 * 64) // 16
    assert shares(V3, Split()) == [(rest, 128), (experts, 2)]
    one = held(V3, Split())
    assert one.weights == 2 * 2 * (experts + rest)
    assert one.gradients == 2 * 4 * (experts + rest)
    assert one.optimizer == pytest.approx(8 * (rest / 128 + experts / 2))
    # 17 micro-batches of 4,096 tokens in flight, each token's numbers of a 16th of the layers
    a_token = memory.activation_bytes_per_token(V3, True, 1)
    assert one.activations == pytest.approx(17 * 4096 * a_token / 16)
    assert one.state / 1e9 == pytest.approx(23.12, abs=0.01)
    assert one.total / 1e9 == pytest.approx(57.9, abs=0.05)


def test_experts_in_one_node_do_not_fit_an_h800_and_over_eight_they_do():
    room = hardware.chip("h800").memory_bytes
    fits = {ep: held(V3, Split(ep=ep)).total <= room for ep in (8, 16, 32, 64)}
    assert fits == {8: False, 16: False, 32: True, 64: True}
    assert held(V3, Split(ep=8)).state / 1e9 == pytest.approx(76.8, abs=0.1)
    # the second copy is what decides: with one, as in 1F1B, they would fit
    assert held(V3, Split(ep=8, copies=1)).total < room


@given(pp=POWERS, dp=POWERS, ep=POWERS, tp=POWERS, copies=st.sampled_from([1, 2]))
def test_all_gpus_together_hold_each_optimizer_once_and_weights_as_often_as_there_are_holders(
    pp, dp, ep, tp, copies
):
    split = Split(pp, dp, min(ep, dp), tp, copies=copies, sequences=8)
    one, total = held(V3, split), params.count(V3)
    assert one.optimizer * split.gpus == pytest.approx(8 * total.total)
    routed = total.by_part["routed_experts"]
    often = split.stages_held * (dp * (total.total - routed) + dp * tp // split.ep * routed)
    assert one.weights * split.gpus == pytest.approx(2 * often)
    assert one.gradients == 2 * one.weights
    assert held(V3, split, TrainingBytes(weights=1)).weights == pytest.approx(one.weights / 2)


def test_activations_are_those_of_the_micro_batches_in_flight():
    a_token = memory.activation_bytes_per_token(V3, True, 1)
    alone = Split(pp=1, dp=8, ep=8)
    assert held(V3, alone).activations == pytest.approx(4096 * a_token)
    assert held(V3, replace(alone, pp=8, copies=1)).activations == pytest.approx(4096 * a_token)
    assert held(V3, replace(alone, pp=8)).activations == pytest.approx(9 / 8 * 4096 * a_token)
    assert held(V3, replace(alone, tp=4)).activations == pytest.approx(4096 * a_token / 4)
