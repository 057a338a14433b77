"""`python -m dsv3_tutorial train`: a run from its options to a model on disk.

A run's folder: run.json (what was asked), log.jsonl (a row a step), checkpoints/ (what --resume
takes up), model/ (the result), and with their options log.csv, tokenizer.json, profile/.
"""

import argparse
import contextlib
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dsv3_tutorial.files import write_whole
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.parallel.data import Ranks, gathered_state, joined
from dsv3_tutorial.train import corpus, evaluate, fault
from dsv3_tutorial.train.begin import fresh_state, introduction, read_text
from dsv3_tutorial.train.layout import job
from dsv3_tutorial.train.log import Log
from dsv3_tutorial.train.options import CHANGEABLE, Plan, parser, plan
from dsv3_tutorial.train.precision import take_weights
from dsv3_tutorial.train.prefetch import drawn_ahead
from dsv3_tutorial.train.profile import Phases, Trace
from dsv3_tutorial.train.sealed import RunLock
from dsv3_tutorial.train.state import Checkpoints
from dsv3_tutorial.train.step import TrainingState, Update, train_step
from dsv3_tutorial.train.trace import Timeline, stall_report, write_trace


def main(argv: list[str] | None = None) -> int:
    """Train as the options say. Raises RecipeError, StateError or NotFinite, with the reason."""
    options = parser().parse_args(argv)
    planned = plan(options)
    with joined(options.device, planned.layout) as ranks:
        ranks.sum(torch.zeros(1, device=ranks.device))  # all have read the folder before one writes
        if options.threads:
            torch.set_num_threads(options.threads)
        train(planned, options, ranks)
    return 0


def train(planned: Plan, options: argparse.Namespace, ranks: Ranks) -> None:
    """Begin or take up the run, train it to its last step, and write the model."""
    with RunLock(planned.out) if ranks.first else contextlib.nullcontext():
        text = read_text(planned, ranks)
        identity = {"text": text.fingerprint(), "config": planned.config.to_dict()}
        state = fresh_state(planned, text, ranks)
        saved = Checkpoints(planned.out / "checkpoints", free=CHANGEABLE, identity=identity)
        _say(ranks, introduction(planned, text))
        if planned.resume:
            step = saved.restore_latest(state)
            _say(ranks, f"resumed after step {step}" if step else "no checkpoint yet: from step 0")
            take_weights(state.worker, state.model)
        if ranks.first:
            _write_plan(planned, text)
        phases = Timeline(exact=True) if options.profile else Phases()
        with drawn_ahead(state, options.prefetch, phases.behind):
            Run(planned, ranks, text, state, saved, phases).go(options)
        _save_model(planned, state, ranks, options.save_dtype)


