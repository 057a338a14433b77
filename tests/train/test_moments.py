"""AdamW with moments in BF16: torch's update, half the memory, and nothing lost when saved."""

import copy

import pytest
import torch
from torch import nn

from dsv3_tutorial.train.moments import MOMENTS, Bf16Moments
from dsv3_tutorial.train.step import optimizer_for

HOW = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(24, 16), nn.RMSNorm(16), nn.Linear(16, 8, bias=False))


def train(model, optimizer, steps, seed=0):
    """Steps on random inputs, whose gradients differ in size a thousandfold."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(32, 24, generator=draw)).square().mul(1e-3).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def moments_of(optimizer):
    return [kept[name] for kept in optimizer.state.values() for name in MOMENTS]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_moments_that_are_not_rounded_it_is_torchs_adamw_bit_for_bit(model, dtype, fused):
    ours, theirs = model.to(dtype), copy.deepcopy(model).to(dtype)
    how = {**HOW, "fused": fused}
    draw = torch.Generator().manual_seed(0)
    mine = Bf16Moments(ours.parameters(), moments=dtype, **how)
    pair = mine, torch.optim.AdamW(theirs.parameters(), **how)
    for _ in range(12):
        for one, other in zip(ours.parameters(), theirs.parameters()):
            one.grad = torch.randn(one.shape, generator=draw, dtype=dtype)
            other.grad = one.grad.clone()
        for optimizer in pair:
            optimizer.step()
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert all(map(torch.equal, moments_of(pair[0]), moments_of(pair[1])))


def test_one_step_is_the_formula_with_the_moments_rounded_when_put_away():
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = Bf16Moments([weight], **HOW)
    m, v, w = torch.zeros(3), torch.zeros(3), weight.detach().clone()
    for step in range(1, 6):
        weight.grad = torch.tensor([1e-3, 3.0, -0.7]) * step
        m, v = 0.9 * m + 0.1 * weight.grad, 0.95 * v + 0.05 * weight.grad.square()
        update = (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        w = w * (1 - 1e-2 * 0.1) - 1e-2 * update
        m, v = m.bfloat16().float(), v.bfloat16().float()
        optimizer.step()
        torch.testing.assert_close(weight.detach(), w, rtol=1e-6, atol=1e-7)
    assert all(kept.dtype == torch.bfloat16 for kept in moments_of(optimizer))


def test_moments_take_half_the_bytes_and_weights_and_gradients_stay_float32(model):
    sizes = {}
    for moments in ("float32", "bf16"):
        own = copy.deepcopy(model)
        optimizer = optimizer_for(own, 1e-2, moments)
        train(own, optimizer, 1)
        sizes[moments] = sum(kept.nbytes for kept in moments_of(optimizer))
        assert {p.dtype for p in own.parameters()} == {torch.float32}
    assert sizes["float32"] == 2 * sizes["bf16"]
    assert sizes["bf16"] == 4 * sum(p.numel() for p in model.parameters())


def test_decay_falls_on_matrices_only_whatever_the_moments_are(model):
    for moments in ("float32", "bf16"):
        decayed, kept = optimizer_for(model, 1e-3, moments).param_groups
        assert decayed["weight_decay"] > 0 == kept["weight_decay"]
        assert {p.ndim for p in decayed["params"]} == {2}
        assert {p.ndim for p in kept["params"]} == {1}


def test_training_with_rounded_moments_stays_near_the_one_without(model):
    one, two = model, copy.deepcopy(model)
    train(one, Bf16Moments(one.parameters(), **HOW), 30)
    train(two, torch.optim.AdamW(two.parameters(), **HOW), 30)
    for a, b in zip(one.parameters(), two.parameters()):
        assert not torch.equal(a, b)
        assert (a - b).norm() < 0.02 * b.norm()


def test_a_second_moment_moves_at_the_reports_beta_and_stands_still_at_the_usual_one():
    for beta, moves in ((0.95, True), (0.999, False)):
        weight = nn.Parameter(torch.zeros(1))
        optimizer = Bf16Moments([weight], lr=1e-3, betas=(0.9, beta), fused=True)
        weight.grad = torch.ones(1)
        optimizer.step()
        kept = optimizer.state[weight]["exp_avg_sq"]
        kept.fill_(1.0)
        weight.grad = torch.full((1,), 0.5)
        optimizer.step()
        assert (kept.item() < 1.0) is moves


def test_a_state_dict_loses_nothing_on_its_way_through_another_optimizer(model):
    ours = Bf16Moments(model.parameters(), **HOW)
    train(model, ours, 3)
    again = copy.deepcopy(model)
    other = Bf16Moments(again.parameters(), **HOW)
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert {kept.dtype for kept in moments_of(other)} == {torch.bfloat16}
    train(model, ours, 3, seed=1), train(again, other, 3, seed=1)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert all(map(torch.equal, moments_of(ours), moments_of(other)))


def test_a_parameter_without_a_gradient_is_left_alone_and_a_closure_is_called(model):
    still = model[2].weight.detach().clone()
    optimizer = Bf16Moments(model.parameters(), **HOW)

    def closure():
        loss = model[0](torch.ones(1, 24)).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert torch.equal(model[2].weight, still) and model[2].weight not in optimizer.state
    assert len(optimizer.state) == 2
