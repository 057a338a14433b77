"""The same weights, bias and input through transformers' routers and ours.

The mask of the groups. DeepSeek's inference code puts experts outside the chosen groups at -inf.
Others put them at 0.0, on scores that are sigmoids and so positive; but a balance bias below a
score makes the biased score negative, and then 0.0 wins: a token goes to a group that it was to
keep out of. vLLM (pull request 13474), SGLang (3705) and the modelling code on Hugging Face had
this and mended it; transformers' V3 had 0.0 into 2026 and has -inf in the version tested here,
its V2 still has 0.0, where it does no harm: softmax scores are never negative and have no bias.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.moe.gate import Gate, route

SIZES = {
    "vocab_size": 16,
    "hidden_size": 24,
    "intermediate_size": 32,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
}
V2_METHODS = ("greedy", "group_limited_greedy")


@st.composite
def expert_counts(draw):
    """Groups of two experts or more, and as many experts a token as the chosen groups hold."""
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    kept = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, kept * per_group))
    return {
        "n_routed_experts": groups * per_group,
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": top_k,
    }


def pair(router, theirs, seed):
    """transformers' router and our gate with the same weights, and an input (2, 20, D)."""
    numbers = torch.Generator().manual_seed(seed)
    layer = router(theirs)
    layer.weight.data = torch.randn(layer.weight.shape, generator=numbers) / 3
    ours = Gate(ModelConfig.from_dict(theirs.to_dict()))
    if ours.e_score_correction_bias is not None:
        shape = layer.e_score_correction_bias.shape
        layer.e_score_correction_bias = torch.randn(shape, generator=numbers)  # many sums below 0
    ours.load_state_dict(layer.state_dict(), strict=True)
    return layer, ours, torch.randn(2, 20, theirs.hidden_size, generator=numbers)


def spread(indices, weights, n_experts):
    """Weights by expert, which no order of the choice changes: (M, E), -1 where not chosen."""
    return torch.full((len(indices), n_experts), -1.0).scatter(1, indices, weights)


def agree(layer, ours, x):
    """The same experts with the same weights, and the same gradients for gate and input."""
    results = []
    for gate in (layer, ours):
        inputs = x.clone().requires_grad_()
        found = gate(inputs)
        indices, weights = (found[2], found[1]) if gate is layer else (found[0], found[1])
        dense = spread(indices, weights, len(ours.weight))
        probe = torch.randn(dense.shape, generator=torch.manual_seed(3))
        (dense * probe).sum().backward()
        results.append((dense, inputs.grad, gate.weight.grad))
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@given(expert_counts(), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_v3_routes_as_transformers_with_any_bias_groups_and_normalisation(counts, norm, seed):
    theirs = DeepseekV3Config(**SIZES, **counts, norm_topk_prob=norm, routed_scaling_factor=2.5)
    agree(*pair(DeepseekV3TopkRouter, theirs, seed))


@pytest.mark.parametrize("method", V2_METHODS)
@given(expert_counts(), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_v2_routes_as_transformers(method, counts, seed):
    """transformers' V2 knows no norm_topk_prob: it scales and never normalises. All V2 do that."""
    known = {"topk_method": method, "norm_topk_prob": False, "routed_scaling_factor": 16.0}
    agree(*pair(DeepseekV2TopkRouter, DeepseekV2Config(**SIZES, **counts, **known), seed))


def best_groups(biased, cfg):
    """The groups with the largest sum of their two best: biased (M, E) -> (M, topk_group)."""
    two = biased.unflatten(-1, (cfg.n_group, -1)).sort(dim=-1, descending=True).values[..., :2]
    return two.sum(-1).topk(cfg.topk_group, dim=-1).indices


def masked_with_zero(biased, cfg):
    """The choice of the code that puts unchosen groups at 0.0: biased (M, E) -> (M, K)."""
    group = torch.arange(cfg.n_routed_experts) // (cfg.n_routed_experts // cfg.n_group)  # (E,)
    kept = (group[:, None] == best_groups(biased, cfg)[:, None]).any(-1)  # (M, E)
    return biased.masked_fill(~kept, 0.0).topk(cfg.num_experts_per_tok, dim=-1).indices


@pytest.fixture
def negative():
    """Eight experts in four groups, two groups and three experts a token, biases of about -2."""
    counts = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
    layer, ours, x = pair(DeepseekV3TopkRouter, DeepseekV3Config(**SIZES, **counts), 0)
    bias = torch.rand(8, generator=torch.manual_seed(5)) - 2.5
    layer.e_score_correction_bias, ours.e_score_correction_bias = bias, bias.clone()
    return layer, ours, x


def test_a_mask_of_zero_sends_tokens_out_of_their_groups_where_biased_scores_are_negative(negative):
    _, ours, x = negative
    flat, bias = x.flatten(0, 1), ours.e_score_correction_bias
    found = route(flat, ours.weight, bias, ours.cfg)
    biased = found.scores + bias
    assert biased.max() < 0
    assert all(row.unique().numel() <= 2 for row in found.indices // 2)  # two experts a group
    zero = masked_with_zero(biased, ours.cfg)
    outside = ~(zero[..., None] // 2 == best_groups(biased, ours.cfg)[:, None]).any(-1)
    assert outside.all()  # at 0.0 every expert that was to be left out beats all that were not
    shifted = route(flat, ours.weight, bias + 3, ours.cfg)  # the same bias for all moves nobody
    assert torch.equal(shifted.indices.sort().values, found.indices.sort().values)
    same = masked_with_zero(shifted.scores + bias + 3, ours.cfg)  # and above 0 both masks agree
    assert torch.equal(same.sort().values, shifted.indices.sort().values)


def test_transformers_masks_as_we_do_where_biased_scores_are_negative(negative):
    agree(*negative)
