"""Mistakes of the field, made on purpose: a small run that reads, saves or routes as it should not.

Every run trains the same weights on the same batches: a repair that changed a loss would be none.
B sequences of S bytes. The text is bytes in memory ("ready"), shards that each draw unpacks
("packed"), or behind a store that answers after a moment ("remote": slept, no network measured).
"""

import bz2
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.parallel.data import Ranks
from dsv3_tutorial.train import corpus
from dsv3_tutorial.train.prefetch import drawn_ahead
from dsv3_tutorial.train.profile import Phases
from dsv3_tutorial.train.recipe import Recipe
from dsv3_tutorial.train.state import Checkpoints
from dsv3_tutorial.train.step import TrainingState, optimizer_for, train_step
from dsv3_tutorial.train.storage import Writer
from dsv3_tutorial.train.trace import Stalls, Timeline, stall_report, table

BATCH, SEQ_LEN, WARMUP = 8, 64, 2
TEXT = 2**21  # bytes of the corpus, enough for a demonstration
SHARD = 2**17  # bytes of text in a shard: unpacking one for each window takes half a step
WAIT = 0.05  # seconds in which a "remote" store answers
STORE = 0.25  # seconds that the store of checkpoints takes longer than this machine's disk
SOURCES = ("ready", "packed", "remote")


@dataclass(frozen=True)
class Recorded:
    """A run that was watched: its spans, its losses in nats, and the seconds of each of its steps.

    Two steps before the first of them are left out, as they still allocate. str() is its table.
    """

    timeline: Timeline
    losses: list[float]
    seconds: list[float]

    @property
    def stalls(self) -> Stalls:
        return stall_report(self.timeline.spans)

    @property
    def step_ms(self) -> float:
        """Milliseconds of a step, a mean: a checkpoint is shared by the steps between two."""
        return 1e3 * sum(self.seconds) / len(self.seconds)

    def __str__(self) -> str:
        return f"{table(self.timeline.spans, len(self.seconds))}\n{self.stalls}"


class Packed(corpus.Sampler):
    """The windows of a Sampler, out of compressed shards that every draw unpacks again.

    A shard reaches as far into the next as a window is long, so each window lies in one.
    """

    def __init__(self, data: Tensor, batch: int, seq_len: int, seed: int, shard: int = SHARD):
        super().__init__(data, batch, seq_len, seed)
        self.shard, self.packed = shard, packed(data, shard, seq_len)

    def draw(self) -> Tensor:
        """The same batch as Sampler's: (B, S + 1) int64, one shard unpacked for each window."""
        super().draw()
        return torch.stack([self._window(start) for start in self.starts.flatten().tolist()])

    def _window(self, start: int) -> Tensor:
        number, offset = divmod(start, self.shard)
        text = bz2.decompress(self.packed[number])[offset : offset + self.seq_len + 1]
        return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


class SlowWriter(Writer):
    """Writes a checkpoint as always, and seals it only STORE seconds later."""

    def finish(self, metadata: Metadata, results: list) -> None:
        """Wait as for a store that many ranks write to at once, then seal."""
        time.sleep(STORE)
        super().finish(metadata, results)


class Remote(corpus.Sampler):
    """The windows of a Sampler, `wait` seconds after each was asked for."""

    def __init__(self, data: Tensor, batch: int, seq_len: int, seed: int, wait: float = WAIT):
        super().__init__(data, batch, seq_len, seed)
        self.wait = wait

    def draw(self) -> Tensor:
        time.sleep(self.wait)
        return super().draw()


def run(
    source: str = "ready",
    prefetch: int = 0,
    save_every: int | None = None,
    background: bool = True,
    steps: int = 12,
    shard: int = SHARD,
    wait: float = WAIT,
) -> Recorded:
    """Train the tiny model for `steps` steps on one of SOURCES, and watch.

    prefetch: batches drawn ahead. save_every: steps between checkpoints (None: none), written
    behind the next steps or, with background=False, while the step waits; their store takes STORE
    seconds. Files are in a temporary folder that is removed. About 2 s for 12 steps, and a second
    more for the first run of a process, which reads the text. Raises ValueError for an unknown
    source.
    """
    state, timeline = begin(source, shard, wait), Timeline()
    with drawn_ahead(state, prefetch, timeline.behind), _checkpoints() as saved:
        for _ in range(WARMUP):
            step(state, timeline)
        timeline.restart()
        losses, seconds = [], []
        for _ in range(steps):
            began = time.perf_counter()
            losses.append(step(state, timeline))
            if save_every and state.step % save_every == 0:
                _save(saved, state, timeline, background)
            seconds.append(time.perf_counter() - began)
        saved.wait()
    return Recorded(timeline, losses, seconds)


def jobs(wait: float = WAIT) -> dict[str, dict]:
    """Three runs to tell apart by their tables: what `run` takes for each. One has no fault."""
    return {
        "A": {"save_every": 2, "background": False},
        "B": {"source": "remote", "wait": wait},
        "C": {},
    }


def begin(source: str = "ready", shard: int = SHARD, wait: float = WAIT) -> TrainingState:
    """The tiny model before its first step, reading from one of SOURCES."""
    made = {
        "ready": lambda *where: corpus.Sampler(*where),
        "packed": lambda *where: Packed(*where, shard),
        "remote": lambda *where: Remote(*where, wait),
    }
    if source not in made:
        raise ValueError(
            f"{source!r} is no source of text here, so nothing can be drawn. Take one of {SOURCES}."
        )
    recipe = Recipe(steps=1000, batch=BATCH, seq_len=SEQ_LEN, peak_lr=3e-3, warmup=30)
    torch.manual_seed(0)
    model = DeepSeekV3(ModelConfig.named("tiny"))
    sampler = made[source](text(), BATCH, SEQ_LEN, 0)
    return TrainingState(model, optimizer_for(model, recipe.peak_lr), sampler, recipe)


@cache
def text() -> Tensor:
    """The beginning of the training text, (TEXT,) uint8 at most."""
    return corpus.load().train[:TEXT]


def packed(data: Tensor, shard: int, seq_len: int) -> list[bytes]:
    """The text in compressed shards of `shard` bytes and the `seq_len` after them."""
    whole = data.numpy().tobytes()
    return [bz2.compress(whole[at : at + shard + seq_len]) for at in range(0, len(whole), shard)]


def step(state: TrainingState, timeline: Phases | None = None) -> float:
    """One step, its batch included: the loss in nats."""
    timeline = timeline or Phases()
    with timeline("data"):
        batch = state.sampler.draw()
    return train_step(state, batch, Ranks(0, 1, torch.device("cpu")), timeline).loss


def _save(saved: Checkpoints, state: TrainingState, timeline: Timeline, background: bool) -> None:
    with timeline("checkpoint"):
        saved.save(state)
        if not background:
            saved.wait()
    if saved.pending is not None:
        timeline.follow("checkpoint", saved.pending[1])


@contextmanager
def _checkpoints() -> Iterator[Checkpoints]:
    with tempfile.TemporaryDirectory(prefix="dsv3-stalls-") as folder:
        saved = Checkpoints(Path(folder), writer=SlowWriter)
        try:
            yield saved
        finally:
            saved.wait()
