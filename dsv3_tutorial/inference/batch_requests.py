"""What goes into a server and what comes out of it: requests, events, results, counts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Generator

from dsv3_tutorial.inference.requests import Answer
from dsv3_tutorial.inference.sample import Sampling


@dataclass(frozen=True)
class Request:
    """A prompt to continue by up to `max_new_tokens` tokens, or to a token of `stop`."""

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: Iterable[int] = ()


@dataclass(frozen=True)
class Result:
    """What came of a request: its new tokens, without the stop token, and why no more came.

    reason: "length", "stop", "cancelled" or "error", whose `problem` says what was wrong. `waited`
    counts the steps from submission to the start; None where it never started.
    """

    tokens: list[int]
    reason: str
    waited: int | None
    problem: str | None = None


@dataclass(frozen=True)
class Event:
    """One thing that a step did for one request: "started", a "token", or "finished"."""

    request: int
    kind: str
    token: int | None = None
    result: Result | None = None


@dataclass(frozen=True)
class Stats:
    """A server's state and what it has done; waits are in steps, of requests that started."""

    queued: int
    running: int
    pages: int
    pages_free: int
    steps: int
    tokens: int
    finished: int
    cancelled: int
    failed: int
    mean_wait: float
    longest_wait: int


@dataclass
class Tally:
    """The counts behind `Stats`."""

    steps: int = 0
    tokens: int = 0
    waits: int = 0
    started: int = 0
    longest_wait: int = 0
    ended: dict[str, int] = field(default_factory=dict)

    def start(self, waited: int) -> None:
        self.started += 1
        self.waits += waited
        self.longest_wait = max(self.longest_wait, waited)

    def end(self, reason: str) -> None:
        self.ended[reason] = self.ended.get(reason, 0) + 1

    def stats(self, queued: int, running: int, pages: int, pages_free: int) -> Stats:
        count = self.ended.get
        return Stats(
            queued,
            running,
            pages,
            pages_free,
            self.steps,
            self.tokens,
            finished=count("length", 0) + count("stop", 0),
            cancelled=count("cancelled", 0),
            failed=count("error", 0),
            mean_wait=self.waits / max(self.started, 1),
            longest_wait=self.longest_wait,
        )


@dataclass(eq=False)  # a job is itself: two equal requests are two jobs
class Job:
    """A request on its way: queued while `waited` is None, then running until its answer ends."""

    id: int
    prompt: list[int]
    answer: Answer
    sampling: Sampling
    generator: Generator
    submitted: int  # the step before which it came
    waited: int | None = None

    @property
    def room(self) -> int:
        """Tokens that its pages must have room for."""
        return len(self.prompt) + self.answer.limit

    @property
    def stored(self) -> int:
        """Tokens of it that the cache holds between two steps: all but the newest."""
        new = len(self.answer.tokens)
        return len(self.prompt) + new - 1 if new else 0

    def result(self, reason: str, problem: str | None = None) -> Result:
        return Result(list(self.answer.tokens), reason, self.waited, problem)
