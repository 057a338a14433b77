"""What one attention layer's decode step computes and reads, in each of the forms MLA can take.

`heads` MHA and GQA over a cache of keys and values. For MLA: `expanded`, every head's key and value
cached; `reexpanded`, the latent cached and all heads rebuilt at each step; `absorbed`, the latent
cached and attended to directly. The three give the same output.
"""

from dataclasses import dataclass

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import params

FORMS = ("heads", "expanded", "reexpanded", "absorbed")


@dataclass(frozen=True)
class DecodeCost:
    """One layer's decode step. FLOP and bytes, each split by what causes them.

    temporary_bytes: rebuilt heads written out and read back; 0 in a kernel that keeps them on chip.
    """

    weight_flops: float  # projections
    cache_flops: float  # all that grows with the cached tokens
    weight_bytes: float
    cache_bytes: float
    temporary_bytes: float = 0.0

    @property
    def flops(self) -> float:
        return self.weight_flops + self.cache_flops

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.cache_bytes + self.temporary_bytes

    @property
    def intensity(self) -> float:
        """FLOP per byte moved: against a chip's ridge point it says which of the two bounds."""
        return self.flops / self.bytes


def decode_step(
    cfg: ModelConfig,
    context: int,
    batch: int = 1,
    queries: int = 1,
    form: str | None = None,
    bytes_per_element: float = 2,
) -> DecodeCost:
    """One attention layer's step for `batch` sequences of `context` cached tokens, `queries` new.

    Every query is counted against all cached tokens. form None: absorbed for MLA, heads otherwise.
    Weights are read once for the whole batch, a cache once for each sequence.
    """
    form = form or ("absorbed" if cfg.is_mla else "heads")
    if form not in FORMS or (form == "heads") == cfg.is_mla:
        known = "expanded, reexpanded and absorbed" if cfg.is_mla else "heads"
        what = f"form {form!r} does not exist for this {cfg.model_type} config"
        raise ValueError(f"{what}: its cost has no meaning. Take {known}.")
    weights = params.attention(cfg)[0]
    rows, up = batch * queries, up_projection(cfg)
    rebuilt = batch * context * up if form == "reexpanded" else 0
    projected = weights - up if form == "reexpanded" else weights  # rebuilding covers the new rows
    elements = batch * context * cached_elements(cfg, form)
    heads_rebuilt = batch * context * cfg.num_attention_heads * _rebuilt_width(cfg, form)
    scores = rows * context * cfg.num_attention_heads * score_width(cfg, form)
    return DecodeCost(
        weight_flops=2 * rows * projected,
        cache_flops=2 * (scores + rebuilt),
        weight_bytes=weights * bytes_per_element,
        cache_bytes=elements * bytes_per_element,
        temporary_bytes=2 * heads_rebuilt * bytes_per_element,
    )


def up_projection(cfg: ModelConfig) -> int:
    """Elements of W_UK and W_UV together, H (N + V) C; 0 without a latent."""
    if not cfg.is_mla:
        return 0
    width = cfg.qk_nope_head_dim + cfg.v_head_dim
    return cfg.num_attention_heads * width * cfg.kv_lora_rank


def score_width(cfg: ModelConfig, form: str) -> int:
    """Multiplications per head, query and cached token: 2 C + R absorbed, else N + R + V."""
    if form == "absorbed":
        return 2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim
    return cfg.qk_head_dim + cfg.value_dim


def cached_elements(cfg: ModelConfig, form: str) -> int:
    """Elements read per cached token and layer."""
    if form == "heads":
        return 2 * cfg.kv_heads * cfg.head_size
    if form == "expanded":
        return cfg.num_attention_heads * (cfg.qk_head_dim + cfg.value_dim)
    return cfg.kv_lora_rank + cfg.qk_rope_head_dim


def _rebuilt_width(cfg: ModelConfig, form: str) -> int:
    return cfg.qk_nope_head_dim + cfg.v_head_dim if form == "reexpanded" else 0


def crossover_queries(cfg: ModelConfig) -> float:
    """Queries per step from which rebuilding the heads takes less arithmetic than absorbing.

    C (N + V) / ((2 C + R) - (N + R + V)) per cached token; the heads cancel. DeepSeek-V3: 170.7, so
    prefill expands and decode absorbs. Infinite where absorbing is never dearer.
    """
    rebuild = cfg.kv_lora_rank * (cfg.qk_nope_head_dim + cfg.v_head_dim)
    dearer = score_width(cfg, "absorbed") - score_width(cfg, "expanded")
    return rebuild / dearer if dearer > 0 else float("inf")
