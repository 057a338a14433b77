"""A model of a few numbers with a cache that can be wrong, and what a decoding loop asked of it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

STATES = 61  # a prime: what was read before changes every row
READS = 200  # more than any case needs


@dataclass(eq=False)
class Turn:
    """All that happened from one question to the MTP module up to the next."""

    hidden: Any
    token: Any
    q: Tensor
    before: int = -1  # tokens in the cache when the model read
    read: list[int] = field(default_factory=list)
    rows: Tensor | None = None  # hidden states (2, 3) of that read
    p: Tensor | None = None
    uniforms: list[float] = field(default_factory=list)
    drawn: list[tuple[Any, int]] = field(default_factory=list)  # from what, and which token

    @property
    def accepted(self) -> bool:
        """Whether the draft should have been kept."""
        draft = self.read[1]
        return bool(self.uniforms[0] * self.q[draft] < self.p[0, draft])


@dataclass(frozen=True, eq=False)
class Ran:
    """What a loop returned, and its turns."""

    result: Any
    prompt: list[int]
    length: int
    first: int | None  # the token drawn behind the prompt
    prompt_row: Tensor | None  # the hidden state of the prompt's last token
    turns: list[Turn]


class Toy:
    """Reads tokens into a cache; each row of probabilities hangs on all that the cache holds.

    A hidden state is (position, token, state). greedy: rows of one 1.
    """

    def __init__(self, seed: int, vocab: int, greedy: bool, dtype: torch.dtype = torch.float32):
        self.dice = torch.Generator().manual_seed(seed)
        near = 1.5 * torch.randn(STATES, vocab, generator=self.dice, dtype=dtype)
        far = torch.randn(STATES, vocab, vocab, generator=self.dice, dtype=dtype)
        self.target = near.softmax(dim=-1)
        self.draft = (near[:, None] + far).softmax(dim=-1)  # by state and next token
        if greedy:
            self.target, self.draft = (_one_hot(each) for each in (self.target, self.draft))
        self.cache: list[int] = []
        self.turns: list[Turn] = []
        self.first: int | None = None
        self.prompt_row: Tensor | None = None
        self.reads = 0

    def read(self, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Tokens into the cache -> hidden (S, 3) and probabilities (S, V)."""
        self.reads += 1
        if self.reads > READS:
            raise RuntimeError(f"the model was asked {READS} times, and the text is not done")
        before, rows = len(self.cache), []
        for token in tokens:
            self.cache.append(int(token))
            rows.append([len(self.cache) - 1, int(token), self._state()])
        hidden = torch.tensor(rows, dtype=self.target.dtype)  # (S, 3)
        p = self.target[hidden[:, 2].long()]  # (S, V)
        if self.turns and self.turns[-1].p is None:
            turn = self.turns[-1]
            turn.before, turn.read, turn.rows, turn.p = before, [int(t) for t in tokens], hidden, p
        else:
            self.prompt_row = hidden[-1]
        return hidden.clone(), p.clone()

    def trim(self, length: int) -> None:
        """The first `length` tokens stay."""
        if not 0 <= length <= len(self.cache):
            raise ValueError(f"trim({length}) of a cache that holds {len(self.cache)} tokens")
        del self.cache[length:]

    def mtp(self, hidden: Tensor, token: int) -> Tensor:
        """The draft's probabilities (V,), for a hidden state and the token given with it."""
        q = self.draft[int(hidden[2]) % STATES, int(token)]
        self.turns.append(Turn(hidden.clone(), int(token), q))
        return q.clone()

    def draw(self, probs: Tensor) -> int:
        """The first token at which the running sum is above a random number."""
        u = torch.rand((), generator=self.dice, dtype=torch.float64)
        token = min(int((probs.double().cumsum(dim=0) <= u).sum()), len(probs) - 1)
        if self.turns:
            self.turns[-1].drawn.append((probs.clone(), token))
        else:
            self.first = token
        return token

    def uniform(self) -> float:
        """A number in [0, 1)."""
        u = float(torch.rand((), generator=self.dice))
        if self.turns:
            self.turns[-1].uniforms.append(u)
        return u

    def _state(self) -> int:
        return sum((place + 3) * (token + 1) for place, token in enumerate(self.cache)) % STATES


def _one_hot(probs: Tensor) -> Tensor:
    return torch.zeros_like(probs).scatter(-1, probs.argmax(dim=-1, keepdim=True), 1.0)


def decode(function, seed: int, prompt: list[int], length: int, vocab: int, greedy: bool) -> Ran:
    """A loop's text from a prompt, and what it asked on the way."""
    toy = Toy(seed, vocab, greedy)
    result = function(list(prompt), length, toy, toy.mtp, toy.draw, toy.uniform)
    return Ran(result, list(prompt), length, toy.first, toy.prompt_row, toy.turns)
