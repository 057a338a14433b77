"""Training with the layers dealt out to stages, in the order of torch.distributed.pipelining.

B sequences of S symbols; rows (B, S + 1) hold inputs and what follows them. Every rank draws the
whole batch, so only hidden states (b, S, D) and their gradients travel. The loss is the last
stage's; balance losses and counts are each stage's own, and the sums are those of one process.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.moe.balance import watch
from dsv3_tutorial.parallel.mesh import Layout
from dsv3_tutorial.parallel.stage import Stage, hand_over, join, take_copy
from dsv3_tutorial.train.precision import give_gradients
from dsv3_tutorial.train.recipe import Recipe
from dsv3_tutorial.train.step import Phases, TrainingState, balance_loss, draft_nats, nats

SCHEDULES = {
    "gpipe": pipelining.ScheduleGPipe,
    "1f1b": pipelining.Schedule1F1B,
    "zb1p": pipelining.ScheduleInterleavedZeroBubble,  # with one stage a rank it is ZB1P
}
ZERO_BUBBLE_NEEDS = "2.13"  # before, autograd.Function ends it, and a node's outputs are mixed up


def problems(cfg: ModelConfig, recipe: Recipe, layout: Layout) -> Iterator[str]:
    """What a pipeline cannot do with this recipe, one line a reason, the option first."""
    parts, stages = recipe.micro_batches, layout.pp
    if stages < 2:
        return
    if layout.schedule == "1f1b" and parts < stages:
        yield (
            f"micro_batches = {parts}: 1f1b gives each of {stages} stages one before the first "
            f"comes back; give {stages} or more, or take pp_schedule = gpipe"
        )
    if layout.schedule == "zb1p":
        yield from _zero_bubble_problems(recipe, stages)


def _zero_bubble_problems(recipe: Recipe, stages: int) -> Iterator[str]:
    rounds = max(1, recipe.micro_batches // stages)
    if recipe.micro_batches % rounds:
        yield (
            f"micro_batches = {recipe.micro_batches}: zb1p deals them out in {rounds} rounds of "
            f"{stages} stages; give a multiple of {stages}"
        )
    if recipe.recompute:
        yield (
            "recompute together with pp_schedule = zb1p: the weights' part of a backward would run "
            "a block again for every group of weights; take 1f1b"
        )
    if torch.__version__ < ZERO_BUBBLE_NEEDS:
        yield (
            f"pp_schedule = zb1p: torch {torch.__version__} cannot split the backward of a block "
            f"with experts, {ZERO_BUBBLE_NEEDS} can; take 1f1b"
        )


class Pipeline:
    """This rank's stage at work: what `train.step` asks in place of a whole model (its `Pipe`).

    worker computes and model keeps the float32 masters; they are one Stage in float32 training.
    group: the ranks of one pipeline, in the order of the stages. A micro-batch is
    batch / (dp micro_batches) sequences. Make it after the worker has been wrapped in whatever else
    it is split by. The bubble of a step is in none of its phases: it is in "the rest".
    """

    def __init__(
        self,
        worker: Stage,
        model: Stage,
        recipe: Recipe,
        group: dist.ProcessGroup,
        device: torch.device,
        schedule: str = "1f1b",
        dp: int = 1,
    ):
        self.worker, self.recipe, self.group, self.device = worker, recipe, group, device
        self.observed = _Observed(worker, recipe, device)
        rows = recipe.batch // (dp * recipe.micro_batches)
        stage = _TrainingStage(
            self.observed,
            worker.index,
            worker.n_stages,
            device,
            **_outlines(worker, rows, recipe.seq_len, self.observed.drafts),
            group=group,
        )
        stage.model = model
        kind = SCHEDULES[schedule]
        of = [stage] if issubclass(kind, pipelining.schedules.PipelineScheduleMulti) else stage
        # the objective is divided here, as one process divides it; PyTorch would do it afterwards
        self.schedule = kind(of, recipe.micro_batches, loss_fn=self._objective, scale_grads=False)
        dist.all_reduce(torch.zeros(1, device=device), group=group)  # NCCL: all meet before pairs

    def accumulate(
        self, state: TrainingState, rows: Tensor, phases: Phases
    ) -> tuple[Tensor, Tensor]:
        """As `step.accumulate`: the means (3,) on every stage, the counts of this stage's gates.

        The gradients are this replica's, of this stage's parameters; a second copy of the embedding
        has given its own to the first.
        """
        self.observed.begin(state.step, phases)
        inputs, last = rows[:, :-1].contiguous(), self.worker.last
        args = (inputs,) if self.worker.first else ()
        kwargs = {"input_ids": inputs} if last and self.observed.drafts else {}
        target = rows if last else None
        self.schedule.step(*args, target=target, return_outputs=False, **kwargs)
        hand_over(state.model, self.group)
        dist.all_reduce(self.observed.means, group=self.group)
        return self.observed.means, self.observed.counts

    @torch.no_grad()
    def forward(self, rows: Tensor) -> Tensor | tuple[Tensor, ...] | None:
        """The rows (B, S + 1) through all stages, drafts included: the logits, on the last stage.

        Every stage calls it, for any number of rows.
        """
        own, inputs = self.worker, rows[:, :-1]
        x = inputs
        if not own.first:
            shape = (*inputs.shape, own.cfg.hidden_size)
            x = torch.empty(shape, dtype=_dtype(own), device=self.device)
            dist.recv(x, group=self.group, group_src=own.index - 1)
        x = own(x, inputs, drafts=own.last and own.cfg.num_nextn_predict_layers > 0)
        if not own.last:
            dist.send(x.contiguous(), group=self.group, group_dst=own.index + 1)
        return x if own.last else None

    @torch.no_grad()
    def held_out(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of the main head and of the MTP heads on rows (B, S + 1): nats, on every stage."""
        logits = self.forward(rows)
        both = torch.zeros(2, dtype=torch.float64, device=self.device)
        if logits is not None:
            both = torch.stack(_nats(logits, rows)).to(both)
        dist.broadcast(both, group=self.group, group_src=self.worker.n_stages - 1)
        return both[0], both[1]

    def after_step(self, model: Stage) -> None:
        """After an update: the last stage's copy of the embedding takes the new one."""
        take_copy(model, self.group)

    def _objective(self, logits: Tensor | tuple[Tensor, ...], rows: Tensor) -> Tensor:
        with self.observed.phases("forward"):
            return self.observed.objective(*_nats(logits, rows))


