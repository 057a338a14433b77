"""How well an expert suits a token, and what its answer weighs: scores, and weights from them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant

FLOAT64 = torch.float64


def _affinity_case(seed: int, m: int, d: int, e: int, *scoring: str, dtype=torch.float32):
    return lambda: (*randn(seed, (m, d), (e, d), dtype=dtype), *scoring)


def _bf16_input() -> tuple:
    x, weight = randn(4, (6, 8), (5, 8))
    return x.bfloat16(), weight, "sigmoid"


def _large_logits() -> tuple:
    x, weight = randn(5, (4, 6), (5, 6))
    return x * 60, weight, "softmax"


def _both_bf16() -> tuple:
    x, weight = randn(6, (6, 8), (5, 8))
    return x.bfloat16(), weight.bfloat16(), "softmax"


def _always_softmax(x, weight, scoring_func="sigmoid"):
    return F.linear(x.float() if x.dtype != FLOAT64 else x, weight).softmax(dim=-1)


def _always_sigmoid(x, weight, scoring_func="sigmoid"):
    return F.linear(x.float() if x.dtype != FLOAT64 else x, weight).sigmoid()


def _over_tokens(x, weight, scoring_func="sigmoid"):
    logits = F.linear(x.float() if x.dtype != FLOAT64 else x, weight)
    return logits.sigmoid() if scoring_func == "sigmoid" else logits.softmax(dim=0)


def _narrow(x, weight, scoring_func="sigmoid"):
    logits = F.linear(x, weight.to(x.dtype))
    scores = logits.sigmoid() if scoring_func == "sigmoid" else logits.softmax(dim=-1)
    return scores.float() if x.dtype == torch.bfloat16 else scores


def _normalised(x, weight, scoring_func="sigmoid"):
    scores = F.linear(x.float() if x.dtype != FLOAT64 else x, weight).sigmoid()
    return scores / scores.sum(dim=-1, keepdim=True)


def _logits(x, weight, scoring_func="sigmoid"):
    return F.linear(x.float() if x.dtype != FLOAT64 else x, weight)


AFFINITIES = Exercise(
    name="moe.affinities",
    reference="dsv3_tutorial.moe.gate:affinities",
    cases=[
        Case("sigmoid, 6 tokens, 5 experts", _affinity_case(0, 6, 8, 5, "sigmoid")),
        Case("softmax, as V2 has it", _affinity_case(1, 6, 8, 5, "softmax")),
        Case("x in BF16, scores in float32", _bf16_input),
        Case("logits of a hundred", _large_logits, hidden=True),
        Case("both in BF16", _both_bf16, hidden=True),
        Case("the default", _affinity_case(2, 1, 4, 16), hidden=True),
        Case("float64", _affinity_case(3, 3, 4, 6, "softmax", dtype=FLOAT64), hidden=True),
    ],
    hints=[
        "F.linear(x, weight) gives (M, E): every token against every expert's vector.",
        "Widen first, x.to(torch.promote_types(x.dtype, torch.float32)): BF16 becomes float32, and "
        "float64 stays what it is.",
        "logits.sigmoid() for 'sigmoid', logits.softmax(dim=-1) for 'softmax'.",
    ],
    difficulty=1,
    importance=4,
    minutes=4,
    lines=3,
    mutants=[
        Mutant("always softmax", _always_softmax, "This is the softmax always: V3's is sigmoid."),
        Mutant("always sigmoid", _always_sigmoid, "scoring_func is not used: V2 has the softmax."),
        Mutant(
            "over tokens",
            _over_tokens,
            "The softmax runs over the tokens; experts compete, dim -1.",
        ),
        Mutant("BF16 product", _narrow, "The product is made in BF16: widen x and weight first."),
        Mutant("normalised", _normalised, "The scores are normalised: each stands alone here."),
        Mutant("logits", _logits, "These are the logits: no sigmoid and no softmax."),
    ],
)


def _weight_case(seed: int, m: int, e: int, k: int, *rest, dtype=torch.float32):
    def make() -> tuple:
        scores, noise = randn(seed, (m, e), (m, e), dtype=dtype)
        # the choice was made with a bias: not the k best scores
        return scores.sigmoid(), (scores + noise).topk(k, dim=-1).indices, *rest

    return make


def _normalise(weights: Tensor) -> Tensor:
    return weights / weights.sum(dim=-1, keepdim=True)


def _over_all(scores, indices, norm_topk_prob=True, routed_scaling_factor=1.0):
    weights = scores.gather(1, indices)
    total = scores.sum(dim=-1, keepdim=True) if norm_topk_prob else 1.0
    return weights / total * routed_scaling_factor


def _never_normalised(scores, indices, norm_topk_prob=True, routed_scaling_factor=1.0):
    return scores.gather(1, indices) * routed_scaling_factor


def _always_normalised(scores, indices, norm_topk_prob=True, routed_scaling_factor=1.0):
    return _normalise(scores.gather(1, indices)) * routed_scaling_factor


def _not_scaled(scores, indices, norm_topk_prob=True, routed_scaling_factor=1.0):
    weights = scores.gather(1, indices)
    return _normalise(weights) if norm_topk_prob else weights


def _scaled_first(scores, indices, norm_topk_prob=True, routed_scaling_factor=1.0):
    weights = scores.gather(1, indices) * routed_scaling_factor
    return _normalise(weights) if norm_topk_prob else weights


def _top_again(scores, indices, norm_topk_prob=True, routed_scaling_factor=1.0):
    weights = scores.topk(indices.shape[-1], dim=-1).values
    return (_normalise(weights) if norm_topk_prob else weights) * routed_scaling_factor


def _softmaxed(scores, indices, norm_topk_prob=True, routed_scaling_factor=1.0):
    weights = scores.gather(1, indices)
    return (weights.softmax(dim=-1) if norm_topk_prob else weights) * routed_scaling_factor


def _whole_rows(scores, indices, norm_topk_prob=True, routed_scaling_factor=1.0):
    kept = torch.zeros_like(scores).scatter(1, indices, scores.gather(1, indices))
    return (_normalise(kept) if norm_topk_prob else kept) * routed_scaling_factor


COMBINE_WEIGHTS = Exercise(
    name="moe.combine_weights",
    reference="dsv3_tutorial.moe.gate:combine_weights",
    cases=[
        Case("normalised", _weight_case(0, 6, 8, 3)),
        Case("V3: normalised, times 2.5", _weight_case(1, 6, 16, 4, True, 2.5)),
        Case("V2: not normalised, times 16", _weight_case(2, 6, 16, 4, False, 16.0)),
        Case("one expert", _weight_case(3, 5, 4, 1, True, 2.0), hidden=True),
        Case("float64", _weight_case(4, 3, 12, 6, False, 1.5, dtype=FLOAT64), hidden=True),
    ],
    hints=[
        "scores.gather(1, indices) picks each token's own experts: (M, K).",
        "Divide by the sum over the K chosen ones, keepdim=True, if norm_topk_prob.",
        "The factor comes last: before the division it would cancel.",
    ],
    difficulty=2,
    importance=5,
    minutes=5,
    lines=4,
    mutants=[
        Mutant("over all experts", _over_all, "Divide by the sum over the chosen K, not over E."),
        Mutant("never normalised", _never_normalised, "norm_topk_prob is not used: normalise."),
        Mutant(
            "always normalised", _always_normalised, "norm_topk_prob=False: V2 divides nothing."
        ),
        Mutant("not scaled", _not_scaled, "routed_scaling_factor is not used."),
        Mutant("scaled first", _scaled_first, "The factor cancels in the division: multiply last."),
        Mutant(
            "top-k again", _top_again, "The K best scores are taken; the choice is in `indices`."
        ),
        Mutant("softmax", _softmaxed, "A softmax over the chosen ones: V3 divides by the sum."),
        Mutant("rows of E", _whole_rows, "Return (M, K), one weight a chosen expert."),
    ],
)

EXERCISES = [AFFINITIES, COMBINE_WEIGHTS]
