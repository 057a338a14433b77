"""Attention over the latent, with every head's keys rebuilt and with none."""

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.registry import Budget, Case, Exercise, Mutant


def _scores_case(seed: int, s: int, t: int, h: int = 3, dtype: torch.dtype = torch.float32):
    shapes = (2, s, h, 6), (2, s, h, 4), (2, t, 10), (2, t, 4), (h, 6, 10)
    return lambda: randn(seed, *shapes, dtype=dtype)


def _no_position(q_nope, q_rope, c_kv, k_rope, w_uk):
    return torch.einsum("bshn,hnc,btc->bhst", q_nope, w_uk, c_kv)


def _no_content(q_nope, q_rope, c_kv, k_rope, w_uk):
    return torch.einsum("bshr,btr->bhst", q_rope, k_rope)


def _right(q_nope, q_rope, c_kv, k_rope, w_uk):
    return _no_position(q_nope, q_rope, c_kv, k_rope, w_uk) + _no_content(
        q_nope, q_rope, c_kv, k_rope, w_uk
    )


def _scaled(q_nope, q_rope, c_kv, k_rope, w_uk):
    width = q_nope.shape[-1] + q_rope.shape[-1]
    return _right(q_nope, q_rope, c_kv, k_rope, w_uk) * width**-0.5


def _first_head(q_nope, q_rope, c_kv, k_rope, w_uk):
    one = w_uk[:1].expand_as(w_uk)
    return _right(q_nope, q_rope, c_kv, k_rope, one)


def _softmaxed(q_nope, q_rope, c_kv, k_rope, w_uk):
    return _scaled(q_nope, q_rope, c_kv, k_rope, w_uk).softmax(dim=-1)


def _axes(q_nope, q_rope, c_kv, k_rope, w_uk):
    return _right(q_nope, q_rope, c_kv, k_rope, w_uk).transpose(1, 2)


def _t_first(q_nope, q_rope, c_kv, k_rope, w_uk):
    return _right(q_nope, q_rope, c_kv, k_rope, w_uk).transpose(2, 3)


def _heads_summed(q_nope, q_rope, c_kv, k_rope, w_uk):
    position = torch.einsum("bshr,btr->bst", q_rope, k_rope)[:, None]
    return _no_position(q_nope, q_rope, c_kv, k_rope, w_uk) + position


_SCORE_MUTANTS = [
    Mutant("no position", _no_position, "The position part, q_rope with k_rope, is missing."),
    Mutant("no content", _no_content, "The content part, q_nope with the latent, is missing."),
    Mutant("scaled", _scaled, "The scores are scaled: leave them as they are here."),
    Mutant("softmaxed", _softmaxed, "These are probabilities: return the raw scores, no softmax."),
    Mutant("one head", _first_head, "Every head uses the first head's matrix w_uk[0]."),
    Mutant("axes", _axes, "The axes are (B, S, H, T); attention wants (B, H, S, T)."),
    Mutant("T before S", _t_first, "The axes are (B, H, T, S); queries come before cached tokens."),
    Mutant("heads summed", _heads_summed, "The position part is summed over the heads."),
]
_SCORE_CASES = [
    Case("prefill, S = T", _scores_case(0, 4, 4)),
    Case("decode, S = 1", _scores_case(1, 1, 7)),
    Case("float64", _scores_case(2, 2, 5, h=2, dtype=torch.float64), hidden=True),
]

EXPANDED_SCORES = Exercise(
    name="attention.expanded_scores",
    reference="dsv3_tutorial.attention.latent:expanded_scores",
    cases=_SCORE_CASES,
    hints=[
        'Keys first: torch.einsum("btc,hnc->bthn", c_kv, w_uk).',
        'Content: einsum "bshn,bthn->bhst". Position: k_rope has no head axis, "bshr,btr->bhst".',
    ],
    difficulty=2,
    importance=4,
    minutes=6,
    lines=4,
    mutants=_SCORE_MUTANTS,
)


def flops_made(function, *args: Tensor) -> int:
    """The FLOP of every matrix product in a call."""
    with FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops()


def _flops_per_token(make):
    """A budget's measure: the FLOP that one more cached token adds to a decode step."""

    def measure(function, *args) -> float:
        return (flops_made(function, *make(256)) - flops_made(function, *make(128))) / 128

    return measure


