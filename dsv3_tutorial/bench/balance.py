"""What balancing the experts does to a small model on real text: nothing, a loss, or the bias.

Every variant sees the same windows of the standard library in the same order. V3's step of 0.001
is made for a quarter of a million optimizer steps; in a run of hundreds it is slow: three are run.
"""

import argparse
import math
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import machine
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.moe.balance import max_violation, watch
from dsv3_tutorial.parallel.data import Ranks
from dsv3_tutorial.train import corpus
from dsv3_tutorial.train.loop import evaluate
from dsv3_tutorial.train.profile import Phases
from dsv3_tutorial.train.recipe import Recipe
from dsv3_tutorial.train.step import TrainingState, optimizer_for, train_step

NAME = "balance"
STEPS, BATCH, SEQ_LEN, EVERY = 300, 8, 128, 10
CONFIG = replace(
    ModelConfig.named("tiny"),
    first_k_dense_replace=1,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_shared_experts=1,
    moe_intermediate_size=64,
)
VARIANTS: dict[str, dict] = {
    "none": {"balance": "none"},
    "loss, sequence-wise": {"balance": "sequence", "alpha": 0.01},
    "loss, batch-wise": {"balance": "batch", "alpha": 0.01},
    "bias, gamma 0.001": {"balance": "bias", "gamma": 0.001, "alpha": 0.0},
    "bias, gamma 0.01": {"balance": "bias", "gamma": 0.01, "alpha": 0.0},
    "bias, gamma 0.1": {"balance": "bias", "gamma": 0.1, "alpha": 0.0},
}
# What the standard library has of different kinds of text: folders and files, whoever holds them.
DOMAINS = {
    "prose": ("pydoc_data/topics.py",),
    "asynchronous code": ("asyncio",),
    "character tables": ("encodings",),
    "e-mail and MIME": ("email",),
}


@dataclass(frozen=True)
class Curve:
    """One run: every EVERY steps the batch's bits per byte and MaxVio; at the end the rest.

    domains: each kind of text's share of tokens per layer and expert, summing to 1 a layer.
    """

    steps: list[int]
    loss: list[float]
    max_violation: list[float]
    held_out: float
    held_out_violation: float
    domains: dict[str, list[list[float]]]


def run(variant: str, seed: int, text: corpus.Corpus, steps: int = STEPS) -> Curve:
    """Train one variant with one seed and look at what its experts do afterwards."""
    state = _begin(variant, seed, text, steps)
    model = state.model
    rows = [_step(state) for _ in range(steps)]
    means = [_mean(rows[at : at + EVERY]) for at in range(0, steps, EVERY)]
    at = [min(steps, begin + EVERY) for begin in range(0, steps, EVERY)]
    loss, violation = ([round(mean[i], 4) for mean in means] for i in (0, 1))
    held_out = evaluate(model, text.held_out, 8, SEQ_LEN)
    return Curve(at, loss, violation, held_out, _violation(model, text.held_out), domains(model))


def live(
    variant: str, seconds: float, seed: int = 100, text: corpus.Corpus | None = None
) -> Iterator[tuple[int, float, float]]:
    """The same run, here and now: (step, bits per byte, MaxVio) of each batch until time is over.

    At least one step and at most STEPS; the seed is none of those on record. The loss is of the
    batch before its update, MaxVio the mean over the layers.
    """
    began = time.perf_counter()
    state = _begin(variant, seed, text or corpus.load(), STEPS)
    for step in range(1, STEPS + 1):
        yield step, *_step(state)
        if time.perf_counter() - began > seconds:
            return


def _begin(variant: str, seed: int, text: corpus.Corpus, steps: int) -> TrainingState:
    """A fresh model and the order of its text: one seed gives every variant the same of both."""
    torch.manual_seed(seed)
    recipe = _recipe(variant, seed, steps)
    model = DeepSeekV3(CONFIG)
    sampler = corpus.Sampler(text.train, BATCH, SEQ_LEN, seed)
    return TrainingState(model, optimizer_for(model, recipe.peak_lr), sampler, recipe)


