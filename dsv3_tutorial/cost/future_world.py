"""What a recommendation about hardware may change, and the figures in which that shows.

One world: DeepSeek-V3 trained on 2,048 H800 in the report's layout, and served from the same chips.
A knob changes a number of it, and every figure is computed again: the step by the planner, serving
by `serving_plan`, one user's token by ISCA section 2.3.2's bound, a conversation's return by bytes.
"""

from dataclasses import dataclass, replace
from functools import cache

from dsv3_tutorial import hardware, paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import comm_moe, expert_network, serving_plan, stage_work, storage
from dsv3_tutorial.cost.assumptions import Assumptions
from dsv3_tutorial.cost.comm_moe import BF16, FP8
from dsv3_tutorial.cost.expert_network import Exchange
from dsv3_tutorial.cost.layout import Layout
from dsv3_tutorial.cost.plan import Job, Plan, plan
from dsv3_tutorial.cost.scaled import scaled
from dsv3_tutorial.cost.serving_target import Target
from dsv3_tutorial.cost.tiers import Network, Tier
from dsv3_tutorial.hardware import Chip, Cluster

GPUS = 2048
UNIT = 256  # devices that hold one routed expert a layer each, as in the bound on decoding
IN_FLIGHT = 64  # tokens of a device there: two micro-batches of 32
LANE = 4e9  # bytes/s of a PCIe 5 lane, one way: 160 of them are the paper's "over 640 GB/s"
_JOB = Job()
_DEFAULTS = Assumptions()
_OTHER_USES = ("gradients", "pipeline sends", "tensor parallel", "optimizer")


@dataclass(frozen=True)
class World:
    """The numbers that knobs turn.

    dispatch, combine: bytes a number that goes to an expert and back. in_network: switches copy and
    add. casts: the share that is left of quantisation's own reads and writes. latency: seconds of
    each exchange beside its bytes. fences: round trips that each waits besides. host: bytes/s to
    the CPU's memory.
    """

    chip: Chip
    layout: Layout
    assume: Assumptions = _DEFAULTS
    dispatch: float = FP8
    combine: float = BF16
    in_network: bool = False
    casts: float = 1.0
    latency: float = 0.0
    fences: int = 1
    host: float = 16 * LANE

    def with_assumed(self, **changes: float) -> "World":
        """The same with other assumptions, by name."""
        return replace(self, assume=replace(self.assume, **changes))

    def with_chip(self, **factors: float) -> "World":
        """The same with a scaled chip, as `scaled.scaled` takes it."""
        return replace(self, chip=scaled(self.chip, **factors))


@cache
def model() -> ModelConfig:
    return ModelConfig.named("deepseek-v3")


@cache
def today() -> World:
    """What DeepSeek had: H800, 400 Gb/s InfiniBand, PCIe 5, a fence behind every exchange."""
    latency = paper.row("network.latency_infiniband").value * 1e-6
    return World(hardware.chip("h800"), Layout.read("deepseek-v3"), latency=latency)


def busy(world: World, copies: float) -> float:
    """Bytes a number that one direction of the link is busy with, for each copy of a token.

    A copy in a switch spares the sender, never the receivers: everyone still gets as many copies as
    before. Combining is the reverse. So with both in flight at once, the busier direction counts:
    max(d + n c, n d + c) / n instead of d + c; one after the other, nothing would be gained.
    """
    out, back = world.dispatch, world.combine
    if not world.in_network or copies <= 1:
        return out + back
    return max(out + copies * back, copies * out + back) / copies


@cache
def training(world: World) -> Plan:
    """The planner's own answer in a world whose links and memory serve nothing but the plan."""
    return plan(model(), Cluster(world.chip, GPUS), _JOB, world.layout, world.assume)


