"""Data parallel training under torchrun: ranks share a batch, and FSDP2 shards what they all hold.

N ranks on a global batch do what one process does on it: the same windows, the mean of the
gradients, the sum of the expert counts. Only the order of the additions differs.
torchrun --standalone --nproc-per-node 2 -m dsv3_tutorial train ...
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from dsv3_tutorial.parallel.meeting import RankLost, meet, under_torchrun, world_size
from dsv3_tutorial.parallel.mesh import Grid, Layout, grid
from dsv3_tutorial.parallel.stage import gathered


@dataclass(frozen=True)
class Ranks:
    """This process among its peers, and what they exchange beside the gradients.

    `grid` says which of them hold what; without one, every rank is a replica of the whole model.
    """

    rank: int
    size: int
    device: torch.device
    grid: Grid | None = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints, logs and writes the model."""
        return self.rank == 0

    @property
    def replica(self) -> tuple[int, int]:
        """Which of the data parallel replicas this rank belongs to, and how many there are."""
        if self.grid is None:
            return self.rank, self.size
        return self.grid.index("dp"), self.grid.size("dp")

    def share(self, rows: Tensor) -> Tensor:
        """This replica's rows of a batch that every rank has drawn: (B, ...) -> (B / dp, ...).

        Raises ValueError when the rows cannot be shared evenly: the mean of the ranks' means is
        the mean of the batch only between equals.
        """
        index, count = self.replica
        if len(rows) % count:
            raise ValueError(
                f"A batch of {len(rows)} rows cannot be shared by {count} ranks. Uneven shares "
                f"would weigh some rows more. Give a batch that {count} divides."
            )
        return rows.chunk(count)[index]

    def sum(self, values: Tensor, axis: str | None = None) -> Tensor:
        """The sum of the `values` of every rank, or of those along one axis of the grid. New."""
        total = values.detach().clone()
        if self.size > 1 and (axis is None or self.grid is None):
            dist.all_reduce(total)
        elif self.grid is not None and (group := self.grid.group(axis)) is not None:
            dist.all_reduce(total, group=group)
        return total

    def gather_rows(self, rows: Tensor, axis: str) -> Tensor:
        """The rows (n, ...) that the ranks along an axis hold, one after the other; n may differ.

        A rank without any may give an empty tensor of any shape.
        """
        group = None if self.grid is None else self.grid.group(axis)
        if group is None:
            return rows
        found: list[Tensor] = [rows] * self.grid.size(axis)
        dist.all_gather_object(found, rows, group=group)
        return torch.cat([part for part in found if part.numel()] or [rows])


def join(device: str | None = None, layout: Layout | None = None) -> Ranks:
    """This process's place among those of torchrun, or of `parallel.launch`; alone without either.

    gloo on CPUs; on GPUs NCCL, with gloo beside it for what lies on the CPU. Without a layout every
    rank is a replica, sharded by FSDP2.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    here = torch.device(kind)
    if not dist.is_initialized() and not under_torchrun():
        return Ranks(0, 1, here)
    if kind == "cuda":
        here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(here)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # ranks on one machine would fight for its cores
    if not dist.is_initialized():
        meet("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    size = dist.get_world_size()
    layout = layout or Layout(dp=size, zero=3 if size > 1 else 0)
    return Ranks(dist.get_rank(), size, here, grid(layout, kind))


@contextlib.contextmanager
def joined(device: str | None = None, layout: Layout | None = None) -> Iterator[Ranks]:
    """`join`, and part however it ends. Raises RankLost where the reason is another rank.

    Ranks that somebody else has brought together stay so.
    """
    found, size = dist.is_initialized(), world_size()
    me = dist.get_rank() if found else os.environ.get("RANK", "0")
    try:
        yield join(device, layout)
    except Exception as error:
        if size > 1 and from_a_peer(error):
            raise RankLost(
                f"Rank {me} of {size} stops: another rank has ended or hangs "
                f"({_first_words(error)}). A step needs all of them. Look for the first "
                "failure in torchrun's report, then start again with --resume."
            ) from None
        raise
    finally:
        if dist.is_initialized() and not found:
            dist.destroy_process_group()


def from_a_peer(error: BaseException | None) -> bool:
    """Whether a collective failed, here or under what was raised because of it."""
    while error is not None:
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_words(error: Exception) -> str:
    """What an error says, without the place in gloo's source and the advice that it adds."""
    line = str(error).strip().partition("\n")[0]
    return re.sub(r"^.*\.cc:\d+\] ", "", line).partition(". ")[0][:200]


def shard(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Give each rank 1 / size of every parameter (FSDP2): a block is whole only while it runs.

    Returned as it is for one rank, or when it is sharded already. Every rank must hold the same
    weights. Make the optimizer after. Memory: parameters, gradients and moments / size. Cost: 1.5x
    the traffic of an all-reduce.
    """
    if ranks.replica[1] > 1 and not isinstance(model, FSDPModule):
        mesh = ranks.grid.mesh["dp"]
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def synchronise(model: nn.Module, last: bool) -> None:
    """Reduce gradients in the coming backward only if it is a step's last; nothing when whole."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def gathered_state(model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """The whole model's state dict: on the first rank, and {} on the others. All call it.

    Whatever its parts are: FSDP2's shards, heads and widths, experts, stages of a pipeline. A key
    that two stages hold is the first one's. Memory: the whole model in the first rank's CPU.
    """
    grid = ranks.grid
    if grid is None:
        return model.state_dict()
    for_all = grid.index("dp") == grid.index("tp") == 0  # one rank of each stage
    held = {name: _whole(value, for_all) for name, value in model.state_dict().items()}
    if for_all and (group := grid.group("pp")) is not None:
        held = gathered(held, group)
    return held if ranks.first else {}


def _whole(tensor: Tensor, keep: bool) -> Tensor | None:
    """A tensor of which each rank may hold a part, whole on the CPU; all its ranks call it."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.cpu() if keep else None
