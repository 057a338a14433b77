"""The whole model: embedding, blocks, norm, head and draft modules, under Hugging Face's names.

B batch, S positions, D hidden_size, V vocab_size. The keys of `state_dict()` are those that
transformers has in memory: all experts of a layer in one tensor. `checkpoint` splits them on disk.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dsv3_tutorial import checkpoint
from dsv3_tutorial.attention.cache import CacheError, FullCache, LatentCache
from dsv3_tutorial.attention.cache_fp8 import Fp8LatentCache
from dsv3_tutorial.block import Block, initialize
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.mtp import MTPModule

Caches = list[LatentCache] | list[Fp8LatentCache] | list[FullCache]
CACHE_KINDS = ("bf16", "fp8", "fp8-rope")


class Decoder(nn.Module):
    """What Hugging Face keeps under `model.`: everything between token ids and the head.

    `layers` holds the blocks and behind them the MTP modules, as a checkpoint numbers them.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        depth = cfg.num_hidden_layers
        drafts = range(depth, depth + cfg.num_nextn_predict_layers)
        self.depth = depth
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(
            [Block(cfg, i) for i in range(depth)] + [MTPModule(cfg, i) for i in drafts]
        )
        self.norm = nn.RMSNorm(cfg.hidden_size, eps=cfg.rms_norm_eps)

    def forward(self, input_ids: Tensor, caches: Caches | None = None) -> Tensor:
        x = self.embed_tokens(input_ids)  # (B, S, D)
        for i, layer in enumerate(self.layers[: self.depth]):
            x = layer(x, cache=None if caches is None else caches[i])
        return self.norm(x)


class DeepSeekV3(nn.Module):
    """A language model of dense and MoE blocks. forward: input_ids (B, S) -> logits (B, S, V).

    A config without a latent or without experts gives the same frame around plain attention or
    dense layers: the baselines. `caches`, one per layer, make it go on where the last call ended.
    With `drafts=True` it gives the logits and, for each MTP module k = 0, 1, ..., logits
    (B, S - 1 - k, V) whose position i guesses token i + 2 + k of the input.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.model = Decoder(cfg)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        initialize(self, cfg.initializer_range)
        if cfg.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, input_ids: Tensor, caches: Caches | None = None, drafts: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        hidden = self.model(input_ids, caches)  # (B, S, D)
        logits = self.lm_head(hidden)  # (B, S, V)
        return (logits, self._drafts(hidden, input_ids)) if drafts else logits

    @property
    def mtp(self) -> list[MTPModule]:
        """The multi-token prediction modules, in the order they follow each other."""
        return list(self.model.layers[self.model.depth :])

    def draft(
        self, hidden: Tensor, next_ids: Tensor, module: int = 0, cache: LatentCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """One MTP module's guess at the token after `next_ids`: hidden, next_ids (B, S) -> both.

        hidden (B, S, D) belongs to the positions before `next_ids`. Returns the module's own
        hidden (B, S, D), which the next module takes, and its logits (B, S, V).
        """
        embedded = self.model.embed_tokens(next_ids)  # (B, S, D)
        hidden = self.mtp[module](hidden, embedded, cache=cache)
        return hidden, self.lm_head(hidden)

    def _drafts(self, hidden: Tensor, input_ids: Tensor) -> list[Tensor]:
        logits = []
        for k in range(len(self.mtp)):
            hidden, guessed = self.draft(hidden[:, :-1], input_ids[:, k + 1 :], k)
            logits.append(guessed)
        return logits

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        mtp: bool = True,
    ) -> "DeepSeekV3":
        """The model in a checkpoint's folder, with config.json and safetensors as published.

        dtype None keeps what is stored, FP8 as bfloat16. mtp=False leaves out the modules for
        multi-token prediction. Raises ConfigError or CheckpointError with all that is wrong, before
        there is a model. Memory: the weights once, and one tensor more.
        """
        published = checkpoint.read_config(folder)
        cfg = published if mtp else replace(published, num_nextn_predict_layers=0)
        with torch.device("meta"):
            model = cls(cfg)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        model.load_state_dict(
            checkpoint.load(folder, published, shapes, dtype, device), assign=True
        )
        if cfg.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight  # two parameters by now
        return model

    def save_pretrained(
        self, folder: str | Path, dtype: torch.dtype | None = None, quantize: str | None = None
    ) -> None:
        """Write the public layout, which from_pretrained and transformers read. See `checkpoint`.

        quantize="fp8" stores the projections as DeepSeek-V3's own files do, a quarter of the bytes.
        """
        checkpoint.save(folder, self.cfg, self.state_dict(), dtype, quantize)

    def caches(
        self,
        batch: int,
        length: int,
        dtype: torch.dtype | None = None,
        kind: str | None = None,
    ) -> Caches:
        """One empty cache per layer, MTP modules last, for `batch` sequences of `length` tokens.

        Latent caches for an MLA model, one key and value per key-value head otherwise. They hold
        the model's dtype, or `dtype`, or what `kind` names: "bf16", "fp8" (the latent in E4M3), and
        "fp8-rope" (the RoPE key too). Raises CacheError for FP8 without a latent, and for a kind
        that does not exist or contradicts `dtype`.
        """
        _check_kind(kind, dtype)
        dtype = torch.bfloat16 if kind == "bf16" else dtype or self.lm_head.weight.dtype
        where = self.cfg, batch, length, dtype, self.lm_head.weight.device
        if kind in ("fp8", "fp8-rope"):
            own = {"rope_fp8": kind == "fp8-rope"}
            return [Fp8LatentCache.for_config(*where, **own) for _ in self.model.layers]
        plain = LatentCache if self.cfg.is_mla else FullCache
        return [plain.for_config(*where) for _ in self.model.layers]


def _check_kind(kind: str | None, dtype: torch.dtype | None) -> None:
    if kind is not None and kind not in CACHE_KINDS:
        raise CacheError(
            f"A cache of kind {kind!r} does not exist, so there is nowhere to store a token. "
            f"Pass one of {CACHE_KINDS}, or None for the model's own dtype."
        )
    if kind == "bf16" and dtype not in (None, torch.bfloat16):
        raise CacheError(
            f"A cache was asked for in {dtype} and in BF16, and tokens are stored in one of them. "
            "Leave out dtype, or kind."
        )
