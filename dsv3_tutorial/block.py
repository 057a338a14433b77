"""One transformer block: attention, then a feed-forward, each behind a norm and a shortcut.

B batch, S positions, D hidden_size. The feed-forward is dense or a mixture of experts.
DeepSeek-V3 technical report, section 2.1, figure 2.
"""

from torch import Tensor, nn

from dsv3_tutorial.attention.cache import FullCache, LatentCache
from dsv3_tutorial.attention.mha import Attention
from dsv3_tutorial.attention.mla import MLA
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.mlp import MLP
from dsv3_tutorial.moe.experts import Experts
from dsv3_tutorial.moe.gate import Gate
from dsv3_tutorial.moe.layer import MoE


class Block(nn.Module):
    """One layer of the model. forward: x (B, S, D), this layer's cache or None -> (B, S, D).

    The attention is MLA where the config has a latent, and MHA, GQA or MQA where it has none; the
    first `first_k_dense_replace` layers are dense, the others a mixture of experts.
    """

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.self_attn = MLA(cfg) if cfg.is_mla else Attention(cfg)
        self.post_attention_layernorm = nn.RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        dense = not cfg.is_moe_layer(layer)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size) if dense else MoE(cfg)

    def forward(self, x: Tensor, cache: FullCache | LatentCache | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cache=cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def initialize(module: nn.Module, std: float) -> None:
    """Draw every matrix of `module` from a normal of width `std` (the report, section 4.2).

    On the meta device there is nothing to draw, and torch would load its compiler to find out.
    """
    if next(module.parameters()).is_meta:
        return
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
        if isinstance(part, Gate):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, Experts):
            nn.init.normal_(part.gate_up_proj, std=std)
            nn.init.normal_(part.down_proj, std=std)
        if isinstance(part, nn.RMSNorm):
            nn.init.ones_(part.weight)
