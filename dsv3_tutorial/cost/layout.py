"""How a run is laid out on its GPUs, and everything that is wrong with a layout, said at once."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost.job import Job, PlanError
from dsv3_tutorial.cost.schedule import SCHEDULES
from dsv3_tutorial.cost.tiers import whole
from dsv3_tutorial.files import data_path
from dsv3_tutorial.hardware import Cluster

__all__ = ["Job", "Layout", "PlanError", "names"]
PRECISIONS = ("fp8", "bf16")
RECOMPUTE = ("none", "selective", "full")
_SIZES = ("pp", "dp", "ep", "tp", "micro_batch")
_WORDS = {
    "schedule": tuple(SCHEDULES),
    "zero": (0, 1, 2, 3),
    "precision": PRECISIONS,
    "recompute": RECOMPUTE,
    "dispatch": ("two_stage", "deduplicated", "flat"),
}


@dataclass(frozen=True)
class Layout:
    """pp x dp x tp GPUs; `ep` of each dp x tp hold a layer's experts together.

    micro_batch: sequences of one micro-batch. recompute: what the backward computes again,
    "selective" as V3 (norms, MLA's up-projections, SwiGLU's output). Raises PlanError.
    """

    pp: int = 1
    dp: int = 1
    ep: int = 1
    tp: int = 1
    micro_batch: int = 1
    schedule: str = "1f1b"
    zero: int = 1
    precision: str = "fp8"
    recompute: str = "none"
    dispatch: str = "two_stage"

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in _SIZES}
        wrong = [
            f"{k} = {v!r} is no whole number of 1 or more"
            for k, v in sizes.items()
            if not whole(v, 1)
        ]
        for name, allowed in _WORDS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or value not in allowed:
                wrong.append(f"{name} = {value!r} is none of {', '.join(map(str, allowed))}")
        if wrong:
            raise PlanError(
                f"This layout cannot be: {'; '.join(wrong)}. No GPU would know its part. Change "
                "what is named."
            )

    @property
    def gpus(self) -> int:
        return self.pp * self.dp * self.tp

    @property
    def stages(self) -> int:
        """Stages that the layers are cut into: two a GPU in DualPipeV."""
        return 2 * self.pp if self.schedule == "dualpipev" and self.pp > 1 else self.pp

    @property
    def copies(self) -> int:
        """GPUs of one replica that hold each stage: two in DualPipe."""
        return 2 if self.schedule == "dualpipe" and self.pp > 1 else 1

    @property
    def holders(self) -> tuple[int, int]:
        """GPUs that hold the same: of what tp cuts, and of routed experts."""
        return self.copies * self.dp, max(1, self.copies * self.dp * self.tp // self.ep)

    @property
    def overlaps(self) -> bool:
        """Whether the schedule hides communication behind another micro-batch's computing."""
        return self.pp > 1 and self.schedule in ("dualpipe", "dualpipev")

    def micro_batches(self, job: Job) -> int:
        """Micro-batches that pass through each replica's pipeline in a step."""
        return job.sequences // (self.dp * self.micro_batch)

    def problems(self, cfg: ModelConfig, cluster: Cluster, job: Job) -> list[str]:
        """All that keeps this layout from training cfg on the cluster, each with its number."""
        return [
            *_division_problems(self, cfg, cluster, job),
            *_pipeline_problems(self, cfg, job),
            *_chip_problems(self, cfg, cluster),
        ]

    @classmethod
    def read(cls, source: "str | Path | Mapping[str, Any]") -> "Layout":
        """A layout by its name in data/layouts, from a JSON file, or from a mapping."""
        raw = source if isinstance(source, Mapping) else _load(source)
        if not isinstance(raw, Mapping):
            raise PlanError(
                f"The layout is {raw!r}: no field can be read from it. Write an object of "
                f"{_names(cls)}."
            )
        raw = {k: v for k, v in raw.items() if k not in ("about", "source", "confidence")}
        if unknown := sorted(map(str, set(raw) - {f.name for f in fields(cls)})):
            raise PlanError(
                f"The layout has unknown fields {', '.join(unknown)}: what they would change is "
                f"not known. There are {_names(cls)}."
            )
        return cls(**raw)


def names() -> list[str]:
    """The layouts under data/layouts."""
    return sorted(path.stem for path in data_path("layouts").glob("*.json"))


def _names(cls: type) -> str:
    return ", ".join(f.name for f in fields(cls))


