"""The block: which attention it holds, what its feed-forward computes, what it refuses."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dsv3_tutorial.attention.mha import Attention
from dsv3_tutorial.attention.mla import MLA
from dsv3_tutorial.block import Block, DenseMLP, initialize
from dsv3_tutorial.config import ModelConfig

TINY = ModelConfig.named("tiny")
PLAIN = replace(TINY, model_type="llama", kv_lora_rank=None, head_dim=32, rope_interleave=False)


def test_a_config_with_a_latent_gets_mla_and_one_without_gets_plain_attention():
    assert isinstance(Block(TINY, 0).self_attn, MLA)
    assert isinstance(Block(PLAIN, 0).self_attn, Attention)


def test_the_feed_forward_is_swiglu():
    mlp, x = DenseMLP(TINY), torch.randn(2, 3, TINY.hidden_size)
    gate, up, down = (m.weight for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    expected = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(mlp(x), expected)


def test_a_block_whose_outputs_are_zero_passes_its_input_through():
    block, x = Block(TINY, 0), torch.randn(1, 5, TINY.hidden_size)
    for out in (block.self_attn.o_proj, block.mlp.down_proj):
        torch.nn.init.zeros_(out.weight)
    assert torch.equal(block(x), x)


def test_a_mixture_of_experts_is_refused_with_what_to_do():
    small = ModelConfig.named("small")
    with pytest.raises(NotImplementedError, match="first_k_dense_replace to 12"):
        Block(small, small.num_hidden_layers - 1)


def test_initialisation_gives_matrices_their_width_and_norms_one():
    block = Block(TINY, 0)
    initialize(block, 0.01)
    assert block.mlp.gate_proj.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert torch.equal(block.input_layernorm.weight, torch.ones(TINY.hidden_size))
