"""Timing of engines: bursts of decode steps in turn, and the memory that a step takes besides."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dsv3_tutorial.bench import timing

AHEAD = 16  # steps that an engine can take before it is reset


@dataclass
class Engine:
    """Decodes one token after the other: `run` takes a step, `reset` goes back to the first.

    Each step reads another token, so that other experts are met, as in a text. weight_bytes and
    cache_bytes are what it holds.
    """

    tokens: Tensor  # (B, AHEAD)
    decode: Callable[[Tensor], Tensor]  # (B, 1) -> logits (B, V)
    rewind: Callable[[], None]
    weight_bytes: int
    cache_bytes: int
    taken: int = 0

    def run(self) -> Tensor:
        self.taken += 1
        return self.decode(self.tokens[:, self.taken - 1, None])

    __call__ = run

    def reset(self) -> None:
        self.taken = 0
        self.rewind()


def compare(
    engines: Mapping[str, Engine], repeats: int, seconds: float, burst: int = AHEAD - 1
) -> dict[str, dict[str, float]]:
    """Seconds a step of each engine: bursts of steps in turn, first place rotating, each CPU time.

    A burst's first step is not timed: it fetches what another engine threw out of the cache. An
    engine that served alone would not wait for that. Bursts end early after half a second. Stats as
    in `timing.summary`, of bursts' means; stops after a whole round once `seconds` are spent.
    """
    order, samples = list(engines), {name: [] for name in engines}
    timer, deadline = timing.cpu_timer(), time.perf_counter() + seconds
    for _ in range(repeats):
        for name in order:
            engine, until = engines[name], time.perf_counter() + 0.5
            engine.run()
            taken = []
            while len(taken) < burst and (not taken or time.perf_counter() < until):
                taken.append(timer(engine))
            engine.reset()
            samples[name].append(sum(taken) / len(taken))
        order = order[1:] + order[:1]
        if time.perf_counter() >= deadline:
            break
    return {name: timing.summary(times) for name, times in samples.items()}


def working_bytes(engine: Engine) -> int:
    """The most that one step holds beyond what was there before it, by torch's allocator."""
    engine.run()  # packs weights, makes tables
    with _no_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        engine.run()
    engine.reset()
    held = most = 0
    events = seen.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@contextmanager
def _no_stderr() -> Iterator[None]:
    """The profiler of some versions writes a line to it each time it starts."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
