"""How fast a model comes out of a machine: bytes that a step must read, over the bandwidth.

A step of decoding reads the weights that its tokens meet once, and each sequence's own cache. No
latency, no imbalance, perfect overlap: bounds to be held against, not forecasts.
"""


def experts_touched(n_experts: int, top_k: int, tokens: int) -> float:
    """How many of a layer's experts are read for so many tokens, on average: E (1 - (1 - K/E)^T).

    A token leaves one expert alone with probability 1 - K / E. DeepSeek-V3's 8 of 256: 32 tokens
    touch 163, so its expert bytes a token fall 1.57x from batch 1 to 32, not 32x. Choices even and
    independent: a trained router has favourites, and neighbours agree, so real counts are lower.
    """
    return n_experts * (1 - (1 - top_k / n_experts) ** tokens)


def tokens_per_second(
    bandwidth: float, weight_bytes: float, cache_bytes: float, batch: int = 1
) -> float:
    """Tokens a second of all sequences together where reading is all that takes time.

    bandwidth: bytes/s. weight_bytes: read once for the whole batch. cache_bytes: one sequence's,
    and each has its own, so a batch saves weights only. A mixture of experts reads more weights for
    more tokens: give those that this batch touches.
    """
    return batch * bandwidth / (weight_bytes + batch * cache_bytes)