def _load(source: str | Path) -> Any:
    path = data_path("layouts", f"{source}.json") if str(source) in names() else Path(source)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = f"There is no layout {str(source)!r}, neither a name nor a file"
    except OSError as error:
        what = f"The layout {path.name} cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        what = f"The layout {path.name} is not JSON: {error}"
    raise PlanError(f"{what}. Nothing can be planned. Names are {', '.join(names())}.") from None


def _division_problems(
    layout: Layout, cfg: ModelConfig, cluster: Cluster, job: Job
) -> Iterator[str]:
    pp, dp, ep, tp = layout.pp, layout.dp, layout.ep, layout.tp
    if layout.gpus != cluster.gpus:
        yield (
            f"pp x dp x tp = {pp} x {dp} x {tp} = {layout.gpus} GPUs and the cluster has "
            f"{cluster.gpus}: change one of the four"
        )
    if dp * tp % ep:
        yield f"ep = {ep} does not divide dp x tp = {dp * tp}: change ep, dp or tp"
    experts = cfg.n_routed_experts
    if experts is None and ep > 1:
        yield f"ep = {ep} and the model has no experts: set ep to 1"
    if experts is not None and experts % ep:
        yield f"ep = {ep} does not divide the model's {experts} routed experts: change ep"
    if job.sequences % (dp * layout.micro_batch):
        yield (
            f"dp x micro_batch = {dp} x {layout.micro_batch} does not divide the step's "
            f"{job.sequences} sequences: change dp, micro_batch or sequences"
        )
    for what, number in _cut_by_tp(cfg, job):
        if number % tp:
            yield f"tp = {tp} does not divide the {number} {what}: change tp"


def _cut_by_tp(cfg: ModelConfig, job: Job) -> list[tuple[str, int]]:
    found = [("attention heads", cfg.num_attention_heads), ("tokens of a sequence", job.seq_len)]
    if not cfg.is_mla and cfg.kv_heads:
        found.append(("key-value heads", cfg.kv_heads))
    return found


def _pipeline_problems(layout: Layout, cfg: ModelConfig, job: Job) -> Iterator[str]:
    if layout.pp == 1:
        return
    name, stages, batches = layout.schedule, layout.stages, layout.micro_batches(job)
    if stages > cfg.num_hidden_layers:
        yield (
            f"pp = {layout.pp} makes {stages} stages of {cfg.num_hidden_layers} layers: a stage "
            "needs at least one; lower pp"
        )
    if name == "dualpipe" and stages % 2:
        yield f"pp = {layout.pp} is odd, and DualPipe's streams enter at both ends: take an even pp"
    if name == "dualpipe" and batches % 2:
        yield (
            f"{batches} micro-batches a replica is odd, and half of them enter at each end of "
            "DualPipe: change dp, micro_batch or sequences"
        )
    least = {"dualpipe": 2 * stages, "dualpipev": stages}.get(name, layout.pp)
    if batches < least:
        yield (
            f"{batches} micro-batches a replica do not fill {name}, which needs {least} at pp = "
            f"{layout.pp}: lower pp, dp or micro_batch, or raise sequences"
        )


def _chip_problems(layout: Layout, cfg: ModelConfig, cluster: Cluster) -> Iterator[str]:
    chip, domain = cluster.chip, cluster.domain
    if chip.rates.get(layout.precision) is None:
        yield f"precision = {layout.precision}: {chip.title} has no rate for it; take another"
    elif chip.rates.get("bf16") is None:
        yield f"{chip.title} has no rates.bf16, and attention runs in it: give it in a cluster file"
    for name in ("memory_bytes", "memory_bandwidth"):
        if getattr(chip, name) is None:
            yield f"{chip.title} has no {name}: give it in a cluster file"
    if layout.tp <= domain and domain % layout.tp:
        yield (
            f"tp = {layout.tp} does not divide a domain of {domain} GPUs, and a group would "
            "straddle two: take a divisor"
        )
    if layout.tp > domain:
        yield (
            f"tp = {layout.tp} exceeds the scale-up domain of {domain} GPUs of {chip.title}: lower "
            "tp"
        )
    if layout.ep > domain and layout.ep % domain:
        yield (
            f"ep = {layout.ep} fills no whole scale-up domains of {domain} GPUs: take a multiple"
        )
    if layout.ep < domain and domain % layout.ep:
        yield (
            f"ep = {layout.ep} does not divide a domain of {domain} GPUs, and a group would "
            "straddle two: take a divisor"
        )
