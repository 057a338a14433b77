"""Rounds of drafts for a case: distributions, drafts and uniforms, none of them near a tie."""

from functools import cache

import torch
from torch import Tensor

from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.registry import Case

CLEAR = 0.01  # how far every decision of a case is from the other one


def _kept(drafted, draft_probs, target_probs, uniforms) -> int:
    at = torch.arange(len(drafted))
    ratio = target_probs[at, drafted] / draft_probs[at, drafted]
    return (*(uniforms[:-1] < ratio).tolist(), False).index(False)


def _clear(drafted, draft_probs, target_probs, uniforms) -> bool:
    """Whether no decision hangs on a digit: neither of a draft nor of the drawn token."""
    at = torch.arange(len(drafted))
    ratio = target_probs[at, drafted] / draft_probs[at, drafted]
    n = _kept(drafted, draft_probs, target_probs, uniforms)
    weights = target_probs[n]
    if n < len(drafted):
        weights = (weights - draft_probs[n]).clamp(min=0)
    reached = weights.cumsum(dim=0) / weights.sum()
    gaps = torch.cat([ratio - uniforms[:-1], reached - uniforms[-1]])
    return bool((gaps.abs() > CLEAR).all())


def _picked(weights: Tensor, u: Tensor) -> int:
    return int((weights.cumsum(dim=0) / weights.sum() <= u).sum())


def _telling(drafted, draft_probs, target_probs, uniforms, n: int) -> bool:
    """Whether wrong ways lead elsewhere: another row or rest, and drafts behind a refusal."""
    if n == len(drafted):
        rest = (target_probs[-1] - draft_probs[-1]).clamp(min=0)
        right, wrong = target_probs[-1], [target_probs[-2], rest]
    else:
        right = (target_probs[n] - draft_probs[n]).clamp(min=0)
        wrong = [target_probs[n], draft_probs[n]]
        at = torch.arange(n + 1, len(drafted))
        ratio = target_probs[at, drafted[n + 1 :]] / draft_probs[at, drafted[n + 1 :]]
        if len(at) and not bool((uniforms[n + 1 : -1] < ratio).any()):
            return False
    return _picked(right, uniforms[-1]) not in [_picked(each, uniforms[-1]) for each in wrong]


def largest_left(drafted, draft_probs, target_probs, uniforms) -> float:
    """The largest probability in what the next token is drawn from."""
    n = _kept(drafted, draft_probs, target_probs, uniforms)
    weights = target_probs[n]
    if n < len(drafted):
        weights = (weights - draft_probs[n]).clamp(min=0)
    return float(weights.max() / weights.sum())


def drawn(
    seed: int,
    drafts: int,
    vocab: int,
    accepted: int,
    dtype: torch.dtype = torch.float32,
    widest: float = 1.0,
):
    """Drafts of which just so many are accepted, from the first seed after this that gives it.

    widest: no token has more than this of what the next one is drawn from.
    """

    def make() -> tuple[Tensor, ...]:
        return _draw(_seed(seed, drafts, vocab, accepted, dtype, widest), drafts, vocab, dtype)

    return make


def _draw(at: int, drafts: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(at)
    near, far = randn(at, (drafts + 1, vocab), (drafts, vocab), dtype=dtype)
    target, draft = (2 * near).softmax(dim=-1), (near[:-1] + far).softmax(dim=-1)
    drafted = torch.multinomial(draft, 1, generator=draw)[:, 0]
    return drafted, draft, target, torch.rand(drafts + 1, generator=draw, dtype=dtype)


@cache
def _seed(
    seed: int, drafts: int, vocab: int, accepted: int, dtype: torch.dtype, widest: float
) -> int:
    for at in range(1000 * seed, 1000 * seed + 1000):
        case = _draw(at, drafts, vocab, dtype)
        right = _kept(*case) == accepted and largest_left(*case) <= widest
        if right and _clear(*case) and _telling(*case, accepted):
            return at
    raise AssertionError("no seed gives such a case: ask for another number of drafts")


def greedy(target: list[int], drafted: list[int], *uniforms: float, vocab: int = 6):
    """Both models sure of one token: rows of one 1."""

    def make() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        p, q = (torch.eye(vocab)[each] for each in (target, drafted))
        return torch.tensor(drafted), q, p, torch.tensor(uniforms)

    return make


def never_said() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A draft that the model gives no chance, and a uniform of exactly 0."""
    q = torch.tensor([[0.5, 0.5, 0.0]])
    p = torch.tensor([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]])
    return torch.tensor([0]), q, p, torch.tensor([0.0, 0.5])


CASES = [
    Case("one draft, accepted", drawn(0, 1, 5, 1)),
    Case("one draft, refused", drawn(1, 1, 5, 0)),
    Case("three drafts, the second refused", drawn(2, 3, 6, 1)),
    Case("three drafts, all accepted", drawn(3, 3, 8, 3)),
    Case("greedy, the second refused", greedy([3, 1, 2], [3, 4], 0.9, 0.3, 0.7)),
    Case("a draft without a chance, u = 0", never_said),
    Case("many tokens left, the first refused", drawn(12, 3, 24, 0, widest=0.35)),
    Case("many tokens left, the third refused", drawn(13, 4, 30, 2, widest=0.3), hidden=True),
    Case("many tokens left", drawn(14, 1, 40, 0, torch.float64, 0.25), hidden=True),
    Case("many tokens left, again", drawn(15, 2, 60, 1, widest=0.3), hidden=True),
    Case("greedy, all accepted", greedy([5, 0, 2], [5, 0], 0.99, 0.0, 0.0), hidden=True),
    Case("greedy, refused at once", greedy([4, 4], [1], 0.0, 0.0), hidden=True),
    Case("five drafts, two accepted", drawn(4, 5, 12, 2, torch.float64), hidden=True),
    Case("four drafts, the last refused", drawn(5, 4, 7, 3), hidden=True),
    Case("four drafts, all accepted", drawn(6, 4, 40, 4), hidden=True),
    Case("two drafts, the first refused", drawn(7, 2, 30, 0), hidden=True),
    Case("two drafts, the first refused, again", drawn(8, 2, 9, 0), hidden=True),
]
