"""A short bridge to the models after V3: what each changed, and what the change does to the bill.

Only what its maker published and we could read; the rest of these models is not described here.
"""

from dataclasses import dataclass, replace

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import comm_moe, params, precision, sparse
from dsv3_tutorial.hardware import chip

NODES = 8  # of eight GPUs, over which V3's training spreads a layer's experts
LONG = 131_072


@dataclass(frozen=True)
class Effect:
    """One number of the bill, before (DeepSeek-V3) and after."""

    what: str
    unit: str
    before: float
    after: float

    @property
    def ratio(self) -> float:
        return self.after / self.before


@dataclass(frozen=True)
class Successor:
    """A later model: what it changed, whose word that is, and how surely we know it."""

    name: str
    when: str
    changed: str
    source: str
    confidence: str


SUCCESSORS = (
    Successor(
        "DeepSeek-V3.1",
        "August 2025",
        "V3's shapes; trained with scales that are powers of two (UE8M0), as microscaling has them",
        "its model card",
        "published",
    ),
    Successor(
        "DeepSeek-V3.2",
        "September 2025 (Exp)",
        "V3's shapes and an indexer: each query attends to the 2,048 cached tokens it ranks best",
        "its config.json and inference code: 64 index heads of 128, topk 2048, keys in FP8",
        "published",
    ),
    Successor(
        "Kimi K2",
        "July 2025",
        "V3's block with 384 experts for 256, half the heads, one dense layer and no expert groups",
        "its model summary, and the sizes in public implementations",
        "published",
    ),
)


def kimi_k2() -> ModelConfig:
    """V3's config with Kimi K2's sizes: 1,026 billion parameters, 31.7 activated.

    Published as "1T" and "32B". RoPE's stretching is left as V3's: no cost depends on it.
    """
    return replace(
        ModelConfig.named("deepseek-v3"),
        vocab_size=163_840,
        num_attention_heads=64,
        num_key_value_heads=64,
        n_routed_experts=384,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        num_nextn_predict_layers=0,
        routed_scaling_factor=2.827,
    )


def effects(name: str) -> tuple[Effect, ...]:
    """What a successor's change does, beside V3. Raises KeyError that lists the names."""
    computed = {"DeepSeek-V3.1": _scales, "DeepSeek-V3.2": _sparse, "Kimi K2": _wider}
    if name not in computed:
        known = ", ".join(computed)
        raise KeyError(f"no successor {name!r}: nothing is known of it here. There are {known}.")
    return computed[name]()


def _scales() -> tuple[Effect, ...]:
    old = precision.STORAGE["e4m3"]
    new = replace(old, scale_bits=8)
    return (
        Effect("bits of an activation", "bits a value", old.bits_per_value, new.bits_per_value),
        Effect(
            "the scales' share", "% of the values' bytes", 100 * old.overhead, 100 * new.overhead
        ),
    )


def _sparse() -> tuple[Effect, ...]:
    cfg, h800 = ModelConfig.named("deepseek-v3"), chip("h800")
    found = []
    for context in (4989, LONG):
        dense, chosen = (sparse.decode(cfg, context, indexer) for indexer in (None, sparse.V32))
        at = f"at {context:,} tokens"
        found += [
            Effect(f"attention's reads a layer {at}", "MB", dense.bytes / 1e6, chosen.bytes / 1e6),
            Effect(
                f"attention's core on an H800 {at}",
                "us",
                1e6 * dense.seconds(h800),
                1e6 * chosen.seconds(h800),
            ),
        ]
    cache = (sparse.cache_bytes(cfg, indexer) / 1e3 for indexer in (None, sparse.V32))
    return (*found, Effect("cached bytes a token", "kB", *cache))


def _wider() -> tuple[Effect, ...]:
    models = ModelConfig.named("deepseek-v3"), kimi_k2()
    counted = [params.count(cfg) for cfg in models]
    layers = [
        comm_moe.Layer(
            *(cfg.n_routed_experts, cfg.num_experts_per_tok, cfg.hidden_size),
            *((cfg.topk_group, cfg.n_group) if cfg.n_group > 1 else (None, None)),
        )
        for cfg in models
    ]
    looks = [sparse.decode(cfg, LONG, None, "bf16") for cfg in models]
    return (
        Effect("parameters", "billion", *(count.total / 1e9 for count in counted)),
        Effect("activated", "billion", *(count.activated / 1e9 for count in counted)),
        Effect(
            f"nodes a token reaches, of {NODES}",
            "nodes",
            *(comm_moe.nodes_reached(layer, NODES) for layer in layers),
        ),
        Effect(
            "attention's arithmetic a cached byte",
            "FLOP",
            *(look.core_flops / look.core_bytes for look in looks),
        ),
    )