def _recipe(variant: str, seed: int, steps: int) -> Recipe:
    if variant not in VARIANTS:
        raise ValueError(
            f"{variant!r} is no way to balance that this benchmark knows, so there is nothing to "
            f"train. Choose one of: {'; '.join(VARIANTS)}."
        )
    return Recipe(
        steps=steps,
        seed=seed,
        batch=BATCH,
        seq_len=SEQ_LEN,
        peak_lr=3e-3,
        schedule="cosine",
        mtp_weight=0.0,
        freeze_bias=0.0,
        **VARIANTS[variant],
    )


def _step(state: TrainingState) -> tuple[float, float]:
    """One update: the batch's bits per byte, and MaxVio as the mean over the layers."""
    alone = Ranks(0, 1, torch.device("cpu"))
    done = train_step(state, state.sampler.draw(), alone, Phases())
    return done.loss / math.log(2), done.violation()[0]


def _mean(rows: list[tuple[float, float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows)]


@torch.no_grad()
def counts(model: DeepSeekV3, data: Tensor, batches: int = 8) -> Tensor:
    """Tokens per expert over windows spread evenly over `data` (bytes,) -> (layers, E)."""
    total = torch.zeros(0)
    for batch in corpus.windows(data, BATCH, SEQ_LEN, batches):
        with watch(model) as seen:
            model(batch[:, :-1])
        total = seen.counts() + (total if total.numel() else 0)
    return total


def by_chance() -> float:
    """The mean MaxVio of batches whose tokens choose evenly, each for itself."""
    draw, e = torch.Generator().manual_seed(0), CONFIG.n_routed_experts
    batches = torch.rand(50, BATCH * SEQ_LEN, e, generator=draw).topk(CONFIG.num_experts_per_tok)
    each = [torch.bincount(chosen.flatten(), minlength=e) for chosen in batches.indices]
    return max_violation(torch.stack(each)).mean().item()


def _violation(model: DeepSeekV3, data: Tensor) -> float:
    """MaxVio over the held-out text as a whole, mean over layers: the paper's MaxVio_global."""
    return max_violation(counts(model, data, 16)).mean().item()


def domains(model: DeepSeekV3) -> dict[str, list[list[float]]]:
    """What share of each kind of text's tokens every expert gets: {domain: layers x E}."""
    found = {}
    for name, data in domain_texts().items():
        load = counts(model, data).float()
        shares = load / load.sum(dim=-1, keepdim=True)
        found[name] = [[round(share, 4) for share in layer] for layer in shares.tolist()]
    return found


def domain_texts(folder: Path | None = None) -> dict[str, Tensor]:
    """The bytes of each domain that this interpreter's library has."""
    folder = Path(folder or sysconfig.get_path("stdlib"))
    found = {}
    for name, places in DOMAINS.items():
        paths = [p for place in places for p in _python_files(folder / place)]
        text = b"\n".join(path.read_bytes() for path in paths)
        if len(text) > SEQ_LEN:
            found[name] = corpus.as_bytes(text)
    return found


def _python_files(place: Path) -> list[Path]:
    return sorted(place.rglob("*.py")) if place.is_dir() else [place] * place.is_file()


def _receipt(variant: str, seed: int, curve: Curve) -> receipts.Receipt:
    value = round(curve.held_out, 5)
    shapes = {
        "variant": variant,
        "seed": seed,
        "tokens_per_step": BATCH * SEQ_LEN,
        "steps": curve.steps,
        "loss": curve.loss,
        "max_violation": curve.max_violation,
        "held_out_violation": round(curve.held_out_violation, 4),
        "domains": curve.domains,
    }
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
    parser = argparse.ArgumentParser(prog="python -m dsv3_tutorial bench balance")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--out", type=Path, help="folder of the receipts (default data/measured)")
    options = parser.parse_args(argv)
    text = corpus.load()
    for seed in options.seeds:
        for variant in VARIANTS:
            if _done(variant, seed, options.out):
                continue
            curve = run(variant, seed, text)
            receipts.append(NAME, [_receipt(variant, seed, curve)], folder=options.out)
            print(
                f"{variant}, seed {seed}: {curve.held_out:.3f} bits per byte held out, "
                f"MaxVio {curve.held_out_violation:.2f}",
                flush=True,
            )
    return 0


def _done(variant: str, seed: int, folder: Path | None) -> bool:
    known = NAME in receipts.names(folder)
    return known and bool(receipts.read(NAME, folder=folder, variant=variant, seed=seed))
