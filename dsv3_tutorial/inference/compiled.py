"""A decode step without its Python: every tensor keeps its shape and place, so it can be replayed.

A step looks at few tokens; what it costs beside the weights' bytes is the launching of some hundred
small operators. A GPU takes them as one graph.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dsv3_tutorial.attention.cache import Cache
from dsv3_tutorial.inference.requests import GenerationError


@contextmanager
def fixed_shapes(caches: Sequence[Cache], count: int) -> Iterator[None]:
    """While it lasts, `count` tokens are stored by the lengths on the device alone.

    To Python every cache then looks full up to the last `count` places and uneven: it writes where
    `lengths` say, and attends over the whole capacity, masked. So all steps are the same step.
    What Python knows of the lengths is put right behind it.
    """
    known = [(cache.shortest, cache.longest) for cache in caches]
    for cache in caches:
        cache.longest = cache.capacity - count
        cache.shortest = cache.longest - 1
    done = 0
    try:
        yield
        done = count
    finally:
        for cache, (shortest, longest) in zip(caches, known, strict=True):
            cache.shortest, cache.longest = shortest + done, longest + done


class GraphStep:
    """ids (B, S) -> hidden (B, S, D), as `body(ids, caches)` gives it, replayed as one CUDA graph.

    One graph an S, recorded at its first use or by `prepare`; the next call overwrites what it
    gave. Attention reaches over the caches' whole capacity, masked: reserve no more than is needed.
    Raises GenerationError on a CPU: there `torch.compile` took more than half a minute for the
    `small` model's 12 layers, again for each capacity, and its step was no faster.
    """

    def __init__(self, body: nn.Module, caches: Sequence[Cache]):
        device = caches[0].lengths.device
        if device.type != "cuda":
            raise GenerationError(
                f"A compiled step is a CUDA graph, and this model is on {device.type!r}: there is "
                "no launch to save there, and compiling took longer than the text. Leave out "
                "--compile (compiled=False), or load the model on a GPU."
            )
        self.body, self.caches = body, caches
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, ids: Tensor) -> Tensor:
        count = ids.shape[1]
        if min(cache.capacity - cache.longest for cache in self.caches) < count:
            return self.body(ids, self.caches)  # the cache's own error, with the true lengths
        self.prepare(count)
        graph, read, hidden = self.graphs[count]
        read.copy_(ids)
        with fixed_shapes(self.caches, count):
            graph.replay()
        return hidden

    def prepare(self, count: int) -> None:
        """Record the step of `count` tokens a text, if there is room for one."""
        room = min(cache.capacity - cache.longest for cache in self.caches)
        if count not in self.graphs and count <= room:
            batch, lengths = self.caches[0].batch, self.caches[0].lengths
            ids = torch.zeros(batch, count, dtype=torch.int64, device=lengths.device)  # (B, S)
            self.graphs[count] = self._capture(ids)

    def _capture(self, ids: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        """Record a step, after two that compile its kernels and whose tokens are forgotten.

        Recording stores nothing: the rows are written, and the lengths moved, by each replay.
        """
        lengths = [cache.lengths.clone() for cache in self.caches]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                self._without_trace(ids)
                for cache, length in zip(self.caches, lengths, strict=True):
                    cache.lengths.copy_(length)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden = self._without_trace(ids)
        return graph, ids, hidden

    def _without_trace(self, ids: Tensor) -> Tensor:
        """A step after which Python knows of no new token: (B, S) -> (B, S, D)."""
        known = [(cache.shortest, cache.longest) for cache in self.caches]
        with fixed_shapes(self.caches, ids.shape[1]):
            hidden = self.body(ids, self.caches)
        for cache, (shortest, longest) in zip(self.caches, known, strict=True):
            cache.shortest, cache.longest = shortest, longest
        return hidden
