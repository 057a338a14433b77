"""Multi-token prediction: one more block that guesses the token after the next.

B batch, S positions, D hidden_size, V vocab_size. DeepSeek-V3 report, section 2.2.
"""

import torch
from torch import Tensor, nn

from dsv3_tutorial.attention.cache import FullCache, LatentCache
from dsv3_tutorial.block import Block
from dsv3_tutorial.config import ModelConfig


class SharedHead(nn.Module):
    """What the module has of a head: its norm. The matrix is the main model's."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.norm = nn.RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)


class MTPModule(Block):
    """forward: hidden (B, S, D), embedded (B, S, D) of the tokens after them -> (B, S, D).

    `hidden` at position i is what the main model's head reads, after its final norm, or the output
    of the module before this one; `embedded` is the next token's row of the shared embedding. What
    comes out goes through the shared head. The halves stand as in the published checkpoint,
    embedding first; equation 21 writes them the other way round, which permutes eh_proj's columns.
    """

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__(cfg, layer)
        self.enorm = nn.RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.hnorm = nn.RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * cfg.hidden_size, cfg.hidden_size, bias=False)  # M_k
        self.shared_head = SharedHead(cfg)

    def forward(
        self, hidden: Tensor, embedded: Tensor, cache: FullCache | LatentCache | None = None
    ) -> Tensor:
        both = torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1)  # (B, S, 2D)
        return self.shared_head.norm(super().forward(self.eh_proj(both), cache=cache))
