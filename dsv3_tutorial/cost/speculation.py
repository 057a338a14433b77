"""What guessing ahead can gain, and what it costs: tokens a pass, against what the pass reads.

A pass over k + 1 tokens gives 1 + a + ... + a^k of them when each draft is accepted with
probability a. Whether that is a gain depends on what a longer pass costs: nothing where the same
weights are read anyway, almost everything where other tokens go to other experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import bill, storage
from dsv3_tutorial.cost.serving import experts_touched
from dsv3_tutorial.hardware import Chip


def tokens_per_pass(acceptance: float | Sequence[float], drafts: int = 1) -> float:
    """Tokens that one verified pass gives: (1 - a^(k + 1)) / (1 - a), the bonus token included.

    acceptance: of a draft whose forerunners were accepted; one number, or one for each position,
    and then `drafts` is their number.
    """
    chances = [acceptance] * drafts if isinstance(acceptance, int | float) else list(acceptance)
    if drafts < 0 or not all(0 <= a <= 1 for a in chances):
        raise ValueError(
            f"acceptance {acceptance} of {drafts} drafts: no number of tokens follows. Give "
            "probabilities from 0 to 1, and 0 drafts or more."
        )
    given, still = 1.0, 1.0
    for chance in chances:
        still *= chance
        given += still
    return given


def speedup(
    acceptance: float | Sequence[float], drafts: int, verify: float, draft: float = 0.0
) -> float:
    """The law: tokens a pass / (c(k + 1) + k d), against plain decoding, one token a pass.

    verify: time of a pass over drafts + 1 tokens; draft: of one draft. Both in plain steps' time.
    """
    drafted = drafts if isinstance(acceptance, int | float) else len(acceptance)
    return tokens_per_pass(acceptance, drafts) / (verify + drafted * draft)


def expert_bytes_bound(
    cfg: ModelConfig,
    batch: int,
    acceptance: float,
    drafts: int = 1,
    context: int = 0,
    drafted: bool = False,
    **formats: str,
) -> float:
    """The most that speculation gains where bytes are all that takes time.

    V3, one draft, 85 %: 1.20 at batch 1, where a second token brings its own 8 experts a layer, and
    1.82 at 128, where all experts are read anyway. In between it falls first, to 1.07 at batch 5.
    context: cached tokens of each sequence, read once a pass for all queries; 0: weights alone.
    drafted: each draft reads its module's share and the output head; False: drafting is free.
    formats: weights and cache, as in bill.decode_bill.
    """
    one, more = (_lines(cfg, batch, queries, context, **formats) for queries in (1, drafts + 1))
    plain = bill.total(one).bytes
    draft = _draft(cfg, one).bytes / plain if drafted else 0.0
    return speedup(acceptance, drafts, bill.total(more).bytes / plain, draft)


def dense_bound(
    cfg: ModelConfig,
    chip: Chip,
    batch: int,
    acceptance: float,
    drafts: int = 1,
    weights: str = "bf16",
) -> float:
    """The same for a model whose weights every token meets: 1 + a until arithmetic binds.

    Each pass takes the longer of reading the weights once and multiplying all tokens in BF16. From
    a batch of ridge / (drafts + 1) on the gain falls, to below 1: an unaccepted draft costs
    arithmetic that another sequence could use. No cache; cfg's experts are taken as all read, so
    that a mixture of experts can be held beside it.
    """
    counted = bill.decode_bill(cfg, 1, weights=weights, touched=cfg.n_routed_experts or 0)
    lines = [line for line in counted if not line.part.endswith("cache")]
    flops, read = bill.total(lines).flops, bill.total(lines).bytes / chip.bandwidth()
    plain, verify = (
        max(read, tokens * flops / chip.rate("bf16")) for tokens in (batch, batch * (drafts + 1))
    )
    return speedup(acceptance, drafts, verify / plain)


@dataclass(frozen=True)
class Gain:
    """What speculation gains and which limits set a plain and a verifying pass."""

    value: float
    plain: str
    verify: str
    reason: str


def gain(
    cfg: ModelConfig,
    chip: Chip,
    batch: int,
    acceptance: float,
    drafts: int = 1,
    context: int = 4096,
    drafted: bool = True,
    **formats: str,
) -> Gain:
    """The bound with bytes and arithmetic both, on one chip that is thought to hold everything.

    A pass takes the longer of the two. drafted: each draft costs its module's bytes and arithmetic,
    the output head's among them. BF16 arithmetic. The reason says what the longer pass has to pay
    for.
    """
    one, more = (_lines(cfg, batch, queries, context, **formats) for queries in (1, drafts + 1))
    times = [_times(bill.total(lines), chip) for lines in (one, more)]
    plain, verify = (max(t, key=t.get) for t in times)
    step = times[0][plain]
    draft = max(_times(_draft(cfg, one), chip).values()) / step if drafted else 0.0
    ratio = times[1][verify] / step
    return Gain(
        speedup(acceptance, drafts, ratio, draft), plain, verify, _reason(one, more, verify)
    )


def _lines(
    cfg: ModelConfig, batch: int, queries: int, context: int, **formats: str
) -> list[bill.Line]:
    touched = None
    if cfg.n_routed_experts:
        many = (cfg.n_routed_experts, cfg.num_experts_per_tok, batch * queries)
        touched = experts_touched(*many)  # not rounded: the bound is smooth
    held = max(context, queries)
    lines = bill.decode_bill(cfg, held, batch, queries, touched=touched, **formats)
    return [line for line in lines if context or not line.part.endswith("cache")]


def _times(line: bill.Line, chip: Chip) -> dict[str, float]:
    return {"bandwidth": line.bytes / chip.bandwidth(), "compute": line.flops / chip.rate("bf16")}


def _draft(cfg: ModelConfig, plain: list[bill.Line]) -> bill.Line:
    """One draft of a module: a layer's share of a plain step, the output head again, and M_k."""
    number = storage.copies(cfg) | {"output head": 1, "routed experts": storage.moe_layers(cfg)}
    number["latent cache"] = number["key-value cache"] = cfg.num_hidden_layers
    number["norms"] = cfg.num_hidden_layers
    moe = cfg.is_moe_layer(cfg.num_hidden_layers)
    left = ("embedding", "dense MLP") if moe else ("embedding",)
    head = next(n.flops for n in plain if n.part == "output head")
    rows = head / (2 * cfg.vocab_size * cfg.hidden_size)
    joined = 2 * cfg.hidden_size**2
    flops, read = 2 * rows * joined, 2 * joined
    for line in plain:
        if line.part not in left:
            flops += line.flops / number[line.part]
            read += line.bytes / number[line.part]
    return bill.Line("draft", flops, read)


def _reason(one: list[bill.Line], more: list[bill.Line], verify: str) -> str:
    """The part that adds most to the verifying pass in what binds it."""
    by = "bytes" if verify == "bandwidth" else "flops"
    grown = {a.part: getattr(b, by) - getattr(a, by) for a, b in zip(one, more, strict=True)}
    part = max(grown, key=grown.get)
    return f"{part}: {'bytes' if by == 'bytes' else 'arithmetic'}" if grown[part] else "nothing"
