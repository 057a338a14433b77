"""What a step sends besides tokens to experts: tensor parallelism, stages, gradients; and when."""

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import step_traffic
from dsv3_tutorial.cost.layout import Job, Layout
from dsv3_tutorial.cost.stage_work import Work
from dsv3_tutorial.cost.step_traffic import ACTIVATION, GRADIENT, WEIGHT, Split
from dsv3_tutorial.cost.tiers import Network


def sends(
    cfg: ModelConfig,
    links: Network,
    job: Job,
    layout: Layout,
    held: tuple[tuple[Work, ...], ...],
    room: float,
) -> tuple[dict[str, float], dict[str, float]]:
    """Exposed and hidden seconds of a step by part; room: its seconds whose links are free."""
    split = Split(
        *(layout.pp, layout.dp, layout.ep, layout.tp, job.sequences, job.seq_len, layout.copies)
    )
    shown, hidden = {}, {}
    again = 1.5 if layout.recompute == "full" else 1.0  # the forward's half once more
    shown["tensor parallel"] = (
        again * step_traffic.tensor(cfg, links, split)["inside"] / links.inside.bandwidth
    )
    first, behind = _stages(cfg, links, job, layout)
    hidden["pipeline sends"] = min(behind, max(0.0, room))
    shown["pipeline sends"] = first + behind - hidden["pipeline sends"]
    largest = max(_gradients(cfg, links, split, layout, own) for own in held)
    shown["gradients"], hidden["gradients"] = _exposed(
        largest, layout, job, room - hidden["pipeline sends"]
    )
    return shown, hidden


def _stages(cfg: ModelConfig, links: Network, job: Job, layout: Layout) -> tuple[float, float]:
    """Activations onward and gradients back: seconds while the pipeline fills and drains, the rest.

    The first are always shown, the rest as far as there is nothing to hide behind.
    """
    if layout.pp == 1:
        return 0.0, 0.0
    near = layout.gpus <= links.ranks_per_node
    tier = links.inside if near else links.across
    tokens = job.seq_len * layout.micro_batch / layout.tp
    one = tier.time(tokens * cfg.hidden_size * ACTIVATION)
    number = layout.micro_batches(job) * (layout.stages // layout.pp)
    shown = 2 * (layout.pp - 1) * one
    return shown, max(0.0, 2 * number * one - shown)


def _gradients(
    cfg: ModelConfig, links: Network, split: Split, layout: Layout, own: tuple[Work, ...]
) -> float:
    """Seconds of float32 gradients summed by parts and BF16 weights gathered, once."""
    numbers = (
        sum(work.dense for work in own) / layout.tp / layout.copies,
        sum(work.experts for work in own) / layout.ep / layout.copies,
    )
    sent = step_traffic.gradients(cfg, links, split, numbers)
    return sent["inside"] / links.inside.bandwidth + sent["across"] / links.across.bandwidth


def _exposed(once: float, layout: Layout, job: Job, room: float) -> tuple[float, float]:
    """What of the gradients' seconds shows. ZeRO-2 sums after each micro-batch, 3 gathers too.

    ZeRO-0 sums and gathers gradients in float32. 0 and 1 send at the end, where nothing is left to
    hide behind; the sums of 2 and all of 3 hide behind computing as far as there is room. Where a
    stage has two holders, each has half of the micro-batches.
    """
    batches = layout.micro_batches(job) // layout.copies
    summed, gathered = (part * once / (WEIGHT + GRADIENT) for part in (GRADIENT, WEIGHT))
    if layout.zero < 2:
        return summed + (2 * gathered if layout.zero == 0 else gathered), 0.0
    behind = batches * summed + (2 * batches * gathered if layout.zero == 3 else 0.0)
    shown = max(0.0, behind - max(0.0, room))
    after = 0.0 if layout.zero == 3 else gathered
    return shown + after, behind - shown
