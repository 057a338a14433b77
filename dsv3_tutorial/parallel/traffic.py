"""What a rank sends, by tier, and what it would take on a network: seen, not told.

    with traffic.record(network("h800"), rate=400e12) as seen:
        loss = model(tokens).sum()
        loss.backward()
    seen.bytes, seen.clock

Every collective and message of torch.distributed is seen where it reaches PyTorch's dispatcher, so
DTensor's, FSDP2's and a backward's are too. Real bytes, a virtual clock. It models cards that are
busy and ranks that wait, not links that ranks share inside the network, and no congestion: all of
it stands in `parallel.clock`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

from dsv3_tutorial.cost.comm import Network
from dsv3_tutorial.parallel import collectives
from dsv3_tutorial.parallel.calls import Call, sent_by
from dsv3_tutorial.parallel.clock import Compute, Event, Mark, Span, TraceError, Wait, timeline


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    """FLOP of scores and mixture: q (B, H, S, N + R), k (B, KV, T, N + R), v (B, KV, T, V)."""
    return 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _attention_backward(_: Tensor, q: Tensor, k: Tensor, v: Tensor, *__: Any, **___: Any) -> int:
    """The scores once more, and two products for each of the two that were made."""
    return 2 * q.shape[:-1].numel() * k.shape[-2] * (3 * q.shape[-1] + 2 * v.shape[-1])


_KERNELS = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
_FLOPS = {  # of PyTorch's, attention's know neither the CPU's kernel nor, in 2.11, shared heads
    **flop_registry,
    **{
        getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{ending}"): count
        for kernel in _KERNELS
        for ending, count in (("", _attention), ("_backward", _attention_backward))
    },
}


class Seen:
    """What one rank did inside `record`. `trace` is all of it, and can be sent and kept."""

    def __init__(self, rank: int, network: Network | None, rate: float | None):
        self.rank, self.network, self.rate = rank, network, rate
        self.trace: list[Event] = []
        self._timelines: list[list[Span]] | None = None

    @property
    def calls(self) -> list[Call]:
        """The communications, in the order in which this rank started them."""
        return [event for event in self.trace if isinstance(event, Call)]

    @property
    def bytes(self) -> dict[str, float]:
        """What this rank sent: bytes by tier, all of it "inside" where no network was given."""
        total = {"inside": 0, "across": 0}
        for call in self.calls:
            for other, n in sent_by(call, self.rank).items():
                total[self.tier(other)] += n
        return total

    def tier(self, other: int) -> str:
        """Which of the two tiers joins this rank and another."""
        if self.network is None or self.network.node(self.rank) == self.network.node(other):
            return "inside"
        return "across"

    @property
    def flops(self) -> float:
        """The arithmetic that was seen or told, in FLOP."""
        return sum(event.flops for event in self.trace if isinstance(event, Compute))

    def compute(self, flops: float) -> None:
        """Tell of arithmetic that was not done here, or not by a matrix product."""
        if not 0 <= flops < float("inf"):
            raise TraceError(f"{flops} FLOP cannot be computed. Give 0 or more.")
        if self.trace and isinstance(self.trace[-1], Compute):
            flops += self.trace.pop().flops
        self.trace.append(Compute(flops))

    def mark(self, name: str) -> None:
        """Name this moment; `marks` tells its time afterwards."""
        self.trace.append(Mark(name))

    @property
    def clock(self) -> float:
        """This rank's virtual time at the end, in seconds."""
        return self.clocks[self.rank]

    @property
    def clocks(self) -> list[float]:
        """Every rank's virtual time at the end, in seconds."""
        return [spans[-1].end for spans in self.timelines]

    @property
    def marks(self) -> list[tuple[str, float]]:
        """This rank's marks and when it reached them, the last being ("end", `clock`)."""
        spans = self.timelines[self.rank]
        return [(span.event.name, span.end) for span in spans if isinstance(span.event, Mark)]

    @property
    def timelines(self) -> list[list[Span]]:
        """Every rank's events with their times: what `clock.timeline` made of all traces."""
        if self._timelines is None:
            raise TraceError(
                "There is no clock: either no network was given, or the block has not ended, and "
                "the ranks' traces meet only there. Use record(network), and ask after the block; "
                "mark(name) keeps a moment within it."
            )
        return self._timelines

    def _finish(self) -> None:
        """Exchange traces, outside all recording, and play them."""
        if self.network is None:
            return
        traces = [self.trace]
        if dist.is_initialized():
            traces = [None] * dist.get_world_size()
            with _disable_current_modes():
                dist.all_gather_object(traces, self.trace)
        self._timelines = timeline(traces, self.network, self.rate)


