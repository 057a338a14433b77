"""The layer as a whole: its experts in a loop, and a step of it with the field's bugs."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _experts_case(seed: int, m: int, e: int, k: int, d: int, f: int, only: int | None = None):
    def make() -> tuple:
        x, scores, gate_up, down = randn(
            seed, (m, d), (m, e), (e, 2 * f, d), (e, d, f), dtype=torch.float64
        )
        if only is not None:
            scores[:, only:] = -9.0  # nobody chooses these
        indices = scores.topk(k, dim=-1).indices
        return x, indices, scores.sigmoid().gather(1, indices), gate_up, down

    return make


def _each(x, indices, weights, gate_up, down, hidden=None, factor=None, weight=None):
    """Every token through its experts, with parts to be got wrong."""
    hidden = hidden or (lambda both: F.silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1])
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for choice, expert in enumerate(indices[token].tolist()):
            y = down[expert] @ hidden(gate_up[expert] @ x[token])
            w = weights[token, choice] if weight is None else weight(weights, token, choice, expert)
            out[token] += w * y
    return out


def _unweighted(x, indices, weights, gate_up, down):
    return _each(x, indices, weights, gate_up, down, weight=lambda *_: 1.0)


def _halves_swapped(x, indices, weights, gate_up, down):
    def hidden(both):
        up, gate = both.chunk(2, -1)
        return F.silu(gate) * up

    return _each(x, indices, weights, gate_up, down, hidden=hidden)


def _no_silu(x, indices, weights, gate_up, down):
    def hidden(both):
        gate, up = both.chunk(2, -1)
        return gate * up

    return _each(x, indices, weights, gate_up, down, hidden=hidden)


def _first_choice(x, indices, weights, gate_up, down):
    return _each(x, indices[:, :1], weights[:, :1], gate_up, down)


def _overwritten(x, indices, weights, gate_up, down):
    out = torch.zeros_like(x)
    for expert in range(len(gate_up)):
        token, choice = (indices == expert).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[expert].T).chunk(2, dim=-1)
        out[token] = ((F.silu(gate) * up) @ down[expert].T) * weights[token, choice, None]
    return out


def _weight_by_expert(x, indices, weights, gate_up, down):
    k = weights.shape[1]
    return _each(x, indices, weights, gate_up, down, weight=lambda w, t, c, e: w[t, e % k])


def _residual(x, indices, weights, gate_up, down):
    return x + _each(x, indices, weights, gate_up, down)


EXPERTS_LOOP = Exercise(
    name="moe.experts_loop",
    reference="dsv3_tutorial.moe.experts:experts_loop",
    cases=[
        Case("5 tokens, 2 of 4", _experts_case(0, 5, 4, 2, 6, 3)),
        Case("an expert that nobody chose", _experts_case(1, 6, 5, 2, 4, 2, only=3)),
        Case("one expert each", _experts_case(2, 4, 3, 1, 6, 5)),
        Case("more", _experts_case(3, 17, 8, 3, 6, 4), hidden=True),
        Case("all experts chosen", _experts_case(4, 3, 4, 4, 5, 3), hidden=True),
    ],
    hints=[
        "token, choice = (indices == expert).nonzero(as_tuple=True): who chose this expert, and "
        "as which of its K.",
        "x[token] @ gate_up[expert].T is (rows, 2F): chunk(2, dim=-1) gives gate and up.",
        "silu(gate) * up, times down[expert].T, times weights[token, choice, None]; "
        "out.index_add(0, token, ...) adds it to what the token's other experts gave.",
    ],
    difficulty=3,
    importance=4,
    minutes=10,
    lines=7,
    mutants=[
        Mutant("not weighted", _unweighted, "The experts' outputs are summed without weights."),
        Mutant("halves swapped", _halves_swapped, "silu goes over the gate, the first half."),
        Mutant("no silu", _no_silu, "gate times up without silu: gate goes through silu first."),
        Mutant("first choice", _first_choice, "Only each token's first expert counts; all K do."),
        Mutant("overwritten", _overwritten, "An expert overwrites what others gave: add to it."),
        Mutant(
            "weight of the wrong choice",
            _weight_by_expert,
            "The weight belongs to the choice (its place among the K), not to the expert's number.",
        ),
        Mutant("residual", _residual, "x is added: the block does that, not the experts."),
    ],
    needs=("swiglu",),
)

BUGS = {
    "weight": "the bias is in the weights; it belongs to the choice alone",
    "mask": "other groups are masked with 0, which beats a negative score; -inf never wins",
    "update": "the bias moves once per micro-batch, not once per optimizer step",
}


def buggy(*kept: str, update: float = 1.0):
    """`balanced_step` with some of BUGS left in."""

    def step(micro_batches, bias, gamma, n_group, topk_group, top_k):
        weights, counts = [], torch.zeros_like(bias)
        for scores in micro_batches:
            biased = scores + bias
            grouped = biased.unflatten(-1, (n_group, -1))
            worth = grouped.topk(2, dim=-1).values.sum(dim=-1)
            chosen = worth.topk(topk_group, dim=-1).indices
            allowed = (chosen[..., None] == torch.arange(n_group)).any(dim=1)
            fill = 0.0 if "mask" in kept else -math.inf
            limited = grouped.masked_fill(~allowed[..., None], fill).flatten(-2)
            indices = limited.topk(top_k, dim=-1).indices
            picked = (biased if "weight" in kept else scores).gather(1, indices)
            weights.append(picked / picked.sum(dim=-1, keepdim=True))
            counts += torch.bincount(indices.flatten(), minlength=len(bias))
            if "update" in kept:
                bias = bias + gamma * (counts.mean() - counts).sign()
                counts = torch.zeros_like(bias)
        moved = 0.0 if "update" in kept else update * gamma * (counts.mean() - counts).sign()
        return weights, bias + moved

    return step


def _last_micro_batch(micro_batches, bias, gamma, n_group, topk_group, top_k):
    weights, _ = buggy()(micro_batches, bias, gamma, n_group, topk_group, top_k)
    arguments = (micro_batches[-1:], bias, gamma, n_group, topk_group, top_k)
    return weights, buggy()(*arguments)[1]


def _remaining(kept: tuple[str, ...]) -> Mutant:
    left = {3: "All three bugs are left.", 2: "Two bugs are left."}
    message = left.get(len(kept)) or f"One bug is left: {BUGS[kept[0]]}."
    return Mutant(" and ".join(kept), buggy(*kept), message)


def _step_case(seed: int, parts: int, m: int, e: int, groups: int, kept: int, k: int, shift: float):
    def make() -> tuple[list[Tensor], Tensor, float, int, int, int]:
        *scores, bias = randn(seed, *[(m, e)] * parts, (e,), dtype=torch.float64)
        skewed = [(s + torch.arange(e) / e).sigmoid() for s in scores]
        return skewed, bias / 3 + shift, 0.05, groups, kept, k

    return make


FIND_THE_BUG = Exercise(
    name="moe.find_the_bug",
    reference="dsv3_tutorial.moe.balance:balanced_step",
    cases=[
        Case("one micro-batch", _step_case(0, 1, 20, 8, 4, 2, 3, 0.0)),
        Case("three micro-batches", _step_case(1, 3, 12, 8, 4, 2, 3, 0.0)),
        Case("biases below zero", _step_case(2, 2, 12, 16, 4, 2, 4, -1.2)),
        Case("more", _step_case(3, 4, 30, 32, 8, 4, 8, -1.0), hidden=True),
    ],
    hints=[
        "Follow the bias: where may it go in, and where not?",
        "Which scores win after the mask when all of them are negative?",
        "How often does the bias move when a step has three micro-batches?",
    ],
    difficulty=4,
    importance=5,
    minutes=12,
    lines=3,
    mutants=[
        _remaining(("weight", "mask", "update")),
        *(
            _remaining(pair)
            for pair in (("weight", "mask"), ("weight", "update"), ("mask", "update"))
        ),
        *(_remaining((bug,)) for bug in BUGS),
        Mutant("wrong way", buggy(update=-1.0), "The busy experts are lifted: lower them."),
        Mutant("never moved", buggy(update=0.0), "The bias does not move any more."),
        Mutant(
            "last micro-batch",
            _last_micro_batch,
            "Only the last micro-batch is counted: the load is that of the whole step.",
        ),
    ],
    needs=("torch", "math"),
)

EXERCISES = [EXPERTS_LOOP, FIND_THE_BUG]
