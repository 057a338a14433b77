"""Keeping the likely tokens: the smallest set that holds a share of the probability."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv3_tutorial.learn.compare import difference
from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _rows(*values: list[float], p: float):
    return lambda: (torch.tensor(values if len(values) > 1 else values[0]), p)


def _drawn(seed: int, p: float, *shape: int, dtype: torch.dtype = torch.float32, wide: float = 2.0):
    return lambda: ((wide * randn(seed, shape, dtype=dtype)[0]).softmax(dim=-1), p)


_STEPS = [0.0625, 0.125, 0.0, 0.5, 0.125, 0.125, 0.0625, 0.0]  # two of three eighths are kept


def _open(
    keep=lambda before, after, p: before < p,
    descending: bool = True,
    share: bool = True,
    first: bool = True,
    back: bool = True,
):
    """`top_p` with its parts open to be got wrong."""

    def nucleus(probs: Tensor, p: float) -> Tensor:
        ranked, order = probs.sort(dim=-1, descending=descending)
        after = ranked.cumsum(dim=-1)
        kept = keep(after - ranked, after, p)
        if first:
            kept = kept | (torch.arange(probs.shape[-1]) == 0)
        left = ranked * kept
        left = left / left.sum(dim=-1, keepdim=True) if share else left
        return torch.zeros_like(probs).scatter(-1, order, left) if back else left

    return nucleus


def _each_alone(probs: Tensor, p: float) -> Tensor:
    kept = probs * (probs >= p)
    return kept / kept.sum(dim=-1, keepdim=True).clamp_min(1e-30)


def _of_the_largest(probs: Tensor, p: float) -> Tensor:
    kept = probs * (probs >= (1 - p) * probs.amax(dim=-1, keepdim=True))
    return kept / kept.sum(dim=-1, keepdim=True)


def _share_of_tokens(probs: Tensor, p: float) -> Tensor:
    count = max(1, round(p * probs.shape[-1]))
    kept = torch.zeros_like(probs).scatter(-1, probs.topk(count, dim=-1).indices, 1.0) * probs
    return kept / kept.sum(dim=-1, keepdim=True)


def _all_rows_at_once(probs: Tensor, p: float) -> Tensor:
    flat = _open()((probs / probs.sum()).flatten(), p).view_as(probs)
    return flat / flat.sum(dim=-1, keepdim=True).clamp_min(1e-30)


def _first_rows_count(probs: Tensor, p: float) -> Tensor:
    rows = probs.flatten(0, -2) if probs.ndim > 1 else probs[None]
    ranked = rows[0].sort(descending=True).values
    least = ranked[: int((ranked.cumsum(0) - ranked < p).sum())].min()
    kept = rows * (rows >= least)
    return (kept / kept.sum(dim=-1, keepdim=True).clamp_min(1e-30)).view_as(probs)


def _one_sum(probs: Tensor, p: float) -> Tensor:
    kept = _open(share=False)(probs, p)
    return kept / kept.sum()


def _softmaxed(probs: Tensor, p: float) -> Tensor:
    kept = _open()(probs, p)
    return kept.masked_fill(kept == 0, -torch.inf).softmax(dim=-1)


def _ties_kept(probs: Tensor, p: float) -> Tensor:
    kept = probs * (probs >= _least(probs, p))
    return kept / kept.sum(dim=-1, keepdim=True)


def _above_ties(probs: Tensor, p: float) -> Tensor:
    top = probs == probs.amax(dim=-1, keepdim=True)
    kept = probs * ((probs > _least(probs, p)) | top)
    return kept / kept.sum(dim=-1, keepdim=True)


def _least(probs: Tensor, p: float) -> Tensor:
    """The probability of the least likely token that is kept."""
    kept = _open(share=False)(probs, p)
    return kept.masked_fill(kept == 0, torch.inf).amin(dim=-1, keepdim=True)


def _ties_in_order(function: Callable, probs: Tensor, p: float) -> Any:
    """The result, as if of equally likely tokens the first were kept: which ones is free."""
    before = probs.clone()
    result = function(probs, p)
    if not isinstance(result, Tensor) or result.shape != before.shape:
        return result
    found = result.argsort(dim=-1, descending=True, stable=True)
    likely = before.gather(-1, found).argsort(dim=-1, descending=True, stable=True)
    ranked = result.gather(-1, found.gather(-1, likely))  # by likelihood, then as kept
    order = before.argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(result).scatter(-1, order, ranked)


def _float32_is_named(got: Tensor, expected: Tensor) -> str | None:
    """Beside the difference: that digits were lost, where float32 explains it."""
    wrong = difference(got, expected)
    if wrong and expected.dtype == torch.float64 and not difference(got.float(), expected.float()):
        return f"{wrong}. Hint: {NARROW.removesuffix('.')}"
    return wrong


NARROW = "Compute in probs' dtype: float32 loses digits here."

TOP_P = Exercise(
    name="inference.top_p",
    reference="dsv3_tutorial.inference.sample:top_p",
    cases=[
        Case("half and more", _rows([0.125, 0.5, 0.3125, 0.0625], p=0.7)),
        Case("reached exactly", _rows([0.0625, 0.25, 0.5, 0.1875], p=0.75)),
        Case("less than the most likely token", _rows([0.25, 0.625, 0.125], p=0.1)),
        Case("a batch", _drawn(0, 0.8, 3, 10)),
        Case("everything", _rows([0.5, 0.25, 0.1875, 0.0625], p=1.0)),
        Case("equally likely tokens", _rows([0.125, 0.25, 0.125, 0.25, 0.25], p=0.4)),
        Case("float64", _drawn(1, 0.9, 2, 2, 50, dtype=torch.float64), hidden=True),
        Case("flat", _drawn(2, 0.35, 4, 30, wide=0.3), hidden=True),
        Case("sure of one", _drawn(3, 0.95, 2, 20, wide=9.0), hidden=True),
        Case("hardly any mass", _drawn(4, 1e-6, 2, 7), hidden=True),
        Case("one token", _rows([1.0], p=0.5), hidden=True),
        Case("one row", _drawn(5, 0.6, 100), hidden=True),
        Case("equally likely tokens, a batch", _rows([0.125] * 8, _STEPS, p=0.7), hidden=True),
    ],
    hints=[
        "Sort the probabilities, largest first: ranked, order = probs.sort(dim=-1, "
        "descending=True). A token is in the set while the mass before it is less than p.",
        "The mass before each: ranked.cumsum(dim=-1) - ranked. Set the others to 0, and divide by "
        "the sum of what is left.",
        "Back to their places: torch.zeros_like(probs).scatter(-1, order, ranked).",
    ],
    difficulty=3,
    importance=3,
    minutes=8,
    lines=5,
    mutants=[
        Mutant(
            "the one that crosses",
            _open(lambda before, after, p: after <= p),
            "The token that crosses p is left out: without it the set does not reach p.",
        ),
        Mutant(
            "the one that crosses, none left",
            _open(lambda before, after, p: after <= p, first=False),
            "Not even the most likely token is kept where it alone is above p.",
        ),
        Mutant(
            "one too many",
            _open(lambda before, after, p: before <= p),
            "Where the mass is p exactly the set is complete: keep while the mass before is < p.",
        ),
        Mutant(
            "not divided",
            _open(share=False),
            "What is kept does not sum to 1: divide by its sum.",
        ),
        Mutant(
            "least likely",
            _open(descending=False),
            "The least likely tokens are kept: sort the largest first.",
        ),
        Mutant(
            "sorted",
            _open(back=False),
            "The probabilities come back in sorted order: put them where they were, with scatter.",
        ),
        Mutant("each alone", _each_alone, "Each token is held against p by itself: add them up."),
        Mutant(
            "share of the largest",
            _of_the_largest,
            "Tokens are held against the largest (that is min-p): add up the mass.",
        ),
        Mutant("share of tokens", _share_of_tokens, "p is a share of the mass, not of the tokens."),
        Mutant(
            "all rows at once",
            _all_rows_at_once,
            "The rows are taken together: each has a set of its own.",
        ),
        Mutant(
            "the first row's limit",
            _first_rows_count,
            "All rows use the first one's limit: each has a set of its own.",
        ),
        Mutant("softmax", _softmaxed, "These are probabilities already: divide, no softmax."),
        Mutant(
            "one sum",
            _one_sum,
            "All rows are divided by one sum: each sums to 1 by itself, sum(dim=-1, keepdim=True).",
        ),
        Mutant("nothing", lambda probs, p: probs.clone(), "Nothing is left out."),
        Mutant(
            "all that tie",
            _ties_kept,
            "Of equally likely tokens all are kept: the smallest set has only as many as p needs.",
        ),
        Mutant(
            "none that tie",
            _above_ties,
            "Of equally likely tokens none is kept: without them the set does not reach p.",
        ),
        Mutant("float32", lambda probs, p: _open()(probs.float(), p), NARROW),
        Mutant(
            "float32 on the way",
            lambda probs, p: _open()(probs.float(), p).to(probs.dtype),
            NARROW,
        ),
    ],
    compare=_float32_is_named,
    run=_ties_in_order,
)
