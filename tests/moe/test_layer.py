"""The mixture as a layer: shared plus routed, one shared expert for several, nobody dropped."""

from dataclasses import replace

import pytest
import torch

from dsv3_tutorial.block import initialize
from dsv3_tutorial.config import ConfigError, ModelConfig
from dsv3_tutorial.mlp import MLP
from dsv3_tutorial.moe.layer import MoE

SIZES = {"hidden_size": 24, "moe_intermediate_size": 10}
CFG = replace(ModelConfig.named("small"), **SIZES)


def layer(engine=None, **changed) -> MoE:
    made = MoE(replace(CFG, **changed), engine).double()
    initialize(made, 0.4)
    return made


def swiglu(x, gate, up, down):
    z = gate @ x
    return down @ (z / (1 + (-z).exp()) * (up @ x))


def by_hand(moe, x):
    """Token by token, chosen expert by chosen expert; x (tokens, D)."""
    routing, width, out = moe.gate(x), CFG.moe_intermediate_size, []
    for m, token in enumerate(x):
        total = torch.zeros_like(token)
        if moe.shared_experts is not None:
            shared = moe.shared_experts
            parts = (shared.gate_proj, shared.up_proj, shared.down_proj)
            total = total + swiglu(token, *(part.weight for part in parts))
        for e, g in zip(routing.indices[m], routing.weights[m]):
            gate_up = moe.experts.gate_up_proj[e]
            gate, up = gate_up[:width], gate_up[width:]
            total = total + g * swiglu(token, gate, up, moe.experts.down_proj[e])
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("n_shared", [0, 1, 2])
@pytest.mark.parametrize("engine", ["loop", "sorted", None])
def test_the_output_and_its_gradients_are_shared_plus_weighted_experts(engine, n_shared):
    moe = layer(engine, n_shared_experts=n_shared)
    x = torch.randn(2, 3, CFG.hidden_size, dtype=torch.float64, requires_grad=True)
    got, expected = moe(x), by_hand(moe, x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    pull, inputs = torch.randn_like(x), [x, *moe.parameters()]
    grads, wanted = (torch.autograd.grad(y, inputs, pull) for y in (got, expected))
    torch.testing.assert_close(grads, wanted, rtol=1e-10, atol=1e-10)


def test_without_shared_experts_there_is_no_such_module_and_no_such_key():
    moe = layer(n_shared_experts=0)
    assert moe.shared_experts is None
    assert not [name for name in moe.state_dict() if "shared" in name]


def test_two_shared_experts_are_one_of_their_joint_width_and_the_sum_of_two():
    wide, f = layer(n_shared_experts=2).shared_experts, CFG.moe_intermediate_size
    x = torch.randn(5, CFG.hidden_size, dtype=torch.float64)
    halves = []
    for part in (slice(0, f), slice(f, 2 * f)):
        one = MLP(CFG.hidden_size, f).double()
        one.gate_proj.weight.data = wide.gate_proj.weight.data[part]
        one.up_proj.weight.data = wide.up_proj.weight.data[part]
        one.down_proj.weight.data = wide.down_proj.weight.data[:, part]
        halves.append(one(x))
    torch.testing.assert_close(wide(x), halves[0] + halves[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ["loop", "sorted"])
def test_no_token_is_dropped_when_all_of_them_choose_the_same_experts(engine):
    moe = layer(engine, n_shared_experts=0)
    moe.gate.e_score_correction_bias[[0, 1, 4, 5]] = 100.0  # two groups, these four for everybody
    x = torch.randn(300, CFG.hidden_size, dtype=torch.float64)
    assert set(moe.gate(x).indices.unique().tolist()) == {0, 1, 4, 5}
    with torch.no_grad():
        crowd = moe(x)
        alone = torch.cat([moe(x[i : i + 1]) for i in range(0, 300, 30)])
        expected = by_hand(moe, x[::30])
    torch.testing.assert_close(crowd[::30], alone, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(crowd[::30], expected, rtol=1e-11, atol=1e-11)
    assert (crowd.norm(dim=-1) > 0).all()


def test_the_shape_of_the_input_is_kept_and_its_layout_does_not_matter():
    moe = layer()
    x = torch.randn(CFG.hidden_size, 3, 2, dtype=torch.float64)
    strided = x.permute(2, 1, 0)  # (B, S, D), not contiguous
    torch.testing.assert_close(moe(strided), moe(strided.contiguous()))
    assert moe(strided[:0]).shape == (0, 3, CFG.hidden_size)
    assert moe(strided[0]).shape == (3, CFG.hidden_size)


def test_the_engine_reaches_the_experts():
    assert layer("loop").experts.engine == "loop"
    assert layer().experts.engine is None


def test_a_config_without_experts_is_refused():
    with pytest.raises(ConfigError, match=r"n_routed_experts is not set.*use MLP"):
        MoE(ModelConfig.named("tiny"))
