"""The whole design against a dense baseline of equal training FLOPs, both trained here.

MLA, experts, FP8 and multi-token prediction stand together against plain attention and a dense
feed-forward in BF16: same layers and channels, same text in the same order, same FLOPs a token.
FP8 is emulated on a CPU: what it does to the loss is real, what it does to the time is not.
"""

import argparse
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import machine
from dsv3_tutorial.bench.codesign_bytes import held_bytes
from dsv3_tutorial.bench.codesign_ladder import (
    BASELINE,
    FULL,
    SEQ_LEN,
    Rung,
    ladder,
    training_flops_per_token,
)
from dsv3_tutorial.bench.codesign_table import compared, sentence, table
from dsv3_tutorial.cost import memory, params
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.parallel.data import Ranks
from dsv3_tutorial.train import corpus, evaluate
from dsv3_tutorial.train.precision import worker_for
from dsv3_tutorial.train.profile import Phases
from dsv3_tutorial.train.recipe import Recipe
from dsv3_tutorial.train.step import TrainingState, Update, optimizer_for, train_step

NAME = "codesign"
ENDS = (BASELINE, FULL)
STEPS, BATCH, EVERY, LOOK = 500, 8, 10, 50
TAIL, WINDOWS = 100, 32  # the held-out loss: every EVERY of the last TAIL steps, over WINDOWS
PEAK_LR = 3e-3


@dataclass(frozen=True)
class Run:
    """One run. Losses in bits per byte; seconds on the clock, and of the processor, for the steps.

    `loss` are means of EVERY batches, of the main head; `mtp_held_out` is None without a module,
    and `violation` (MaxVio over the tail) without experts.
    """

    steps: list[int]
    loss: list[float]
    held_out_steps: list[int]
    held_out: list[float]
    mtp_held_out: float | None
    violation: float | None
    seconds: float
    processor_seconds: float
    weight_bytes: int
    optimizer_bytes: int
    activation_bytes_per_token: float

    def tail(self) -> list[float]:
        """The held-out losses of the last TAIL steps: a single look would be mostly noise."""
        looks = zip(self.held_out_steps, self.held_out)
        return [loss for step, loss in looks if step > self.steps[-1] - TAIL]


def run(
    name: str, seed: int, text: corpus.Corpus, steps: int = STEPS, peak_lr: float = PEAK_LR
) -> Run:
    """Train one rung with one seed, and look at the held-out text every LOOK steps and at the end.

    Raises ValueError for a name that is no rung, before anything is made.
    """
    began, state = time.perf_counter(), begin(_rung(name), seed, text, steps, peak_lr)
    updates, looks, spent = [], {}, 0.0
    for step in range(1, steps + 1):
        before = time.process_time()
        updates.append(_step(state))
        spent += time.process_time() - before
        if _looks(step, steps):
            looks[step] = _held_out(state, text)
    seconds = time.perf_counter() - began
    drafts = [draft for _, draft in looks.values() if draft is not None]
    return Run(
        steps=[min(steps, at + EVERY) for at in range(0, steps, EVERY)],
        loss=[_bits(updates[at : at + EVERY]) for at in range(0, steps, EVERY)],
        held_out_steps=[*looks],
        held_out=[round(loss, 6) for loss, _ in looks.values()],
        mtp_held_out=round(drafts[-1], 6) if drafts else None,
        violation=_violation(updates[-TAIL:]),
        seconds=round(seconds, 1),
        processor_seconds=round(spent, 1),
        **held_bytes(state, state.sampler.draw()),
    )


