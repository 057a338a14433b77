"""Getting the tokens to their experts: one list of requests, sorted."""

import torch
from torch import Tensor

from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _indices(seed: int, m: int, k: int, e: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(m, e, generator=draw).topk(k, dim=-1).indices


def _dispatch_case(seed: int, m: int, k: int, chosen: int, e: int):
    return lambda: (_indices(seed, m, k, chosen), e)


def _unstable(indices, n_experts):
    flat = indices.flatten()
    last_first = len(flat) - 1 - flat.flip(0).argsort(stable=True)
    return last_first, torch.bincount(flat, minlength=n_experts)


def _as_tokens(indices, n_experts):
    flat = indices.flatten()
    order = flat.argsort(stable=True) // indices.shape[1]
    return order, torch.bincount(flat, minlength=n_experts)


def _no_empty(indices, n_experts):
    flat = indices.flatten()
    return flat.argsort(stable=True), torch.bincount(flat)


def _sorted_values(indices, n_experts):
    flat = indices.flatten()
    return flat.sort(stable=True).values, torch.bincount(flat, minlength=n_experts)


def _columns(indices, n_experts):
    flat = indices.T.flatten()
    return flat.argsort(stable=True), torch.bincount(flat, minlength=n_experts)


def _ends(indices, n_experts):
    flat = indices.flatten()
    return flat.argsort(stable=True), torch.bincount(flat, minlength=n_experts).cumsum(0)


def _inverse(indices, n_experts):
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    return order.argsort(), torch.bincount(flat, minlength=n_experts)


DISPATCH = Exercise(
    name="moe.dispatch",
    reference="dsv3_tutorial.moe.experts:dispatch",
    cases=[
        Case("6 tokens, 2 of 4", _dispatch_case(0, 6, 2, 4, 4)),
        Case("nobody chose the last three", _dispatch_case(1, 8, 2, 5, 8)),
        Case("one expert a token", _dispatch_case(2, 7, 1, 3, 3)),
        Case("many", _dispatch_case(3, 64, 4, 16, 16), hidden=True),
        Case("one token", _dispatch_case(4, 1, 3, 6, 9), hidden=True),
    ],
    hints=[
        "indices.flatten() is one list of M K requests; request r belongs to token r // K.",
        ".argsort(stable=True) gives the requests' places in the order of their experts.",
        "torch.bincount(flat, minlength=n_experts) counts them, the empty experts included.",
    ],
    difficulty=3,
    importance=5,
    minutes=6,
    lines=3,
    mutants=[
        Mutant(
            "not stable", _unstable, "Within an expert the tokens are turned round: stable=True."
        ),
        Mutant("tokens", _as_tokens, "order holds places in the flattened indices, not tokens."),
        Mutant("no empty ones", _no_empty, "An expert without tokens has a count too: minlength."),
        Mutant("values", _sorted_values, "These are the experts sorted; return where they stood."),
        Mutant("column by column", _columns, "indices is read column by column; flatten() rows."),
        Mutant("running ends", _ends, "These are running sums; return each expert's own count."),
        Mutant("inverse", _inverse, "This is the way back; order leads to the experts."),
    ],
)

EXERCISES = [DISPATCH]
