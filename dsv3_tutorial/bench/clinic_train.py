"""The patients of the loss-curve clinic: a very small model with latent attention and experts.

0.2M parameters, 200 steps of 512 bytes each, some five seconds on one quiet core: enough for a
healthy run to learn words and for its experts to find their balance.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dsv3_tutorial.bench.clinic_cases import Case
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.parallel.data import Ranks
from dsv3_tutorial.train import step
from dsv3_tutorial.train.corpus import Corpus, Sampler, windows
from dsv3_tutorial.train.recipe import Recipe

CONFIG = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    initializer_range=0.06,
)
RECIPE = Recipe(
    steps=200,
    batch=8,
    seq_len=64,
    peak_lr=6e-3,
    warmup=20,
    schedule="cosine",
    mtp_weight=0.0,
    alpha=0.0,  # the bias alone: no balance loss reaches the gate
    gamma=0.015,  # V3's 0.001 is for a million steps, not for 200
    evaluate_every=20,
)
COLUMNS = ("loss", "grad_norm", "max_violation", "zero_fraction", "held_out")


def train(case: Case, seed: int, text: Corpus, recipe: Recipe = RECIPE) -> dict[str, Any]:
    """One run with the case's bug in place: {seed, and a list of numbers for each of COLUMNS}.

    One value a step, `held_out` one every `evaluate_every` steps. A run whose loss stops being a
    number ends there. The same seed gives the same numbers on the same machine and thread count.
    """
    recipe = replace(recipe, seed=seed, **case.recipe)
    data = text.train[: case.bytes_of_text]
    columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
    with case.plant():
        torch.manual_seed(seed)
        model = DeepSeekV3(CONFIG)
        optimizer = step.optimizer_for(model, recipe.peak_lr)
        optimizer.register_step_pre_hook(
            lambda *ignored: columns["zero_fraction"].append(round(zero_fraction(model), 4))
        )
        sampler = Sampler(data, recipe.batch, recipe.seq_len, seed)
        state = step.TrainingState(model, optimizer, sampler, recipe)
        _steps(state, text, columns)
    return {"seed": seed, **columns}


def _steps(state: step.TrainingState, text: Corpus, columns: dict[str, list[float]]) -> None:
    alone = Ranks(0, 1, torch.device("cpu"))
    while state.step < state.recipe.steps:
        try:
            update = step.train_step(state, state.sampler.draw(), alone, no_phase)
        except FloatingPointError:
            return
        columns["loss"].append(round(update.loss / math.log(2), 3))
        columns["grad_norm"].append(float(f"{update.grad_norm:.3g}"))
        columns["max_violation"].append(round(update.violation()[0], 2))
        if state.step % state.recipe.evaluate_every == 0:
            columns["held_out"].append(round(held_out(state, text), 3))


def no_phase(name: str) -> AbstractContextManager:
    """Nobody times these steps."""
    return nullcontext()


def zero_fraction(model: nn.Module) -> float:
    """How much of the gradient is exactly 0, the embedding left out: bytes of no batch are many.

    An expert that no token of the step chose has a gradient of zeros, and so has what the loss
    does not reach.
    """
    rest = [p for name, p in model.named_parameters() if "embed_tokens" not in name]
    zeros = sum(p.numel() if p.grad is None else int((p.grad == 0).sum()) for p in rest)
    return zeros / sum(p.numel() for p in rest)


@torch.no_grad()
def held_out(state: step.TrainingState, text: Corpus, count: int = 4) -> float:
    """Bits per byte of the model as it is, bug included, over `count` fixed batches."""
    recipe = state.recipe
    batches = list(windows(text.held_out, recipe.batch, recipe.seq_len, count))
    each = [
        step.nats(step.predict(state.model, b[:, :-1], drafts=False)[0], b[:, 1:]) for b in batches
    ]
    return torch.stack(each).mean().item() / math.log(2)
