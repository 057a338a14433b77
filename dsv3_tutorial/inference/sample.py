"""From logits to the next token: greedy, or drawn at a temperature from the likeliest ones.

B batch, V vocab_size. Each text draws from a generator of its own, so that what it gets never
depends on who shares the batch.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from dsv3_tutorial.inference.requests import GenerationError


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and not math.isnan(value)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0, the default, takes the likeliest.

    Above 0: logits are divided by `temperature`, then the `top_k` likeliest are kept, then the
    fewest whose mass reaches `top_p`. The same seed gives the same tokens; None draws a fresh one.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self):
        if not (_is_number(self.temperature) and 0 <= self.temperature < math.inf):
            self._refuse("temperature", "a finite number, 0 for the likeliest token")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            self._refuse("top_k", "an integer of 1 or more, or None for all tokens")
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            self._refuse("top_p", "above 0 and at most 1, or None for all tokens")
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 2**62):
            self._refuse("seed", "an integer from 0 to 2**62 - 1, or None for a fresh one")

    def _refuse(self, field: str, wanted: str) -> None:
        raise GenerationError(
            f"{field} is {getattr(self, field)!r}: no token could be chosen by it. It must be "
            f"{wanted}."
        )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def generators(self, batch: int) -> list[Generator]:
        """One a text, on the CPU: text i draws the numbers of seed + i whoever stands beside it."""
        seed = secrets.randbits(48) if self.seed is None else self.seed
        return [Generator().manual_seed(seed + index) for index in range(batch)]


GREEDY = Sampling()


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that the next token is drawn from: (..., V) any dtype -> float32.

    All on the likeliest token when greedy. Raises GenerationError for logits that are no
    distribution: NaN, +inf, or all -inf; a look at them, so a GPU is waited for.
    """
    problem = problem_of(logits)
    if problem is not None:
        raise GenerationError(problem)
    return _distribution(logits, sampling)


def top_k(probs: Tensor, k: int) -> Tensor:
    """Keep the k likeliest tokens and renormalise: probs (..., V) -> (..., V).

    Of equals the lower token id is kept.
    """
    order = probs.argsort(dim=-1, descending=True, stable=True)[..., :k]
    kept = torch.zeros_like(probs).scatter(-1, order, probs.gather(-1, order))
    return kept / kept.sum(dim=-1, keepdim=True)


def top_p(probs: Tensor, p: float) -> Tensor:
    """Keep the smallest set of likeliest tokens whose mass reaches p, renormalised.

    probs (..., V), 0 < p <= 1 -> (..., V). The likeliest is always kept; of equals the lower token
    id. Source: "The Curious Case of Neural Text Degeneration" (arXiv 1904.09751), section 3.1.
    """
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    mass = ordered.double().cumsum(dim=-1)  # in float32 a long tail would round away
    before = mass - ordered  # what the likelier ones hold already
    kept = ordered.masked_fill(before >= p * mass[..., -1:], 0.0)
    kept = torch.zeros_like(probs).scatter(-1, order, kept)
    return kept / kept.sum(dim=-1, keepdim=True)


def choose(probs: Tensor, generator: Generator | Sequence[Generator]) -> Tensor:
    """Draw a token from each distribution: probs (V,) -> (), or (B, V) -> (B,) int64.

    One uniform number of each generator and the inverse of the distribution function, so that a
    text takes one number a token from its own generator, on whatever device it runs.
    """
    rows = probs.reshape(-1, probs.shape[-1])  # (B, V)
    if isinstance(generator, Generator):
        uniform = torch.rand(len(rows), generator=generator, dtype=torch.float64)
    else:
        drawn = [torch.rand(1, generator=each, dtype=torch.float64) for each in generator]
        uniform = torch.cat(drawn)  # (B,)
    return draw(rows, uniform.to(probs.device)).reshape(probs.shape[:-1])


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """The tokens (B,) at which the mass of probs (B, V) first exceeds `uniform` (B,) in [0, 1)."""
    mass = probs.double().cumsum(dim=-1)
    total = mass[:, -1:]
    # Never the very end: rounding could carry a number past the last token that has any mass.
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, -total))
    return torch.searchsorted(mass, target, right=True)[:, 0]


def next_tokens(
    logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[Generator]
) -> list[int | None]:
    """Each text's next token by its own rule: logits (B, V), a sampling and a generator a text.

    None where the logits are no distribution (`problem_of` says why): the others go on. A device
    is waited for once.
    """
    best, chosen = logits.max(dim=-1)
    for rule in {replace(s, seed=None) for s in samplings if not s.greedy}:
        rows = [i for i, s in enumerate(samplings) if replace(s, seed=None) == rule]
        probs = _distribution(logits[rows], rule)
        chosen[rows] = choose(probs, [generators[i] for i in rows])
    found = torch.where(best.isfinite(), chosen, -1).tolist()
    return [None if token < 0 else token for token in found]


def problem_of(logits: Tensor) -> str | None:
    """Why logits (..., V) are no distribution, or None: what a GenerationError says of them."""
    best = logits.amax(dim=-1)  # NaN where any is
    if bool(best.isfinite().all()):
        return None
    if bool(best.isnan().any()):
        what = f"{int(logits.isnan().sum())} of {logits.numel()} logits are NaN"
    else:
        what = (
            "Logits are +inf"
            if bool((best == math.inf).any())
            else "All logits of a position are -inf"
        )
    return (
        f"{what}: no token can be chosen from them, and any text that came would be noise. "
        "Check the weights, or compute in float32 if a narrow type overflowed."
    )


def _distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    if sampling.greedy:
        return F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()
    wide = logits.float()
    distance = wide - wide.amax(dim=-1, keepdim=True)  # 0 at the top: no temperature overflows it
    probs = (distance / sampling.temperature).softmax(dim=-1)
    if sampling.top_k is not None:
        probs = top_k(probs, sampling.top_k)
    if sampling.top_p is not None:
        probs = top_p(probs, sampling.top_p)
    return probs
