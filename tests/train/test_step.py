"""One update: accumulation, recomputation and BF16 change how it is computed, not what it is."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from dsv3_tutorial.moe.balance import update_bias, watch
from dsv3_tutorial.moe.balance_losses import sequence_wise_loss
from dsv3_tutorial.train import step
from dsv3_tutorial.train.fault import NotFinite
from dsv3_tutorial.train.precision import give_gradients, take_weights, worker_for


def gradients(state, batch):
    """The gradients, the means and the counts that one batch leaves behind."""
    means, counts = step.accumulate(state, batch, lambda name: nullcontext())
    return {name: p.grad for name, p in state.model.named_parameters()}, means, counts


def biases(model):
    return [b.clone() for name, b in model.named_buffers() if name.endswith("correction_bias")]


@pytest.mark.parametrize("balance", ["bias", "sequence", "none"])
def test_four_micro_batches_are_one_batch_of_four_times_the_size(start, balance):
    whole = start(torch.float64, balance=balance, alpha=0.1)
    parts = start(torch.float64, balance=balance, alpha=0.1, micro_batches=4)
    batch = whole.sampler.draw()
    one, means_one, counts_one = gradients(whole, batch)
    four, means_four, counts_four = gradients(parts, batch)
    assert one.keys() == four.keys() and all(g is not None for g in one.values())
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=0, atol=1e-12, msg=name)
    torch.testing.assert_close(means_one, means_four, rtol=0, atol=1e-6)  # kept in float32
    assert torch.equal(counts_one, counts_four)


def test_counts_hold_every_token_of_the_batch_once_whatever_it_is_split_into(start):
    for micro_batches in (1, 2, 8):
        state = start(micro_batches=micro_batches, recompute=True)
        _, _, counts = gradients(state, state.sampler.draw())
        # two MoE layers over 8 x 16 positions, the draft module over 15; two experts a token
        assert counts.sum(1).tolist() == [8 * 16 * 2, 8 * 16 * 2, 8 * 15 * 2]


def test_recomputation_gives_the_same_gradients_and_the_same_counts(start):
    plain, again = start(alpha=0.1), start(alpha=0.1, recompute=True)
    batch = plain.sampler.draw()
    kept, means, counts = gradients(plain, batch)
    ran_twice, means_again, counts_again = gradients(again, batch)
    assert all(torch.equal(kept[name], ran_twice[name]) for name in kept)
    assert torch.equal(means, means_again) and torch.equal(counts, counts_again)
    assert plain.model.state_dict().keys() == again.model.state_dict().keys()


def test_recomputation_really_runs_each_block_a_second_time(start):
    ran = []
    for recompute in (False, True):
        state = start(recompute=recompute)
        block, runs = state.model.model.layers[1], []
        block.mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        gradients(state, state.sampler.draw())
        ran.append(len(runs))
    assert ran == [1, 2]


def test_the_bias_moves_once_a_step_by_gamma_against_the_whole_batchs_load(start, update):
    state = start(micro_batches=4, gamma=0.25)
    before = biases(state.model)
    counts = update(state).counts
    expected = [update_bias(b, c, 0.25) for b, c in zip(before, counts)]
    assert all(map(torch.equal, biases(state.model), expected))
    assert {abs(x) for bias in biases(state.model) for x in bias.tolist()} <= {0.0, 0.25}
    assert any(bias.abs().sum() for bias in biases(state.model))


@pytest.mark.parametrize(
    "recipe", [{"balance": "none"}, {"balance": "batch"}, {"freeze_bias": 1.0}, {"gamma": 0.0}]
)
def test_the_bias_rests_where_nothing_should_move_it(start, update, recipe):
    state = start(**recipe)
    update(state)
    assert not any(bias.any() for bias in biases(state.model))


def test_the_objective_is_the_loss_the_drafts_and_the_balance_with_their_weights(start):
    state = start(mtp_weight=0.7, alpha=0.3)
    batch = state.sampler.draw()
    with watch(state.model) as seen:
        logits, (draft,) = state.model(batch[:, :-1], drafts=True)
    main = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:])
    ahead = F.cross_entropy(draft.transpose(1, 2), batch[:, 2:])
    each = [sequence_wise_loss(r.scores, r.indices, 8) for r in seen.routings.values()]
    balance = sum(each) / 3
    found = step.losses(state.model, batch, state.recipe, 0)
    torch.testing.assert_close(found.objective, main + 0.7 * ahead + 0.3 * balance)
    torch.testing.assert_close(found.main, main.detach())
    assert not any(x.requires_grad for x in found[1:])


def test_a_draft_answers_for_the_symbol_after_the_next():
    batch = torch.randint(256, (2, 9))
    logits = F.one_hot(batch, 256) * 50.0
    assert step.nats(logits[:, 1:], batch[:, 1:]) < 1e-9
    assert step.draft_nats([logits[:, 2:], logits[:, 3:]], batch) < 1e-9
    assert step.draft_nats([logits[:, 1:-1]], batch) > 10


def test_a_batch_wise_loss_looks_across_sequences_and_a_sequence_wise_one_does_not(start):
    state = start()
    with watch(state.model) as seen:
        state.model(state.sampler.draw()[:, :-1], drafts=True)
    sequence, batch, none = (step.balance_loss(seen, 8, kind) for kind in ("bias", "batch", "none"))
    assert sequence > batch > 0 and none == 0


def test_an_update_is_the_plain_loops_update_for_a_dense_model(start, update, moe_config):
    from dataclasses import replace

    from dsv3_tutorial.train import loop

    dense = replace(moe_config, n_routed_experts=None, num_nextn_predict_layers=0, n_group=1)
    ours, plain = (start(torch.float64, cfg=dense, steps=9, schedule="cosine") for _ in "ab")
    optimizer = loop.optimizer_for(plain.model, 1.0)
    for at in range(3):
        batch = ours.sampler.draw()
        rate = ours.recipe.learning_rate(at)
        loss = loop.train_step(plain.model, optimizer, batch, rate)
        assert update(ours, batch).loss / math.log(2) == pytest.approx(loss, rel=1e-6)
    for one, other in zip(ours.model.parameters(), plain.model.parameters()):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_gradients_are_clipped_to_norm_one_and_reported_as_they_were(start, update):
    state, seen = start(peak_lr=1e-4), {}
    state.optimizer.register_step_pre_hook(
        lambda *_: seen.update(norm=sum(p.grad.square().sum() for p in state.model.parameters()))
    )
    with torch.no_grad():
        state.model.lm_head.weight.mul_(100)
    assert update(state).grad_norm > 1
    assert seen["norm"].sqrt().item() == pytest.approx(1, rel=1e-4)


def test_training_lowers_the_loss_and_the_same_seed_trains_the_same_way(start, update):
    def losses():
        state = start(peak_lr=2e-2, steps=20)
        return [update(state).loss for _ in range(20)]

    one = losses()
    assert one[0] == pytest.approx(math.log(256), rel=0.05) and one[-1] < 0.75 * one[0]
    assert one == losses()


def test_bf16_computes_in_a_rounded_copy_and_updates_float32_masters(start, update):
    state = start(precision="bf16", peak_lr=2e-2, steps=20)
    assert {p.dtype for p in state.worker.parameters()} == {torch.bfloat16}
    losses = [update(state).loss for _ in range(20)]
    assert losses[-1] < 0.75 * losses[0]
    assert {p.dtype for p in state.model.parameters()} == {torch.float32}
    assert any((p != p.bfloat16().float()).any() for p in state.model.parameters())
    for own, master in zip(state.worker.parameters(), state.model.parameters()):
        assert torch.equal(own, master.bfloat16()) and own.grad is None
    assert all(b.dtype == torch.float32 for b in biases(state.worker))
    assert all(map(torch.equal, biases(state.worker), biases(state.model)))


@pytest.mark.parametrize("precision", ["fp8", "fp8-tensor"])
def test_fp8_learns_and_keeps_float32_masters_and_bf16_moments(start, update, precision):
    state = start(precision=precision, peak_lr=4e-2, steps=9)
    losses = [update(state).loss for _ in range(9)]
    assert losses[-1] < 0.8 * losses[0]
    assert {p.dtype for p in state.model.parameters()} == {torch.float32}
    kept = {
        name: {own[name].dtype for own in state.optimizer.state.values()}
        for name in ("exp_avg", "exp_avg_sq")
    }
    assert kept == {"exp_avg": {torch.bfloat16}, "exp_avg_sq": {torch.bfloat16}}


@pytest.mark.parametrize("precision", ["fp8", "fp8-tensor"])
def test_fp8_gradients_are_those_of_float32_to_within_its_rounding(start, precision):
    exact, rounded = start(), start(precision=precision)
    batch = exact.sampler.draw()
    one, means, counts = gradients(exact, batch)
    two, means_fp8, counts_fp8 = gradients(rounded, batch)
    assert one.keys() == two.keys()
    assert means_fp8[0].item() == pytest.approx(means[0].item(), rel=2e-3)
    assert counts_fp8.sum() == counts.sum()
    differ = [(one[n] - two[n]).norm() / one[n].norm() for n in one if "experts." not in n]
    assert 0 < max(differ) < 0.3  # a gate's choice of another expert is part of it


def test_fp8_gradients_of_micro_batches_are_added_in_float32(start):
    state = start(precision="fp8", micro_batches=4)
    sums, _, _ = gradients(state, state.sampler.draw())
    assert {grad.dtype for grad in sums.values()} == {torch.float32}
    experts = sums["model.layers.1.mlp.experts.gate_up_proj"]
    assert (experts != experts.bfloat16().float()).any()


@pytest.mark.parametrize("precision", ["fp8", "fp8-tensor"])
def test_what_is_not_finite_is_not_hidden_by_fp8_and_stops_the_step(start, update, precision):
    state = start(precision=precision)
    before = state.model.lm_head.weight.detach().clone()
    with torch.no_grad():
        state.model.model.layers[1].self_attn.o_proj.weight[3, 5] = math.inf
    with pytest.raises(NotFinite, match="Step 1 stopped the run"):
        update(state)
    assert torch.equal(state.model.lm_head.weight, before)


def test_fp8_runs_again_in_recomputation_as_it_ran_the_first_time(start):
    plain, again = start(precision="fp8"), start(precision="fp8", recompute=True)
    batch = plain.sampler.draw()
    kept, means, counts = gradients(plain, batch)
    ran_twice, means_again, counts_again = gradients(again, batch)
    assert all(torch.equal(kept[name], ran_twice[name]) for name in kept)
    assert torch.equal(means, means_again) and torch.equal(counts, counts_again)


def test_bf16_gradients_of_micro_batches_are_added_in_float32():
    model = torch.nn.Linear(1, 1, bias=False)
    worker = worker_for(model, "bf16")
    for grad in (256.0, 1.0, 1.0):  # in BF16, 256 + 1 is 256
        worker.weight.grad = torch.full((1, 1), grad, dtype=torch.bfloat16)
        give_gradients(worker, model)
    assert model.weight.grad.item() == 258
    take_weights(worker, model)
    assert worker.weight.item() == model.weight.bfloat16().item()
