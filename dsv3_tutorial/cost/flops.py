"""How much arithmetic a token costs: two operations a parameter, and attention's own products.

A multiplication and its addition are two operations. What is not a matrix product (norms, softmax,
rotations, the gate's selection) is left out, as in the paper.
"""

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import params


def forward_flops_per_token(cfg: ModelConfig, seq_len: int = 4096, causal: bool = True) -> float:
    """FLOP of one token's forward pass, averaged over a sequence of seq_len tokens.

    2 x activated parameters, and in each layer scores and values over the positions seen: half the
    sequence on average when causal. Linear in seq_len per token, so quadratic in the sequence.
    """
    seen = seq_len / 2 if causal else seq_len
    heads, width = cfg.num_attention_heads, cfg.qk_head_dim + cfg.value_dim
    return 2 * params.count(cfg).activated + cfg.num_hidden_layers * 2 * seen * heads * width


def training_flops_per_token(cfg: ModelConfig, seq_len: int = 4096, causal: bool = True) -> float:
    """FLOP of one token's forward and backward: three forwards, without multi-token prediction.

    DeepSeek-V3 at 4096, causal: 250.46e9, the paper's 250 (ISCA 2025, table 2). Recomputation comes
    on top and is no useful work.
    """
    return 3 * forward_flops_per_token(cfg, seq_len, causal)


def decode_flops_per_token(cfg: ModelConfig, context: int, absorb: bool = True) -> float:
    """FLOP of one decoded token that attends to `context` cached tokens.

    absorb matters to MLA alone: True multiplies 2 C + R per head and cached token, False N + R + V
    over heads that some cache has kept expanded. The projections cost the same either way: W_UK and
    W_UV meet the new token once, as key and value or as query and output.
    """
    if cfg.is_mla and absorb:
        width = 2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim
    else:
        width = cfg.qk_head_dim + cfg.value_dim
    attention = 2 * context * cfg.num_attention_heads * width
    return 2 * params.count(cfg).activated + cfg.num_hidden_layers * attention


def dense_estimate(cfg: ModelConfig) -> int:
    """72 L D^2 + 6 V D: the generic GPT count per trained token, blind to a model's real shapes.

    It hits both dense rows of ISCA table 2 (394 and 2448), so those rows were not counted like the
    MoE rows beside them; an inference, the paper does not say.
    """
    d = cfg.hidden_size
    return 72 * cfg.num_hidden_layers * d**2 + 6 * cfg.vocab_size * d
