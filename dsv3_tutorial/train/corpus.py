"""Real text that every machine already has: the sources of the running Python's standard library.

Text is bytes: 256 symbols, nothing to download, and a loss in bits per byte that can be compared
between models. A twentieth of the files, chosen by the hash of their path, is held out. A
vocabulary over the same files (`train.bpe`) keeps how many bytes each symbol stands for.
"""

import bisect
import hashlib
import itertools
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SUFFIXES = {".py", ".txt", ".md", ".rst"}
HELD_OUT_ONE_IN = 20


@dataclass(frozen=True)
class Corpus:
    """Text split by file: `train` and `held_out`, both (bytes,) uint8, or (symbols,) int32."""

    train: Tensor
    held_out: Tensor
    train_files: int
    held_out_files: int
    symbol_bytes: Tensor = field(default_factory=lambda: torch.ones(256, dtype=torch.int64))  # (V,)
    places: tuple[tuple[int, str], ...] = ()  # where in `train` each file begins

    def place(self, at: int) -> str:
        """The file that position `at` of `train` lies in, and how far in: "json/tool.py + 12"."""
        if not self.places:
            return f"position {at}"
        begin, name = self.places[bisect.bisect_right(self.places, at, key=lambda p: p[0]) - 1]
        return f"{name} + {at - begin}"

    def fingerprint(self) -> str:
        """A hash of both splits: a run can go on only over the very same text."""
        digest = hashlib.sha256()
        for split in (self.train, self.held_out):
            digest.update(split.numpy())
        return digest.hexdigest()[:16]


def is_held_out(relative_path: str) -> bool:
    """Whether a file is kept from training. The same path gives the same answer everywhere."""
    digest = hashlib.sha256(relative_path.encode()).hexdigest()
    return int(digest, 16) % HELD_OUT_ONE_IN == 0


def text_files(folder: Path) -> list[str]:
    """The text files under `folder`, as sorted relative paths with forward slashes."""
    paths = (p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    relative = (p.relative_to(folder) for p in paths)
    return sorted(p.as_posix() for p in relative if not SKIPPED & set(p.parts))


def files(folder: Path | None = None) -> dict[bool, dict[str, bytes]]:
    """Each text file under `folder` by whether it is held out: {held out: {relative path: bytes}}.

    The default is the standard library of this interpreter.
    Raises ValueError when a split is empty: a loss on nothing would look perfect.
    """
    folder = Path(folder or sysconfig.get_path("stdlib"))
    names = text_files(folder)
    split = {kept: [n for n in names if is_held_out(n) is kept] for kept in (False, True)}
    if not split[False] or not split[True]:
        raise ValueError(
            f"The folder {folder.name!r} has {len(split[False])} text files to train on and "
            f"{len(split[True])} held out; both must have some. A file is held out by the hash of "
            "its path, one in twenty: give a folder of a hundred files or more."
        )
    return {kept: {n: (folder / n).read_bytes() for n in split[kept]} for kept in split}


def load(folder: Path | None = None) -> Corpus:
    """The corpus under `folder`, by default the standard library of this interpreter, as bytes.

    Raises ValueError when a split is empty.
    """
    return joined(files(folder), as_bytes)


def joined(
    split: dict[bool, dict[str, bytes]],
    encode: Callable[[bytes], Tensor],
    symbol_bytes: Tensor | None = None,
) -> Corpus:
    """The files of each split in one tensor, a newline between two of them, as `encode` reads it.

    `encode` turns bytes into (symbols,); symbol_bytes (V,) says how long each symbol is.
    """
    made = {}
    for held_out, texts in split.items():
        last = len(texts) - 1
        pieces = [text + b"\n" * (i < last) for i, text in enumerate(texts.values())]
        made[held_out] = [encode(piece) for piece in pieces]
    lengths = [0, *map(len, made[False])]
    places = tuple(zip(itertools.accumulate(lengths), split[False]))
    sizes = {} if symbol_bytes is None else {"symbol_bytes": symbol_bytes}
    train, held_out = torch.cat(made[False]), torch.cat(made[True])
    return Corpus(train, held_out, len(split[False]), len(split[True]), places=places, **sizes)


def as_bytes(text: bytes) -> Tensor:
    """A text as its own symbols: (bytes,) uint8."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else NO_BYTES


NO_BYTES = torch.empty(0, dtype=torch.uint8)


class Sampler:
    """Draws the windows of one update after another; what it holds is a run's place in the text."""

    def __init__(
        self,
        data: Tensor,
        batch: int,
        seq_len: int,
        seed: int,
        place: Callable[[int], str] = "position {}".format,
    ):
        check_window(data, seq_len)
        self.place = place  # a position's name, for a report of what was drawn
        self.data, self.batch, self.seq_len = data, batch, seq_len
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn = 0  # updates
        self.starts = torch.empty(0, 1, dtype=torch.int64)  # of the last draw, for a report of it

    def draw(self) -> Tensor:
        """The next update's windows (B, S + 1) int64, the same ones as `sample` draws."""
        last = len(self.data) - self.seq_len
        self.starts = torch.randint(last, (self.batch, 1), generator=self.generator)
        self.drawn += 1
        return self.data[self.starts + torch.arange(self.seq_len + 1)].long()  # (B, S + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.drawn = int(state["drawn"])


def check_window(data: Tensor, seq_len: int) -> None:
    """Raise ValueError when `data` has no window of seq_len symbols and the next one."""
    if len(data) <= seq_len:
        raise ValueError(
            f"The text has {len(data)} bytes, and a window needs {seq_len + 1}. No batch can be "
            "drawn from it. Give more text or a smaller seq_len."
        )


def sample(data: Tensor, batch: int, seq_len: int, generator: torch.Generator) -> Tensor:
    """`batch` random windows of `data` (bytes,) -> (B, S + 1) int64: inputs and the next byte."""
    check_window(data, seq_len)
    start = torch.randint(len(data) - seq_len, (batch, 1), generator=generator)
    return data[start + torch.arange(seq_len + 1)].long()  # (B, S + 1)


def windows(data: Tensor, batch: int, seq_len: int, count: int) -> Iterator[Tensor]:
    """`count` batches (B, S + 1) spread evenly over `data`: the same ones at every call."""
    start = torch.linspace(0, len(data) - seq_len - 1, batch * count).long()[:, None]
    for at in start.split(batch):
        yield data[at + torch.arange(seq_len + 1)].long()
