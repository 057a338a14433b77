"""How many bytes a model holds: its cache, its weights, and what training keeps beside them."""

from dataclasses import dataclass

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import params


def kv_elements_per_token_and_layer(cfg: ModelConfig) -> int:
    """Numbers that one token leaves in one layer's cache: C + R in MLA, 2 x heads x width else."""
    if cfg.is_mla:
        return cfg.kv_lora_rank + cfg.qk_rope_head_dim
    return 2 * cfg.kv_heads * cfg.head_size


def kv_cache_bytes_per_token(cfg: ModelConfig, bytes_per_element: float = 2) -> float:
    """Bytes that one token leaves in the cache, all layers: V3 70,272 in BF16 (ISCA table 1).

    MLA caches a latent and one rotated key for all heads; MHA and GQA a key and a value for each
    key-value head. The multi-token prediction module's own layer is not counted.
    """
    if cfg.is_mla:
        elements = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    else:
        elements = 2 * cfg.kv_heads * cfg.head_size
    return elements * cfg.num_hidden_layers * bytes_per_element


def kv_cache_bytes(
    cfg: ModelConfig, context: int, batch: int = 1, bytes_per_element: float = 2
) -> float:
    """Bytes of the cache of `batch` sequences of `context` tokens: linear in both."""
    return kv_cache_bytes_per_token(cfg, bytes_per_element) * context * batch


def kv_cache_bytes_expanded(cfg: ModelConfig, bytes_per_element: float = 2) -> float:
    """Bytes a token would leave if every head's own key and value were cached.

    The base of MLA's 71x: 40,960 elements a layer in V3 against 576. Equal to the real cache for
    MHA; GQA's heads are repeated.
    """
    elements = cfg.num_attention_heads * (cfg.qk_head_dim + cfg.value_dim)
    return elements * cfg.num_hidden_layers * bytes_per_element


def cache_bytes_per_gpu(
    cfg: ModelConfig, tensor_parallel: int, bytes_per_element: float = 2
) -> float:
    """Bytes that one token leaves on each GPU when attention is split by heads.

    Key-value heads are dealt out until each GPU holds one and are replicated from there on. A
    latent belongs to all heads, so every GPU holds all of it: splitting by heads saves nothing.
    """
    if cfg.is_mla:
        elements = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    else:
        heads = -(-cfg.kv_heads // tensor_parallel)  # rounded up: the fullest GPU, never under 1
        elements = 2 * heads * cfg.head_size
    return elements * cfg.num_hidden_layers * bytes_per_element


def weight_bytes(cfg: ModelConfig, fmt: str = "bf16", mtp: bool = False) -> float:
    """Bytes of the weights at rest. bf16: 2 each. fp8: 1 each for the linear layers of the blocks.

    In fp8 a float32 scale comes with each 128 x 128 block (0.024 %), and embedding, head, gate and
    norms stay in BF16 (V3 report, section 3.3.1). Sides are taken as multiples of 128.
    """
    counted = params.count(cfg)
    extra = counted.mtp if mtp else 0
    if fmt == "bf16":
        return 2 * (counted.total + extra)
    if fmt != "fp8":
        raise ValueError(f"no weight format {fmt!r}: its bytes are not known. Take bf16 or fp8.")
    kept = sum(counted.by_part[part] for part in ("embedding", "head", "gate", "norms"))
    return 2 * kept + (counted.total - kept + extra) * (1 + 4 / 128**2)


@dataclass(frozen=True)
class TrainingBytes:
    """Bytes per parameter that training holds, as the V3 report sets them (section 3.3.3)."""

    weights: float = 2  # the BF16 copy that multiplies; 1 in FP8
    master: float = 4  # float32, what the optimizer updates
    gradients: float = 4  # float32, accumulated over micro-batches
    moments: float = 2 * 2  # AdamW's two, in BF16; 8 in float32

    @property
    def total(self) -> float:
        return self.weights + self.master + self.gradients + self.moments

    @property
    def optimizer(self) -> float:
        """What ZeRO-1 deals out over the data-parallel ranks."""
        return self.master + self.moments


def training_bytes(cfg: ModelConfig, per_parameter: TrainingBytes | None = None) -> float:
    """Bytes of weights, gradients and optimizer over all GPUs, MTP included, activations not.

    Replicas come on top: each data-parallel group holds its own weights and gradients.
    """
    counted = params.count(cfg)
    return (counted.total + counted.mtp) * (per_parameter or TrainingBytes()).total


def activation_bytes_per_token(
    cfg: ModelConfig, recompute: bool = True, bytes_per_element: float = 2
) -> float:
    """Bytes that the forward pass of one token keeps for its backward, all layers, no MTP.

    Kept are the inputs of every matrix product and of attention; scores are not, as in
    FlashAttention. recompute drops what V3 computes again (report, section 3.2.3 and 3.3.3): the
    norms' outputs, MLA's up-projections and SwiGLU's output.
    """
    layers = (cfg.is_moe_layer(layer) for layer in range(cfg.num_hidden_layers))
    return sum(layer_activations(cfg, moe, recompute) for moe in layers) * bytes_per_element


def layer_activations(cfg: ModelConfig, moe: bool, recompute: bool = True) -> int:
    """Numbers that one layer keeps of a token for its backward."""
    residuals = 2 * cfg.hidden_size  # the stream before attention and before the FFN
    return (
        _attention_activations(cfg, recompute) + residuals + _ffn_activations(cfg, moe, recompute)
    )


def _attention_activations(cfg: ModelConfig, recompute: bool) -> int:
    heads, kv = cfg.num_attention_heads, cfg.num_attention_heads if cfg.is_mla else cfg.kv_heads
    expanded = heads * cfg.qk_head_dim + kv * (cfg.qk_head_dim + cfg.value_dim)
    output, normed = heads * cfg.value_dim, cfg.hidden_size
    if not cfg.is_mla:
        return expanded + output + (0 if recompute else normed)
    latents = (cfg.q_lora_rank or 0) + cfg.kv_lora_rank + cfg.qk_rope_head_dim
    normed += (cfg.q_lora_rank or 0) + cfg.kv_lora_rank
    return latents + output + (0 if recompute else expanded + normed)


def _ffn_activations(cfg: ModelConfig, moe: bool, recompute: bool) -> int:
    width, copies = cfg.intermediate_size, 1
    if moe:
        copies = cfg.num_experts_per_tok + cfg.n_shared_experts
        width = copies * cfg.moe_intermediate_size
    # Each expert keeps its own gathered input; recomputing a norm's output cannot bring that back.
    inputs = copies * cfg.hidden_size if moe else 0 if recompute else cfg.hidden_size
    return inputs + width * (2 if recompute else 3)
