"""What the fullest GPU of a layout holds, by part, with the stages as they are cut."""

from functools import cache

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import memory, stage_work
from dsv3_tutorial.cost.layout import Job, Layout
from dsv3_tutorial.cost.memory import TrainingBytes
from dsv3_tutorial.cost.stage_work import Work

LOGITS = 2 + 4  # bytes a number: BF16, and its gradient in float32


def fullest(
    cfg: ModelConfig, job: Job, layout: Layout, held: tuple[tuple[Work, ...], ...]
) -> dict[str, float]:
    """Bytes by part of the GPU that holds most; held: each device's stages."""
    found = [parts(cfg, job, layout, own, device) for device, own in enumerate(held)]
    return max(found, key=lambda each: sum(each.values()))


def parts(
    cfg: ModelConfig, job: Job, layout: Layout, own: tuple[Work, ...], device: int
) -> dict[str, float]:
    """Bytes of a GPU of these stages. ZeRO-1 deals out the optimizer, 2 gradients, 3 weights.

    mtp: weights, gradients and optimizer of the multi-token prediction modules, apart. gathered:
    what ZeRO-2 and 3 hold besides, of the one layer that is at work and so is there whole.
    """
    extra = sum(work.extra_dense for work in own), sum(work.extra_experts for work in own)
    numbers = sum(work.dense for work in own), sum(work.experts for work in own)
    main = _state(layout, numbers[0] - extra[0], numbers[1] - extra[1])
    return {
        **main,
        "mtp": sum(_state(layout, *extra).values()),
        "gathered": _gathered(cfg, job, layout, numbers),
        "activations": activations(cfg, job, layout, own, device),
        "logits": _logits(cfg, job, layout, own),
    }


def _state(layout: Layout, dense: float, experts: float) -> dict[str, float]:
    """Bytes that stay from step to step, of numbers cut by tp and of numbers cut by ep."""
    each, dense, experts = TrainingBytes(), dense / layout.tp, experts / layout.ep
    holders, few = layout.holders
    whole, dealt = dense + experts, dense / holders + experts / few
    return {
        "weights": each.weights * (dealt if layout.zero == 3 else whole),
        "gradients": each.gradients * (dealt if layout.zero >= 2 else whole),
        "optimizer": each.optimizer * (dealt if layout.zero >= 1 else whole),
    }


def _gathered(cfg: ModelConfig, job: Job, layout: Layout, own: tuple[float, float]) -> float:
    """Bytes of the largest layer's gradients under ZeRO-2, and weights under 3, that are not dealt.

    One layer at a time: a gradient is whole until it is summed, a weight while it multiplies. V3's
    with its experts on one GPU: 23 GB of weights and 46 of gradients.
    """
    if layout.zero < 2:
        return 0.0
    (holders, few), each, found = layout.holders, TrainingBytes(), 0.0
    number = each.gradients + (each.weights if layout.zero == 3 else 0)
    for dense, experts in _layers(cfg, job.seq_len):
        away = min(dense, own[0]) / layout.tp * (1 - 1 / holders)
        away += min(experts, own[1]) / layout.ep * (1 - 1 / few)
        found = max(found, away * number)
    return found


@cache
def _layers(cfg: ModelConfig, seq_len: int) -> frozenset[tuple[float, float]]:
    """The numbers of each kind of layer there is, the routed experts' apart."""
    units = stage_work.parts(cfg, seq_len, mtp=False)
    return frozenset((unit.dense, unit.experts) for unit in units)


def activations(
    cfg: ModelConfig, job: Job, layout: Layout, own: tuple[Work, ...], device: int
) -> float:
    """What the micro-batches in flight keep for their backward, in FP8 or BF16.

    Where all is recomputed one layer's is there besides, that of the layer whose backward runs.
    """
    width = 1 if layout.precision == "fp8" else 2
    tokens = job.seq_len * layout.micro_batch / layout.tp
    kept = sum(_kept(cfg, layout, work, width) for work in own) / len(own)
    again = 0.0
    if layout.recompute == "full" and any(work.inputs for work in own):
        moe = any(work.exchanges for work in own)
        again = width * memory.layer_activations(cfg, moe, recompute=False)
    return tokens * (in_flight(layout, job, device) * kept + again)


def in_flight(layout: Layout, job: Job, device: int) -> int:
    """Chunks whose activations a device keeps at its fullest: the report's table 2, by device."""
    batches = layout.micro_batches(job)
    if layout.pp == 1:
        return 1
    if layout.schedule == "gpipe":
        return batches
    if layout.overlaps:
        return layout.stages + 1
    return min(batches, layout.pp - device if layout.schedule == "1f1b" else layout.pp)


def _kept(cfg: ModelConfig, layout: Layout, work: Work, width: int) -> float:
    """Bytes a token leaves in a stage; of each layer its input alone where all is recomputed."""
    if layout.recompute == "full":
        return work.inputs * cfg.hidden_size * 2
    again = layout.recompute == "selective"
    kept = 0.0
    for moe, layers in ((False, work.inputs - work.exchanges), (True, work.exchanges)):
        kept += layers * memory.layer_activations(cfg, moe, again) if layers else 0
    return width * kept


def _logits(cfg: ModelConfig, job: Job, layout: Layout, own: tuple[Work, ...]) -> float:
    """The head's outputs of one micro-batch and their gradients; two heads take turns."""
    uses = any(work.heads for work in own)
    return uses * job.seq_len * layout.micro_batch * cfg.vocab_size / layout.tp * LOGITS
