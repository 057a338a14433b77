"""Multi-head attention and its grouped forms: the baselines that MLA is measured against.

One class is all three: MHA where `num_key_value_heads` equals the heads, MQA where it is 1, GQA
between. B batch, S query positions, T cached positions, D hidden, H heads; a key-value head is
shared by H / KV query heads, and the cache shrinks by that factor and no more.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_tutorial.attention.cache import Cache, CacheError, FullCache
from dsv3_tutorial.attention.rope import RotationTable, rotate
from dsv3_tutorial.config import ConfigError, ModelConfig


def visible(lengths: Tensor, queries: int, cached: int) -> Tensor:
    """Which cached tokens each query may read: those up to itself, padding never.

    lengths (B,) int, the queries being the last S tokens of each sequence -> (B, S, T) bool.
    """
    own = lengths[:, None] - queries + torch.arange(queries, device=lengths.device)  # (B, S)
    return torch.arange(cached, device=lengths.device) <= own[..., None]  # (B, S, T)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, cache: Cache | None = None
) -> Tensor:
    """Causal softmax attention over whole heads, by the fastest way this device has.

    q (B, S, H, N + R), keys (B, T, KV, N + R), values (B, T, KV, V) -> (B, S, H, V).
    PyTorch's fused kernels, except over a cache on a CPU: there they copy the whole cache first.
    """
    queries, cached = q.shape[1], keys.shape[1]
    fresh = queries == cached  # nothing was cached before: the kernel's own causal mask is right
    if not fresh and q.device.type == "cpu":
        lengths = [cached] * len(q) if cache.uniform else cache.lengths.tolist()
        each = zip(q, keys, values, lengths, strict=True)
        return torch.stack([attend_one(a, k[:t], v[:t], scale) for a, k, v, t in each])
    mask, causal = None, False
    if fresh and queries > 1:  # asked, not assigned: a compiler of many lengths has a symbol there
        causal = True
    elif not fresh and (queries > 1 or not cache.uniform):
        mask = visible(cache.lengths, queries, cached)[:, None]  # (B, 1, S, T)
    width = values.shape[-1]
    if mask is None and q.device.type == "cpu" and width < q.shape[-1]:
        # the fused CPU kernel wants one width for all: 1.4 to 2.1 times faster, zeros included
        values = F.pad(values, (0, q.shape[-1] - width))
    out = F.scaled_dot_product_attention(
        *(part.transpose(1, 2) for part in (q, keys, values)),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != keys.shape[2],
    )
    return out.transpose(1, 2)[..., :width]  # (B, S, H, V)


def attend_one(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """The same for one sequence, as matrix products over views: nothing cached is copied.

    q (S, H, N + R), the last S tokens, keys (T, KV, N + R), values (T, KV, V) -> (S, H, V).
    """
    grouped = (q * scale).unflatten(1, (keys.shape[1], -1))  # (S, KV, H / KV, N + R)
    scores = torch.einsum("skgd,tkd->kgst", grouped, keys)
    if len(q) > 1:
        hidden = ~visible(torch.tensor([len(keys)], device=q.device), len(q), len(keys))[0]
        scores = scores.masked_fill(hidden, -math.inf)
    wide = torch.promote_types(q.dtype, torch.float32)
    probs = scores.softmax(dim=-1, dtype=wide).to(q.dtype)
    return torch.einsum("kgst,tkv->skgv", probs, values).flatten(1, 2)  # (S, H, V)


class Attention(nn.Module):
    """MHA, GQA or MQA with rotary positions. forward: x (B, S, D) -> (B, S, D), causal.

    With a FullCache, x continues each sequence where the cache ends. Names and results are those
    of transformers' LlamaAttention and Qwen2Attention.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        if cfg.is_mla:
            raise ConfigError(["kv_lora_rank is set: this config is MLA; use attention.mla.MLA"])
        self.cfg, bias = cfg, cfg.attention_bias
        kv_width = cfg.kv_heads * cfg.head_size
        width = cfg.num_attention_heads * cfg.head_size
        self.q_proj = nn.Linear(cfg.hidden_size, width, bias=bias or cfg.qkv_bias)
        self.k_proj = nn.Linear(cfg.hidden_size, kv_width, bias=bias or cfg.qkv_bias)
        self.v_proj = nn.Linear(cfg.hidden_size, kv_width, bias=bias or cfg.qkv_bias)
        self.o_proj = nn.Linear(width, cfg.hidden_size, bias=bias)
        self.rotation = RotationTable(cfg)

    def forward(self, x: Tensor, cache: FullCache | None = None) -> Tensor:
        check_input(x, self.cfg)
        if cache is not None and not isinstance(cache, FullCache):
            raise CacheError(
                f"Attention got a {type(cache).__name__}, which has no place for heads' keys and "
                "values. Use FullCache.for_config(cfg, batch, capacity)."
            )
        heads = (self.cfg.head_size,)
        q = self.q_proj(x).unflatten(-1, (-1, *heads))  # (B, S, H, N)
        keys = self.k_proj(x).unflatten(-1, (-1, *heads))  # (B, S, KV, N)
        values = self.v_proj(x).unflatten(-1, (-1, *heads))  # (B, S, KV, N)
        cos, sin = self.rotation.next_rows(cache, x.shape[1], x)
        q = rotate(q, cos, sin, self.cfg.rope_interleave)
        keys = rotate(keys, cos, sin, self.cfg.rope_interleave)
        if cache is not None:
            keys, values = cache.append(keys, values)
        out = attend(q, keys, values, self.cfg.softmax_scale, cache)
        return self.o_proj(out.flatten(2))  # (B, S, D)


def check_input(x: Tensor, cfg: ModelConfig) -> None:
    """Raises ValueError where x is not (B, S, D), before a matrix product says it less clearly."""
    if x.ndim != 3 or x.shape[-1] != cfg.hidden_size or x.shape[1] < 1:
        raise ValueError(
            f"Attention got x of shape {tuple(x.shape)}, which cannot be (batch, tokens, "
            f"{cfg.hidden_size}). Add the batch dimension, give at least one token, or use the "
            "config that the activations come from."
        )