def live(
    names: Iterable[str] = ENDS,
    seconds: float = 60.0,
    seed: int = 100,
    text: corpus.Corpus | None = None,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Rungs side by side, here and now: (step, {name: bits per byte of its batch}).

    Each step is taken by all before the next one; at least one, at most STEPS. The seed is none of
    those on record.
    """
    began, text = time.perf_counter(), text or corpus.load()
    states = {name: begin(_rung(name), seed, text, STEPS) for name in names}
    for step in range(1, STEPS + 1):
        yield step, {name: _bits([_step(state)]) for name, state in states.items()}
        if time.perf_counter() - began > seconds:
            return


def begin(
    rung: Rung, seed: int, text: corpus.Corpus, steps: int, peak_lr: float = PEAK_LR
) -> TrainingState:
    """A fresh model and the order of its text; one seed gives every rung the same order."""
    recipe = _recipe(rung, seed, steps, peak_lr)
    torch.manual_seed(seed)
    model = DeepSeekV3(rung.cfg)
    worker = worker_for(model, rung.precision)
    optimizer = optimizer_for(model, peak_lr, recipe.moments_in)
    sampler = corpus.Sampler(text.train, BATCH, SEQ_LEN, seed)
    return TrainingState(model, optimizer, sampler, recipe, worker=worker)


def _rung(name: str) -> Rung:
    known = ladder(SEQ_LEN)
    if name not in known:
        raise ValueError(
            f"{name!r} is no rung of this ladder, so there is nothing to train. "
            f"Choose one of: {'; '.join(known)}."
        )
    return known[name]


def _recipe(rung: Rung, seed: int, steps: int, peak_lr: float) -> Recipe:
    return Recipe(
        steps=steps,
        seed=seed,
        batch=BATCH,
        seq_len=SEQ_LEN,
        peak_lr=peak_lr,
        warmup=30,
        schedule="cosine",
        mtp_weight=rung.mtp_weight,
        gamma=0.01,
        precision=rung.precision,
        evaluate_windows=WINDOWS,
    )


def _alone() -> Ranks:
    return Ranks(0, 1, torch.device("cpu"))


def _step(state: TrainingState) -> Update:
    return train_step(state, state.sampler.draw(), _alone(), Phases())


def _bits(updates: list[Update]) -> float:
    """The batches' mean loss before their updates, main head, in bits per byte."""
    return round(mean(update.loss for update in updates) / math.log(2), 5)


def _violation(updates: list[Update]) -> float | None:
    each = [update.violation() for update in updates]
    return round(mean(layers for layers, _ in each), 4) if each[0] else None


def _looks(step: int, steps: int) -> bool:
    return step == steps or step % LOOK == 0 or (step > steps - TAIL and step % EVERY == 0)


def _held_out(state: TrainingState, text: corpus.Corpus) -> tuple[float, float | None]:
    """Bits per byte of the held-out text, computed as the run computes: main head, and MTP's."""
    return evaluate.held_out(state.worker, text, state.recipe, _alone())


def receipt(name: str, seed: int, steps: int, peak_lr: float, made: Run) -> receipts.Receipt:
    """One run with all it takes to repeat it and to compare it."""
    rung, tail = _rung(name), made.tail()
    counted = params.count(rung.cfg)
    shapes = {
        "variant": name,
        "seed": seed,
        "length": steps,
        "peak_lr": peak_lr,
        "tokens_per_step": BATCH * SEQ_LEN,
        "seq_len": SEQ_LEN,
        "windows": WINDOWS,
        "precision": rung.precision,
        "parameters": counted.total + counted.mtp,
        "activated_parameters": counted.activated,
        "training_flops_per_token": training_flops_per_token(rung.cfg, SEQ_LEN),
        "cache_bytes_per_token": memory.kv_cache_bytes_per_token(rung.cfg),
    }
    return receipts.Receipt(
        what="held-out loss",
        shapes=shapes | asdict(made),
        value=mean(tail),
        unit="bits per byte",
        spread={"min": min(tail), "max": max(tail)},
        repeats=len(tail),
        **machine.here(),
    )


def main(argv: list[str] | None = None) -> int:
    """Run what has no receipt yet, seed by seed, so that an interrupted run can be taken up."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_tutorial bench codesign")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument(
        "--rungs", nargs="+", choices=[*ladder()], default=[*ENDS], metavar="NAME", help="the ends"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run ({STEPS})")
    parser.add_argument("--lr", type=float, default=PEAK_LR, help=f"the highest ({PEAK_LR:g})")
    parser.add_argument("--out", type=Path, help="folder of the receipts (default data/measured)")
    options = parser.parse_args(argv)
    text = corpus.load()
    for seed in options.seeds:
        for name in options.rungs:
            if not _read(options, variant=name, seed=seed):
                _record(name, seed, text, options)
    found = _read(options)
    print(table(found))
    for pairs in compared(found).values():
        print(sentence(pairs))
    return 0


def _record(name: str, seed: int, text: corpus.Corpus, options: argparse.Namespace) -> None:
    made = run(name, seed, text, options.steps, options.lr)
    kept = receipt(name, seed, options.steps, options.lr, made)
    receipts.append(NAME, [kept], folder=options.out)
    print(f"{name}, seed {seed}: {kept.value:.4f} bits per byte held out", flush=True)


def _read(options: argparse.Namespace, **wanted) -> list[receipts.Receipt]:
    if NAME not in receipts.names(options.out):
        return []
    asked = {"length": options.steps, "peak_lr": options.lr} | wanted
    return receipts.latest(NAME, folder=options.out, **asked)
