"""Which rank holds what: data, expert, tensor and pipeline parallelism on one grid of ranks.

world = pp x dp x tp. Experts are split inside the data parallel replicas, so ep divides dp and adds
no ranks: DeepSeek-V3 trained on pp = 16, dp = 128 with ep = 64 inside, and tp = 1 (the report,
section 3.2). Ranks are numbered with tp innermost, where the traffic is heaviest, and pp outermost.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dsv3_tutorial.config import ModelConfig

TIMEOUT = timedelta(minutes=5)  # a rank that hangs ends the job after this; a dead one at once
AXES = ("pp", "dp", "tp")  # outermost first
ZEROS = (0, 1, 3)
SCHEDULES = ("gpipe", "1f1b", "zb1p")


@dataclass(frozen=True)
class Layout:
    """How many ways a run is split, each way. `dp` counts attention replicas, and `ep` divides it.

    zero: what the replicas share out. 0 nothing, 1 the optimizer's state, 3 also gradients and
    weights (FSDP2). schedule: the order of a pipeline's micro-batches.
    """

    dp: int = 1
    ep: int = 1
    tp: int = 1
    pp: int = 1
    zero: int = 0
    schedule: str = "1f1b"

    @property
    def world(self) -> int:
        """The ranks it takes: ep is inside dp."""
        return self.pp * self.dp * self.tp

    def check(self, world: int, cfg: ModelConfig | None = None) -> list[str]:
        """Every reason why `world` ranks, or a model of `cfg`, cannot be laid out so; [] if none.

        One line a reason, with the option it is about first.
        """
        problems = list(_own_problems(self))
        if problems:
            return problems
        problems += _world_problems(self, world)
        return problems + (list(_model_problems(self, cfg)) if cfg is not None else [])


def _own_problems(layout: Layout) -> Iterator[str]:
    for name in ("dp", "ep", "tp", "pp"):
        value = getattr(layout, name)
        if type(value) is not int or value < 1:
            yield f"{name} = {value!r}: it must be a whole number of 1 or more"
    if layout.zero not in ZEROS:
        yield f"zero = {layout.zero!r}: it must be 0, 1 or 3"
    if layout.schedule not in SCHEDULES:
        yield f"pp_schedule = {layout.schedule!r}: it must be one of {', '.join(SCHEDULES)}"


def _world_problems(layout: Layout, world: int) -> Iterator[str]:
    if layout.world != world:
        yield (
            f"dp = {layout.dp} times tp = {layout.tp} times pp = {layout.pp} is {layout.world} "
            f"ranks, and there {'are' if world > 1 else 'is'} {world}: each rank has one place. "
            f"Start {layout.world} (torchrun --nproc-per-node), or change the numbers"
        )
    if layout.dp % layout.ep:
        yield (
            f"ep = {layout.ep} does not divide dp = {layout.dp}: the experts of a layer are split "
            "over ranks that hold replicas of everything else"
        )
    if layout.zero == 3 and (layout.ep > 1 or layout.pp > 1):
        yield (
            "zero = 3 together with ep or pp: FSDP2 would gather the weights again for every "
            "micro-batch of a stage, and split experts twice. Take zero = 1, as DeepSeek-V3 did"
        )


def _model_problems(layout: Layout, cfg: ModelConfig) -> Iterator[str]:
    experts = cfg.n_routed_experts
    if layout.ep > 1 and experts is None:
        yield f"ep = {layout.ep}: the config has no experts to split"
    elif layout.ep > 1 and experts % layout.ep:
        yield f"ep = {layout.ep} does not divide n_routed_experts = {experts}: shares would differ"
    for name, size in _split_by_tensor(cfg):
        if size % layout.tp:
            yield f"tp = {layout.tp} does not divide {name} = {size}: shares would differ"
    if not cfg.is_mla and cfg.kv_heads % layout.tp and layout.tp % cfg.kv_heads:
        heads = cfg.kv_heads
        yield f"tp = {layout.tp} and num_key_value_heads = {heads}: neither divides the other"
    if layout.pp > cfg.num_hidden_layers:
        yield f"pp = {layout.pp}: the config has {cfg.num_hidden_layers} blocks to share out"


def _split_by_tensor(cfg: ModelConfig) -> Iterator[tuple[str, int]]:
    """What tensor parallelism cuts: heads and widths, by the config's names."""
    yield "num_attention_heads", cfg.num_attention_heads
    if cfg.n_routed_experts is None or cfg.first_k_dense_replace:
        yield "intermediate_size", cfg.intermediate_size
    if cfg.n_routed_experts is not None and cfg.n_shared_experts:
        yield "the shared experts' width", cfg.moe_intermediate_size * cfg.n_shared_experts


@dataclass(frozen=True)
class Grid:
    """This process's place in a layout, and the groups of ranks that it shares something with.

    `mesh` has the axes pp, dp and tp; `experts` the one axis ep, a part of dp. "outer" is the rest
    of dp: the ranks that hold the same experts.
    """

    layout: Layout
    mesh: DeviceMesh
    experts: DeviceMesh | None
    groups: dict[str, dist.ProcessGroup] = field(repr=False)

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The ranks that differ from this one along `axis` alone; None where it is the only one."""
        return self.groups.get(axis)

    def size(self, axis: str) -> int:
        """How many ranks lie along pp, dp, tp, ep or outer."""
        group = self.group(axis)
        return 1 if group is None else dist.get_world_size(group)

    def index(self, axis: str) -> int:
        """This rank's place along an axis, from 0."""
        group = self.group(axis)
        return 0 if group is None else dist.get_group_rank(group, dist.get_rank())


def grid(layout: Layout, kind: str) -> Grid:
    """The groups of a layout on devices of `kind`; every rank of the world calls it.

    Each group ends a call that takes longer than TIMEOUT. Raises ValueError when the layout does
    not take the whole world: ranks left over would wait for ever.
    """
    problems = layout.check(dist.get_world_size())
    if problems:
        raise ValueError(f"This layout is not possible: {'; '.join(problems)}.")
    shape = (layout.pp, layout.dp // layout.ep, layout.ep, layout.tp)
    ranks = torch.arange(layout.world).view(shape)  # (pp, outer, ep, tp)
    groups = {
        "pp": _groups(ranks, (0,)),
        "dp": _groups(ranks, (1, 2)),
        "tp": _groups(ranks, (3,)),
        "outer": _groups(ranks, (1,)),
        "ep": _groups(ranks, (2,)),
    }
    mesh = DeviceMesh.from_group(
        [groups[axis] for axis in AXES],
        kind,
        mesh=ranks.flatten(1, 2),  # (pp, dp, tp)
        mesh_dim_names=AXES,
    )
    split = layout.ep > 1
    experts = DeviceMesh.from_group(groups["ep"], kind, mesh_dim_names=("ep",)) if split else None
    used = {name: group for name, group in groups.items() if dist.get_world_size(group) > 1}
    return Grid(layout, mesh, experts, used)


def _groups(ranks: torch.Tensor, axes: tuple[int, ...]) -> dist.ProcessGroup:
    """This rank's group along `axes` of the grid of ranks; all ranks make all groups, in order."""
    rest = [axis for axis in range(ranks.ndim) if axis not in axes]
    lines = ranks.permute(*rest, *axes).flatten(-len(axes)).flatten(0, -2)  # (groups, members)
    own, _ = dist.new_subgroups_by_enumeration(lines.tolist(), timeout=TIMEOUT)
    return own
