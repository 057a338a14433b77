"""A small mixture of experts with a draft module, a text that can be learned, and a run on both."""

import json
from contextlib import nullcontext

import pytest
import torch

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.parallel.data import Ranks
from dsv3_tutorial.train import corpus
from dsv3_tutorial.train.precision import recompute_blocks, worker_for
from dsv3_tutorial.train.recipe import Recipe
from dsv3_tutorial.train.step import TrainingState, optimizer_for, train_step

SMALL = {
    "model_type": "deepseek_v3",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 128,
}
WORDS = [b"tensor", b"expert", b"token", b"gate", b"bias", b"route", b"latent", b"cache", b"head"]


@pytest.fixture
def moe_config():
    return ModelConfig.from_dict(SMALL)


@pytest.fixture
def text_folder(tmp_path):
    """120 small files of words in a fixed order of their own, and a config.json beside them."""
    folder = tmp_path / "text"
    folder.mkdir()
    (tmp_path / "moe.json").write_text(json.dumps(SMALL))
    for i in range(120):
        words = [WORDS[(i + k * k) % len(WORDS)] for k in range(60)]
        (folder / f"{i}.txt").write_bytes(b" ".join(words))
    return folder


@pytest.fixture
def alone():
    return Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def start(moe_config, text_folder):
    """Begin a run on the small text: start(dtype, **recipe) -> TrainingState."""
    text = corpus.load(text_folder)

    def begin(dtype=torch.float32, cfg=moe_config, **given):
        recipe = Recipe(**{"steps": 20, "batch": 8, "seq_len": 16, "warmup": 2, **given})
        torch.manual_seed(recipe.seed)
        model = DeepSeekV3(cfg).to(dtype)
        worker = worker_for(model, recipe.precision)
        if recipe.recompute:
            recompute_blocks(worker)
        sampler = corpus.Sampler(text.train, recipe.batch, recipe.seq_len, recipe.seed, text.place)
        optimizer = optimizer_for(model, recipe.peak_lr, recipe.moments_in)
        return TrainingState(model, optimizer, sampler, recipe, worker=worker)

    return begin


@pytest.fixture
def update(alone):
    """One update of a state on its own next batch, or on a given one."""

    def once(state, batch=None):
        batch = state.sampler.draw() if batch is None else batch
        return train_step(state, batch, alone, lambda name: nullcontext())

    return once
