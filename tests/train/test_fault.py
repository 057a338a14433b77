"""A number that is none stops the run before a weight changes, and is said to have begun where."""

import math

import pytest
import torch

from dsv3_tutorial.train import fault


def snapshot(state):
    return {name: tensor.clone() for name, tensor in state.model.state_dict().items()}


def stop(state, update):
    """Update until it stops; the message, having checked that nothing was changed by it."""
    before, moments = snapshot(state), dict(state.optimizer.state)
    with pytest.raises(fault.NotFinite) as caught:
        update(state)
    after = snapshot(state)
    assert all(torch.equal(before[n], after[n]) or n in BAD for n in before)
    assert state.step == 0 and state.optimizer.state == moments
    return str(caught.value)


BAD = {"model.layers.1.mlp.gate.weight"}  # NaN there is not equal to itself


def test_a_bad_weight_is_named(start, update):
    state = start()
    with torch.no_grad():
        state.model.get_parameter("model.layers.1.mlp.gate.weight")[0, 0] = math.nan
    assert "is the weight model.layers.1.mlp.gate.weight." in stop(state, update)


def test_the_first_module_whose_output_is_bad_is_named(start, update):
    state = start(recompute=True)
    spoil = state.model.model.layers[2].self_attn.o_proj
    spoil.register_forward_hook(lambda module, args, out: out / 0)
    assert "is the output of model.layers.2.self_attn.o_proj." in stop(state, update)


def test_a_gradient_that_is_bad_behind_good_outputs_is_named(start, update):
    state = start()
    spoiled = state.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    spoiled.register_hook(lambda grad: grad * math.inf)
    said = stop(state, update)
    assert "is the gradient of model.layers.0.mlp.up_proj.weight." in said


def test_the_message_says_the_step_the_batch_the_rate_and_what_to_do(start, update):
    state = start(peak_lr=1e-3, warmup=4)
    state.model.lm_head.register_forward_hook(lambda module, args, out: out * math.nan)
    said = stop(state, update)
    assert said.startswith("Step 1 stopped the run: loss nan")
    assert f"begin at {state.sampler.place(state.sampler.starts[0].item())}, " in said
    assert "8 windows of 17 symbols" in said and ".txt + " in said
    assert "Nothing was updated" in said and "the rate was 2.5e-04" in said


def test_a_bad_weight_is_seen_in_buffers_too_and_a_good_model_has_none(start):
    state = start()
    assert fault.bad_weight(state.model) is None
    gate = state.model.model.layers[1].mlp.gate
    gate.e_score_correction_bias[3] = math.inf
    said = "the weight model.layers.1.mlp.gate.e_score_correction_bias"
    assert fault.bad_weight(state.model) == said
