"""Does compressed attention still learn? MHA, GQA, MQA and MLA at equal parameters, on real text.

Every variant sees the same windows of the standard library in the same order. The feed-forward
takes up what the attention saves, so that all variants have as many parameters, within 0.1 %.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import machine
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import memory, params
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.train import corpus
from dsv3_tutorial.train.loop import Schedule, train

NAME = "learning"
SCHEDULE = Schedule(steps=1200, batch=8, seq_len=128, evaluate_every=100)


def variants() -> dict[str, ModelConfig]:
    """The compared attentions by name, all of `tiny`'s frame and of its parameter count.

    The caches hold 512, 128, 64, 128 and 64 elements a token and layer.
    """
    mla = ModelConfig.named("tiny")
    plain = ModelConfig(
        model_type="llama",
        rope_interleave=False,
        head_dim=32,
        **{name: getattr(mla, name) for name in _SHARED},
    )
    candidates = {
        "MHA": plain,
        "GQA, 2 groups": replace(plain, num_key_value_heads=2),
        "MQA": replace(plain, num_key_value_heads=1),
        "MLA, latent 96 + 32": mla,
        "MLA, latent 48 + 16": replace(mla, kv_lora_rank=48, qk_rope_head_dim=16),
    }
    budget = params.count(mla).total
    return {name: with_parameters(cfg, budget) for name, cfg in candidates.items()}


_SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "max_position_embeddings", "rope_theta", "rms_norm_eps"),
    "initializer_range",
)


def with_parameters(cfg: ModelConfig, budget: int) -> ModelConfig:
    """`cfg` with the feed-forward width that brings its parameter count nearest to `budget`."""
    per_unit = 3 * cfg.hidden_size * cfg.num_hidden_layers  # gate, up and down, in every layer
    spare = budget - params.count(cfg).total
    return replace(cfg, intermediate_size=cfg.intermediate_size + round(spare / per_unit))


def curve(cfg: ModelConfig, text: corpus.Corpus, schedule: Schedule, seed: int) -> Iterator[dict]:
    """Train one variant with one seed; yields {step, held_out} where held-out loss was taken."""
    torch.manual_seed(seed)
    model = DeepSeekV3(cfg)
    for row in train(model, text, schedule, seed=seed):
        if row.held_out is not None:
            yield {"step": row.step, "held_out": row.held_out}


def _receipt(name: str, cfg: ModelConfig, seed: int, row: dict) -> receipts.Receipt:
    elements = memory.kv_cache_bytes_per_token(cfg, bytes_per_element=1)
    shapes = {
        "variant": name,
        "seed": seed,
        "step": row["step"],
        "cache_elements_per_token": elements,
        "parameters": params.count(cfg).total,
        "steps": SCHEDULE.steps,
        "tokens_per_step": SCHEDULE.batch * SCHEDULE.seq_len,
    }
    value = round(row["held_out"], 5)
    return receipts.Receipt(
        what="held-out loss",
        shapes=shapes,
        value=value,
        unit="bits per byte",
        spread={"min": value, "max": value},
        repeats=1,
        **machine.here(),
    )


def main(argv: list[str] | None = None) -> int:
    """Run what has no receipt yet, seed by seed, so that an interrupted run can be taken up."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_tutorial bench learning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--out", type=Path, help="folder of the receipts (default data/measured)")
    options = parser.parse_args(argv)
    text = corpus.load()
    for seed in options.seeds:
        for name, cfg in variants().items():
            if _done(name, seed, options.out):
                continue
            rows = [_receipt(name, cfg, seed, row) for row in curve(cfg, text, SCHEDULE, seed)]
            receipts.append(NAME, rows, folder=options.out)
            print(f"{name}, seed {seed}: {rows[-1].value:.3f} bits per byte held out", flush=True)
    return 0


def _done(name: str, seed: int, folder: Path | None) -> bool:
    if NAME not in receipts.names(folder):
        return False
    return bool(receipts.read(NAME, folder=folder, variant=name, seed=seed, step=SCHEDULE.steps))
