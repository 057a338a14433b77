"""What comes after V3: attention that first looks for the tokens worth attending to, priced.

DeepSeek-V3.2's sparse attention: an indexer of small heads scores *every* cached token in FP8, and
MLA attends to the best `topk` of them. So what is quadratic stays quadratic, at a fraction of the
cost. Its numbers are those of the published config and inference code (DeepSeek-V3.2-Exp, 2025).
"""

from dataclasses import dataclass

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import attention, storage
from dsv3_tutorial.hardware import Chip


@dataclass(frozen=True)
class Indexer:
    """The indexer's heads, their width, tokens kept for each query, and scale bytes a key."""

    heads: int = 64
    width: int = 128
    topk: int = 2048
    scale_bytes: int = 4

    def __post_init__(self) -> None:
        if min(self.heads, self.width, self.topk) < 1 or self.scale_bytes < 0:
            raise ValueError(
                f"An indexer of {self.heads} heads of {self.width}, keeping {self.topk} tokens: it "
                "would choose nothing. Give heads, width and topk of 1 or more."
            )

    @property
    def flops(self) -> int:
        """FLOP for one query and one token looked at: one product a head, 2 x 64 x 128."""
        return 2 * self.heads * self.width

    @property
    def key_bytes(self) -> int:
        """Bytes of one token's index key in FP8: one for all heads, 132 with its scale."""
        return self.width + self.scale_bytes


V32 = Indexer()


@dataclass(frozen=True)
class Look:
    """One layer's work for one new token. index: of every token in FP8; core: of those kept."""

    index_flops: float
    core_flops: float
    index_bytes: float
    core_bytes: float

    @property
    def bytes(self) -> float:
        return self.index_bytes + self.core_bytes

    def seconds(self, chip: Chip) -> float:
        """Roofline time, the two one after the other: nothing is known before the search ends."""
        index = max(self.index_flops / chip.rate("fp8"), self.index_bytes / chip.bandwidth())
        return index + max(self.core_flops / chip.rate("bf16"), self.core_bytes / chip.bandwidth())


def decode(
    cfg: ModelConfig, context: int, indexer: Indexer | None = V32, cache: str = "fp8"
) -> Look:
    """A decoded token's look at `context` cached ones in one layer of an MLA model, absorbed.

    indexer None: at all of them, as V3 does. cache: of the latent, out of storage.CACHES.
    """
    seen = min(context, indexer.topk) if indexer else context
    width = attention.score_width(cfg, "absorbed")
    return Look(
        index_flops=context * indexer.flops if indexer else 0,
        core_flops=2 * seen * cfg.num_attention_heads * width,
        index_bytes=context * indexer.key_bytes if indexer else 0,
        core_bytes=seen * storage.cache_row(cfg, cache),
    )


def cache_bytes(cfg: ModelConfig, indexer: Indexer | None = V32, cache: str = "fp8") -> int:
    """Bytes that a token leaves in all layers: sparse attention *adds* its index keys."""
    each = storage.cache_row(cfg, cache) + (indexer.key_bytes if indexer else 0)
    return cfg.num_hidden_layers * each


def prefill_flops(cfg: ModelConfig, tokens: int, indexer: Indexer | None = V32) -> float:
    """FLOP of one layer's causal attention over a prompt, projections left out.

    Without an indexer the heads are expanded, 2 (N + R + V) a pair. What is gathered differs from
    query to query, so it must stay latent: 2 (2 C + R) a pair, 3.4 times as much for V3.
    """
    pairs = tokens * (tokens + 1) / 2
    heads = 2 * cfg.num_attention_heads
    if indexer is None:
        return pairs * heads * attention.score_width(cfg, "expanded")
    left = max(0, tokens - indexer.topk)  # queries that have more before them than is kept
    kept = pairs - left * (left + 1) / 2
    return pairs * indexer.flops + kept * heads * attention.score_width(cfg, "absorbed")


def worth_it_from(cfg: ModelConfig, indexer: Indexer = V32, phase: str = "decode") -> int:
    """The context from which sparse attention takes less: bytes in decoding, FLOP in prefill.

    V3: 2,564 cached tokens in decoding (FP8 latents), 16,315 tokens of a prompt, whose heads are
    cheaper expanded: for short prompts V3.2 masks dense heads instead of gathering.
    """
    if phase not in ("decode", "prefill"):
        raise ValueError(f"phase {phase!r}: what is compared is not known. Take decode or prefill.")

    def saves(tokens: int) -> bool:
        if phase == "decode":
            return decode(cfg, tokens, indexer).bytes < decode(cfg, tokens, None).bytes
        return prefill_flops(cfg, tokens, indexer) < prefill_flops(cfg, tokens, None)

    low, high = 1, 1 << 24
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if saves(middle) else (middle, high)
    return high
