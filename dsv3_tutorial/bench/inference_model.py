"""One model in every engine: ours in several formats, and transformers', with equal weights.

B batch, T cached tokens, V vocab_size. `trained` is the checkpoint that comes with the course;
`wide` has random weights, 115 M of them, so large that a step waits for their bytes.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dsv3_tutorial.attention.cache import Cache
from dsv3_tutorial.bench.attention_steps import peer_problem
from dsv3_tutorial.bench.inference_timing import AHEAD, Engine
from dsv3_tutorial.bench.moe_model import SMALL, _peer
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.files import data_path
from dsv3_tutorial.inference.quantize import nbytes, quantized
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.weights.formats import FORMATS

LONGEST = 2**15  # positions: more than any cell's context; a trained model is timed beyond its own
WIDE = replace(
    SMALL, vocab_size=512, hidden_size=1024, num_attention_heads=16, num_key_value_heads=16,
    n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1,
    first_k_dense_replace=0, moe_intermediate_size=1024, max_position_embeddings=LONGEST,
)  # fmt: skip
MODELS = ("trained", "wide")

PLAIN = "float32"
CACHED = {"bf16 cache": "bf16", "fp8 cache": "fp8"}  # float32 weights
WEIGHTS = ("bf16", *FORMATS)  # "bf16" computes in it too; the others in float32
# transformers' attention, experts and cache: `generate` takes the first two by default
PEERS = {
    "transformers sdpa": ("sdpa", "grouped_mm", False),
    "transformers eager": ("eager", "grouped_mm", False),
    "transformers static": ("eager", "grouped_mm", True),
}
FORMS = (PLAIN, *CACHED, *WEIGHTS, *PEERS)


class Engines:
    """One model's engines. Formats are made when first asked for. Nothing random is left changed.

    `peer_problem` says why transformers takes no part, or is None.
    """

    def __init__(self, name: str, cfg: ModelConfig | None = None, peers: bool = True):
        self.name = name
        self.plain = trained() if name == "trained" else _random(cfg or WIDE)
        self.cfg, self.made = self.plain.cfg, {PLAIN: self.plain}
        self.peer_problem, self.theirs = "it was not asked for", None
        if peers:
            self.peer_problem = peer_problem()
        if self.peer_problem is None:
            self.theirs = _peer(self.cfg, self.plain).eval()

    def model(self, form: str) -> DeepSeekV3:
        """Our model in a form of ours."""
        form = PLAIN if form in CACHED else form
        if form not in self.made:
            narrow = form != "bf16"
            self.made[form] = (
                quantized(self.plain, form) if narrow else copy.deepcopy(self.plain).bfloat16()
            )
            with torch.no_grad():  # each matrix is packed at its first use: all experts are met
                self.made[form](torch.arange(512)[None] % self.cfg.vocab_size)
        return self.made[form]

    def peer(self, form: str) -> nn.Module:
        """transformers' model with the two implementations that a form stands for."""
        attention, experts, _ = PEERS[form]
        self.theirs.config._attn_implementation = attention
        self.theirs.config._experts_implementation = experts
        return self.theirs

    def steps(self, context: int, batch: int, forms: Sequence[str]) -> dict[str, Engine]:
        """Decoding in each form, behind `context` cached tokens: a step -> logits (B, V).

        The caches hold random latents, each form's the same ones, rounded to what it stores.
        """
        numbers = torch.Generator().manual_seed(context)
        tokens = torch.randint(self.cfg.vocab_size, (batch, AHEAD), generator=numbers)
        filled = _rows(self.cfg, context, batch, numbers)
        ours = [form for form in forms if form not in PEERS]
        made = {form: self._own(form, tokens, filled) for form in ours}
        if self.theirs is not None:
            stored = [_as_transformers_stores(rows, self.cfg) for rows in filled]
            peers = [form for form in forms if form in PEERS]
            made |= {form: self._peer(form, tokens, stored) for form in peers}
        return made

    def _own(self, form: str, tokens: Tensor, filled: Sequence[Tensor]) -> Engine:
        model, rank = self.model(form), self.cfg.kv_lora_rank
        batch, context = filled[0].shape[:2]
        caches = model.caches(batch, context + AHEAD, kind=CACHED.get(form))
        for cache, rows in zip(caches, filled):
            rows = rows.to(model.lm_head.weight.dtype)
            cache.append(rows[..., :rank], rows[..., rank:])
        held = sum(cache.nbytes for cache in caches)

        def decode(ids: Tensor) -> Tensor:
            return model(ids, caches)[:, -1]

        return Engine(tokens, decode, _trimmer(caches, context), nbytes(model), held)

    def _peer(self, form: str, tokens: Tensor, stored: Sequence[tuple[Tensor, Tensor]]) -> Engine:
        from transformers import DynamicCache, StaticCache

        static, context = PEERS[form][2], stored[0][0].shape[2]
        cache = StaticCache(self.theirs.config, context + AHEAD) if static else DynamicCache()
        for layer, parts in enumerate(stored):
            some = parts if static else (part[:, :, :1] for part in parts)
            cache.update(*some, layer)

        def reset() -> None:
            for held, parts in zip(cache.layers, stored, strict=True):
                if static:
                    held.cumulative_length.fill_(context)  # what lies behind is written again
                else:
                    held.keys, held.values = parts  # a step makes new tensors: these are as before

        def decode(ids: Tensor) -> Tensor:
            return self.peer(form)(ids, past_key_values=cache, use_cache=True).logits[:, -1]

        reset()
        size = sum(p.nbytes for p in self.theirs.parameters())
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return Engine(tokens, decode, reset, size, held)


def trained(longest: int = LONGEST, mtp: bool = False) -> DeepSeekV3:
    """The course's own checkpoint in float32, allowed to be timed beyond its last position."""
    folder = data_path("checkpoints", "small")
    found = DeepSeekV3.from_pretrained(folder, torch.float32, mtp=mtp)
    cfg = replace(found.cfg, max_position_embeddings=longest)
    with torch.random.fork_rng():
        model = DeepSeekV3(cfg).eval()
    model.load_state_dict(found.state_dict())
    return model


def _random(cfg: ModelConfig) -> DeepSeekV3:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DeepSeekV3(cfg).eval()


def _rows(cfg: ModelConfig, context: int, batch: int, numbers: torch.Generator) -> list[Tensor]:
    """What each layer's cache holds: latent beside RoPE key, (B, T, C + R) each."""
    shape = batch, context, cfg.kv_lora_rank + cfg.qk_rope_head_dim
    return [torch.randn(shape, generator=numbers) for _ in range(cfg.num_hidden_layers)]


def _as_transformers_stores(rows: Tensor, cfg: ModelConfig) -> tuple[Tensor, Tensor]:
    """(B, 1, T, C) and (B, 1, T, R), even coordinates of a rotated key first."""
    c_kv, k_rope = rows[..., : cfg.kv_lora_rank], rows[..., cfg.kv_lora_rank :]
    if cfg.rope_interleave:
        k_rope = torch.cat([k_rope[..., 0::2], k_rope[..., 1::2]], dim=-1)
    return c_kv[:, None].contiguous(), k_rope[:, None].contiguous()


def _trimmer(caches: Sequence[Cache], context: int) -> Callable[[], None]:
    lengths = torch.full((caches[0].batch,), context)

    def reset() -> None:
        for cache in caches:
            cache.trim(lengths)

    return reset
