"""Attention over codes with a scaled copy of them, made in several ways."""

import torch
from torch import Tensor

from dsv3_tutorial.learn.exercises.inference.latent_cases import TILE


def _every(scales: Tensor, rank: int) -> Tensor:
    return scales.repeat_interleave(TILE, dim=1)[:, :rank]  # (T, C)


def opened(
    keys=lambda c, s: c * s,
    values=lambda c, s: c * s,
    scores=lambda content, position, s: (content + position) * s,
    probs=lambda scores: scores.softmax(dim=-1),
    wide=lambda codes: codes.float(),
):
    """`fp8_attend` with a dequantised copy, and its parts open to be got wrong."""

    def attend(q_latent, q_rope, codes, scales, k_rope, softmax_scale):
        c, s = wide(codes), _every(scales, codes.shape[1])
        content, position = q_latent.float() @ keys(c, s).T, q_rope.float() @ k_rope.float().T
        p = probs(scores(content, position, softmax_scale))
        return (p @ values(c, s)).to(q_latent.dtype)

    return attend


def tiles_of(q_latent, q_rope, codes, scales, k_rope, softmax_scale):
    """Each tile's queries, codes and scales, and the position's part of the scores."""
    parts = q_latent.float().split(TILE, 1), codes.float().split(TILE, 1), scales.unbind(dim=1)
    return list(zip(*parts, strict=True)), q_rope.float() @ k_rope.float().T


def _by_copies(copy):
    """Tile by tile, each of them scaled first."""

    def attend(*args):
        tiles, position = tiles_of(*args)
        values = [copy(c, s) for _, c, s in tiles]
        scores = position + sum(q @ v.T for (q, _, _), v in zip(tiles, values, strict=True))
        probs = (scores * args[-1]).softmax(dim=-1)
        return torch.cat([probs @ v for v in values], dim=-1).to(args[0].dtype)

    return attend


COPIES = {
    "a dequantised copy": opened(),
    "a copy of each tile": _by_copies(lambda c, s: c * s[:, None]),
    "a copy of each token": _by_copies(
        lambda c, s: torch.stack([row * scale for row, scale in zip(c, s, strict=True)])
    ),
    "a diagonal of scales": _by_copies(lambda c, s: torch.diag(s) @ c),
    "an einsum": _by_copies(lambda c, s: torch.einsum("tc,t->tc", c, s)),
}
