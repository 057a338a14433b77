"""One decode step's bill: what every part of a model computes, and which bytes it has to read.

Counted are matrix products, and of the bytes those that lie in memory before the step: each weight
and each cached number once, however often it is used. What one operator hands to the next stays on
the chip in a good kernel and is left out. `inference.ledger` counts the same by watching a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import attention, storage
from dsv3_tutorial.cost.serving import experts_touched

PARTS = (
    *("embedding", "attention weights", "latent cache", "key-value cache", "dense MLP", "gate"),
    *("routed experts", "shared experts", "norms", "output head"),
)
_PREFIXES = ("", "k", "M", "G", "T", "P")


@dataclass(frozen=True)
class Line:
    """One part's share of a step: FLOP, and bytes that must be read for it."""

    part: str
    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOP per byte: against a chip's ridge point it says which of the two bounds."""
        return self.flops / self.bytes if self.bytes else 0.0


def decode_bill(
    cfg: ModelConfig,
    context: int,
    batch: int = 1,
    queries: int = 1,
    weights: str = "bf16",
    cache: str = "bf16",
    touched: float | Sequence[float] | None = None,
) -> list[Line]:
    """The lines of one step: `batch` sequences of `context` tokens, the last `queries` of them new.

    MLA absorbed; every query is counted against all of its context, itself included. weights and
    cache: out of storage.WEIGHTS and CACHES; embedding, output head, gate and norms stay BF16
    (float32 in float32). touched: experts read in a layer, one number or one for each MoE layer;
    None: the expected number, rounded. All integers, unless `touched` has a fraction.
    """
    _check(context, batch, queries, weights, cache)
    rows = batch * queries
    vectors = storage.vectors(cfg, weights)
    looked_up = 0 if cfg.tie_word_embeddings else rows * cfg.hidden_size * storage.kept(weights)
    lines = [Line("embedding", 0, looked_up)] if looked_up else []  # tied: in the head
    lines += [
        _cache(cfg, context, batch, queries, cache),
        Line("norms", 0, vectors.pop("norms")),
    ]
    for part, sides in storage.matrices(cfg).items():
        met, read = _met(cfg, part), _read(cfg, part, rows, touched)
        fmt = storage.narrowed(part, weights)
        size = read * sum(storage.matrix_bytes(m, k, fmt) for m, k in sides)
        flops = 2 * rows * met * sum(m * k for m, k in sides)
        lines.append(Line(part, flops, size + vectors.get(part, 0)))
    return sorted(lines, key=lambda line: PARTS.index(line.part))


def total(lines: Sequence[Line]) -> Line:
    """The sum of a bill's lines."""
    return Line("total", sum(line.flops for line in lines), sum(line.bytes for line in lines))


def largest(lines: Sequence[Line], by: str = "bytes") -> Line:
    """The line with the most bytes, or by="flops" the most arithmetic."""
    return max(lines, key=lambda line: getattr(line, by))


def receipt(lines: Sequence[Line], title: str = "", tokens: int = 1) -> str:
    """The bill as a till prints it, at most 72 columns wide: lines, total, and the largest line.

    tokens: that the step makes; above 1 the total is also printed for each of them.
    """
    whole = total(lines)
    flops, bytes = (_scale(n) for n in (whole.flops, whole.bytes))
    rule = "-" * 66
    heading = f"{'part':<20}{flops[1] + 'FLOP':>12}{bytes[1] + 'B':>14}{'share':>9}{'FLOP/B':>11}"
    printed = [title] if title else []
    printed += [heading, rule, *(_printed(line, flops[0], bytes[0], whole) for line in lines), rule]
    printed.append(_printed(whole, flops[0], bytes[0], whole))
    if tokens > 1:
        each = Line(f"a token, of {tokens:,}", whole.flops / tokens, whole.bytes / tokens)
        printed.append(_printed(each, flops[0], bytes[0], None))
    worst = largest(lines)
    share = worst.bytes / whole.bytes if whole.bytes else 0
    printed.append(f"largest: {worst.part}, {share:.0%} of the bytes")
    return "\n".join(printed)


def _printed(line: Line, flops: float, bytes: float, whole: Line | None) -> str:
    share = f"{line.bytes / whole.bytes:.1%}" if whole and whole.bytes else ""
    amounts = f"{line.flops / flops:>12,.3f}{line.bytes / bytes:>14,.3f}"
    return f"{line.part:<20}{amounts}{share:>9}{line.intensity:>11,.1f}"


def _scale(amount: float) -> tuple[float, str]:
    """The largest unit of which there are ten: the lines below the total keep their digits."""
    fits = [(1000.0**i, name) for i, name in enumerate(_PREFIXES) if amount >= 10 * 1000.0**i]
    return fits[-1] if fits else (1.0, "")


def _cache(cfg: ModelConfig, context: int, batch: int, queries: int, cache: str) -> Line:
    """Scores and values, and the cached rows that they are made from, the new ones among them."""
    width = attention.score_width(cfg, "absorbed" if cfg.is_mla else "heads")
    layers, heads = cfg.num_hidden_layers, cfg.num_attention_heads
    flops = 2 * batch * queries * context * layers * heads * width
    name = "latent cache" if cfg.is_mla else "key-value cache"
    return Line(name, flops, batch * storage.cache_bytes(cfg, cache, context))


def _met(cfg: ModelConfig, part: str) -> int:
    """How many of a part's copies one token is multiplied with."""
    return storage.copies(cfg)[part] * (cfg.num_experts_per_tok if part == "routed experts" else 1)


def _read(cfg: ModelConfig, part: str, rows: int, touched: float | Sequence[float] | None) -> float:
    """How many of a part's copies are read; of experts, all layers' together."""
    layers = storage.copies(cfg)[part]
    if part != "routed experts":
        return layers
    if touched is None:
        touched = round(experts_touched(cfg.n_routed_experts, cfg.num_experts_per_tok, rows))
    if not isinstance(touched, Sequence):
        return layers * touched
    if len(touched) != layers:
        raise ValueError(
            f"{len(touched)} numbers of touched experts for {layers} MoE layers: the bytes of the "
            "others would be missing. Give one number a layer, or one for all."
        )
    return sum(touched)


def _check(context: int, batch: int, queries: int, weights: str, cache: str) -> None:
    storage.check_formats(weights, cache)
    if min(context, batch, queries) < 1 or queries > context:
        raise ValueError(
            f"{batch} sequences of {context} tokens, {queries} of them new: nothing is decoded. "
            "Give a batch and queries of 1 or more, and a context that holds the new tokens."
        )