def _rebuilt_keys(q_nope, q_rope, c_kv, k_rope, w_uk):
    keys = torch.einsum("btc,hnc->bthn", c_kv, w_uk)
    content = torch.einsum("bshn,bthn->bhst", q_nope, keys)
    return content + torch.einsum("bshr,btr->bhst", q_rope, k_rope)


ABSORBED_SCORES = Exercise(
    name="attention.absorbed_scores",
    reference="dsv3_tutorial.attention.latent:absorbed_scores",
    cases=_SCORE_CASES,
    hints=[
        "Which letter of q_nope and w_uk must disappear before any T comes in? N.",
        'The query in the latent\'s width: torch.einsum("bshn,hnc->bshc", q_nope, w_uk).',
        'Then "bshc,btc->bhst" with c_kv, plus the position part as before.',
    ],
    difficulty=3,
    importance=5,
    minutes=8,
    lines=4,
    mutants=[
        *_SCORE_MUTANTS,
        Mutant(
            "keys rebuilt",
            _rebuilt_keys,
            "Every cached token's key is rebuilt: contract q_nope with w_uk first.",
        ),
    ],
    budget=Budget(
        _flops_per_token(lambda t: _scores_case(5, 1, t)()),
        300,  # absorbed: 168; with every head's key rebuilt: 888
        "FLOP per cached token",
    ),
)


def _values_case(seed: int, s: int, t: int, h: int = 3, dtype: torch.dtype = torch.float32):
    def make() -> tuple[Tensor, ...]:
        scores, c_kv, w_uv = randn(seed, (2, h, s, t), (2, t, 10), (h, 6, 10), dtype=dtype)
        return scores.softmax(dim=-1), c_kv, w_uv

    return make


def _rebuilt_values(probs, c_kv, w_uv):
    values = torch.einsum("btc,hvc->bthv", c_kv, w_uv)
    return torch.einsum("bhst,bthv->bshv", probs, values)


def _heads_first(probs, c_kv, w_uv):
    return torch.einsum("bhst,btc,hvc->bhsv", probs, c_kv, w_uv)


def _heads_mixed(probs, c_kv, w_uv):
    mixed = torch.einsum("bhst,btc->bsc", probs, c_kv)
    return torch.einsum("bsc,hvc->bshv", mixed, w_uv)


def _not_expanded(probs, c_kv, w_uv):
    return torch.einsum("bhst,btc->bshc", probs, c_kv)


def _plain_mean(probs, c_kv, w_uv):
    return _rebuilt_values(torch.full_like(probs, 1 / probs.shape[-1]), c_kv, w_uv)


ABSORBED_VALUES = Exercise(
    name="attention.absorbed_values",
    reference="dsv3_tutorial.attention.latent:absorbed_values",
    cases=[
        Case("prefill, S = T", _values_case(0, 4, 4)),
        Case("decode, S = 1", _values_case(1, 1, 7)),
        Case("float64", _values_case(2, 2, 5, h=2, dtype=torch.float64), hidden=True),
    ],
    hints=[
        "Sum over T while everything is still C wide, and expand what is left.",
        'The mixture: torch.einsum("bhst,btc->bshc", probs, c_kv).',
        'Then torch.einsum("bshc,hvc->bshv", mixture, w_uv).',
    ],
    difficulty=3,
    importance=5,
    minutes=6,
    lines=3,
    mutants=[
        Mutant(
            "values rebuilt",
            _rebuilt_values,
            "Every cached token's value is rebuilt: mix the latents with probs first.",
        ),
        Mutant("axes", _heads_first, "The axes are (B, H, S, V); the layer wants (B, S, H, V)."),
        Mutant("heads mixed", _heads_mixed, "The heads are summed: each head has its own mixture."),
        Mutant(
            "not expanded", _not_expanded, "The mixture is still a latent: w_uv is not applied."
        ),
        Mutant("mean", _plain_mean, "All tokens count alike: probs is not used."),
    ],
    budget=Budget(
        _flops_per_token(lambda t: _values_case(5, 1, t)()),
        300,  # mixed first: 120; with every head's value rebuilt: 792
        "FLOP per cached token",
    ),
)

EXERCISES = [EXPANDED_SCORES, ABSORBED_SCORES, ABSORBED_VALUES]
