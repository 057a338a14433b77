"""How many parameters a model has and how many of them one token meets, part by part, exactly."""

from dataclasses import dataclass

from dsv3_tutorial.config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """A model's parameters. `by_part` sums to `total`; multi-token prediction stands apart."""

    total: int
    activated: int  # what one token is multiplied with: output head in, input embedding out
    by_part: dict[str, int]
    mtp: int  # what the MTP modules add; embedding and head are the main model's


def count(cfg: ModelConfig) -> Parameters:
    """Every learned number of the model, to the last one: DeepSeek-V3 has 671,026,419,200.

    Parts: embedding, head, attention, dense_ffn, shared_experts, routed_experts, gate, norms.
    `e_score_correction_bias` counts under gate, one number an expert and layer: no gradient reaches
    it, but balancing moves it, it decides the routing and the checkpoint ships it.
    """
    layers = range(cfg.num_hidden_layers)
    parts = {"embedding": cfg.vocab_size * cfg.hidden_size}
    parts["head"] = 0 if cfg.tie_word_embeddings else parts["embedding"]
    for layer in layers:
        for part, number in layer_parts(cfg, cfg.is_moe_layer(layer)).items():
            parts[part] = parts.get(part, 0) + number
    parts["norms"] += cfg.hidden_size  # the last one, before the head
    parts = {name: parts.get(name, 0) for name in _PARTS}
    total = sum(parts.values())
    resting = routed_resting(cfg) * sum(cfg.is_moe_layer(layer) for layer in layers)
    unread = 0 if cfg.tie_word_embeddings else parts["embedding"]  # a tied one is read as the head
    return Parameters(total, total - resting - unread, parts, mtp(cfg))


_PARTS = (
    *("embedding", "head", "attention", "dense_ffn"),
    *("shared_experts", "routed_experts", "gate", "norms"),
)


def layer_parts(cfg: ModelConfig, moe: bool) -> dict[str, int]:
    """One transformer block's parameters by part."""
    matrices, norms = attention(cfg)
    parts = {"attention": matrices, "norms": norms + 2 * cfg.hidden_size}
    if not moe:
        return {**parts, "dense_ffn": 3 * cfg.hidden_size * cfg.intermediate_size}
    bias = cfg.n_routed_experts if cfg.topk_method == "noaux_tc" else 0
    return {
        **parts,
        "shared_experts": cfg.n_shared_experts * expert(cfg),
        "routed_experts": cfg.n_routed_experts * expert(cfg),
        "gate": cfg.n_routed_experts * cfg.hidden_size + bias,
    }


def attention(cfg: ModelConfig) -> tuple[int, int]:
    """One attention layer's projections (their biases included) and the norms inside it."""
    return _latent_attention(cfg) if cfg.is_mla else (_plain_attention(cfg), 0)


def _latent_attention(cfg: ModelConfig) -> tuple[int, int]:
    d, heads, c, q = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank, cfg.q_lora_rank
    queries = heads * cfg.qk_head_dim
    latent = c + cfg.qk_rope_head_dim
    matrices = (d * q + q * queries) if q else d * queries
    matrices += d * latent + c * heads * (cfg.qk_nope_head_dim + cfg.v_head_dim)
    matrices += heads * cfg.v_head_dim * d
    biases = (q or 0) + latent + d if cfg.attention_bias else 0
    return matrices + biases, c + (q or 0)


def _plain_attention(cfg: ModelConfig) -> int:
    d, size = cfg.hidden_size, cfg.head_size
    queries, keys = cfg.num_attention_heads * size, cfg.kv_heads * size
    biases = queries + 2 * keys if cfg.attention_bias or cfg.qkv_bias else 0
    biases += d if cfg.attention_bias else 0
    return 2 * d * queries + 2 * d * keys + biases


def expert(cfg: ModelConfig) -> int:
    """One expert: gate, up and down."""
    return 3 * cfg.hidden_size * cfg.moe_intermediate_size


def moe_layer(cfg: ModelConfig) -> tuple[int, int]:
    """One layer's mixture of experts: its parameters, and those that a token is multiplied with.

    The gate scores every expert and the shared ones serve every token, so both count whole; of the
    routed experts a token meets num_experts_per_tok.
    """
    expert = 3 * cfg.hidden_size * cfg.moe_intermediate_size  # gate, up and down
    gate = cfg.n_routed_experts * cfg.hidden_size
    if cfg.topk_method == "noaux_tc":
        gate += cfg.n_routed_experts  # the balance bias
    always = gate + cfg.n_shared_experts * expert
    return always + cfg.n_routed_experts * expert, always + cfg.num_experts_per_tok * expert


def routed_resting(cfg: ModelConfig) -> int:
    """Routed experts' parameters that a token does not meet in one MoE layer."""
    if cfg.n_routed_experts is None:
        return 0
    total, met = moe_layer(cfg)
    return total - met


def mtp(cfg: ModelConfig) -> int:
    """What the multi-token prediction modules add: a block, M_k (D, 2 D) and three norms each."""
    block = sum(layer_parts(cfg, cfg.is_moe_layer(cfg.num_hidden_layers)).values())
    return cfg.num_nextn_predict_layers * (block + 2 * cfg.hidden_size**2 + 3 * cfg.hidden_size)
