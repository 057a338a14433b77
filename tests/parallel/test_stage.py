"""Stages are the model cut up: the same tensors under the same names, together the same sums."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.moe.balance import watch
from dsv3_tutorial.parallel.launch import launch
from dsv3_tutorial.parallel.stage import (
    StageError,
    deal,
    gathered,
    hand_over,
    join,
    shares_embedding,
    split,
    take_copy,
)

SMALL = {
    "model_type": "deepseek_v3",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
IDS = torch.arange(18).view(2, 9) * 7 % 32


def model(**changes):
    torch.manual_seed(0)
    return DeepSeekV3(ModelConfig.from_dict({**SMALL, **changes})).double()


@given(layers=st.integers(1, 70), stages=st.integers(1, 70))
def test_layers_are_dealt_in_order_evenly_and_those_left_over_in_front(layers, stages):
    if stages > layers:
        with pytest.raises(StageError, match=f"{layers} layers cannot be dealt out to {stages}"):
            deal(layers, stages)
        return
    dealt = deal(layers, stages)
    assert [i for own in dealt for i in own] == list(range(layers))
    sizes = [len(own) for own in dealt]
    assert len(sizes) == stages and sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize("stages", [0, -1])
def test_no_stages_at_all_are_refused(stages):
    with pytest.raises(StageError, match="Take from 1 to 5 stages"):
        deal(5, stages)


@pytest.mark.parametrize("index", [-1, 3])
def test_a_stage_that_there_is_not_is_refused(index):
    with pytest.raises(StageError, match=f"no stage {index} of 3: they are 0 to 2"):
        split(model(), 3, index)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("modules", [0, 2])
@pytest.mark.parametrize("stages", [1, 2, 5])
def test_the_stages_hold_the_wholes_own_tensors_under_its_names(stages, modules, tied):
    whole = model(num_nextn_predict_layers=modules, tie_word_embeddings=tied)
    parts = [split(whole, stages, i) for i in range(stages)]
    held = [dict(part.state_dict(keep_vars=True)) for part in parts]
    together = {name: tensor for part in held for name, tensor in part.items()}
    state = whole.state_dict(keep_vars=True)
    assert together.keys() == state.keys()
    assert all(together[name] is state[name] for name in state)
    twice = [name for name in state if sum(name in part for part in held) > 1]
    shared = stages > 1 and shares_embedding(whole.cfg)
    assert twice == (["model.embed_tokens.weight"] if shared else [])
    assert [part.copy is not None for part in parts] == [False] * (stages - 1) + [shared]


@settings(max_examples=12, deadline=None)
@given(
    stages=st.integers(1, 5), modules=st.integers(0, 2), drafts=st.booleans(), tied=st.booleans()
)
def test_one_stage_after_the_other_is_the_model_gradients_included(stages, modules, drafts, tied):
    whole = model(num_nextn_predict_layers=modules, tie_word_embeddings=tied)
    drafts = drafts and modules > 0
    expected = whole(IDS, drafts=True) if drafts else whole(IDS)
    expected = [expected[0], *expected[1]] if drafts else [expected]
    sum(out.square().sum() for out in expected).backward()
    wanted = {name: p.grad for name, p in whole.named_parameters()}
    whole.zero_grad()
    x = IDS
    for i in range(stages):
        last = i == stages - 1
        x = split(whole, stages, i)(x, IDS, drafts=drafts and last)
    found = list(x) if drafts else [x]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    sum(out.square().sum() for out in found).backward()
    for name, p in whole.named_parameters():
        assert (p.grad is None) == (wanted[name] is None)
        assert p.grad is None or torch.equal(p.grad, wanted[name])


def test_a_stages_gates_are_found_under_the_wholes_names():
    whole = model()
    with watch(whole) as seen:
        names = seen.names
    found = []
    for i in range(2):
        with watch(split(whole, 2, i)) as seen:
            found += seen.names
    assert found == names


def test_a_joined_loss_changes_no_value_and_adds_its_own_gradient():
    x = torch.randn(3, 4, requires_grad=True)
    other = torch.randn(5, requires_grad=True)
    joined = join(x * 2, other.square().sum() * 0.25)
    assert torch.equal(joined, x * 2) and not joined._is_view()
    weights = torch.randn(3, 4)
    joined.backward(weights)
    assert torch.equal(x.grad, weights * 2)
    torch.testing.assert_close(other.grad, other.detach() / 2)


def _on_stages(modules, tied):
    """What each rank has after an exchange of gradients, of weights, and a gathering."""
    group = dist.group.WORLD
    stage = split(model(num_nextn_predict_layers=modules, tie_word_embeddings=tied), 3, rank())
    own = {name: p for name, p in stage.named_parameters() if "embed_tokens" in name}
    for p in own.values():
        p.grad = torch.full_like(p, 1.0 + rank())
    hand_over(stage, group)
    grads = {n: None if p.grad is None else p.grad.unique().tolist() for n, p in own.items()}
    with torch.no_grad():
        for p in stage.parameters():
            p.add_(rank() + 1)
    take_copy(stage, group)
    return grads, {n: p.detach() for n, p in own.items()}, gathered(stage.state_dict(), group)


def rank():
    return dist.get_rank()


def _all_cases():
    return [_on_stages(*case) for case in CASES]


CASES = [(1, False), (0, True), (0, False)]


def test_two_copies_of_the_embedding_are_one_parameter_and_the_parts_gather_to_the_whole():
    of_ranks = launch(_all_cases, 3)
    for i, (modules, tied) in enumerate(CASES):
        first, middle, last = (found[i] for found in of_ranks)
        shared = bool(modules) or tied
        name = "model.embed_tokens.weight"
        assert first[0] == {name: [4.0] if shared else [1.0]}
        assert middle[0] == {} and last[0] == ({name: None} if shared else {})
        if shared:
            assert torch.equal(first[1][name], last[1][name])
        whole = model(num_nextn_predict_layers=modules, tie_word_embeddings=tied).state_dict()
        assert middle[2] == last[2] == {} and first[2].keys() == whole.keys()
        dealt = deal(5, 3)
        for layer, of in ((0, 1), (dealt[1][0], 2), (dealt[2][-1], 3)):
            key = f"model.layers.{layer}.input_layernorm.weight"
            assert torch.equal(first[2][key], whole[key] + of)
        assert torch.equal(first[2][name], whole[name] + 1)
        assert torch.equal(first[2]["lm_head.weight"], whole["lm_head.weight"] + (1 if tied else 3))


def test_a_copy_without_a_gradient_adds_nothing():
    """A step without drafts: the last stage has not used its embedding."""

    def on_rank():
        stage = split(model(), 2, dist.get_rank())
        if dist.get_rank() == 0:
            stage.model.embed_tokens.weight.grad = torch.ones(32, 16, dtype=torch.float64)
        hand_over(stage, dist.group.WORLD)
        grad = stage.model.embed_tokens.weight.grad
        return None if grad is None else grad.unique().tolist()

    assert launch(on_rank, 2) == [[1.0], None]
