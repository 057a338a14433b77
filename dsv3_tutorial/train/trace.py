"""A step taken apart: what it worked on, what it waited for, and what went on behind its back.

Spans in seconds from the first one, on two lanes: "step" is the thread that trains, one thing after
another; "behind" is what other threads do meanwhile. A wait is what no work of the step covers.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_tutorial.cost.overlap import covered, exposed, hidden
from dsv3_tutorial.files import write_whole
from dsv3_tutorial.train.profile import Phases

LANES = ("step", "behind")
WORK = ("forward", "backward", "optimizer", "evaluation")
REST = "no phase"


@dataclass(frozen=True)
class Span:
    """Something that went on from `start` to `end`, in seconds, on one of LANES."""

    name: str
    start: float
    end: float
    lane: str = "step"


@dataclass(frozen=True)
class Stalls:
    """Where the seconds went. `work` and `waited` add up to `wall`.

    waited: by cause, REST included: Python between the phases. behind: seconds of each name on the
    other lane that the step's work covered. They are in no wait, and still not free: without a
    core of their own they make the work longer. Compare `wall` with and without.
    """

    wall: float
    work: float
    waited: dict[str, float]
    behind: dict[str, float]

    @property
    def share(self) -> float:
        """The part of the time in which the step's device had nothing to do: 0 to 1."""
        return 1 - self.work / self.wall if self.wall else 0.0

    def __str__(self) -> str:
        causes = sorted(self.waited.items(), key=lambda item: -item[1])
        said = ", ".join(f"{name} {spent / self.wall:.0%}" for name, spent in causes if spent > 0)
        line = f"waiting {self.share:.0%} of the time" + (f": {said}" if said else "")
        covered_by_work = ", ".join(f"{name} {1e3 * t:.0f} ms" for name, t in self.behind.items())
        return line + (f"; hidden behind work: {covered_by_work}" if self.behind else "")


class Timeline(Phases):
    """Phases that remember when they were, for `table`, `stall_report` and `write_trace`.

    Called as Phases is. `behind(name)` is for other threads: their spans are no part of the step.
    """

    def __init__(self, exact: bool = False):
        super().__init__(exact)
        self.spans: list[Span] = []
        self.began = self._now()

    def restart(self) -> None:
        """Forget everything so far, as what comes before is no part of what is to be shown."""
        self.spans, self.began = [], self._now()
        self.seconds = dict.fromkeys(self.seconds, 0.0)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = self._now()
        try:
            with super().__call__(name):
                yield
        finally:
            self.add(name, began, self._now())

    @contextmanager
    def behind(self, name: str) -> Iterator[None]:
        """What another thread does meanwhile."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, began, time.perf_counter(), "behind")

    def follow(self, name: str, future: Future) -> None:
        """What another thread has just begun, until `future` is done."""
        began = time.perf_counter()
        future.add_done_callback(lambda _: self.add(name, began, time.perf_counter(), "behind"))

    def add(self, name: str, start: float, end: float, lane: str = "step") -> None:
        """A span by two readings of time.perf_counter(). Any thread may add one."""
        self.spans.append(Span(name, start - self.began, end - self.began, lane))


def stall_report(spans: Sequence[Span]) -> Stalls:
    """How long the step's device waited, and for what.

    From the first span's start to the last end on the lane "step". A moment that two causes share
    is given to the one that is named first.
    """
    own = [span for span in spans if span.lane == "step"]
    if not own:
        return Stalls(0.0, 0.0, {}, {})
    busy = [(s.start, s.end) for s in own if s.name in WORK]
    waited, known = {}, list(busy)
    for name in dict.fromkeys(s.name for s in own if s.name not in WORK):
        cause = [(s.start, s.end) for s in own if s.name == name]
        waited[name] = exposed(known, cause)
        known += cause
    whole = (min(s.start for s in own), max(s.end for s in own))
    waited[REST] = exposed(known, [whole])
    other = [s for s in spans if s.lane != "step"]
    behind = {
        n: hidden(busy, [(s.start, s.end) for s in other if s.name == n]) for n in names(other)
    }
    return Stalls(whole[1] - whole[0], covered(busy), waited, behind)


def table(spans: Sequence[Span], steps: int) -> str:
    """What a step spent on work and on each wait, in ms and as shares; then what it hid."""
    found = stall_report(spans)
    work = {n: covered((s.start, s.end) for s in spans if s.name == n) for n in WORK}
    rows = [(n, t, "work") for n, t in work.items() if t]
    rows += [(n, t, "wait") for n, t in found.waited.items()]
    lines = [f"{'':<12} {'ms a step':>10} {'share':>7}"]
    lines += [_row(n, t, steps, found.wall) + f"  {kind}" for n, t, kind in rows]
    lines += [_row("a step", found.wall, steps, found.wall)]
    lines += [_row(n, t, steps, found.wall) + "  hidden" for n, t in found.behind.items()]
    return "\n".join(lines)


def _row(name: str, seconds: float, steps: int, wall: float) -> str:
    return f"{name:<12} {1e3 * seconds / max(1, steps):>10.2f} {seconds / (wall or 1):>7.1%}"


def names(spans: Sequence[Span]) -> list[str]:
    """The names of spans, each once, in the order of their first."""
    return list(dict.fromkeys(span.name for span in spans))


def write_trace(spans: Sequence[Span], path: Path) -> Path:
    """The spans as a Chrome trace, written whole: a lane a row at ui.perfetto.dev. Times in us."""
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": i, "args": {"name": lane}}
        for i, lane in enumerate(LANES)
    ]
    for span in spans:
        when = {"ts": 1e6 * span.start, "dur": 1e6 * (span.end - span.start)}
        events.append(
            {"name": span.name, "ph": "X", "pid": 0, "tid": LANES.index(span.lane), **when}
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    return path


@dataclass(frozen=True)
class Operator:
    """One of PyTorch's operators: its calls, and the seconds in them."""

    name: str
    calls: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.name:<36} {self.calls:>6} calls {1e3 * self.seconds:>9.2f} ms"


def operators(run: Callable[[], Any], top: int = 8) -> list[Operator]:
    """The operators that `run` spends most time in, and all the others as "the rest".

    Those of the calling thread, forward and backward, on the CPU: on a GPU it would be the time to
    launch them. Being asked before each makes `run` slower, but is in no operator's seconds.
    """
    with _Clocked() as seen:
        run()
    found = [Operator(name, len(each), sum(each)) for name, each in seen.times.items()]
    found.sort(key=lambda op: (-op.seconds, op.name))
    rest = found[top:]
    calls, seconds = sum(op.calls for op in rest), sum(op.seconds for op in rest)
    return [*found[:top], Operator("the rest", calls, seconds)]


class _Clocked(TorchDispatchMode):
    """Takes the time of every operator below autograd. torch.profiler would print on stderr."""

    def __init__(self):
        super().__init__()
        self.times: dict[str, list[float]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        began = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            name = func.overloadpacket.__name__
            self.times.setdefault(name, []).append(time.perf_counter() - began)
        return out
