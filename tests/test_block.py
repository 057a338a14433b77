"""The block: which attention it holds, what its feed-forward computes, what it refuses."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dsv3_tutorial.attention.mha import Attention
from dsv3_tutorial.attention.mla import MLA
from dsv3_tutorial.block import Block, initialize
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.mlp import MLP
from dsv3_tutorial.moe.layer import MoE

TINY = ModelConfig.named("tiny")
PLAIN = replace(TINY, model_type="llama", kv_lora_rank=None, head_dim=32, rope_interleave=False)


def test_a_config_with_a_latent_gets_mla_and_one_without_gets_plain_attention():
    assert isinstance(Block(TINY, 0).self_attn, MLA)
    assert isinstance(Block(PLAIN, 0).self_attn, Attention)


def test_the_feed_forward_is_swiglu():
    mlp, x = MLP(TINY.hidden_size, TINY.intermediate_size), torch.randn(2, 3, TINY.hidden_size)
    gate, up, down = (m.weight for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    expected = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(mlp(x), expected)


def test_a_block_whose_outputs_are_zero_passes_its_input_through():
    block, x = Block(TINY, 0), torch.randn(1, 5, TINY.hidden_size)
    for out in (block.self_attn.o_proj, block.mlp.down_proj):
        torch.nn.init.zeros_(out.weight)
    assert torch.equal(block(x), x)


def test_the_first_layers_are_dense_and_the_rest_mixtures_of_experts():
    small = ModelConfig.named("small")
    kinds = [type(Block(small, layer).mlp) for layer in range(3)]
    assert kinds == [MLP, MoE, MoE]


def test_initialisation_reaches_the_gate_and_every_expert():
    moe = MoE(ModelConfig.named("small"))
    initialize(moe, 0.03)
    for weight in (moe.gate.weight, moe.experts.gate_up_proj, moe.experts.down_proj):
        assert weight.std().item() == pytest.approx(0.03, rel=0.05)


def test_initialisation_gives_matrices_their_width_and_norms_one():
    block = Block(TINY, 0)
    initialize(block, 0.01)
    assert block.mlp.gate_proj.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert torch.equal(block.input_layernorm.weight, torch.ones(TINY.hidden_size))
