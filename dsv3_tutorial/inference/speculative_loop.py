"""Speculative decoding in ten lines: one text, one draft a pass, and nothing else.

`inference.speculate` does the same for batches, several drafts and real caches.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Reader(Protocol):
    """A model with a cache: what `speculated` asks of it."""

    def read(self, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Read on, and keep it in the cache -> hidden states (S, D), probabilities (S, V)."""

    def trim(self, length: int) -> None:
        """Keep the first `length` tokens in the cache."""


def speculated(
    prompt: list[int],
    length: int,
    model: Reader,
    mtp: Callable[[Tensor, int], Tensor],
    draw: Callable[[Tensor], int],
    uniform: Callable[[], float],
) -> list[int]:
    """The prompt and what the model says after it, `length` tokens, two at a time where it can.

    mtp(hidden state (D,), the token after it) -> probabilities (V,) of the token after that;
    draw(probabilities) -> a token; uniform() -> a number in [0, 1). The cache holds all tokens but
    the last when a pass begins. What comes out is distributed as without drafts.
    """
    hidden, p = model.read(prompt)
    tokens = [*prompt, draw(p[-1])]
    while len(tokens) < length:
        q = mtp(hidden[-1], tokens[-1])
        draft = draw(q)
        hidden, p = model.read([tokens[-1], draft])
        if uniform() * q[draft] < p[0, draft]:
            tokens += [draft, draw(p[1])]
        else:
            model.trim(len(tokens))  # the draft goes
            hidden, rest = hidden[:1], (p[0] - q).clamp(min=0)
            tokens.append(draw(rest / rest.sum()))
    return tokens[:length]
