"""A plain training loop on one process: AdamW as in the report, a warm-up, a cosine, clipping.

DeepSeek-V3 technical report, section 4.2: betas 0.9 and 0.95, weight decay 0.1, clip at 1.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_tutorial.train.corpus import Corpus, sample, windows
from dsv3_tutorial.train.optimizer import groups
from dsv3_tutorial.train.recipe import BETAS


@dataclass(frozen=True)
class Schedule:
    """How long and how hard to train. `seconds` ends a run early without changing its steps."""

    steps: int
    batch: int = 8
    seq_len: int = 128
    peak_lr: float = 3e-3
    final_lr: float = 3e-4
    warmup: int = 50
    evaluate_every: int = 100
    seconds: float | None = None

    def learning_rate(self, step: int) -> float:
        """Linear warm-up to `peak_lr`, then half a cosine down to `final_lr`."""
        if step < self.warmup:
            return self.peak_lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final_lr + (self.peak_lr - self.final_lr) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class Row:
    """What one step left behind. Losses in bits per byte; `held_out` only where it was measured."""

    step: int
    loss: float
    held_out: float | None
    tokens_per_s: float


def bits_per_byte(logits: Tensor, target: Tensor) -> Tensor:
    """Mean bits the model needs per next byte: logits (B, S, 256), target (B, S) -> scalar."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten()) / math.log(2)  # (B * S, 256)


def optimizer_for(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW with the groups that every run has, and torch's own choice of kernel."""
    return torch.optim.AdamW(groups(model.parameters()), lr=lr, betas=BETAS)


@torch.no_grad()
def evaluate(model: nn.Module, data: Tensor, batch: int, seq_len: int, count: int = 16) -> float:
    """Held-out bits per byte over `count` fixed batches of windows spread over `data`."""
    batches = windows(data, batch, seq_len, count)
    losses = [bits_per_byte(model(b[:, :-1]), b[:, 1:]).item() for b in batches]
    return sum(losses) / len(losses)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor, lr: float
) -> float:
    """One update on one batch (B, S + 1). Returns the loss before it, in bits per byte.

    Raises FloatingPointError when the loss is no number, before the weights are touched.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = bits_per_byte(model(batch[:, :-1]), batch[:, 1:])
    if not loss.isfinite():
        raise FloatingPointError(
            f"The loss became {loss.item()}. Going on would write it into every weight. "
            f"Lower the learning rate (it was {lr:.1e}) or look at the batch."
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def train(model: nn.Module, corpus: Corpus, schedule: Schedule, seed: int = 0) -> Iterator[Row]:
    """Train `model` in place and yield a Row a step. The seed fixes the order of the text.

    Held-out loss is measured every `evaluate_every` steps and after the last.
    """
    order = torch.Generator().manual_seed(seed)
    optimizer = optimizer_for(model, schedule.peak_lr)
    device = next(model.parameters()).device
    limit = math.inf if schedule.seconds is None else schedule.seconds
    began = time.perf_counter()
    for step in range(schedule.steps):
        batch = sample(corpus.train, schedule.batch, schedule.seq_len, order).to(device)
        loss = train_step(model, optimizer, batch, schedule.learning_rate(step))
        spent = time.perf_counter() - began
        last = step == schedule.steps - 1 or limit < spent
        held_out = None
        if last or (step + 1) % schedule.evaluate_every == 0:
            held_out = evaluate(model, corpus.held_out.to(device), 8, schedule.seq_len)
        tokens = (step + 1) * schedule.batch * schedule.seq_len
        yield Row(step + 1, loss, held_out, tokens / spent)
        if last:
            return
