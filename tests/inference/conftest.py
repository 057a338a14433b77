"""Models small enough to generate with in a test, and how a text is continued the slow way."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.model import DeepSeekV3

SMALL = Path(__file__).parents[2] / "data/checkpoints/small"


@pytest.fixture(scope="session")
def cfg():
    """A dense and an expert layer and an MTP module over 48 tokens: 64 positions at most."""
    return ModelConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=1,
        max_position_embeddings=64,
        initializer_range=0.3,
    )


@pytest.fixture(scope="session")
def plain_cfg(cfg):
    """The same without an MTP module."""
    return replace(cfg, num_nextn_predict_layers=0)


@pytest.fixture
def model(cfg):
    """Random weights, float32, no gradient wanted; a fresh one for each test."""
    torch.manual_seed(5)
    return DeepSeekV3(cfg).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def small():
    """The folder of the trained checkpoint."""
    return SMALL


@pytest.fixture(scope="session")
def trained(small):
    """The trained model in float32, its MTP module included: not to be changed."""
    return DeepSeekV3.from_pretrained(small, torch.float32).requires_grad_(False)


@pytest.fixture(scope="session")
def reread():
    """reread(model, prompt, n): n greedy tokens, the whole text read anew for each: no cache."""

    def continued(model: DeepSeekV3, prompt: list[int], count: int) -> list[int]:
        text = list(prompt)
        with torch.inference_mode():
            for _ in range(count):
                text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
        return text[len(prompt) :]

    return continued
