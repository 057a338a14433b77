"""The two parts of a stage's backward: the gradients and the arithmetic of the whole, no more."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.parallel.pipeline_backward import LaterGradients, backward

D = 16
CONFIG = {
    "model_type": "deepseek_v3",
    "num_experts_per_tok": 2,
    "vocab_size": 11,
    "hidden_size": D,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 8,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 64,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "rope_theta": 10000,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}


class Uses(nn.Module):
    """Weights used once, twice one after the other, elementwise, and not at all."""

    def __init__(self, embed=False):
        super().__init__()
        self.embedding = nn.Embedding(11, D) if embed else None
        self.norm, self.once, self.twice = nn.LayerNorm(D), nn.Linear(D, D), nn.Linear(D, D)
        self.scale = nn.Parameter(torch.randn(D))
        self.double()
        self.never = nn.Linear(D, D) if not embed else None

    def forward(self, x):
        x = self.embedding(x) if self.embedding else x
        x = x + self.once(self.norm(x)).tanh() * self.scale
        return x + self.twice(self.twice(x).sin())


class Recomputed(nn.Module):
    """A block that recomputes its inside in the backward."""

    def __init__(self):
        super().__init__()
        self.inside = parts_of_a_block()["block with experts"]

    def forward(self, x):
        return checkpoint(self.inside, x, use_reentrant=False)


def grads(module):
    return {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}


def parts_of_a_block():
    torch.manual_seed(0)
    model = DeepSeekV3(ModelConfig.from_dict(CONFIG)).double()
    return {"dense block": model.model.layers[0], "block with experts": model.model.layers[2]}


MODULES = {
    "every kind of use": Uses,
    "dense block": lambda: parts_of_a_block()["dense block"],
    "block with experts": lambda: parts_of_a_block()["block with experts"],
    "recomputed block": Recomputed,
    "no weights": nn.Tanh,
}


def in_parts(make, counter=FlopCounterMode):
    """Input's and weights' gradients of one backward and of one in two parts, with their FLOPs."""
    x, module = torch.randn(2, 3, D, dtype=torch.float64), make()
    gradient, results = torch.randn_like(module(x)), []
    for whole in (True, False):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        with counter(display=False) as flops:
            if whole:
                found = backward(out, gradient, leaf)
            else:
                later = LaterGradients(out, gradient, leaf)
                assert all(p.grad is None for p in module.parameters()) and leaf.grad is None
                found = later.input_gradient
                later.finish()
        results.append((found, grads(module), flops and flops.get_total_flops()))
    return results


@pytest.mark.parametrize("name", MODULES)
def test_the_parts_of_a_backward_give_what_the_whole_gives(name):
    # The counter's own hooks do not stand a block that recomputes.
    whole, parts = in_parts(MODULES[name], counter=lambda display: nullcontext())
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-12, atol=1e-12)
    for key, gradient in whole[1].items():
        if gradient is None:
            assert parts[1][key] is None
        else:
            torch.testing.assert_close(parts[1][key], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["dense block", "block with experts"])
def test_the_parts_of_a_block_s_backward_do_the_arithmetic_of_the_whole(name):
    whole, parts = in_parts(MODULES[name])
    assert parts[2] == whole[2] > 0


def test_an_input_without_a_gradient_leaves_all_of_the_backward_for_later():
    stage, tokens = Uses(embed=True), torch.tensor([[1, 2, 3]])
    later = LaterGradients(stage(tokens).sum(), None, tokens)
    assert later.input_gradient is None and stage.scale.grad is None
    later.finish()
    found = grads(stage)
    stage.zero_grad()
    assert backward(stage(tokens).sum(), None, tokens) is None
    for name, gradient in grads(stage).items():
        assert torch.equal(found[name], gradient)


def test_an_input_that_an_output_does_not_use_gets_zeros():
    weight = nn.Parameter(torch.ones(3))
    x = torch.ones(3, requires_grad=True)
    later = LaterGradients((2 * weight).sum(), None, x)
    assert torch.equal(later.input_gradient, torch.zeros(3)) and weight.grad is None
    later.finish()
    assert torch.equal(weight.grad, torch.full((3,), 2.0))
    assert torch.equal(backward((2 * weight).sum(), None, x), torch.zeros(3))
