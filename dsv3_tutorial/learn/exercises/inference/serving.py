"""What a step reads: experts for a batch of tokens, and tokens a second from bytes."""

import math

from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _tokens(n_experts: int, top_k: int, tokens: int):
    return lambda: (n_experts, top_k, tokens)


def _no_logarithm(error: BaseException, arguments: tuple) -> str | None:
    """After a logarithm of 0 or a division by 0: which numbers may be 0."""
    if not isinstance(error, ArithmeticError | ValueError):
        return None
    return (
        "With top_k = n_experts no expert is left alone: that probability is 0, and has no "
        "logarithm. A power has no such case: (1 - top_k / n_experts) ** tokens; and tokens may "
        "be 0."
    )


EXPERTS_TOUCHED = Exercise(
    name="inference.experts_touched",
    reference="dsv3_tutorial.cost.serving:experts_touched",
    cases=[
        Case("DeepSeek-V3, one token", _tokens(256, 8, 1)),
        Case("DeepSeek-V3, 32 tokens", _tokens(256, 8, 32)),
        Case("16 experts, top 4, 2 tokens", _tokens(16, 4, 2)),
        Case("no token", _tokens(256, 8, 0)),
        Case("every expert at once", _tokens(6, 6, 3), hidden=True),
        Case("one expert a token", _tokens(128, 1, 100), hidden=True),
        Case("many tokens", _tokens(256, 8, 512), hidden=True),
        Case("another model", _tokens(64, 6, 13), hidden=True),
    ],
    hints=[
        "Take one expert. One token leaves it alone with probability 1 - top_k / n_experts.",
        "All tokens leave it alone with that probability to the power of tokens.",
        "n_experts * (1 - that) are touched by at least one.",
    ],
    difficulty=2,
    importance=5,
    minutes=4,
    lines=1,
    mutants=[
        Mutant(
            "no overlap",
            lambda e, k, t: min(e, k * t),
            "This counts as if no two tokens chose the same expert.",
        ),
        Mutant(
            "without a limit",
            lambda e, k, t: k * t,
            "There may be more choices than experts: an expert chosen twice is read once.",
        ),
        Mutant(
            "choices one by one",
            lambda e, k, t: e * (1 - (1 - 1 / e) ** (k * t)),
            "A token's top_k experts are all different: it misses one expert with probability "
            "1 - top_k / n_experts, not (1 - 1 / n_experts) ** top_k.",
        ),
        Mutant(
            "exponential",
            lambda e, k, t: e * (1 - math.exp(-k * t / e)),
            "The exponential is the limit of many experts: here the number is exact.",
        ),
        Mutant(
            "left alone",
            lambda e, k, t: e * (1 - k / e) ** t,
            "These are the experts that nobody chose.",
        ),
        Mutant(
            "all agree",
            lambda e, k, t: e * (k / e) ** t,
            "These are the experts that every token chose: one token is enough.",
        ),
        Mutant("one token", lambda e, k, t: k, "tokens is not used."),
        Mutant("all", lambda e, k, t: e, "Not every expert is touched: some are left alone."),
        Mutant(
            "share",
            lambda e, k, t: 1 - (1 - k / e) ** t,
            "This is the probability for one expert: times n_experts.",
        ),
        Mutant(
            "for one token",
            lambda e, k, t: e * (1 - (1 - k / e) ** t) / max(t, 1),
            "This is shared out over the tokens: return the experts of the whole batch.",
        ),
        Mutant(
            "whole experts",
            lambda e, k, t: round(e * (1 - (1 - k / e) ** t)),
            "A mean need not be whole: do not round.",
        ),
    ],
    raised=_no_logarithm,
)


def _machine(*numbers: float):
    return lambda: numbers


def _open(gain=lambda b: b, weights=lambda b: 1, cache=lambda b: b):
    """`tokens_per_second` with what a batch multiplies open to be got wrong."""

    def rate(bandwidth, weight_bytes, cache_bytes, batch=1):
        return (
            gain(batch) * bandwidth / (weight_bytes * weights(batch) + cache_bytes * cache(batch))
        )

    return rate


def _one(batch: int) -> int:
    return 1


def _none(batch: int) -> int:
    return 0


TOKENS_PER_SECOND = Exercise(
    name="inference.tokens_per_second",
    reference="dsv3_tutorial.cost.serving:tokens_per_second",
    cases=[
        Case("one sequence", _machine(400e9, 20e9, 2e9)),
        Case("a batch of 32", _machine(3.35e12, 40e9, 1.2e9, 32)),
        Case("hardly any cache", _machine(1e12, 7e9, 1e3, 4)),
        Case("hardly any weights", _machine(1e12, 1e6, 5e9, 64)),
        Case("a large batch", _machine(4.8e12, 671e9, 0.65e9, 512), hidden=True),
        Case("a small machine", _machine(50e9, 30e6, 12345, 3), hidden=True),
        Case("no cache yet", _machine(1e9, 2e9, 0, 2), hidden=True),
    ],
    hints=[
        "A step makes one token for each sequence: batch tokens. How many bytes does it read?",
        "The weights once, however many sequences; the cache of each sequence: "
        "weight_bytes + batch * cache_bytes.",
        "That over bandwidth is a step's seconds; batch over the seconds is the rate.",
    ],
    difficulty=1,
    importance=5,
    minutes=5,
    lines=2,
    mutants=[
        Mutant(
            "one sequence's",
            _open(gain=_one),
            "This is one sequence's rate: a step makes a token for each of the batch.",
        ),
        Mutant(
            "cache once",
            _open(cache=_one),
            "One sequence's cache is read: each of the batch has its own.",
        ),
        Mutant(
            "weights each time",
            _open(weights=lambda b: b),
            "The batch changes nothing here: a step reads the weights once for all of it, and "
            "makes batch tokens.",
        ),
        Mutant("no cache", _open(cache=_none), "The caches are not read here."),
        Mutant("no weights", _open(weights=_none), "The weights are not read here."),
        Mutant(
            "everything shared out",
            _open(cache=lambda b: 1 / b),
            "The cache is divided by the batch: it is given for one sequence.",
        ),
        Mutant(
            "seconds",
            lambda bandwidth, weight_bytes, cache_bytes, batch=1: (
                (weight_bytes + batch * cache_bytes) / bandwidth
            ),
            "These are a step's seconds: return tokens a second.",
        ),
        Mutant(
            "seconds a token",
            lambda bandwidth, weight_bytes, cache_bytes, batch=1: (
                (weight_bytes + batch * cache_bytes) / bandwidth / batch
            ),
            "These are seconds for a token: return tokens a second.",
        ),
        Mutant(
            "two rates",
            lambda bandwidth, weight_bytes, cache_bytes, batch=1: (
                batch * bandwidth / weight_bytes + (bandwidth / cache_bytes if cache_bytes else 0.0)
            ),
            "Rates do not add up: weights and caches come one after the other, so seconds do.",
        ),
        Mutant(
            "the slower",
            lambda bandwidth, weight_bytes, cache_bytes, batch=1: (
                batch * bandwidth / max(weight_bytes, batch * cache_bytes)
            ),
            "The larger part alone decides here: one memory reads both, so their bytes add up.",
        ),
    ],
)
