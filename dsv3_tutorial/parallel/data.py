"""Data parallel training under torchrun: ranks share a batch, and FSDP2 shards what they all hold.

N ranks on a global batch do what one process does on it: the same windows, the mean of the
gradients, the sum of the expert counts. Only the order of the additions differs.
torchrun --standalone --nproc-per-node 2 -m dsv3_tutorial train ...
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

TIMEOUT = timedelta(minutes=5)  # a rank that hangs ends the job after this; a dead one at once


class RankLost(RuntimeError):
    """Another rank has died or hangs, so this one cannot go on either."""


@dataclass(frozen=True)
class Ranks:
    """This process among its peers, and what they exchange beside the gradients."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints, logs and writes the model."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This rank's rows of a batch that every rank has drawn: (B, ...) -> (B / size, ...).

        Raises ValueError when the rows cannot be shared evenly: the mean of the ranks' means is
        the mean of the batch only between equals.
        """
        if len(rows) % self.size:
            raise ValueError(
                f"A batch of {len(rows)} rows cannot be shared by {self.size} ranks. Uneven shares "
                f"would weigh some rows more. Give a batch that {self.size} divides."
            )
        return rows.chunk(self.size)[self.rank]

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every rank's `values`, as a new tensor, on every rank."""
        total = values.detach().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total


def join(device: str | None = None) -> Ranks:
    """This process's place, from torchrun's environment; alone where there is none.

    gloo on CPUs; on GPUs NCCL, with gloo beside it for what lies on the CPU.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks(0, 1, torch.device(kind))
    if kind == "cuda":
        here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(here)
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    else:
        here = torch.device(kind)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # ranks on one machine would fight for its cores
        dist.init_process_group("gloo", timeout=TIMEOUT)
    return Ranks(dist.get_rank(), dist.get_world_size(), here)


@contextlib.contextmanager
def joined(device: str | None = None) -> Iterator[Ranks]:
    """`join`, and `leave` however it ends. Raises RankLost where the reason is another rank."""
    ranks = join(device)
    try:
        yield ranks
    except Exception as error:
        if ranks.size > 1 and _from_a_peer(error):
            raise RankLost(
                f"Rank {ranks.rank} of {ranks.size} stops: another rank has ended or hangs "
                f"({str(error).strip().splitlines()[0][:200]}). A step needs all of them. Look for "
                "the first failure in torchrun's report, then start again with --resume."
            ) from None
        raise
    finally:
        leave()


def _from_a_peer(error: BaseException | None) -> bool:
    """Whether a collective failed, here or under what was raised because of it."""
    while error is not None:
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def leave() -> None:
    """Part from the other ranks; nothing where there are none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Give each rank 1 / size of every parameter (FSDP2): a block is whole only while it runs.

    Returned as it is for one rank, or when it is sharded already. Every rank must hold the same
    weights. Make the optimizer after. Memory: parameters, gradients and moments / size. Cost: 1.5x
    the traffic of an all-reduce.
    """
    if ranks.size > 1 and not isinstance(model, FSDPModule):
        mesh = init_device_mesh(ranks.device.type, (ranks.size,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def synchronise(model: nn.Module, last: bool) -> None:
    """Reduce gradients in the coming backward only if it is a step's last; nothing when whole."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def gathered_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole model's state dict: on the first rank's CPU, and {} on the others. All call it."""
    if not isinstance(model, FSDPModule):
        return model.state_dict()
    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
