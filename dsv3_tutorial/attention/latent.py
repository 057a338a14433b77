"""Attention over one latent a token, as pure functions: expanded, and absorbed.

B batch, S query positions, T cached positions, D hidden, H heads, C kv latent, N nope head dim,
R rope head dim, V value head dim. DeepSeek-V3 report, section 2.1.1, equations 1 to 11;
absorption: DeepSeek-V2 report, section 2.1.2.

Keys are linear in the latent, k = W_UK c, so q . k = (W_UK^T q) . c: move the matrix to the query
and the keys never need to exist. That works because nothing position-dependent stands between
W_UK and c; positions therefore have a small key of their own, k_rope, shared by all heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def compress(
    x: Tensor,
    kv_a_weight: Tensor,
    norm_weight: Tensor,
    eps: float = 1e-6,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One projection makes all that is cached: a latent, normalised, and the shared key, not.

    x (B, S, D), kv_a_weight (C + R, D), norm_weight (C,) -> c_kv (B, S, C), k_rope (B, S, R).
    k_rope still has to be rotated. Equations 1 and 3.
    """
    rank = norm_weight.shape[0]
    compressed = F.linear(x, kv_a_weight, bias)  # (B, S, C + R)
    c_kv, k_rope = compressed[..., :rank], compressed[..., rank:]
    return F.rms_norm(c_kv, (rank,), norm_weight, eps), k_rope


def separate(compressed: Tensor, norm_weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """What `compress` does after its projection: (B, S, C + R) -> (B, S, C), (B, S, R)."""
    rank = norm_weight.shape[0]
    c_kv = F.rms_norm(compressed[..., :rank], (rank,), norm_weight, eps)
    return c_kv, compressed[..., rank:]


def expanded_scores(
    q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, w_uk: Tensor
) -> Tensor:
    """The logits of every query with every cached token, each head's keys rebuilt from the latent.

    q_nope (B, S, H, N), q_rope (B, S, H, R), c_kv (B, T, C), k_rope (B, T, R), w_uk (H, N, C)
    -> (B, H, S, T), neither scaled nor masked.

    Rebuilding costs H N C multiplies for each of the T cached tokens, at every call.
    """
    k_nope = torch.einsum("btc,hnc->bthn", c_kv, w_uk)
    content = torch.einsum("bshn,bthn->bhst", q_nope, k_nope)
    position = torch.einsum("bshr,btr->bhst", q_rope, k_rope)
    return content + position


def absorbed_scores(
    q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, w_uk: Tensor
) -> Tensor:
    """The logits of `expanded_scores`, read straight from the latent: no key is ever made.

    q_nope (B, S, H, N), q_rope (B, S, H, R), c_kv (B, T, C), k_rope (B, T, R), w_uk (H, N, C)
    -> (B, H, S, T), neither scaled nor masked.

    W_UK meets the S queries, not the T cached tokens; in exchange a dot product is C long, not N.
    """
    q_latent = torch.einsum("bshn,hnc->bshc", q_nope, w_uk)
    content = torch.einsum("bshc,btc->bhst", q_latent, c_kv)
    position = torch.einsum("bshr,btr->bhst", q_rope, k_rope)
    return content + position


def expanded_values(probs: Tensor, c_kv: Tensor, w_uv: Tensor) -> Tensor:
    """Each head's mixture of values, all values rebuilt from the latent.

    probs (B, H, S, T), c_kv (B, T, C), w_uv (H, V, C) -> (B, S, H, V).
    """
    values = torch.einsum("btc,hvc->bthv", c_kv, w_uv)
    return torch.einsum("bhst,bthv->bshv", probs, values)


def absorbed_values(probs: Tensor, c_kv: Tensor, w_uv: Tensor) -> Tensor:
    """The result of `expanded_values`: mix the latents first, then expand only the mixture.

    probs (B, H, S, T), c_kv (B, T, C), w_uv (H, V, C) -> (B, S, H, V).
    """
    mixed = torch.einsum("bhst,btc->bshc", probs, c_kv)
    return torch.einsum("bshc,hvc->bshv", mixed, w_uv)


def absorb_query(q_nope: Tensor, w_uk: Tensor) -> Tensor:
    """The query as the latent sees it, W_UK^T q: once a token, whatever the context.

    q_nope (B, S, H, N), w_uk (H, N, C) -> (B, S, H, C).
    """
    return per_head(q_nope, w_uk)


def per_head(x: Tensor, matrices: Tensor) -> Tensor:
    """Each head's vectors times its own matrix: `einsum("bshn,hnm->bshm")`, the same product.

    x (B, S, H, n), matrices (H, n, m) -> (B, S, H, m). At one token einsum's own bookkeeping costs
    as much as the product.
    """
    product = torch.bmm(x.flatten(0, 1).transpose(0, 1), matrices)  # (H, B * S, m)
    return product.transpose(0, 1).view(*x.shape[:-1], -1)  # (B, S, H, m)


def probabilities(scores: Tensor, scale: float, mask: Tensor) -> Tensor:
    """Softmax over the tokens a query may read, in at least float32, given back in scores' dtype.

    scores (B, H, S, T), mask (B, S, T) bool -> (B, H, S, T).
    """
    scores = (scores * scale).masked_fill(~mask[:, None], -math.inf)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(dim=-1, dtype=dtype).to(scores.dtype)


def latent_attention(
    q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, w_uk: Tensor, w_uv: Tensor
) -> Tensor:
    """The whole of causal attention over latents as equations 1 to 11 stand, to read and to test.

    q_nope (B, S, H, N), q_rope (B, S, H, R), c_kv (B, T, C), k_rope (B, T, R), w_uk (H, N, C),
    w_uv (H, V, C) -> (B, S, H, V). The S queries are the last of the T tokens; no YaRN.
    """
    k_nope = torch.einsum("btc,hnc->bthn", c_kv, w_uk)
    values = torch.einsum("btc,hvc->bthv", c_kv, w_uv)
    scores = torch.einsum("bshn,bthn->bhst", q_nope, k_nope)
    scores = scores + torch.einsum("bshr,btr->bhst", q_rope, k_rope)
    scores = scores * (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5
    s, t = scores.shape[-2:]
    seen = torch.ones(s, t, dtype=torch.bool, device=scores.device).tril(t - s)
    probs = scores.masked_fill(~seen, -math.inf).softmax(dim=-1)
    return torch.einsum("bhst,bthv->bshv", probs, values)