class _Observed(nn.Module):
    """A stage in training, seen: its gates' counts, its share of the losses. In: x, out: as Stage.

    A stage before the last joins the balance loss of its gates to what it sends on.
    """

    def __init__(self, stage: Stage, recipe: Recipe, device: torch.device):
        super().__init__()
        self.stage, self.recipe, self.device = stage, recipe, device
        cfg = stage.cfg
        self.drafts = recipe.mtp_weight > 0 and cfg.num_nextn_predict_layers > 0
        layers = cfg.num_hidden_layers + (cfg.num_nextn_predict_layers if self.drafts else 0)
        self.gates = sum(map(cfg.is_moe_layer, range(layers)))
        self.begin(0, lambda phase: nullcontext())

    def begin(self, step: int, phases: Phases) -> None:
        """Forget the last update's numbers."""
        self.phases, self.mtp_weight = phases, self.recipe.mtp_weight_at(step)
        self.means = torch.zeros(3, device=self.device)
        self.counts = torch.zeros(0, 0, dtype=torch.int64)
        self.balance: Tensor | float = 0.0

    def forward(self, x: Tensor, input_ids: Tensor | None = None):
        recipe, last = self.recipe, self.stage.last
        with self.phases("forward"):
            with watch(self.stage) as seen:
                out = self.stage(x, input_ids, drafts=last and self.drafts)
            if not seen.routings:
                return out
            counts = seen.counts()
            self.counts = self.counts + counts if self.counts.numel() else counts
            kind = recipe.balance if recipe.alpha else "none"
            mean = balance_loss(seen, len(x), kind) * (len(seen.routings) / self.gates)
            self.means[2] += mean.detach().to(self.means) / recipe.micro_batches
            own = (recipe.alpha * mean).to(x.device)
            if last or not own.requires_grad:
                self.balance = own
                return out
            return join(out, own / recipe.micro_batches)

    def objective(self, main: Tensor, mtp: Tensor) -> Tensor:
        """What the last stage minimises of a micro-batch, right after its forward. Scalar."""
        parts = self.recipe.micro_batches
        self.means[:2] += torch.stack([main, mtp]).detach().to(self.means) / parts
        balance, self.balance = self.balance, 0.0
        return (main + self.mtp_weight * mtp + balance) / parts


class _TrainingStage(pipelining.PipelineStage):
    """PyTorch's stage, whose backward hands a BF16 worker's gradients to the masters each time.

    Added up over micro-batches in BF16 they would lose what float32 keeps.
    """

    model: Stage

    def backward_one_chunk(self, *args, **kwargs) -> None:
        self._timed(super().backward_one_chunk, *args, **kwargs)

    def backward_weight_one_chunk(self, *args, **kwargs) -> None:
        self._timed(super().backward_weight_one_chunk, *args, **kwargs)

    def _timed(self, backward, *args, **kwargs) -> None:
        with self.submod.phases("backward"):
            backward(*args, **kwargs)
            give_gradients(self.submod.stage, self.model)


def _nats(logits: Tensor | tuple[Tensor, ...], rows: Tensor) -> tuple[Tensor, Tensor]:
    """The main loss and the drafts' mean, of logits (b, S, V) or of them and the drafts'."""
    main, *drafts = logits if isinstance(logits, tuple) else (logits,)
    return nats(main, rows[:, 1:]), draft_nats(drafts, rows)


def _outlines(stage: Stage, rows: int, seq_len: int, drafts: bool) -> dict[str, tuple[Tensor, ...]]:
    """What goes in and out of a stage, without values: PyTorch need not run it to find out."""
    cfg, dtype = stage.cfg, _dtype(stage)

    def outline(length: int, width: int) -> Tensor:
        shape = (rows, length, width)
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

    ids = torch.empty((rows, seq_len), dtype=torch.int64, device="meta")
    into = (ids,) if stage.first else (outline(seq_len, cfg.hidden_size),)
    if not stage.last:
        return {"input_args": into, "output_args": (outline(seq_len, cfg.hidden_size),)}
    modules = cfg.num_nextn_predict_layers if drafts else 0
    lengths = [seq_len, *(seq_len - 1 - k for k in range(modules))]
    return {"input_args": into, "output_args": tuple(outline(n, cfg.vocab_size) for n in lengths)}


def _dtype(stage: Stage) -> torch.dtype:
    """Of the hidden states: that of the norms, which no FP8 product replaces."""
    return next(iter(stage.model.layers)).input_layernorm.weight.dtype
