"""From a model, a cluster and a layout to a run: memory, step time, hours, dollars, kWh."""

from dataclasses import asdict, dataclass, field
from functools import cached_property

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import flops, params, stage_memory, stage_step
from dsv3_tutorial.cost.assumptions import Assumptions
from dsv3_tutorial.cost.layout import Job, Layout, PlanError
from dsv3_tutorial.cost.scaled import RESOURCES, scaled
from dsv3_tutorial.cost.stage_step import Step
from dsv3_tutorial.hardware import Cluster

__all__ = ["Job", "Layout", "Plan", "PlanError", "plan", "run_cost"]
_DAY = 86_400
_NEVER = 1e15  # seconds, thirty million years


def run_cost(
    tokens: float, tokens_per_step: float, step_s: float, gpus: int, rent: float, watts: float
) -> tuple[float, float, float]:
    """(GPU hours, dollars, kWh) of a run; rent in dollars a GPU hour, watts of one GPU.

    V3: 14.8e12 tokens in steps of 62.9e6 and 19.926 s on 2,048 GPUs are 2,667 thousand hours.
    """
    hours = tokens / tokens_per_step * step_s * gpus / 3600
    return hours, hours * rent, hours * watts / 1000


@dataclass(frozen=True)
class Plan:
    """A training run on paper. Every number follows from the first five fields."""

    cfg: ModelConfig
    cluster: Cluster
    job: Job
    layout: Layout
    assume: Assumptions
    step: Step = field(repr=False, compare=False)

    @property
    def times(self) -> dict[str, float]:
        """Exposed seconds of a step by part; they add up to step_time_s."""
        return self.step.times

    @property
    def hidden(self) -> dict[str, float]:
        """Seconds of communication by part that overlap hid."""
        return self.step.hidden

    @cached_property
    def step_time_s(self) -> float:
        return sum(self.times.values())

    @cached_property
    def parameters(self) -> params.Parameters:
        return params.count(self.cfg)

    @cached_property
    def flops_per_token(self) -> float:
        """Useful FLOP of a trained token: causal attention, no multi-token prediction."""
        return flops.training_flops_per_token(self.cfg, self.job.seq_len)

    @cached_property
    def memory(self) -> dict[str, float]:
        """Bytes of the fullest GPU by part."""
        return stage_memory.fullest(self.cfg, self.job, self.layout, self.step.held)

    @cached_property
    def memory_per_gpu_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def room(self) -> float:
        """Bytes of a GPU that may be used."""
        return self.assume.usable_memory * self.cluster.chip.memory_bytes

    @property
    def spare(self) -> float:
        return self.room - self.memory_per_gpu_bytes

    @property
    def fits(self) -> bool:
        return self.spare >= 0

    @property
    def tokens_per_step(self) -> int:
        return self.job.sequences * self.job.seq_len

    @cached_property
    def tokens_per_second(self) -> float:
        """Tokens of the run a second, `lost` time included."""
        return self.tokens_per_step / self.step_time_s * (1 - self.assume.lost)

    @property
    def tokens_per_day(self) -> float:
        return self.tokens_per_second * _DAY

    def _mfu(self, causal: bool) -> float:
        each = flops.training_flops_per_token(self.cfg, self.job.seq_len, causal)
        peak = self.cluster.chip.rate("bf16") * self.cluster.gpus
        return each * self.tokens_per_step / self.step_time_s / peak

    @cached_property
    def mfu(self) -> float:
        """Share of the BF16 peak that useful FLOPs are, causal, as in ISCA table 4."""
        return self._mfu(True)

    @cached_property
    def mfu_non_causal(self) -> float:
        return self._mfu(False)

    @cached_property
    def _cost(self) -> tuple[float, float, float]:
        step_s = self.step_time_s / (1 - self.assume.lost)
        watts = (self.cluster.chip.power_w or 0.0) * self.assume.power_share * self.assume.pue
        tokens, gpus, rent = self.job.tokens, self.cluster.gpus, self.assume.rent
        return run_cost(tokens, self.tokens_per_step, step_s, gpus, rent, watts)

    @property
    def gpu_hours(self) -> float:
        return self._cost[0]

    @property
    def cost_usd(self) -> float:
        return self._cost[1]

    @property
    def energy_kwh(self) -> float | None:
        return self._cost[2] if self.cluster.chip.power_w else None

    @property
    def days(self) -> float:
        return self.job.tokens / self.tokens_per_day

    @cached_property
    def bottleneck(self) -> str:
        """The resource of which a tenth more saves most of a step; memory where it does not fit."""
        if not self.fits:
            return "memory"

        def richer(resource: str) -> float:
            cluster = Cluster(scaled(self.cluster.chip, **{resource: 1.1}), self.cluster.gpus)
            return plan(self.cfg, cluster, self.job, self.layout, self.assume).step_time_s

        return min(RESOURCES, key=richer).replace("_", " ")

    def as_json(self) -> dict:
        """Everything as plain numbers, strings, lists and mappings."""
        named = (
            *("gpu_hours", "step_time_s", "tokens_per_day", "mfu", "mfu_non_causal", "days"),
            *("cost_usd", "energy_kwh", "bottleneck", "memory_per_gpu_bytes", "fits", "room"),
            *("flops_per_token", "tokens_per_step", "memory", "times", "hidden"),
        )
        return {
            "model": self.cfg.model_type,
            "cluster": {"chip": self.cluster.chip.name, "gpus": self.cluster.gpus},
            "job": asdict(self.job),
            "layout": asdict(self.layout),
            "assumptions": asdict(self.assume),
            "parameters": {"total": self.parameters.total, "activated": self.parameters.activated},
            **{name: getattr(self, name) for name in named},
        }


def plan(
    cfg: ModelConfig,
    cluster: Cluster,
    job: Job,
    layout: Layout,
    assume: Assumptions = Assumptions(),  # noqa: B008
) -> Plan:
    """The run of a layout. Raises PlanError with all that makes it impossible.

    Whether it fits in memory is `Plan.fits`: a plan that does not is still told.
    """
    if wrong := layout.problems(cfg, cluster, job):
        listed = "".join(f"\n  - {each}" for each in wrong)
        raise PlanError(
            f"This plan cannot be carried out:{listed}\nNo step could run. Change what is named."
        )
    found = Plan(
        cfg, cluster, job, layout, assume, stage_step.step(cfg, cluster, job, layout, assume)
    )
    if not found.step_time_s < _NEVER:
        slow = max(found.times, key=found.times.__getitem__)
        raise PlanError(
            f"A step would take {found.step_time_s:g} seconds, most of them {slow}: no run ends, "
            "and its cost has no meaning. Give the chip's rates in FLOP/s and bytes/s, shares of "
            "them and an expert_load that a run can have, or a smaller seq_len."
        )
    return found
