"""What one GPU must hold for a training step in a layout, and so which layouts there can be.

Counted as DeepSeek-V3 trains (report, sections 3.2 and 3.3.3): BF16 weights, float32 gradients, and
ZeRO-1, which shares a float32 master copy and BF16 moments out over all that hold the same part.
DualPipe keeps two stages on each GPU, so weights and gradients twice (`Split.copies`). Stages are
taken as equally large; multi-token prediction, buffers and what an allocator loses are left out.
"""

from dataclasses import dataclass

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import memory, params
from dsv3_tutorial.cost.memory import TrainingBytes
from dsv3_tutorial.cost.step_traffic import Split

ACTIVATION = 1  # bytes a number kept for the backward pass: FP8, as nearly all of V3's are


@dataclass(frozen=True)
class Held:
    """Bytes on one GPU. activations: what the micro-batches in flight keep, an estimate."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def state(self) -> float:
        """What stays from step to step."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.state + self.activations


def held(cfg: ModelConfig, split: Split, per_parameter: TrainingBytes | None = None) -> Held:
    """Bytes of weights, gradients, optimizer and activations on a GPU of this layout.

    Micro-batches are of one sequence; 1F1B keeps pp of them in flight and DualPipe pp + 1 (table 2
    of the report).
    """
    each = per_parameter or TrainingBytes()
    parts = shares(cfg, split)
    numbers = sum(share for share, _ in parts)
    copies = split.stages_held
    flying = split.pp + (copies > 1)
    tokens = flying * split.seq_len / split.tp  # sequence parallel: each has a part of every one
    kept = memory.activation_bytes_per_token(cfg, True, ACTIVATION) / split.pp
    return Held(
        weights=copies * each.weights * numbers,
        gradients=copies * each.gradients * numbers,
        # Two copies have twice as many holders to share their optimizer out to.
        optimizer=sum(each.optimizer * share / replicas for share, replicas in parts),
        activations=tokens * kept,
    )


def state_bytes(dense: float, routed: float, pp: int, ep: int, dp: int, copies: int = 1) -> float:
    """Bytes of a GPU's BF16 weights, float32 gradients and share of the optimizer, under ZeRO-1.

    dense, routed: the model's numbers, cut evenly into pp stages, the routed ones over ep GPUs too.
    A GPU holds `copies` stages, weights (2 bytes a number) and gradients (4); the optimizer (8) of
    a stage is dealt out over all that hold the same: copies x dp, for experts copies x dp / ep.
    """
    total = 0.0
    for numbers, holders in ((dense / pp, copies * dp), (routed / pp / ep, copies * dp / ep)):
        held = copies * numbers
        total += held * (2 + 4) + held * 8 / holders
    return total


def shares(cfg: ModelConfig, split: Split) -> list[tuple[float, int]]:
    """(numbers of a GPU's stage, GPUs that hold the same) of all but the routed experts, and these.

    Tensor parallelism cuts the first; experts stay whole. The stages are counted once.
    """
    counted = params.count(cfg)
    routed = counted.by_part["routed_experts"]
    return [
        ((counted.total - routed) / split.pp / split.tp, split.dp),
        (routed / split.pp / split.ep, split.dp * split.tp // split.ep),
    ]
