"""One update of a run: accumulate, check, clip, step, and move the balance bias once.

B sequences of S symbols; a batch (B, S + 1) holds inputs and what follows them. DeepSeek-V3
technical report, sections 2.1.2 (balance), 2.2 (multi-token prediction) and 4.2 (the numbers).
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_tutorial.moe.balance import Watch, max_violation, update_biases, watch
from dsv3_tutorial.moe.balance_losses import batch_wise_loss, sequence_wise_loss
from dsv3_tutorial.parallel.data import Ranks, synchronise
from dsv3_tutorial.parallel.replicas import Replicas
from dsv3_tutorial.train.corpus import Sampler
from dsv3_tutorial.train.fault import report
from dsv3_tutorial.train.moments import Bf16Moments
from dsv3_tutorial.train.optimizer import groups
from dsv3_tutorial.train.precision import give_gradients, take_weights
from dsv3_tutorial.train.prefetch import Prefetch
from dsv3_tutorial.train.recipe import BETAS, CLIP, Recipe

Phases = Callable[[str], AbstractContextManager]


class Pipe(Protocol):
    """What stands in for the model where its layers lie on several ranks (`train.pipelined`)."""

    def accumulate(
        self, state: "TrainingState", rows: Tensor, phases: Phases
    ) -> tuple[Tensor, Tensor]:
        """As `accumulate` below: the means on every stage, the counts of this stage's gates."""
        ...

    def held_out(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of the main head and of the MTP heads on rows (B, S + 1), in nats, everywhere."""
        ...

    def after_step(self, model: nn.Module) -> None:
        """After an update: a second copy of a weight, on another stage, takes the new one."""
        ...


@dataclass
class TrainingState:
    """All that a run is after `step` updates; what a checkpoint holds to go on bit for bit.

    `worker` runs forward and backward: the model itself, unless it is its BF16 copy (`precision`).
    `replicas` knows who else holds which weights, and `pipe` who holds the other layers: nobody,
    unless told.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    sampler: Sampler | Prefetch
    recipe: Recipe
    step: int = 0
    worker: nn.Module | None = None
    replicas: Replicas | None = None
    pipe: Pipe | None = None

    def __post_init__(self) -> None:
        self.worker = self.worker or self.model
        self.replicas = self.replicas or Replicas(self.model, Ranks(0, 1, torch.device("cpu")))


class Losses(NamedTuple):
    """What a forward pass says: `objective` is minimised; the parts in nats per symbol, weightless.

    counts (layers, E) int64: the tokens each expert got; (0, 0) for a dense model.
    """

    objective: Tensor
    main: Tensor
    mtp: Tensor
    balance: Tensor
    counts: Tensor


class Update(NamedTuple):
    """What an update left behind, as numbers. `loss`, `mtp_loss` in nats per symbol."""

    loss: float
    mtp_loss: float
    balance_loss: float
    grad_norm: float
    counts: Tensor

    def violation(self) -> tuple[float, float] | None:
        """MaxVio's mean over the layers, and the worst layer's; None for a dense model."""
        if not self.counts.numel():
            return None
        each = max_violation(self.counts[self.counts.sum(dim=-1) > 0])  # of the gates that ran
        return each.mean().item(), each.max().item()


def optimizer_for(
    model: nn.Module,
    lr: float,
    moments: str = "float32",
    parameters: Iterable[nn.Parameter] | None = None,
) -> torch.optim.AdamW:
    """AdamW on a model's parameters, or on those of them that this rank is to update.

    moments: what it keeps of each parameter, twice, in "float32" or in "bf16".
    """
    made = groups(model.parameters() if parameters is None else parameters)
    kind = Bf16Moments if moments == "bf16" else torch.optim.AdamW
    return kind(made, lr=lr, betas=BETAS, fused=True)


def nats(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy: logits (B, S, V), target (B, S) -> scalar, nats per symbol."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), target.flatten())  # (B * S, V)


def predict(model: nn.Module, inputs: Tensor, drafts: bool) -> tuple[Tensor, list[Tensor]]:
    """Logits (B, S, V), and each MTP module's (B, S - 1 - k, V) where `drafts` asks for them."""
    if not drafts or not model.cfg.num_nextn_predict_layers:
        return model(inputs), []
    return model(inputs, drafts=True)


def draft_nats(drafts: list[Tensor], batch: Tensor) -> Tensor:
    """The MTP modules' mean loss: draft k at position i answers for symbol i + 2 + k. Scalar."""
    each = [nats(draft, batch[:, 2 + k :]) for k, draft in enumerate(drafts)]
    return torch.stack(each).mean() if each else torch.zeros((), device=batch.device)


def balance_loss(seen: Watch, batch: int, kind: str) -> Tensor:
    """The mean over layers of the balance loss that `kind` asks for, before alpha. Scalar.

    "bias" takes the sequence-wise loss beside the bias, as V3 does. The load it counts is that of
    the choice really made, bias included.
    """
    routings = list(seen.routings.values())
    if kind == "none" or not routings:
        return torch.zeros(())
    if kind == "batch":
        each = [batch_wise_loss(r.scores, r.indices) for r in routings]
    else:
        each = [sequence_wise_loss(r.scores, r.indices, batch) for r in routings]
    return torch.stack(each).mean()


def losses(model: nn.Module, batch: Tensor, recipe: Recipe, step: int) -> Losses:
    """Forward on a micro-batch (B, S + 1). The graph hangs on `objective` alone."""
    weight, alpha = recipe.mtp_weight_at(step), recipe.alpha
    with watch(model) as seen:
        logits, drafts = predict(model, batch[:, :-1], drafts=weight > 0)
    main, mtp = nats(logits, batch[:, 1:]), draft_nats(drafts, batch)
    balance = balance_loss(seen, len(batch), recipe.balance if alpha else "none")
    counts = seen.counts() if seen.routings else torch.zeros(0, 0, dtype=torch.int64)
    objective = main + weight * mtp + alpha * balance.to(main.device)
    return Losses(objective, main.detach(), mtp.detach(), balance.detach(), counts)


def accumulate(state: TrainingState, rows: Tensor, phases: Phases) -> tuple[Tensor, Tensor]:
    """Add up the gradients of a rank's rows (B, S + 1), micro-batch by micro-batch.

    Returns the mean (main, mtp, balance) (3,) and the summed counts (layers, E). Equal parts make
    the mean of their means the batch's mean; a batch-wise balance loss sees one part at a time.
    """
    parts = rows.chunk(state.recipe.micro_batches)
    means, counts = torch.zeros(3, device=rows.device), 0
    for i, part in enumerate(parts):
        synchronise(state.worker, last=i == len(parts) - 1)
        with phases("forward"):
            found = losses(state.worker, part, state.recipe, state.step)
        with phases("backward"):
            (found.objective / len(parts)).backward()
            give_gradients(state.worker, state.model)
        means += torch.stack([x.to(means) for x in found[1:4]]) / len(parts)
        counts = counts + found.counts
    return means, counts


def train_step(state: TrainingState, batch: Tensor, ranks: Ranks, phases: Phases) -> Update:
    """One update on the global batch (B, S + 1): of the weights once, and of the bias once.

    Raises NotFinite, with the step, the batch and the tensor, before any weight changes.
    """
    rows = ranks.share(batch).to(ranks.device)
    means, counts = (state.pipe.accumulate if state.pipe else accumulate)(state, rows, phases)
    with phases("optimizer"):
        state.replicas.reduce_gradients()
        norm = state.replicas.norm()
        means = ranks.sum(means, "dp") / ranks.replica[1]
        loss, mtp, balance, size = torch.cat([means, norm.to(means)[None]]).tolist()
        if not means.sum().add(norm).isfinite():
            numbers = {"loss": loss, "MTP loss": mtp, "gradient norm": size}
            raise report(state, batch, rows, ranks, numbers, state.sampler.place)
        if size > CLIP:
            state.replicas.clip_gradients(CLIP, norm)
        for group in state.optimizer.param_groups:
            group["lr"] = state.recipe.learning_rate(state.step)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        counts = _balance(state, ranks.sum(counts, "dp") if counts.numel() else counts)
        _share_weights(state)
    state.step += 1
    return Update(loss, mtp, balance, size, ranks.gather_rows(counts, "pp"))


def _balance(state: TrainingState, counts: Tensor) -> Tensor:
    """Move every gate's bias once, by the whole batch's counts (layers, E); those, on the CPU."""
    gamma = state.recipe.gamma_at(state.step)
    if gamma and counts.numel():
        update_biases(state.model, counts, gamma)
    return counts.cpu()


@torch.no_grad()
def _share_weights(state: TrainingState) -> None:
    """The new weights, to all who compute with them."""
    state.replicas.share_weights()
    if state.pipe is not None:
        state.pipe.after_step(state.model)
    take_weights(state.worker, state.model)
