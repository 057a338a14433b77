"""Load and bias: what even means, which way the bias moves, and whom `watch` sees."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.moe.balance import (
    balanced_step,
    expert_counts,
    max_violation,
    update_bias,
    update_biases,
    watch,
)
from dsv3_tutorial.moe.gate import Gate, choose_experts, combine_weights, route

SMALL = ModelConfig.named("small")
SIZES = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 8}
CFG = replace(SMALL, num_hidden_layers=3, **SIZES)  # one dense layer, two of experts, one MTP
LAYERS, TOP_K, EXPERTS = 3, 4, 16


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.data())
def test_max_violation_lies_between_even_and_what_k_different_choices_allow(n_experts, data):
    k, tokens = data.draw(st.integers(1, n_experts)), data.draw(st.integers(1, 40))
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    skew = data.draw(st.floats(0, 50)) * torch.arange(n_experts)
    indices = (torch.randn(tokens, n_experts, generator=seed) + skew).topk(k).indices
    counts = expert_counts(indices, n_experts)
    assert counts.tolist() == [(indices == e).sum().item() for e in range(n_experts)]
    assert -1e-6 <= max_violation(counts).item() <= n_experts / k - 1 + 1e-5


@pytest.mark.parametrize("n_experts", [1, 2, 7, 256])
def test_max_violation_is_zero_for_an_even_load_and_one_less_than_e_for_a_collapse(n_experts):
    collapsed = torch.zeros(n_experts, dtype=torch.int64)
    collapsed[-1] = 12
    assert max_violation(torch.full((n_experts,), 5)).item() == 0
    assert max_violation(collapsed).item() == pytest.approx(n_experts - 1)


def test_max_violation_is_taken_per_layer_and_does_not_depend_on_the_batch_size():
    counts = torch.tensor([[1, 2, 3], [4, 4, 4], [0, 0, 0]])
    assert max_violation(counts).tolist() == pytest.approx([0.5, 0.0, 0.0])
    assert max_violation(1000 * counts).tolist() == pytest.approx([0.5, 0.0, 0.0])
    assert max_violation(counts.double()).dtype == torch.float64


def test_experts_that_nobody_chose_are_counted_as_zero():
    assert expert_counts(torch.tensor([[1, 3], [3, 1]]), 6).tolist() == [0, 2, 0, 2, 0, 0]
    assert expert_counts(torch.empty(0, 2, dtype=torch.int64), 3).tolist() == [0, 0, 0]


def test_the_bias_rises_for_the_idle_and_falls_for_the_busy_by_gamma_whatever_the_gap():
    counts = torch.tensor([0, 9, 10, 11, 20])
    moved = update_bias(torch.zeros(5), counts, 0.001)
    assert moved.tolist() == pytest.approx([0.001, 0.001, 0.0, -0.001, -0.001])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(0, 2**40))
def test_an_even_load_leaves_the_bias_to_the_last_bit(n_experts, load):
    bias = torch.randn(n_experts)
    counts = torch.full((n_experts,), load)
    assert torch.equal(update_bias(bias, counts, 0.1), bias)
    assert torch.equal(update_bias(bias, counts, 0.1, zero_mean=True), bias)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=20))
def test_the_zero_mean_variant_keeps_the_sum_and_differs_by_one_shift(loads):
    counts, bias = torch.tensor(loads), torch.zeros(len(loads), dtype=torch.float64)
    plain, centred = (update_bias(bias, counts, 0.5, zero_mean=z) for z in (False, True))
    assert centred.sum().item() == pytest.approx(0, abs=1e-12)
    shift = plain - centred
    torch.testing.assert_close(shift, shift.mean().expand_as(shift))


def test_gamma_zero_freezes_the_bias_and_the_input_is_never_written_to():
    bias, counts = torch.randn(4), torch.tensor([1, 2, 3, 4])
    kept = bias.clone()
    assert torch.equal(update_bias(bias, counts, 0.0), bias)
    update_bias(bias, counts, 1.0)
    assert torch.equal(bias, kept)


def test_the_step_written_out_is_the_gates_choice_and_one_update_by_the_summed_load():
    parts = [torch.rand(tokens, 8) for tokens in (5, 3, 7)]
    bias, counts = 0.3 * torch.randn(8), torch.zeros(8, dtype=torch.int64)
    weights, moved = balanced_step(parts, bias, 0.01, 4, 2, 3)
    for scores, got in zip(parts, weights):
        indices = choose_experts(scores + bias, 4, 2, 3)
        torch.testing.assert_close(got, combine_weights(scores, indices))
        counts += expert_counts(indices, 8)
    torch.testing.assert_close(moved, update_bias(bias, counts, 0.01), rtol=0, atol=0)


def simulate(gamma, zero_mean=False, steps=120):
    """MaxVio of fresh batches whose experts differ in popularity, and the bias in the end."""
    cfg = replace(SMALL, n_group=1, topk_group=1)
    popular, eye = torch.linspace(-1.5, 1.5, EXPERTS), torch.eye(EXPERTS)
    bias, seen = torch.zeros(EXPERTS), []
    for _ in range(steps):
        routing = route(torch.randn(1024, EXPERTS) + popular, eye, bias, cfg)
        counts = expert_counts(routing.indices, EXPERTS)
        seen.append(max_violation(counts).item())
        bias = update_bias(bias, counts, gamma, zero_mean)
    return seen, bias


@pytest.mark.parametrize("zero_mean", [False, True])
def test_the_update_alone_evens_out_a_planted_skew(zero_mean):
    seen, bias = simulate(0.01, zero_mean)
    assert seen[0] > 1.2
    assert max(seen[-20:]) < 0.35
    assert bias[0] - bias[-1] > 0.3  # the unpopular needed the help
    frozen, _ = simulate(0.0, steps=10)
    assert min(frozen) > 1.2


def test_watch_counts_every_choice_of_every_layer_once():
    model, ids = DeepSeekV3(CFG), torch.randint(256, (2, 6))
    with watch(model) as seen:
        model(ids, drafts=True)
    counts = seen.counts()
    assert counts.shape == (LAYERS, EXPERTS)
    assert counts.sum(-1).tolist() == [12 * TOP_K, 12 * TOP_K, 10 * TOP_K]  # a draft has S - 1
    assert list(seen.routings) == [f"model.layers.{i}.mlp.gate" for i in (1, 2, 3)]


def test_watch_holds_the_last_forward_and_not_the_sum():
    model = DeepSeekV3(CFG)
    with watch(model) as seen:
        for batch in (5, 1):
            model(torch.randint(256, (batch, 4)))
    assert seen.counts().sum(-1).tolist() == [4 * TOP_K] * 2 + [0]  # no drafts: that gate rests


def test_a_gate_that_did_not_run_keeps_its_bias():
    model = DeepSeekV3(CFG)
    with watch(model) as seen:
        model(torch.randint(256, (2, 6)))
    update_biases(model, seen.counts(), 0.01)
    moved = [gate.e_score_correction_bias.any().item() for gate in gates_of(model)]
    assert moved == [True, True, False]


def gates_of(model):
    return [part for part in model.modules() if isinstance(part, Gate)]


def test_the_counts_stand_in_the_models_order_whichever_gate_ran_first():
    gates = torch.nn.ModuleList([Gate(CFG), Gate(CFG)])
    for gate in gates:
        torch.nn.init.normal_(gate.weight)
    with watch(gates) as seen:
        for i in (1, 0):
            gates[i](torch.randn(i + 1, 32))
    assert seen.counts().sum(-1).tolist() == [TOP_K, 2 * TOP_K]


def test_recomputation_in_backward_counts_no_token_twice():
    model, ids = DeepSeekV3(CFG), torch.randint(256, (2, 6))
    with watch(model) as plain:
        model(ids)
    runs = []
    model.model.layers[1].mlp.gate.register_forward_hook(lambda *_: runs.append(1))
    for block in model.model.layers:
        forward = block.forward
        block.forward = lambda *args, run=forward, **kwargs: checkpoint(
            run, *args, use_reentrant=False, **kwargs
        )
    with watch(model) as seen:
        model(ids).sum().backward()
    assert len(runs) == 2  # it really was recomputed
    assert torch.equal(seen.counts(), plain.counts())


def hooks(model):
    return sum(len(part._forward_hooks) for part in model.modules())


def test_watch_leaves_no_hook_behind_even_after_an_exception():
    model = DeepSeekV3(CFG)
    with watch(model) as seen:
        assert hooks(model) == LAYERS
    assert hooks(model) == 0
    with pytest.raises(KeyError, match="inside"), watch(model):
        raise KeyError("inside")
    assert hooks(model) == 0
    model(torch.randint(256, (1, 3)))
    assert not seen.routings


def test_two_watches_may_look_at_once():
    model = DeepSeekV3(CFG)
    with watch(model) as outer:
        with watch(model) as inner:
            model(torch.randint(256, (1, 3)))
        assert torch.equal(inner.counts(), outer.counts())
        assert hooks(model) == LAYERS


def test_counting_before_any_forward_says_what_to_do():
    with watch(DeepSeekV3(CFG)) as seen, pytest.raises(ValueError, match="Run the model inside"):
        seen.counts()


def test_update_biases_moves_each_gate_by_its_own_layers_load():
    model = DeepSeekV3(CFG).bfloat16()
    counts = torch.randint(0, 9, (LAYERS, EXPERTS))
    update_biases(model, counts, 0.01)
    for i, load in zip((1, 2, 3), counts):
        bias = model.model.layers[i].mlp.gate.e_score_correction_bias
        assert torch.equal(bias, update_bias(torch.zeros(EXPERTS), load, 0.01))


def test_update_biases_refuses_another_models_counts_and_moves_nothing():
    model = DeepSeekV3(CFG)
    with pytest.raises(ValueError, match=r"3 gates of 16 experts.*\(2, 16\)"):
        update_biases(model, torch.randint(0, 9, (2, EXPERTS)), 0.01)
    gates = [part for part in model.modules() if isinstance(part, Gate)]
    assert not any(gate.e_score_correction_bias.any() for gate in gates)


def test_update_biases_refuses_counts_of_another_number_of_experts():
    model = DeepSeekV3(CFG)
    with pytest.raises(ValueError, match=r"16 experts.*\(3, 1\)"):
        update_biases(model, torch.randint(0, 9, (LAYERS, 1)), 0.01)


def test_update_biases_leaves_gates_without_a_bias_alone():
    model = DeepSeekV3(replace(CFG, topk_method="greedy"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    update_biases(model, torch.randint(0, 9, (LAYERS, EXPERTS)), 0.01)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
