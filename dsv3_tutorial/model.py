"""The whole model: embedding, blocks, norm and head, under Hugging Face's names.

B batch, S positions, D hidden_size. The keys of `state_dict()` are those of a public checkpoint.
"""

import torch
from torch import Tensor, nn

from dsv3_tutorial.attention.cache import FullCache, LatentCache
from dsv3_tutorial.block import Block, initialize
from dsv3_tutorial.config import ModelConfig

Caches = list[LatentCache] | list[FullCache]


class Decoder(nn.Module):
    """What Hugging Face keeps under `model.`: everything between token ids and the head."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Block(cfg, i) for i in range(cfg.num_hidden_layers))
        self.norm = nn.RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)

    def forward(self, input_ids: Tensor, caches: Caches | None = None) -> Tensor:
        x = self.embed_tokens(input_ids)  # (B, S, D)
        for i, layer in enumerate(self.layers):
            x = layer(x, cache=None if caches is None else caches[i])
        return self.norm(x)


class DeepSeekV3(nn.Module):
    """A language model of dense blocks. forward: input_ids (B, S) -> logits (B, S, vocab_size).

    A config without a latent gives the same frame around plain attention: the baselines that
    MLA is compared with. `caches`, one per layer, make it go on where the last call ended.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.model = Decoder(cfg)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        initialize(self, cfg.initializer_range)
        if cfg.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, caches: Caches | None = None) -> Tensor:
        return self.lm_head(self.model(input_ids, caches))

    def caches(self, batch: int, length: int, dtype: torch.dtype | None = None) -> Caches:
        """One empty cache per layer for `batch` sequences of up to `length` tokens.

        Latent caches for an MLA model, one key and value per key-value head otherwise.
        """
        kind = LatentCache if self.cfg.is_mla else FullCache
        weight = self.lm_head.weight
        made = [
            kind.for_config(self.cfg, batch, length, dtype or weight.dtype, weight.device)
            for _ in self.model.layers
        ]
        return made
