"""What a small model loses when it trains in FP8: pairs of runs that differ in nothing else.

Every variant begins with the same weights and reads the same windows in the same order. Rounding
alone sends two runs apart, so one pair proves nothing: the difference has an error over the seeds.
DeepSeek-V3 technical report, section 3.3: within 0.25 % of BF16's loss.
"""

import argparse
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import machine
from dsv3_tutorial.bench.precision_pairs import paired
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.fp8.scaling import DEEPSEEK, Scaling
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.parallel.data import Ranks
from dsv3_tutorial.train import corpus, evaluate
from dsv3_tutorial.train.fault import NotFinite
from dsv3_tutorial.train.precision import worker_for
from dsv3_tutorial.train.profile import Phases
from dsv3_tutorial.train.recipe import Recipe
from dsv3_tutorial.train.step import TrainingState, optimizer_for, train_step

NAME = "precision"
STEPS, BATCH, SEQ_LEN, EVERY = 500, 8, 128, 10
TAIL, WINDOWS = 100, 32  # the held-out loss: every EVERY of the last TAIL steps, over WINDOWS
CONFIG = replace(
    ModelConfig.named("tiny"),
    first_k_dense_replace=1,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=128,
)
ONE_SCALE = 2.0**-10  # of every gradient alike, as a loss multiplied by 1024 has it
# What computes: a precision of `train`, or how the products of the linear layers are scaled. The
# last is broken on purpose: these gradients would need 2 ** 16, and lie where E4M3 ends. It goes
# along with the others at first, while gradients are large.
VARIANTS: dict[str, str | Scaling] = {
    "bf16": "bf16",
    "fp8": "fp8",
    "fp8-tensor": "fp8-tensor",
    "fp8, one loss scale": replace(DEEPSEEK, grad_scale=ONE_SCALE),
}
NO_MASTERS = "bf16, no masters"
# Only where asked for: what rounding alone does to a run of BF16; weights that are kept in BF16
# between the steps; and gradients as they are, of which E4M3 has nothing below 2 ** -10.
MORE: dict[str, str | Scaling] = {
    "float32": "float32",
    NO_MASTERS: "bf16",
    "fp8, gradients unscaled": replace(DEEPSEEK, grad_scale=1.0),
}


@dataclass(frozen=True)
class Curve:
    """One run, in bits per byte: means of EVERY batches, and the held-out loss over its tail."""

    steps: list[int]
    loss: list[float]
    held_out_steps: list[int]
    held_out: list[float]
    seconds: float

    @property
    def value(self) -> float:
        """The held-out loss, averaged over the tail: a single look would be mostly noise."""
        return mean(self.held_out)


def run(variant: str, seed: int, text: corpus.Corpus, steps: int = STEPS) -> Curve:
    """Train one variant with one seed; look at the held-out text towards the end of the run."""
    began, state = time.perf_counter(), _begin(variant, seed, text, steps)
    losses, held_out = [], {}
    for step in range(1, steps + 1):
        losses.append(_step(state))
        if variant == NO_MASTERS:
            _forget_masters(state)
        if step > steps - TAIL and (step % EVERY == 0 or step == steps):
            held_out[step] = round(_held_out(state, text), 6)
    means = [round(mean(losses[at : at + EVERY]), 5) for at in range(0, steps, EVERY)]
    at = [min(steps, begin + EVERY) for begin in range(0, steps, EVERY)]
    spent = round(time.perf_counter() - began, 1)
    return Curve(at, means, [*held_out], [*held_out.values()], spent)


def live(
    variants: Iterable[str] = tuple(VARIANTS),
    seconds: float = 60.0,
    seed: int = 100,
    text: corpus.Corpus | None = None,
) -> Iterator[tuple[int, dict[str, float]]]:
    """The same runs side by side, here and now: (step, {variant: bits per byte of its batch}).

    Each step is taken by all before the next one; at least one, at most STEPS. The seed is none of
    those on record.
    """
    began, text = time.perf_counter(), text or corpus.load()
    states = {variant: _begin(variant, seed, text, STEPS) for variant in variants}
    for step in range(1, STEPS + 1):
        yield step, {variant: _step(state) for variant, state in states.items()}
        if time.perf_counter() - began > seconds:
            return


