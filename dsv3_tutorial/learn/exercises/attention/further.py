"""Beyond the core path: YaRN's temperature, and a function with the field's bugs in it."""

import math

import torch
from torch import Tensor

from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _growth(factor: float, mscale_all_dim: float) -> float:
    return 0.1 * mscale_all_dim * math.log(factor) + 1


SOFTMAX_SCALE = Exercise(
    name="attention.softmax_scale",
    reference="dsv3_tutorial.config:yarn_softmax_scale",
    cases=[
        Case("no stretching", lambda: (192, 1.0, 1.0)),
        Case("DeepSeek-V3", lambda: (192, 40.0, 1.0)),
        Case("DeepSeek-V2-Lite", lambda: (192, 40.0, 0.707)),
        Case("another", lambda: (96, 8.0, 1.0), hidden=True),
        Case("one more", lambda: (40, 3.5, 0.25), hidden=True),
    ],
    hints=[
        "Without YaRN it is qk_head_dim ** -0.5, with N + R as the width.",
        "m = 0.1 * mscale_all_dim * ln(factor) + 1 multiplies the query AND the key.",
    ],
    difficulty=2,
    importance=3,
    minutes=5,
    lines=2,
    mutants=[
        Mutant(
            "no YaRN",
            lambda qk_head_dim, factor, mscale_all_dim: qk_head_dim**-0.5,
            "YaRN's temperature is missing: m depends on factor and mscale_all_dim.",
        ),
        Mutant(
            "m once",
            lambda d, factor, mscale_all_dim: d**-0.5 * _growth(factor, mscale_all_dim),
            "m is applied once; it multiplies the query and the key, so the score twice.",
        ),
        Mutant(
            "mscale ignored",
            lambda d, factor, m: d**-0.5 * _growth(factor, 1.0) ** 2,
            "mscale_all_dim is not used: V2-Lite has 0.707.",
        ),
        Mutant(
            "log10",
            lambda d, factor, m: d**-0.5 * (0.1 * m * math.log10(factor) + 1) ** 2,
            "The logarithm has base ten; YaRN's is the natural one.",
        ),
        Mutant(
            "inverse",
            lambda d, factor, m: d**-0.5 / _growth(factor, m) ** 2,
            "m divides the scores; stretched positions flatten them, so m must sharpen.",
        ),
    ],
)

BUGS = {
    "scale": "the scale is taken from the content part alone, not from N + R",
    "mask": "the mask counts from the first cached token, so a decode step sees one token only",
    "fill": "hidden scores are set to 0, which the softmax still gives weight; -inf gives none",
}


def buggy(*kept: str, fill: float = -math.inf):
    """`latent_attention` with some of BUGS left in."""

    def attention(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv):
        keys = torch.einsum("btc,hnc->bthn", c_kv, w_uk)
        values = torch.einsum("btc,hvc->bthv", c_kv, w_uv)
        scores = torch.einsum("bshn,bthn->bhst", q_nope, keys)
        scores = scores + torch.einsum("bshr,btr->bhst", q_rope, k_rope)
        s, t = scores.shape[-2:]
        width = q_nope.shape[-1] + (0 if "scale" in kept else q_rope.shape[-1])
        offset = 0 if "mask" in kept else t - s
        seen = torch.ones(s, t, dtype=torch.bool).tril(offset)
        hidden = 0.0 if "fill" in kept else fill
        probs = (scores * width**-0.5).masked_fill(~seen, hidden).softmax(dim=-1)
        return torch.einsum("bhst,bthv->bshv", probs, values)

    return attention


def _remaining(kept: tuple[str, ...]) -> Mutant:
    left = {3: "All three bugs are left.", 2: "Two bugs are left."}
    message = left.get(len(kept)) or f"One bug is left: {BUGS[kept[0]]}."
    return Mutant(" and ".join(kept), buggy(*kept), message)


def _attention_case(seed: int, s: int, t: int):
    shapes = (2, s, 3, 6), (2, s, 3, 4), (2, t, 9), (2, t, 4), (3, 6, 9), (3, 5, 9)
    return lambda: randn(seed, *shapes)


def _large_scores() -> tuple:  # all far below zero, where a finite fill would win
    q_nope, q_rope, c_kv, k_rope, *weights = _attention_case(3, 3, 6)()
    return q_nope, torch.full_like(q_rope, -1000.0), c_kv, k_rope.abs() + 1, *weights


def _scaled_by_latent(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv) -> Tensor:
    width = (q_nope.shape[-1] + q_rope.shape[-1]) / c_kv.shape[-1]
    return buggy()(q_nope * width**0.5, q_rope * width**0.5, c_kv, k_rope, w_uk, w_uv)


def _finite_fill(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv) -> Tensor:
    return buggy(fill=-100.0)(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv)


def _rotated_latent(q_nope, q_rope, c_kv, k_rope, w_uk, w_uv) -> Tensor:
    return buggy()(q_nope, q_rope * 0, c_kv, k_rope, w_uk, w_uv)


FIND_THE_BUG = Exercise(
    name="attention.find_the_bug",
    reference="dsv3_tutorial.attention.latent:latent_attention",
    cases=[
        Case("prefill, S = T", _attention_case(0, 5, 5)),
        Case("decode, S = 1", _attention_case(1, 1, 6)),
        Case("two new tokens", _attention_case(2, 2, 7), hidden=True),
        Case("large scores", _large_scores, hidden=True),
    ],
    hints=[
        "Try it with one query and many cached tokens: which of them may it see?",
        "How wide is the vector whose dot products are scaled?",
        "What does softmax do with a score of 0?",
    ],
    difficulty=4,
    importance=4,
    minutes=12,
    lines=3,
    mutants=[
        _remaining(("scale", "mask", "fill")),
        *(_remaining(pair) for pair in (("scale", "mask"), ("scale", "fill"), ("mask", "fill"))),
        *(_remaining((bug,)) for bug in BUGS),
        Mutant(
            "finite fill",
            _finite_fill,
            "Hidden scores are filled with a finite number, which large scores fall below: "
            "only -inf gives no weight.",
        ),
        Mutant(
            "scale from C",
            _scaled_by_latent,
            "The scale is taken from the latent's width C; a score is a product N + R wide.",
        ),
        Mutant("no position", _rotated_latent, "The position part of the scores is gone."),
    ],
    needs=("torch", "math"),
)

EXERCISES = [SOFTMAX_SCALE, FIND_THE_BUG]
