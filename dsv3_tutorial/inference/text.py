"""Text and tokens, both ways: a checkpoint's vocabulary, and output that never splits a letter.

A token is some bytes, and a letter beyond ASCII is several: it may end in the middle of a token.
"""

import codecs
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel, DecodeStream

from dsv3_tutorial.inference.requests import GenerationError

_STOPS = "generation_config.json", "config.json"  # where a public checkpoint names its last token


class Vocabulary:
    """How a checkpoint's tokens are text: its tokenizer.json, or plain bytes where it has 256.

    Raises GenerationError for a folder whose tokens nobody can read.
    """

    def __init__(self, folder: str | Path, vocab_size: int):
        self.folder, path = Path(folder), Path(folder) / "tokenizer.json"
        self.tokenizer = self._read(path) if path.is_file() else None
        if self.tokenizer is None and vocab_size != 256:
            raise GenerationError(
                f"{self.folder.name!r} has {vocab_size} tokens and no tokenizer.json: nobody knows "
                "what text they are. Put the tokenizer.json that the model was trained with into "
                "the folder."
            )

    def _read(self, path: Path) -> Tokenizer:
        try:
            return Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises Exception itself
            raise GenerationError(
                f"{self.folder.name!r} has a tokenizer.json that cannot be read ({error}): no "
                "prompt could be turned into tokens. Fetch or write it again."
            ) from None

    def encode(self, text: str) -> list[int]:
        """A prompt's tokens, with those that the tokenizer puts before every text."""
        if self.tokenizer is None:
            return list(text.encode())
        return self.tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens; a letter that they end in the middle of is left out."""
        return "".join(map(self.stream().add, ids))

    def last_tokens(self) -> set[int]:
        """The tokens that the checkpoint says end a text; none for one trained on plain text."""
        for path in (self.folder / name for name in _STOPS):
            named = _read_json(path).get("eos_token_id") if path.is_file() else None
            if named is not None:
                return {named} if isinstance(named, int) else set(named)
        return set()

    def stream(self) -> "ByteStream | AnyStream":
        """A decoder for one text, token by token."""
        if self.tokenizer is None or isinstance(self.tokenizer.decoder, ByteLevel):
            return ByteStream(self.tokenizer)
        return AnyStream(self.tokenizer)


class ByteStream:
    """Tokens that are bytes, to text as soon as a letter is whole.

    Any text that was encoded comes out as it was; bytes that are no text become U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer | None):
        self.tokenizer = tokenizer
        added = {} if tokenizer is None else tokenizer.get_added_tokens_decoder()
        self.added = {i: "" if t.special else t.content for i, t in added.items()}
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """The text that became whole with this token; "" in the middle of a letter."""
        return self.decoder.decode(self._bytes(token))

    def _bytes(self, token: int) -> bytes:
        if self.tokenizer is None:
            return bytes([token])
        if token in self.added:
            return self.added[token].encode()
        name = self.tokenizer.id_to_token(token) or ""  # a row of the model beyond its vocabulary
        return bytes(_BYTE[letter] for letter in name)


class AnyStream:
    """Tokens of any other vocabulary, by the library's own rule: whole letters only."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.decoder = tokenizer, DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        """The text that became whole with this token."""
        return self.decoder.step(self.tokenizer, token) or ""


class StopText:
    """Lets text through up to the first of some stop strings, and no letter of it.

    What may yet become a stop string is held back until it is known.
    """

    def __init__(self, stops: Sequence[str] = ()):
        if not all(stops):
            raise GenerationError(
                "A stop string is empty: it is found before the first letter, so nothing would "
                "ever come. Give one letter or more, or none at all."
            )
        self.stops, self.held, self.found = tuple(stops), "", False

    def add(self, text: str) -> str:
        """What may be shown of all that came; `found` says whether a stop string ended it."""
        self.held += text
        places = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._release(min(places))
        longest = max((self._overlap(stop) for stop in self.stops), default=0)
        return self._release(len(self.held) - longest)

    def rest(self) -> str:
        """What was held back and turned out to be text after all."""
        return "" if self.found else self._release(len(self.held))

    def _release(self, count: int) -> str:
        shown, self.held = self.held[:count], self.held[count:]
        return shown

    def _overlap(self, stop: str) -> int:
        """How many letters at the end of what is held could be the beginning of `stop`."""
        ends = range(min(len(stop) - 1, len(self.held)), 0, -1)
        return next((n for n in ends if self.held.endswith(stop[:n])), 0)


def _read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise GenerationError(
            f"{path.name} cannot be read ({error}): it may say which token ends a text. Fetch or "
            "write it again, or take it out of the folder."
        ) from None


def _byte_letters() -> dict[str, int]:
    """Which letter a byte-level vocabulary writes each byte as: GPT-2's rule, in use ever since.

    Printable Latin-1 letters stand for themselves, the others for letters from U+0100 on.
    """
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE = _byte_letters()
