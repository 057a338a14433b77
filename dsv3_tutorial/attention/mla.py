"""Multi-head Latent Attention as a layer: one set of weights, several ways to the same numbers.

B batch, S query positions, T cached positions, D hidden, H heads, Q query latent, C kv latent,
N nope head dim, R rope head dim, V value head dim. The functions that it wires are in
`attention.latent`. DeepSeek-V3 report, section 2.1.1.
"""

import torch
from torch import Tensor, nn

from dsv3_tutorial.attention import latent
from dsv3_tutorial.attention.cache import Cache, CacheError, FullCache
from dsv3_tutorial.attention.mha import attend, check_input, visible
from dsv3_tutorial.attention.rope import RotationTable, rotate
from dsv3_tutorial.config import ConfigError, ModelConfig
from dsv3_tutorial.cost.attention import crossover_queries

# DeepSeek's code and transformers give the two norms inside MLA this value, whatever `rms_norm_eps`
# says. Moonlight's config says 1e-5: following it here would be another function than its own.
NORM_EPS = 1e-6


class MLA(nn.Module):
    """Attention over (c_kv, k_rope). forward: x (B, S, D) -> (B, S, D), causal.

    One set of weights, several ways to the same numbers. `absorb`, here or per call:
      None   whole heads and a fused kernel without a cache or for a long prefill, else absorbed.
      False  keys and values rebuilt from the latent, as the equations stand.
      True   never rebuilt.
    With a LatentCache or a FullCache, x continues each sequence where the cache ends. A FullCache
    keeps the expanded heads themselves, whatever `absorb`: less arithmetic a step, H (N + R + V) /
    (C + R) times the bytes. `backend` forces one side of the decode kernel (`attention.decode`).
    """

    def __init__(self, cfg: ModelConfig, absorb: bool | None = None, backend: str | None = None):
        super().__init__()
        if not cfg.is_mla:
            raise ConfigError(
                ["kv_lora_rank is not set: this config is not MLA; use attention.mha.Attention"]
            )
        self.cfg, self.absorb, self.backend = cfg, absorb, backend
        d, h, bias = cfg.hidden_size, cfg.num_attention_heads, cfg.attention_bias
        q, c = cfg.q_lora_rank, cfg.kv_lora_rank
        if q is None:
            self.q_proj = nn.Linear(d, h * cfg.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(d, q, bias=bias)  # W^DQ
            self.q_a_layernorm = nn.RMSNorm(q, eps=NORM_EPS)
            self.q_b_proj = nn.Linear(q, h * cfg.qk_head_dim, bias=False)  # W^UQ, W^QR
        self.kv_a_proj_with_mqa = nn.Linear(d, c + cfg.rope_dim, bias=bias)  # W^DKV, W^KR
        self.kv_a_layernorm = nn.RMSNorm(c, eps=NORM_EPS)
        per_head = cfg.qk_nope_head_dim + cfg.v_head_dim
        self.kv_b_proj = nn.Linear(c, h * per_head, bias=False)  # W^UK, W^UV
        self.o_proj = nn.Linear(h * cfg.v_head_dim, d, bias=bias)  # W^O
        self.rotation = RotationTable(cfg)
        self.expands_from = crossover_queries(cfg)

    def forward(self, x: Tensor, cache: Cache | None = None, absorb: bool | None = None) -> Tensor:
        check_input(x, self.cfg)
        absorb = self.absorb if absorb is None else absorb
        q_nope, q_rope = self.queries(x)
        c_kv, k_rope = self.compressed(x)
        q_rope, k_rope = self._turned(q_rope, k_rope, cache)
        if isinstance(cache, FullCache) or (cache is None and absorb is None):
            out = self._whole_heads(q_nope, q_rope, c_kv, k_rope, cache)
        else:
            out = self._from_latent((q_nope, q_rope, c_kv, k_rope), cache, absorb)
        return self.o_proj(out.flatten(2))  # (B, S, D)

    def queries(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, S, D) -> q_nope (B, S, H, N), q_rope (B, S, H, R), not yet rotated."""
        if self.cfg.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.unflatten(-1, (-1, self.cfg.qk_head_dim))  # (B, S, H, N + R)
        n = self.cfg.qk_nope_head_dim
        return q[..., :n], q[..., n:]

    def compressed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, S, D) -> c_kv (B, S, C), k_rope (B, S, R), not yet rotated."""
        down, norm = self.kv_a_proj_with_mqa, self.kv_a_layernorm
        if type(down) is nn.Linear:
            return latent.compress(x, down.weight, norm.weight, norm.eps, down.bias)
        return latent.separate(down(x), norm.weight, norm.eps)  # another arithmetic: FP8

    def up_weights(self) -> tuple[Tensor, Tensor]:
        """W_UK (H, N, C) and W_UV (H, V, C): views of the one weight `kv_b_proj`."""
        n, v = self.cfg.qk_nope_head_dim, self.cfg.v_head_dim
        return self.kv_b_proj.weight.view(-1, n + v, self.cfg.kv_lora_rank).split([n, v], dim=1)

    def _turned(self, q_rope: Tensor, k_rope: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """Both parts with a position, (B, S, H, R) and (B, S, R), rotated to where they stand."""
        cos, sin = self.rotation.next_rows(cache, q_rope.shape[1], q_rope)
        k_rope, interleave = k_rope[:, :, None], self.cfg.rope_interleave  # (B, S, 1, R)
        if cache is None:
            q_rope, k_rope = (rotate(part, cos, sin, interleave) for part in (q_rope, k_rope))
            return q_rope, k_rope[:, :, 0]
        # few tokens: ten small operators cost more than copying the queries
        both = rotate(torch.cat([q_rope, k_rope], dim=2), cos, sin, interleave)
        return both[:, :, :-1], both[:, :, -1]

    def _whole_heads(
        self, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, cache: Cache | None
    ) -> Tensor:
        """Through each head's own key and value: fresh ones, or all that a FullCache holds."""
        n, heads = self.cfg.qk_nope_head_dim, self.cfg.num_attention_heads
        expanded = self.kv_b_proj(c_kv).unflatten(-1, (heads, -1))  # (B, T, H, N + V)
        k_rope = k_rope[:, :, None].expand(-1, -1, heads, -1)  # (B, T, H, R)
        keys, values = torch.cat([expanded[..., :n], k_rope], dim=-1), expanded[..., n:]
        if isinstance(cache, FullCache):
            keys, values = cache.append(keys, values)
        q = torch.cat([q_nope, q_rope], dim=-1)  # (B, S, H, N + R)
        return attend(q, keys, values, self.cfg.softmax_scale, cache)

    def _from_latent(
        self, new: tuple[Tensor, ...], cache: Cache | None, absorb: bool | None
    ) -> Tensor:
        """Through the latent, fresh or cached: absorbed, or with every head rebuilt from it."""
        q_nope, q_rope, c_kv, k_rope = new
        queries = q_nope.shape[1]
        if cache is None:
            lengths = torch.full((1,), queries, device=c_kv.device)
        else:
            lengths = _append(cache, c_kv, k_rope).lengths
            expanded = queries >= self.expands_from if absorb is None else not absorb
            if not expanded:
                return self._decode(q_nope, q_rope, cache)
            c_kv, k_rope = (part.to(q_nope.dtype) for part in (cache.c_kv, cache.k_rope))
            if absorb is None:
                return self._whole_heads(q_nope, q_rope, c_kv, k_rope, cache)
        w_uk, w_uv = self.up_weights()
        scores = latent.absorbed_scores if absorb else latent.expanded_scores
        mix = latent.absorbed_values if absorb else latent.expanded_values
        mask = visible(lengths, queries, c_kv.shape[1])
        logits = scores(q_nope, q_rope, c_kv, k_rope, w_uk)
        return mix(latent.probabilities(logits, self.cfg.softmax_scale, mask), c_kv, w_uv)

    def _decode(self, q_nope: Tensor, q_rope: Tensor, cache: Cache) -> Tensor:
        """Absorbed, over rows as the cache keeps them: each is read once for all heads."""
        w_uk, w_uv = self.up_weights()
        q = torch.cat([latent.absorb_query(q_nope, w_uk), q_rope], dim=-1)  # (B, S, H, C + R)
        mixed = cache.attend(q, self.cfg.softmax_scale, self.backend)  # (B, S, H, C)
        return latent.per_head(mixed, w_uv.mT)  # (B, S, H, V)


def _append(cache: Cache, c_kv: Tensor, k_rope: Tensor) -> Cache:
    if not hasattr(cache, "attend"):  # what makes a cache a latent one, wherever its rows lie
        raise CacheError(
            f"MLA got a {type(cache).__name__}, which it cannot write to. "
            "Use LatentCache.for_config(cfg, batch, capacity), or a FullCache."
        )
    cache.append(c_kv, k_rope)
    return cache
