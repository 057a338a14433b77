"""Counting instead of learning: a smoothed n-gram model over bytes, which a network must beat.

It predicts a byte from the `order` bytes before it, by how often each continuation stood there in
the training text. A context that was never seen hands over to the shorter one inside it, down to
1/256 for every byte. A gram of up to 8 bytes is one 64-bit integer, its first byte the highest;
grams are sorted arrays of those integers, so that counting is sorting.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Keys = NDArray[np.uint64]
Counts = NDArray[np.int64]
Shares = NDArray[np.float64]

SMOOTHINGS = ("kneser-ney", "witten-bell")
LONGEST_ORDER = 7  # with the predicted byte 8: one 64-bit integer
BEFORE_THE_TEXT = ord("\n")  # what stands before the first byte, as between any two files
_EIGHT = np.uint64(8)


@dataclass(frozen=True)
class Level:
    """One context length: p(byte | context) = kept(gram) + spare(context) * p(byte | shorter one).

    grams and contexts are sorted; a gram that is not there keeps 0, an unseen context spares 1.
    """

    grams: Keys
    kept: Shares
    contexts: Keys
    spare: Shares

    def mix(self, keys: Keys, shorter: Shares) -> Shares:
        """p of the last byte of each gram in `keys`, given what the shorter context says of it."""
        kept = _look_up(self.grams, self.kept, keys, 0.0)
        return kept + _look_up(self.contexts, self.spare, keys >> _EIGHT, 1.0) * shorter


@dataclass(frozen=True)
class NGram:
    """A fitted model: level n holds grams of n + 1 bytes, contexts of n.

    11 MB of text at order 5: some ten seconds to fit, under a gigabyte while it does.
    """

    levels: tuple[Level, ...]

    @classmethod
    def fit(cls, text: Bytes, order: int = 5, smoothing: str = "kneser-ney") -> "NGram":
        """Count `text` (bytes,) once for every context length up to `order` bytes.

        "kneser-ney" is interpolated, with three discounts a level (Chen and Goodman 1999): below
        the top a gram counts in how many different bytes it was seen after. "witten-bell" spares
        as much for the unseen as there were different continuations. Raises ValueError.
        """
        _check(text, order, smoothing)
        if smoothing == "witten-bell":
            counted = (np.unique(grams(text, n), return_counts=True) for n in range(1, order + 2))
            return cls(tuple(_witten_bell(*level) for level in counted))
        keys, counts = np.unique(grams(text, order + 1), return_counts=True)
        levels = [_kneser_ney(keys, counts)]
        for length in range(order, 0, -1):
            keys, counts = np.unique(keys & _mask(length), return_counts=True)
            levels.insert(0, _kneser_ney(keys, counts))
        return cls(tuple(levels))

    def probabilities(self, text: Bytes) -> Shares:
        """The model's probability of every byte of `text` (bytes,), each given those before it."""
        p = np.full(len(text), 1 / 256)
        for length, level in enumerate(self.levels, 1):
            p = level.mix(grams(text, length), p)
        return p

    def next_byte(self, context: bytes) -> Shares:
        """The distribution over the 256 bytes that may follow `context`. It sums to one."""
        p, before = np.full(256, 1 / 256), bytes([BEFORE_THE_TEXT]) * len(self.levels) + context
        for length, level in enumerate(self.levels, 1):
            seen = before[len(before) - (length - 1) :]
            key = np.uint64(int.from_bytes(seen + b"\0", "big"))
            p = level.mix(key + np.arange(256, dtype=np.uint64), p)
        return p

    def bits_per_byte(self, text: Bytes) -> float:
        """The code length of `text` by the chain rule, over its bytes: every byte counts."""
        return float(-np.log2(self.probabilities(text)).mean())


def grams(text: Bytes, length: int) -> Keys:
    """The gram that ends at each byte of `text` (bytes,) -> (bytes,), newlines before the first."""
    keys = np.zeros(len(text), np.uint64)
    before = np.full(length - 1, BEFORE_THE_TEXT, np.uint8)
    padded = np.concatenate([before, text])
    for at in range(length):
        keys = (keys << _EIGHT) | padded[at : at + len(text)]
    return keys


def discounts(counts: Counts) -> Shares:
    """What is taken from a gram seen once, twice, and more often: (4,), the first unused.

    From the numbers of grams seen one to four times, and never less than the first discount, so
    that something is left for the unseen. A text too small or too regular to have all four kinds
    gets one discount for all; 0.75 where no gram was seen just once.
    """
    n1, n2, n3, n4 = (int((counts == times).sum()) for times in (1, 2, 3, 4))
    once = n1 / (n1 + 2 * n2) if n1 else 0.75
    if 0 in (n1, n2, n3, n4):
        return np.array([0, once, once, once])
    taken = [0, once, 2 - 3 * once * n3 / n2, 3 - 4 * once * n4 / n3]
    return np.clip(taken, [0, once, once, once], [0, 1, 2, 3])


def _kneser_ney(keys: Keys, counts: Counts) -> Level:
    contexts, starts, sizes = _contexts(keys)
    taken = discounts(counts)[np.minimum(counts, 3)]
    total = np.add.reduceat(counts, starts)
    spare = np.add.reduceat(taken, starts) / total
    return Level(keys, (counts - taken) / np.repeat(total, sizes), contexts, spare)


def _witten_bell(keys: Keys, counts: Counts) -> Level:
    contexts, starts, sizes = _contexts(keys)
    total = np.add.reduceat(counts, starts) + sizes
    return Level(keys, counts / np.repeat(total, sizes), contexts, sizes / total)


def _contexts(keys: Keys) -> tuple[Keys, Counts, Counts]:
    """The contexts of sorted grams, where the grams of each begin, and how many there are."""
    contexts, starts, sizes = np.unique(keys >> _EIGHT, return_index=True, return_counts=True)
    return contexts, starts, sizes


def _look_up(keys: Keys, values: Shares, wanted: Keys, otherwise: float) -> Shares:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], otherwise)


def _mask(length: int) -> np.uint64:
    return np.uint64(256**length - 1)


def _check(text: Bytes, order: int, smoothing: str) -> None:
    if not len(text):
        raise ValueError(
            "The text is empty. Every byte would be equally likely, which is no model of anything. "
            "Give the training split of train.corpus.load()."
        )
    if not 0 <= order <= LONGEST_ORDER:
        raise ValueError(
            f"order={order} does not fit. A context and the byte after it are one 64-bit integer. "
            f"Give 0 to {LONGEST_ORDER}."
        )
    if smoothing not in SMOOTHINGS:
        raise ValueError(
            f"smoothing={smoothing!r} is not known. Without one, an unseen byte would cost "
            f"infinitely many bits. Give one of {SMOOTHINGS}."
        )
