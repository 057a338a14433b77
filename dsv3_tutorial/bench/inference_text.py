"""Texts for the trained model to go on with, and what kind of Python each of their tokens is."""

import functools
import keyword
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsv3_tutorial.files import data_path
from dsv3_tutorial.inference.text import Vocabulary
from dsv3_tutorial.train import bpe, corpus

PROMPT = 64
KINDS = ("space", "keyword", "name", "operator", "number", "string or comment")
# Forgiving, where `tokenize` would stop: what a model writes need not be Python to its end.
_PYTHON = re.compile(
    r"""(?P<text>\#[^\n]*|[rbfuRBFU]{0,2}(?:"{3}.*?(?:"{3}|\Z)|'{3}.*?(?:'{3}|\Z)"""
    r"""|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?))"""
    r"""|(?P<space>\s+)|(?P<number>\d[\w.]*)|(?P<name>\w+)|(?P<operator>.)""",
    re.DOTALL,
)


@dataclass(frozen=True)
class Place:
    """Somewhere in a held-out file: all symbols before it and the ones that follow."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def prompt(self) -> list[int]:
        return list(self.before[-PROMPT:])


def folder() -> Path:
    """The trained checkpoint."""
    return data_path("checkpoints", "small")


@functools.cache
def symbol_names() -> tuple[bytes, ...]:
    """The bytes of each symbol of the trained model's vocabulary."""
    vocabulary = Vocabulary(folder(), 512)
    stream = vocabulary.stream()
    return tuple(stream._bytes(i) for i in range(vocabulary.tokenizer.get_vocab_size()))


@functools.cache
def places(count: int, ahead: int = 0) -> tuple[Place, ...]:
    """`count` places in held-out Python files, none in a file's first `PROMPT` symbols.

    Files in turn, then the same files further on. Each place has `ahead` symbols behind it.
    """
    files = len(_files())
    turns, found = -(-count // files), []
    for index in range(count):
        turn, file = divmod(index, files)
        symbols = _symbols(file)
        at = max(PROMPT, (len(symbols) - ahead) * (2 * turn + 1) // (2 * turns))
        found.append(Place(symbols[:at], symbols[at : at + ahead]))
    return tuple(found)


@functools.cache
def _files() -> tuple[bytes, ...]:
    """The beginnings of the running Python's held-out files, those that are long enough."""
    library = Path(sysconfig.get_path("stdlib"))
    names = [name for name in corpus.text_files(library) if name.endswith(".py")]
    texts = ((library / name).read_bytes() for name in names if corpus.is_held_out(name))
    return tuple(text[:8000] for text in texts if len(text) >= 8000 and text.isascii())


@functools.cache
def _symbols(file: int) -> tuple[int, ...]:
    vocabulary = (folder() / "tokenizer.json").read_text("utf-8")
    return tuple(bpe.symbols_of(_files()[file], vocabulary)[0].tolist())


def prompts(count: int) -> list[list[int]]:
    """`count` prompts of `PROMPT` symbols each."""
    return [place.prompt for place in places(count)]


def kinds(before: Sequence[int], tokens: Sequence[int]) -> list[str]:
    """The kind of each of `tokens`, which follow `before` in a Python file: one of `KINDS`.

    A token is what its first letter is that is no space; "space" if it has none.
    """
    names = symbol_names()
    text = b"".join(names[t] for t in (*before, *tokens)).decode("latin-1")  # a letter is a byte
    of = [kind for kind, length in _lexed(text) for _ in range(length)]
    at, found = sum(len(names[t]) for t in before), []
    for token in tokens:
        letters = text[at : at + len(names[token])]
        first = at + len(letters) - len(letters.lstrip()) if letters.strip() else at
        found.append(of[first] if letters else "space")
        at += len(letters)
    return found


def tensor(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([list(row) for row in rows])


def _lexed(text: str) -> Iterator[tuple[str, int]]:
    for match in _PYTHON.finditer(text):
        kind = match.lastgroup
        if kind == "name" and keyword.iskeyword(match.group()):
            kind = "keyword"
        yield "string or comment" if kind == "text" else kind, len(match.group())
