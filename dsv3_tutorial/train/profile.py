"""Where a step's time goes: a table of its phases, and a trace of a few steps for Perfetto."""

import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

PHASES = ("data", "forward", "backward", "optimizer", "evaluation", "checkpoint")
TRACED = range(2, 5)  # steps of this run, from 0: the first two still allocate


class Phases:
    """Adds up the seconds of each phase; a phase is also a name in the trace.

    `exact` waits for the device at both ends, which a CUDA run needs to tell phases apart.
    """

    def __init__(self, exact: bool = False):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.exact = exact and torch.cuda.is_available()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = self._now()
        with record_function(name):
            yield
        self.seconds[name] += self._now() - began

    def behind(self, name: str) -> AbstractContextManager:
        """What another thread does meanwhile: no phase of the step; `trace.Timeline` keeps it."""
        return nullcontext()

    def follow(self, name: str, future: Future) -> None:
        """The same, of what is under way and will end when `future` does."""

    def _now(self) -> float:
        if self.exact:
            torch.cuda.synchronize()
        return time.perf_counter()

    def table(self, wall: float, steps: int) -> str:
        """The phases' share of `wall` seconds, and what a step of `steps` spent in each."""
        rows = {**self.seconds, "the rest": wall - sum(self.seconds.values())}
        lines = [f"{'phase':<12} {'ms a step':>10} {'share':>7}"]
        lines += [
            f"{name:<12} {1e3 * spent / steps:>10.2f} {spent / wall:>7.1%}"
            for name, spent in rows.items()
        ]
        return "\n".join(lines)


class Trace:
    """Records steps TRACED of a run into `path` (.json or .json.gz), to open at ui.perfetto.dev."""

    def __init__(self, path: Path | None):
        self.path, self.recorder = path, None

    def at(self, step: int) -> None:
        """Begin or end at the start of `step`, counted from this run's first."""
        if self.path is not None and step == TRACED.start:
            kinds = [ProfilerActivity.CPU]
            kinds += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.recorder = profile(activities=kinds, acc_events=True)
            self.recorder.start()
        if step == TRACED.stop:
            self.end()

    def end(self) -> None:
        """Write what was recorded, if anything was; a run may end in the middle."""
        if self.recorder is None:
            return
        self.recorder.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.recorder.export_chrome_trace(str(self.path))
        self.recorder = None
