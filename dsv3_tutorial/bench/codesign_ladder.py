"""Five models of equal training FLOPs: a dense baseline, and V3's decisions added one at a time.

D hidden_size, V vocab_size, S positions. Every rung has four layers of 128 channels. What a rung
saves in arithmetic its feed-forward takes up, so that a token costs as much in all of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import flops, params
from dsv3_tutorial.train.recipe import MTP_WEIGHT

SEQ_LEN = 128
BASELINE, FULL = "dense MHA, BF16", "+ MTP"
GRAIN = 8  # channels by which a feed-forward grows: other widths are slow to multiply


@dataclass(frozen=True)
class Rung:
    """One way to build and train the small model; each has all decisions of those before it."""

    name: str
    cfg: ModelConfig
    precision: str = "bf16"
    mtp_weight: float = 0.0


def ladder(seq_len: int = SEQ_LEN) -> dict[str, Rung]:
    """The rungs by name, the baseline first and the whole design last, all of equal FLOPs.

    The last one sets the budget: its module for multi-token prediction comes on top of its layers,
    and what that costs is feed-forward width in the others.
    """
    mla = ModelConfig.named("tiny")
    moe = replace(
        mla,
        first_k_dense_replace=1,
        n_routed_experts=16,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=128,
    )
    whole = replace(moe, num_nextn_predict_layers=1)
    budget = training_flops_per_token(whole, seq_len)
    dense, latent, mixed = (with_flops(c, budget, seq_len) for c in (_plain(mla), mla, moe))
    rungs = (
        Rung(BASELINE, dense),
        Rung("+ MLA", latent),
        Rung("+ MoE", mixed),
        Rung("+ FP8", mixed, "fp8"),
        Rung(FULL, whole, "fp8", MTP_WEIGHT),
    )
    return {rung.name: rung for rung in rungs}


def training_flops_per_token(cfg: ModelConfig, seq_len: int = SEQ_LEN) -> float:
    """FLOP of one token's forward and backward, causal, multi-token prediction included.

    `cost.flops` leaves the modules out, as the paper does; whoever trains them pays for them.
    """
    main = flops.training_flops_per_token(cfg, seq_len)
    drafts = (_module_flops(cfg, seq_len - 1 - k) for k in range(cfg.num_nextn_predict_layers))
    shares = ((seq_len - 1 - k) / seq_len for k in range(cfg.num_nextn_predict_layers))
    return main + 3 * sum(each * share for each, share in zip(drafts, shares))


def _module_flops(cfg: ModelConfig, seq_len: int) -> float:
    """FLOP of one position's forward through one module and the shared head."""
    moe = cfg.is_moe_layer(cfg.num_hidden_layers)
    resting = params.routed_resting(cfg) if moe else 0
    met = params.mtp(cfg) // cfg.num_nextn_predict_layers - resting
    head = cfg.vocab_size * cfg.hidden_size
    width = cfg.num_attention_heads * (cfg.qk_head_dim + cfg.value_dim)
    return 2 * (met + head) + seq_len * width  # scores and values over half the positions


def with_flops(cfg: ModelConfig, budget: float, seq_len: int = SEQ_LEN) -> ModelConfig:
    """`cfg` with the feed-forward width that brings a token's training FLOPs nearest to `budget`.

    A mixture of experts widens all its experts alike as far as the budget reaches; its dense layers
    take up what is left, and a dense model takes up all. Widths grow in steps of GRAIN.
    """
    if cfg.n_routed_experts is not None:
        cfg = _widened(cfg, "moe_intermediate_size", budget, seq_len, math.floor)
    return _widened(cfg, "intermediate_size", budget, seq_len, round)


def _widened(
    cfg: ModelConfig, field: str, budget: float, seq_len: int, rounded: Callable[[float], int]
) -> ModelConfig:
    """`cfg` with `field` wider by as many steps of GRAIN as bring it to `budget`."""
    now = training_flops_per_token(cfg, seq_len)
    width = getattr(cfg, field)
    step = training_flops_per_token(replace(cfg, **{field: width + GRAIN}), seq_len) - now
    return replace(cfg, **{field: width + GRAIN * rounded((budget - now) / step)})


def _plain(mla: ModelConfig) -> ModelConfig:
    """The same frame around plain multi-head attention: as many heads, as wide as MLA's values."""
    return ModelConfig(
        model_type="llama",
        rope_interleave=False,
        head_dim=mla.v_head_dim,
        **{name: getattr(mla, name) for name in _SHARED},
    )


_SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "max_position_embeddings", "rope_theta", "rms_norm_eps"),
    "initializer_range",
)