@dataclass
class Run:
    """A run under way: what is trained, what it is measured with, and where it is written."""

    planned: Plan
    ranks: Ranks
    text: corpus.Corpus
    state: TrainingState
    saved: Checkpoints
    phases: Phases

    def go(self, options: argparse.Namespace) -> None:
        """Every step that is left. An error or an interrupt leaves the last whole checkpoint."""
        trace = Trace(self.planned.out / "profile/trace.json" if options.profile else None)
        first, began = self.state.step, time.perf_counter()
        with contextlib.ExitStack() as opened:
            opened.callback(self.saved.wait)
            opened.callback(trace.end)
            log = None
            if self.ranks.first:
                log = opened.enter_context(Log(self.planned.out, first, options.csv))
            for _ in self._steps():
                trace.at(self.state.step - first)
                row = self.step()
                if log is not None:
                    log.write(row)  # before its checkpoint: a row that a resume skips stays lost
                self._save()
                self._tell(row)
        if options.profile and self.state.step > first:
            wall = time.perf_counter() - began
            _say(self.ranks, self.phases.table(wall, self.state.step - first))
            _say(self.ranks, str(stall_report(self.phases.spans)))
            if self.ranks.first:
                write_trace(self.phases.spans, self.planned.out / "profile/spans.json")

    def step(self) -> dict[str, Any]:
        """One update, and the held-out loss where it is due. Returns its log row."""
        recipe, began = self.state.recipe, time.perf_counter()
        rate = recipe.learning_rate(self.state.step)
        with self.phases("data"):
            batch = self.state.sampler.draw()
        update = train_step(self.state, batch, self.ranks, self.phases)
        spent = time.perf_counter() - began
        row = self._row(update, batch, rate, spent)
        if self._due(recipe.evaluate_every):
            with self.phases("evaluation"):
                seen_by = self.state.worker, self.text, recipe, self.ranks, self.state.pipe
                main, mtp = evaluate.held_out(*seen_by)
            row |= {"held_out": main} | ({} if mtp is None else {"held_out_mtp": mtp})
        return row

    def _row(self, update: Update, batch: torch.Tensor, rate: float, spent: float) -> dict:
        in_bits = evaluate.bits_per_byte(update.loss, batch[:, 1:], self.text.symbol_bytes)
        row = {"step": self.state.step, "loss": update.loss, "bits_per_byte": in_bits}
        if self.planned.config.num_nextn_predict_layers:
            row["mtp_loss"] = update.mtp_loss
        violation = update.violation()
        if violation is not None:
            row["balance_loss"] = update.balance_loss
            row["max_violation"], row["max_violation_worst"] = violation
        tokens = batch[:, 1:].numel()
        return row | {
            "grad_norm": update.grad_norm,
            "lr": rate,
            "tokens_per_s": round(tokens / spent, 1),
        }

    def _save(self) -> None:
        """A checkpoint where one is due, unless a weight is not finite: the last good one stays."""
        self.saved.poll()  # hear of one that has failed
        if not self._due(self.state.recipe.save_every):
            return
        bad = fault.bad_weight(self.state.model)
        if fault.anywhere(bad, self.ranks):
            raise fault.NotFinite(
                f"At step {self.state.step} {bad or fault.ELSEWHERE} is not finite. A checkpoint "
                "would replace a good one. None was made: lower --peak-lr, then --resume."
            )
        with self.phases("checkpoint"):
            self.saved.save(self.state)
        if self.saved.pending is not None:
            self.phases.follow("checkpoint", self.saved.pending[1])

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.state.recipe.steps

    def _steps(self) -> Iterator[int]:
        steps = self.state.recipe.steps
        quiet = None if self.ranks.first else True  # None: quiet where stderr is no terminal
        self.bar = tqdm(
            range(self.state.step, steps),
            total=steps,
            initial=min(self.state.step, steps),
            disable=quiet,
            unit="step",
        )
        return iter(self.bar)

    def _tell(self, row: dict[str, Any]) -> None:
        self.bar.set_postfix({"bits per byte": f"{row['bits_per_byte']:.3f}"}, refresh=False)
        if "held_out" in row and self.ranks.first:
            with self.bar.external_write_mode(file=sys.stdout):
                print(_line(row), flush=True)


def _line(row: dict[str, Any]) -> str:
    said = f"step {row['step']:>6}  loss {row['bits_per_byte']:.3f}  held out {row['held_out']:.3f}"
    said += f", two ahead {row['held_out_mtp']:.3f}" if "held_out_mtp" in row else ""
    said += " bits per byte"
    said += f"  MaxVio {row['max_violation']:.2f}" if "max_violation" in row else ""
    return f"{said}  {row['tokens_per_s']:,.0f} tokens/s"


def _say(ranks: Ranks, text: str) -> None:
    if ranks.first:
        print(text, flush=True)


def _write_plan(planned: Plan, text: corpus.Corpus) -> None:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    written = {**planned.to_dict(), "fingerprint": text.fingerprint(), "made_with": versions}
    written |= {"job": job()} if job() else {}
    write_whole(planned.out / "run.json", json.dumps(written, indent=1) + "\n")


def _save_model(planned: Plan, state: TrainingState, ranks: Ranks, dtype: str) -> None:
    """DIR/model from the whole weights, whatever they were sharded and wrapped in."""
    weights = gathered_state(state.model, ranks)
    if not ranks.first:
        return
    whole = DeepSeekV3(planned.config)
    whole.load_state_dict(weights)
    folder = planned.out / "model"
    whole.save_pretrained(folder, dtype={"float32": torch.float32, "bf16": torch.bfloat16}[dtype])
    tokenizer: Path = planned.out / "tokenizer.json"
    if tokenizer.exists():
        write_whole(folder / "tokenizer.json", tokenizer.read_text(encoding="utf-8"))
    print(f"the model is in {folder.name}/ of the run's folder", flush=True)
