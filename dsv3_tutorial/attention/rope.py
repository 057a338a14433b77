"""Rotary positions: turn each pair of coordinates by position times a frequency.

A score q . k between two rotated vectors then depends on the *distance* of their positions alone.
B batch, S query positions, H heads, R rope head dim. Tables are computed in float32 and cast,
as DeepSeek and transformers do: a trained model expects exactly those angles.
RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071); DeepSeek-V3 report, section 4.3.
"""

import math

import torch
from torch import Tensor

from dsv3_tutorial.attention.cache import Cache
from dsv3_tutorial.config import ModelConfig, RopeScaling


def inverse_frequencies(cfg: ModelConfig, device: torch.device | str | None = None) -> Tensor:
    """How far each pair turns per position, stretched where the config asks for more context.

    -> (R / 2,) float32, radians per token, from 1 down to about 1 / rope_theta.
    """
    pairs = torch.arange(0, cfg.rope_dim, 2, dtype=torch.float32, device=device)
    plain = 1.0 / cfg.rope_theta ** (pairs / cfg.rope_dim)
    if cfg.rope_scaling is None:
        return plain
    if cfg.rope_scaling.rope_type == "yarn":
        return _yarn(plain, cfg.rope_scaling, cfg.rope_dim, cfg.rope_theta)
    return _llama3(plain, cfg.rope_scaling)


def attention_factor(cfg: ModelConfig) -> float:
    """What YaRN multiplies both cos and sin by: 1 for DeepSeek-V3, whose two mscales cancel.

    DeepSeek's own temperature is in the softmax instead: `ModelConfig.softmax_scale`.
    """
    rope = cfg.rope_scaling
    if rope is None or rope.rope_type != "yarn":
        return 1.0
    growth = 0.1 * math.log(rope.factor)
    if rope.mscale and rope.mscale_all_dim:
        return (rope.mscale * growth + 1.0) / (rope.mscale_all_dim * growth + 1.0)
    return growth + 1.0


def rotation_table(
    cfg: ModelConfig,
    positions: int | Tensor,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """cos and sin of every pair's angle at each position, attention factor folded in.

    positions: how many from 0, or a tensor (..., S) -> cos, sin (..., S, R / 2) of `dtype`.
    """
    if isinstance(positions, int):
        positions = torch.arange(positions, device=device)
    angles = positions[..., None].float() * inverse_frequencies(cfg, positions.device)
    factor = attention_factor(cfg)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (0, 1), (2, 3), ... where they stand: DeepSeek's layout.

    x (B, S, H, R), cos and sin (S, R / 2) or (B, S, R / 2) -> (B, S, H, R).

    transformers writes the same numbers with all even coordinates first. A score is a sum over
    coordinates, so it does not see their order; only what lies in the cache differs.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (S, 1, R / 2): one angle for all heads
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2)  # (B, S, H, R)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (0, R/2), (1, R/2 + 1), ...: Llama's and Qwen2's layout.

    x (B, S, H, R), cos and sin (S, R / 2) or (B, S, R / 2) -> (B, S, H, R).
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (S, 1, R / 2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleave: bool = True) -> Tensor:
    """Apply positions in the layout the weights were trained with.

    x (B, S, H, R), cos and sin (S, R / 2) or (B, S, R / 2) -> (B, S, H, R).
    The wrong layout raises nothing and ruins every score; the config's `rope_interleave` decides.
    """
    if x.shape[-1] != 2 * cos.shape[-1]:
        raise ValueError(
            f"{x.shape[-1]} coordinates cannot be turned by {cos.shape[-1]} angles: one angle "
            f"turns two coordinates. Slice out the rope part, {2 * cos.shape[-1]} wide, first."
        )
    return rotate_pairs(x, cos, sin) if interleave else rotate_halves(x, cos, sin)


class RotationTable:
    """The angles a layer has needed so far, so that a decode step only slices.

    Grown to twice the need, in the dtype and on the device of what it turns. It is a plain
    attribute and no buffer: `module.bfloat16().float()` would leave a buffer rounded for good.
    """

    def __init__(self, cfg: ModelConfig):
        self.cfg = cfg
        self.cos = self.sin = torch.empty(0, cfg.rope_dim // 2)

    def next_rows(self, cache: Cache | None, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for the `count` tokens that come next after what the cache holds.

        -> (S, R / 2) each, or (B, S, R / 2) where the sequences have different lengths.
        """
        start = 0 if cache is None else cache.longest
        self._reach(start + count, like)
        if cache is None or cache.uniform:
            return self.cos[start : start + count], self.sin[start : start + count]
        positions = cache.lengths[:, None] + torch.arange(count, device=like.device)  # (B, S)
        return self.cos[positions], self.sin[positions]

    def _reach(self, length: int, like: Tensor) -> None:
        held = self.cos
        if held.shape[0] >= length and held.dtype == like.dtype and held.device == like.device:
            return
        # A table made in inference mode could not be saved for a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            self.cos, self.sin = rotation_table(self.cfg, 2 * length, like.device, like.dtype)


def _yarn(plain: Tensor, rope: RopeScaling, dim: int, theta: float) -> Tensor:
    """Fast pairs as trained, slow pairs slowed by `factor`, a straight ramp between them."""

    def pair_that_turns(times: float) -> float:
        wavelength = rope.original_max_position_embeddings / (times * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(rope.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(rope.beta_slow)), dim - 1)
    width = high - low or 0.001
    pairs = torch.arange(dim // 2, dtype=torch.float32, device=plain.device)
    slowed = ((pairs - low) / width).clamp(0, 1)
    return plain / rope.factor * slowed + plain * (1 - slowed)


def _llama3(plain: Tensor, rope: RopeScaling) -> Tensor:
    """As `_yarn`, the ramp running over how often a pair turns within the trained length."""
    turns = rope.original_max_position_embeddings * plain / (2 * math.pi)
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0, 1)
    return plain / rope.factor * (1 - kept) + plain * kept