@contextlib.contextmanager
def record(
    network: Network | None = None, rate: float | None = None, matmuls: bool = True
) -> Iterator[Seen]:
    """See what this rank communicates in the block and, on a network, when it would be done.

    rate: FLOP/s; None: computing takes no time. matmuls: count matrix products and attention,
    forward and backward, causal as whole, as torch.utils.flop_counter does; False: only what
    `Seen.compute` tells. With a network every rank of the world must enter and leave, as the traces
    are exchanged at the end; without one a rank may record alone. Slows every operator by
    microseconds. Raises TraceError at the end for what has no modelled time, and, with a network,
    where two ranks gave one communication tensors of other sizes or dtypes.
    """
    seen = Seen(dist.get_rank() if dist.is_initialized() else 0, network, rate)
    recorder = _Recorder(seen, matmuls)
    with _waits_told_to(recorder), recorder:
        yield seen
    seen._finish()


@contextlib.contextmanager
def _waits_told_to(recorder: "_Recorder") -> Iterator[None]:
    """A wait reaches no dispatcher: `Work.wait` itself has to tell."""
    original = dist.Work.wait

    def wait(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
        done = original(work, *args, **kwargs)
        recorder.waited(id(work))
        return done

    dist.Work.wait = wait
    try:
        yield
    finally:
        dist.Work.wait = original


class _Recorder(TorchDispatchMode):
    """Passes every operator on, and writes down those that communicate or multiply."""

    def __init__(self, seen: Seen, matmuls: bool):
        super().__init__()
        self.seen, self.matmuls, self.started = seen, matmuls, 0
        # What a wait will name: a Work (kept alive, or its id could be another's) or a storage.
        self.pending: dict[int, tuple[Any, list[int]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types):
            return NotImplemented  # they ask again with what they hold
        kwargs = kwargs or {}
        if any(issubclass(kind, FakeTensor) for kind in types):
            return func(*args, **kwargs)  # sizes are being found out; nothing is sent
        if func.name() == "_c10d_functional::wait_tensor":
            self.waited(args[0].untyped_storage().data_ptr())
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if func.namespace in collectives.NAMESPACES:
            self._communicated(collectives.read(func, args, kwargs), out)
        elif self.matmuls and func._overloadpacket in _FLOPS:
            self.seen.compute(_FLOPS[func._overloadpacket](*args, **kwargs, out_val=out))
        return out

    def waited(self, handle: int) -> None:
        """The rank has waited for what this handle stands for; for some it waits twice."""
        _, calls = self.pending.pop(handle, (None, ()))
        self.seen.trace.extend(Wait(call) for call in calls)

    def _communicated(self, calls: list[Call], out: Any) -> None:
        if not calls:
            return
        indices = list(range(self.started, self.started + len(calls)))
        self.started += len(calls)
        self.seen.trace.extend(calls)
        handles = _handles(out)
        for handle, kept in handles:
            self.pending[handle] = kept, indices
        if not handles:
            self.seen.trace.extend(Wait(index) for index in indices)


def _handles(out: Any) -> list[tuple[int, Any]]:
    """What an operator gives to wait for: a Work, or the tensors that are on their way."""
    parts = out if isinstance(out, list | tuple) else [out]
    works = [dist.Work.unbox(part) for part in parts if isinstance(part, torch.ScriptObject)]
    if works:
        return [(id(work), work) for work in works]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return [(part.untyped_storage().data_ptr(), part) for part in tensors]