def _begin(variant: str, seed: int, text: corpus.Corpus, steps: int) -> TrainingState:
    """A fresh model and the order of its text: one seed gives every variant the same of both."""
    known = VARIANTS | MORE
    if variant not in known:
        raise ValueError(
            f"{variant!r} is no way to compute that this benchmark knows, so there is nothing to "
            f"train. Choose one of: {'; '.join(known)}."
        )
    computes = known[variant]
    recipe = _recipe(computes if isinstance(computes, str) else "fp8", seed, steps)
    torch.manual_seed(seed)
    model = DeepSeekV3(CONFIG)
    worker = worker_for(model, computes)
    optimizer = optimizer_for(model, recipe.peak_lr, recipe.moments_in)
    sampler = corpus.Sampler(text.train, BATCH, SEQ_LEN, seed)
    return TrainingState(model, optimizer, sampler, recipe, worker=worker)


def _recipe(precision: str, seed: int, steps: int) -> Recipe:
    return Recipe(
        steps=steps,
        seed=seed,
        batch=BATCH,
        seq_len=SEQ_LEN,
        peak_lr=3e-3,
        warmup=30,
        schedule="cosine",
        mtp_weight=0.0,
        gamma=0.01,
        precision=precision,
        evaluate_windows=WINDOWS,
    )


def _alone() -> Ranks:
    return Ranks(0, 1, torch.device("cpu"))


def _step(state: TrainingState) -> float:
    """One update: the batch's bits per byte before it."""
    return train_step(state, state.sampler.draw(), _alone(), Phases()).loss / math.log(2)


@torch.no_grad()
def _forget_masters(state: TrainingState) -> None:
    """Leave of the float32 weights only what BF16 holds, which the worker has already."""
    for weight in state.model.parameters():
        weight.copy_(weight.bfloat16())


def _held_out(state: TrainingState, text: corpus.Corpus) -> float:
    """Bits per byte of the held-out text, computed as the run computes."""
    return evaluate.held_out(state.worker, text, state.recipe, _alone())[0]


def _receipt(variant: str, seed: int, steps: int, curve: Curve) -> receipts.Receipt:
    shapes = {
        "variant": variant,
        "seed": seed,
        "length": steps,
        "tokens_per_step": BATCH * SEQ_LEN,
        "windows": WINDOWS,
        "steps": curve.steps,
        "loss": curve.loss,
        "held_out_steps": curve.held_out_steps,
        "held_out": curve.held_out,
        "seconds": curve.seconds,
    }
    return receipts.Receipt(
        what="held-out loss",
        shapes=shapes,
        value=curve.value,
        unit="bits per byte",
        spread={"min": min(curve.held_out), "max": max(curve.held_out)},
        repeats=len(curve.held_out),
        **machine.here(),
    )


def main(argv: list[str] | None = None) -> int:
    """Run what has no receipt yet, seed by seed, so that an interrupted run can be taken up."""
    known = [*VARIANTS, *MORE]
    parser = argparse.ArgumentParser(prog="python -m dsv3_tutorial bench precision")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--variants", nargs="+", choices=known, default=[*VARIANTS], metavar="NAME")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run ({STEPS})")
    parser.add_argument("--out", type=Path, help="folder of the receipts (default data/measured)")
    options = parser.parse_args(argv)
    text = corpus.load()
    for seed in options.seeds:
        for variant in options.variants:
            if not _read(options.out, variant=variant, seed=seed, length=options.steps):
                _record(variant, seed, text, options)
    for pairs in paired(_read(options.out, length=options.steps)).values():
        print(pairs)
    return 0


def _record(variant: str, seed: int, text: corpus.Corpus, options: argparse.Namespace) -> None:
    """Train one and keep its receipt. One that breaks off has none, and the next is begun."""
    try:
        curve = run(variant, seed, text, options.steps)
    except NotFinite as error:
        print(f"{variant}, seed {seed}: {error}", flush=True)
        return
    made = _receipt(variant, seed, options.steps, curve)
    receipts.append(NAME, [made], folder=options.out)
    rate = curve.seconds / options.steps
    print(f"{variant}, seed {seed}: {curve.value:.4f} held out, {rate:.2f} s a step", flush=True)


def _read(folder: Path | None, **wanted) -> list[receipts.Receipt]:
    known = NAME in receipts.names(folder)
    return receipts.latest(NAME, folder=folder, **wanted) if known else []
