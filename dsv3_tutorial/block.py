"""One transformer block: attention, then a gated feed-forward, each behind a norm and a shortcut.

B batch, S positions, D hidden_size, F intermediate_size.
DeepSeek-V3 technical report, section 2.1, figure 2.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_tutorial.attention.cache import FullCache, LatentCache
from dsv3_tutorial.attention.mha import Attention
from dsv3_tutorial.attention.mla import MLA
from dsv3_tutorial.config import ModelConfig


class DenseMLP(nn.Module):
    """SwiGLU: one product decides, the other carries. forward: x (B, S, D) -> (B, S, D)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        d, f = cfg.hidden_size, cfg.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer of the model. forward: x (B, S, D), this layer's cache or None -> (B, S, D).

    The attention is MLA where the config has a latent, and MHA, GQA or MQA where it has none.
    """

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        if cfg.is_moe_layer(layer):
            raise NotImplementedError(
                f"Layer {layer} of this config is a mixture of experts, and a block is dense here. "
                "Its weights would be left out without a word. Set n_routed_experts to null, or "
                f"first_k_dense_replace to {cfg.num_hidden_layers}."
            )
        self.input_layernorm = nn.RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.self_attn = MLA(cfg) if cfg.is_mla else Attention(cfg)
        self.post_attention_layernorm = nn.RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.mlp = DenseMLP(cfg)

    def forward(self, x: Tensor, cache: FullCache | LatentCache | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cache=cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def initialize(module: nn.Module, std: float) -> None:
    """Draw every matrix of `module` from a normal of width `std` (the report, section 4.2)."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.RMSNorm):
            nn.init.ones_(part.weight)