@cache
def step_s(world: World) -> float:
    """Seconds of a training step.

    Fewer bytes are links, or a memory, that are so much faster *for these bytes*: what else uses
    them keeps its time. So a second plan gives the parts that a knob leaves alone.
    """
    plain = training(world)
    fewer = busy(world, _training_copies(world)) / (FP8 + BF16)
    left = 1 - (1 - world.casts) * casts_share(world.layout)
    if fewer == left == 1:
        return plain.step_time_s
    chip = scaled(world.chip, scale_up=1 / fewer, scale_out=1 / fewer, memory_bandwidth=1 / left)
    times = training(replace(world, chip=chip)).times
    return sum(plain.times[part] if part in _OTHER_USES else s for part, s in times.items())


def gpu_hours(world: World) -> float:
    """GPU-hours of the whole run, steps that are lost included."""
    return training(world).gpu_hours * step_s(world) / training(world).step_time_s


@cache
def casts_share(layout: Layout | None = None) -> float:
    """Quantisation's share of the bytes that no matrix product moves: all layers, both passes."""
    layout = layout or today().layout
    works = stage_work.parts(model(), _JOB.seq_len)
    casts = sum(work.forward_casts + work.backward_casts for work in works)
    others = sum(work.forward_bytes + work.backward_bytes + work.again_bytes for work in works)
    tokens = _JOB.seq_len * layout.micro_batch / layout.tp  # over which a GPU's gradients are added
    added = sum(8 * (work.dense / layout.tp + work.experts / layout.ep) for work in works) / tokens
    return casts / (casts + others + added)


@cache
def serving(world: World, rate: float = 20.0) -> float:
    """Tokens a second and GPU of a service that promises each user `rate`, at 4,989 tokens."""
    spared = busy(world, model().num_experts_per_tok) / (world.dispatch + world.combine)
    exchange = Exchange(dispatch=world.dispatch * spared, combine=world.combine * spared)
    target = Target(tokens_per_second=rate, exchange=exchange)
    found = serving_plan.best(model(), Cluster(world.chip, GPUS), target)
    return found.tokens_per_second_per_gpu


def token_s(world: World) -> float:
    """Seconds from one token to the next if only exchanges took time: ISCA section 2.3.2's bound.

    On 256 devices with an expert each. Beside the paper's: the rates that are reached, the model's
    sizes, what lies in the domain goes by scale-up, and every exchange has its latency and fences.
    """
    spared = busy(world, model().num_experts_per_tok) / (world.dispatch + world.combine)
    exchange = Exchange(dispatch=world.dispatch * spared, combine=world.combine * spared)
    sent = expert_network.step_s(model(), world.chip, UNIT, IN_FLIGHT, exchange=exchange)
    exchanges = 2 * 2 * storage.moe_layers(model())  # two micro-batches, out and back
    return sent + exchanges * world.latency * (1 + 2 * world.fences)


def return_s(world: World, context: int = 4989) -> float:
    """Seconds until a conversation's cached latents are back from the CPU's memory."""
    return storage.cache_bytes(model(), "bf16", context) / world.host


def balanced_ratio(world: World) -> float:
    """Scale-up over scale-out bandwidth at which both links finish an exchange together.

    V3 in training: 1.85, against 4 at the 160 and 40 GB/s reached: NVLink waits for InfiniBand.
    """
    sent = _sent(world)
    return sent["inside"] / sent["across"]


def _training_copies(world: World) -> float:
    """Copies of a token that leave a device over the slower of the tiers in use."""
    sent = _sent(world)
    return sent["across"] or sent["inside"]


def _sent(world: World) -> dict[str, float]:
    """Copies of a token by tier in training, under the model's own limit of groups."""
    cfg, ep = model(), world.layout.ep
    domain = min(ep, world.chip.scale_up.domain or 1)
    free = Tier("counted, not timed", 0.0, 1.0)
    layer = comm_moe.Layer(
        *(cfg.n_routed_experts, cfg.num_experts_per_tok, cfg.hidden_size),
        *(cfg.topk_group, cfg.n_group),
    )
    return comm_moe.copies(layer, ep, Network(free, free, domain), world.layout.dispatch)
