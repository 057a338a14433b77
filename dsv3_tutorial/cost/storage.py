"""How many bytes a weight or a cached token takes in each format, its scales counted, exactly.

The formats are those of `weights.formats` and of `fp8.latent`. Everything that lies in memory
before a step is here; what one operator hands to the next is not.
"""

import math

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import attention, params

WEIGHTS = ("float32", "bf16", "fp8", "int8", "int8-tensor", "int8-tile", "int4")
CACHES = ("float32", "bf16", "fp8", "fp8-rope")
GROUP = 128  # weights that share a scale: a side of an FP8 block, a run of INT4


def matrix_bytes(m: int, k: int, weights: str) -> int:
    """Bytes of one matrix (m, k) at rest, its float32 scales included.

    fp8: a scale each 128 x 128 block. int8: one each output row, or one in all (-tensor), or one
    each 128 in a row (-tile). int4: one each 128 in a row.
    """
    groups = math.ceil(k / GROUP)
    return {
        "float32": 4 * m * k,
        "bf16": 2 * m * k,
        "fp8": m * k + 4 * math.ceil(m / GROUP) * groups,
        "int8": m * k + 4 * m,
        "int8-tensor": m * k + 4,
        "int8-tile": m * k + 4 * m * groups,
        "int4": m * math.ceil(k / 2) + 4 * m * groups,
    }[weights]


def kept(weights: str) -> int:
    """Bytes a number of what no format narrows: embedding, output head, gate, norms, biases."""
    return 4 if weights == "float32" else 2


def cache_row(cfg: ModelConfig, cache: str, form: str | None = None) -> int:
    """Bytes that one token leaves in one layer: V3 1,152 in BF16, 656 in FP8, 596 in fp8-rope.

    FP8 stores the latent in E4M3 with a float32 scale each 128, and the RoPE key in BF16; fp8-rope
    stores that as the latent; keys and values of heads have a scale each 128 too. form: as in
    cost.attention; None: as it is cached.
    """
    elements = attention.cached_elements(cfg, form or ("absorbed" if cfg.is_mla else "heads"))
    if cache in ("float32", "bf16"):
        return {"float32": 4, "bf16": 2}[cache] * elements
    rope = cfg.qk_rope_head_dim if cfg.is_mla and form in (None, "absorbed") else 0
    latent = elements - rope + 4 * math.ceil((elements - rope) / GROUP)
    return latent + (2 * rope if cache == "fp8" else rope + 4 * math.ceil(rope / GROUP))


def cache_bytes(cfg: ModelConfig, cache: str, context: int, form: str | None = None) -> int:
    """Bytes of one sequence's cache in all layers, MTP modules not counted."""
    return context * cfg.num_hidden_layers * cache_row(cfg, cache, form)


def held_bytes(cfg: ModelConfig, weights: str = "bf16", mtp: bool = False) -> dict[str, int]:
    """Bytes of all weights at rest, by part; every expert counts.

    weights narrows projections and experts; the rest stays BF16 (float32 in float32). mtp: with the
    draft modules, their blocks counted under the same parts and M_k under "draft projection".
    """
    numbers = copies(cfg, mtp)
    numbers["routed experts"] *= cfg.n_routed_experts or 0
    sides = {**matrices(cfg), "draft projection": [(cfg.hidden_size, 2 * cfg.hidden_size)]}
    held = {
        part: numbers[part] * sum(matrix_bytes(m, k, narrowed(part, weights)) for m, k in shapes)
        for part, shapes in sides.items()
    }
    for part, extra in vectors(cfg, weights, mtp).items():
        held[part] = held.get(part, 0) + extra
    held["embedding"] = 0 if cfg.tie_word_embeddings else held["output head"]
    return {part: size for part, size in held.items() if size}


def matrices(cfg: ModelConfig) -> dict[str, list[tuple[int, int]]]:
    """The sides (m, k) of every part's matrices in one layer; of the experts, one expert's."""
    d, width = cfg.hidden_size, cfg.moe_intermediate_size
    found = {"output head": [(cfg.vocab_size, d)], "attention weights": _attention(cfg)}
    if moe_layers(cfg) < cfg.num_hidden_layers:
        found["dense MLP"] = _swiglu(d, cfg.intermediate_size)
    if moe_layers(cfg):
        found["gate"] = [(cfg.n_routed_experts, d)]
        found["routed experts"] = _swiglu(d, width)
    if moe_layers(cfg) and cfg.n_shared_experts:
        found["shared experts"] = _swiglu(d, width * cfg.n_shared_experts)
    return found


def copies(cfg: ModelConfig, mtp: bool = False) -> dict[str, int]:
    """How many layers have each part's matrices."""
    drafts = cfg.num_nextn_predict_layers if mtp else 0
    moe, layers = moe_layers(cfg, mtp), cfg.num_hidden_layers + drafts
    found = {"output head": 1, "attention weights": layers, "dense MLP": layers - moe}
    return found | {
        **dict.fromkeys(("gate", "routed experts", "shared experts"), moe),
        "draft projection": drafts,
    }


def vectors(cfg: ModelConfig, weights: str, mtp: bool = False) -> dict[str, int]:
    """Bytes of what is no matrix: norms, biases, and the gates' balance bias, always float32."""
    drafts = cfg.num_nextn_predict_layers if mtp else 0
    layers, d = cfg.num_hidden_layers + drafts, cfg.hidden_size
    norms = layers * (params.attention(cfg)[1] + 2 * d) + d + drafts * 3 * d
    biases = params.attention(cfg)[0] - sum(m * k for m, k in _attention(cfg))
    found = {"norms": norms * kept(weights), "attention weights": layers * biases * kept(weights)}
    if moe_layers(cfg) and cfg.topk_method == "noaux_tc":
        found["gate"] = 4 * moe_layers(cfg, mtp) * cfg.n_routed_experts
    return found


def narrowed(part: str, weights: str) -> str:
    """The format that a part's matrices really have."""
    wide = "float32" if weights == "float32" else "bf16"
    return wide if part in ("output head", "gate", "draft projection") else weights


def moe_layers(cfg: ModelConfig, mtp: bool = False) -> int:
    """How many layers are a mixture of experts."""
    drafts = cfg.num_nextn_predict_layers if mtp else 0
    return sum(cfg.is_moe_layer(layer) for layer in range(cfg.num_hidden_layers + drafts))


def check_formats(weights: str, cache: str) -> None:
    """Raise ValueError for a format whose bytes are not known."""
    if weights not in WEIGHTS or cache not in CACHES:
        raise ValueError(
            f"weights {weights!r} and cache {cache!r}: the bytes of one are not known. "
            f"Take weights out of {WEIGHTS} and a cache out of {CACHES}."
        )


def _attention(cfg: ModelConfig) -> list[tuple[int, int]]:
    d, heads = cfg.hidden_size, cfg.num_attention_heads
    if not cfg.is_mla:
        own, shared = heads * cfg.head_size, cfg.kv_heads * cfg.head_size
        return [(own, d), (shared, d), (shared, d), (d, own)]
    q, c, queries = cfg.q_lora_rank, cfg.kv_lora_rank, heads * cfg.qk_head_dim
    up = heads * (cfg.qk_nope_head_dim + cfg.v_head_dim)
    asked = [(q, d), (queries, q)] if q else [(queries, d)]
    return [*asked, (c + cfg.qk_rope_head_dim, d), (up, c), (d, heads * cfg.v_head_dim)]


def _swiglu(d: int, width: int) -> list[tuple[int, int]]:
    return [(width, d), (width, d), (d, width)]
