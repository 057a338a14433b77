"""The balance losses: 1 where all is even, gradients in closed form, what a step on them does."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.moe.balance_losses import (
    batch_wise_loss,
    communication_loss,
    device_level_loss,
    expert_level_loss,
    expert_loads,
    sequence_wise_loss,
)

LOSSES = {
    "sequence-wise": lambda s, i: sequence_wise_loss(s, i, batch=2),
    "batch-wise": batch_wise_loss,
    "expert-level": expert_level_loss,
    "device-level": lambda s, i: device_level_loss(s, i, n_devices=4),
    "communication": lambda s, i: communication_loss(s, i, n_devices=4, devices_per_token=2),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def draw(tokens, n_experts, top_k, seed, sigmoid=False):
    """Random scores and the top-k choice on them."""
    logits = torch.randn(
        tokens, n_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    scores = logits.sigmoid() if sigmoid else logits.softmax(dim=-1)
    return scores, scores.topk(top_k).indices


def even_choice(length, n_experts=8):
    """Two sequences of choices: every expert equally often in each, two devices of four a token."""
    first = torch.arange(length) % n_experts
    return torch.stack([first, (first + 2) % n_experts], dim=1).repeat(2, 1)  # (2 * length, 2)


@each_loss
def test_even_load_and_even_scores_give_exactly_one(loss):
    scores = torch.full((16, 8), 1 / 8)
    assert loss(scores, even_choice(8)).item() == 1.0


@each_loss
def test_scores_that_sum_to_one_need_not_be_even_where_the_load_is(loss):
    scores, _ = draw(16, 8, 2, seed=3)
    torch.testing.assert_close(loss(scores, even_choice(8)).item(), 1.0)


@pytest.mark.parametrize(("name", "value"), [("sequence-wise", 4.0), ("batch-wise", 4.0)])
def test_collapse_onto_k_experts_gives_e_over_k_where_scores_are_normalised(name, value):
    scores = torch.zeros(16, 8)
    scores[:, :2] = 0.3  # sigmoid scores sum to anything
    indices = torch.tensor([[0, 1]]).expand(16, 2)
    torch.testing.assert_close(LOSSES[name](scores, indices).item(), value)
    torch.testing.assert_close(LOSSES["expert-level"](scores / 0.6, indices).item(), value)


def test_collapse_onto_one_device_of_four_gives_four_and_half_of_it_for_communication():
    scores = torch.zeros(16, 8)
    scores[:, :2] = 0.5
    indices = torch.tensor([[0, 1]]).expand(16, 2)
    torch.testing.assert_close(LOSSES["device-level"](scores, indices).item(), 4.0)
    torch.testing.assert_close(LOSSES["communication"](scores, indices).item(), 2.0)


def test_the_sequence_wise_loss_sees_what_the_batch_wise_loss_allows():
    scores = torch.zeros(8, 4)
    scores[:4, 0] = scores[4:, 1] = 1.0  # each sequence has an expert of its own
    indices = scores.topk(1).indices
    assert sequence_wise_loss(scores, indices, batch=2).item() == 4.0
    assert batch_wise_loss(scores, indices).item() == 2.0
    each = [
        sequence_wise_loss(scores[rows], indices[rows], 1) for rows in torch.arange(8).view(2, 4)
    ]
    assert sequence_wise_loss(scores, indices, batch=2) == torch.stack(each).mean()


def test_the_device_level_loss_allows_what_the_expert_level_loss_sees():
    scores = torch.zeros(4, 4)
    scores[:, 0::2] = 0.5  # experts 0 and 2 alone, one on each of two devices
    indices = torch.tensor([[0], [2], [0], [2]])
    assert expert_level_loss(scores, indices).item() == 2.0
    assert device_level_loss(scores, indices, n_devices=2).item() == 1.0


def test_communication_counts_a_token_once_for_two_experts_of_one_device():
    scores = torch.full((4, 4), 0.25)
    together = torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3]])
    apart = torch.tensor([[0, 2], [1, 3], [0, 3], [1, 2]])
    assert communication_loss(scores, together, 2, devices_per_token=2).item() == 0.5
    assert communication_loss(scores, apart, 2, devices_per_token=2).item() == 1.0
    pairs = torch.cat([together, together.flip(0)], dim=1)  # four experts on both devices
    assert communication_loss(scores, pairs, 2, devices_per_token=2).item() == 1.0
    same = [device_level_loss(scores, indices, 2).item() for indices in (together, apart)]
    assert same == [1.0, 1.0]


def test_one_is_no_floor_of_the_loss():
    """Chosen often and barely, or seldom and with a great score: load and score disagree."""
    scores = torch.tensor([[0.51, 0.49], [0.51, 0.49], [0.51, 0.49], [0.0, 1.0]])
    assert expert_level_loss(scores, scores.topk(1).indices).item() < 0.9


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6), st.sampled_from([4, 8, 12])),
    top_k=st.integers(1, 4),
    sigmoid=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_the_gradient_is_the_papers_with_the_load_held_fixed(shape, top_k, sigmoid, seed):
    batch, length, n_experts = shape
    scores, indices = draw(batch * length, n_experts, top_k, seed, sigmoid)
    scores.requires_grad_()
    sequence_wise_loss(scores, indices, batch).backward()
    total = scores.detach().sum(dim=-1, keepdim=True)
    load = torch.stack([expert_loads(i, n_experts) for i in indices.view(batch, length, -1)])
    load = load.repeat_interleave(length, dim=0).double()  # (M, E)
    expected = (load * scores.detach() / total).sum(dim=-1, keepdim=True)
    by_hand = (load - expected) / (total * batch * length)
    torch.testing.assert_close(scores.grad, by_hand, rtol=1e-5, atol=1e-7)


@each_loss
def test_the_load_carries_no_gradient_so_a_given_choice_makes_the_loss_linear(loss):
    one, indices = draw(16, 8, 2, seed=1)
    two, _ = draw(16, 8, 2, seed=2)
    one.requires_grad_()
    (slope,) = torch.autograd.grad(loss(one, indices), one)
    if loss in (LOSSES["sequence-wise"], LOSSES["batch-wise"]):
        return  # normalised per token, so linear in the shares only: the closed form tests these
    difference = (slope * (two - one)).sum()
    torch.testing.assert_close(
        loss(two, indices) - loss(one, indices), difference, atol=1e-6, rtol=0
    )


@given(seed=st.integers(0, 2**31), name=st.sampled_from(sorted(LOSSES)))
@settings(max_examples=40, deadline=None)
def test_a_step_takes_score_from_the_busiest_and_gives_it_to_the_idlest(seed, name):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(32, 8, generator=generator, dtype=torch.float64)
    logits += torch.linspace(2, 0, 8, dtype=torch.float64)  # devices in falling order of load
    logits.requires_grad_()
    indices = logits.topk(2).indices
    before = LOSSES[name](logits.softmax(dim=-1), indices)
    before.backward()
    stepped = (logits - logits.grad).detach()
    assert LOSSES[name](stepped.softmax(dim=-1), indices) < before
    if name in ("expert-level", "batch-wise"):
        load = expert_loads(indices, 8)
        change = (stepped.softmax(dim=-1) - logits.detach().softmax(dim=-1)).mean(dim=0)
        assert change[load.argmax()] < 0 < change[load.argmin()]


@given(tokens=st.integers(1, 20), top_k=st.integers(1, 6), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_loads_are_counts_in_fair_shares(tokens, top_k, seed):
    _, indices = draw(tokens, 6, top_k, seed)
    counts = torch.bincount(indices.flatten(), minlength=6)
    torch.testing.assert_close(expert_loads(indices, 6), counts * (6 / (tokens * top_k)))


def test_for_softmax_scores_the_expert_level_loss_is_the_batch_wise_one():
    scores, indices = draw(12, 8, 3, seed=0)
    torch.testing.assert_close(expert_level_loss(scores, indices), batch_wise_loss(scores, indices))


def test_sigmoid_scores_may_all_vanish():
    scores = torch.zeros(4, 8, requires_grad=True)
    loss = batch_wise_loss(scores, even_choice(2))
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all()


SCORES, CHOICE = torch.full((8, 4), 0.25), torch.zeros(8, 2, dtype=torch.int64)
REFUSED = {
    "tokens differ": (
        lambda: batch_wise_loss(SCORES, CHOICE[:4]),
        r"scores \(8, 4\) and indices \(4, 2\)",
    ),
    "not flattened": (lambda: batch_wise_loss(SCORES.view(2, 4, 4), CHOICE), "Flatten both"),
    "no token": (lambda: expert_level_loss(SCORES[:0], CHOICE[:0]), "M at least 1"),
    "too many experts": (lambda: expert_level_loss(SCORES[:, :1], CHOICE), "2 of 1 experts"),
    "batch": (lambda: sequence_wise_loss(SCORES, CHOICE, batch=3), "no 3 sequences"),
    "devices": (lambda: device_level_loss(SCORES, CHOICE, n_devices=3), "Change n_devices"),
    "cap above K": (lambda: communication_loss(SCORES, CHOICE, 4, 3), "a number from 1 to 2"),
    "no cap": (lambda: communication_loss(SCORES, CHOICE, 4, 0), "Change devices_per_token"),
}


@pytest.mark.parametrize(("call", "says"), REFUSED.values(), ids=REFUSED)
def test_shapes_that_would_give_a_wrong_number_are_refused_in_three_parts(call, says):
    with pytest.raises(ValueError, match=says) as caught:
        call()
    assert len(re.findall(r"[.](?: |$)", str(caught.value))) >= 3
