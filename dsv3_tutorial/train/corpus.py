"""Real text that every machine already has: the sources of the running Python's standard library.

Text is bytes: 256 symbols, nothing to download, and a loss in bits per byte that can be compared
between models. A twentieth of the files, chosen by the hash of their path, is held out.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SUFFIXES = {".py", ".txt", ".md", ".rst"}
HELD_OUT_ONE_IN = 20


@dataclass(frozen=True)
class Corpus:
    """Text split by file: `train` and `held_out`, both (bytes,) uint8."""

    train: Tensor
    held_out: Tensor
    train_files: int
    held_out_files: int


def is_held_out(relative_path: str) -> bool:
    """Whether a file is kept from training. The same path gives the same answer everywhere."""
    digest = hashlib.sha256(relative_path.encode()).hexdigest()
    return int(digest, 16) % HELD_OUT_ONE_IN == 0


def text_files(folder: Path) -> list[str]:
    """The text files under `folder`, as sorted relative paths with forward slashes."""
    paths = (p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    relative = (p.relative_to(folder) for p in paths)
    return sorted(p.as_posix() for p in relative if not SKIPPED & set(p.parts))


def load(folder: Path | None = None) -> Corpus:
    """The corpus under `folder`, by default the standard library of this interpreter.

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
    joined = {kept: b"\n".join((folder / n).read_bytes() for n in split[kept]) for kept in split}
    train, held_out = (
        torch.frombuffer(bytearray(joined[kept]), dtype=torch.uint8) for kept in (False, True)
    )
    return Corpus(train, held_out, len(split[False]), len(split[True]))


def sample(data: Tensor, batch: int, seq_len: int, generator: torch.Generator) -> Tensor:
    """`batch` random windows of `data` (bytes,) -> (B, S + 1) int64: inputs and the next byte."""
    if len(data) <= seq_len:
        raise ValueError(
            f"The text has {len(data)} bytes, and a window needs {seq_len + 1}. No batch can be "
            "drawn from it. Give more text or a smaller seq_len."
        )
    start = torch.randint(len(data) - seq_len, (batch, 1), generator=generator)
    return data[start + torch.arange(seq_len + 1)].long()  # (B, S + 1)


def windows(data: Tensor, batch: int, seq_len: int, count: int) -> Iterator[Tensor]:
    """`count` batches (B, S + 1) spread evenly over `data`: the same ones at every call."""
    start = torch.linspace(0, len(data) - seq_len - 1, batch * count).long()[:, None]
    for at in start.split(batch):
        yield data[at + torch.arange(seq_len + 1)].long()
