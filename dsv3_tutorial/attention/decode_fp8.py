"""Decoding over a latent cache in FP8: the scales leave the sum, the codes go into it as they are.

An E4M3 code has four digits, its tile's scale twenty-four: multiplied with each other, all cached
values would be made again at every step. But a token's scale is one number for 128 values, so it
can stand outside their dot product: beside the scores on the way in, and beside the probabilities
on the way out. Letters: B batch, S queries, T cached positions, H heads, C latent, R rope head dim.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_tutorial.attention.decode import AT_ONCE, causal_bias, lengths_problem
from dsv3_tutorial.attention.rows_fp8 import RowLayout
from dsv3_tutorial.backend import BackendError
from dsv3_tutorial.fp8.cpu import widen
from dsv3_tutorial.fp8.quant import TILE, pick_fp8


def fp8_attend(
    q_latent: Tensor,
    q_rope: Tensor,
    codes: Tensor,
    scales: Tensor,
    k_rope: Tensor,
    softmax_scale: float,
) -> Tensor:
    """One query's attention over cached codes, without the values that the codes stand for.

    q_latent (H, C), q_rope (H, R), codes float8_e4m3fn (T, C), scales float32 (T, ceil(C / 128)),
    k_rope (T, R) -> (H, C) in q_latent's dtype, computed in float32.
    Costs 2 H T multiplies a tile for the scales; multiplying the codes would take 128 T.
    """
    keys, queries = codes.float().split(128, dim=-1), q_latent.float().split(128, dim=-1)
    scores = q_rope.float() @ k_rope.float().T  # (H, T)
    for i, (query, key) in enumerate(zip(queries, keys)):
        scores = scores + (query @ key.T) * scales[:, i]
    probs = (scores * softmax_scale).softmax(dim=-1)  # (H, T)
    mixed = [(probs * scales[:, i]) @ key for i, key in enumerate(keys)]
    return torch.cat(mixed, dim=-1).to(q_latent.dtype)  # (H, C)


def fp8_latent_decode(
    q: Tensor,
    rows: Tensor,
    lengths: Tensor,
    rank: int,
    scale: float,
    backend: str | None = None,
    rope_fp8: bool = False,
) -> Tensor:
    """`attention.decode.latent_decode` over rows of bytes, as `attention.rows_fp8` lays them out.

    q (B, S, H, C + R), rows uint8 (B, T, bytes), lengths (B,) int32 or int64: cached tokens of each
    sequence, the S queries included. Returns (B, S, H, C) in q's dtype, accumulated in float32.
    Reads 656 bytes a cached token with DeepSeek-V3's sizes instead of 1,152. No gradient: what is
    stored in FP8 has none, and q gets none. Rows with `rope_fp8` have no kernel: the reference
    runs, on any device.
    Raises ValueError for shapes, dtypes or lengths that do not fit, BackendError for a forced
    backend that cannot run.
    """
    if torch.compiler.is_compiling():
        return torch.ops.dsv3.fp8_latent_decode(q, rows, lengths, rank, scale, backend, rope_fp8)
    return _run(q, rows, lengths, rank, scale, backend, rope_fp8)


def fp8_latent_decode_reference(
    q: Tensor, rows: Tensor, lengths: Tensor, rank: int, scale: float, rope_fp8: bool = False
) -> Tensor:
    """`fp8_latent_decode` in plain PyTorch, one sequence after the other."""
    layout = RowLayout(rank, q.shape[-1] - rank, rope_fp8)
    sequences = [
        _attend(q[b], layout.split(rows[b, :length]), scale)
        for b, length in enumerate(lengths.tolist())
    ]
    return torch.stack(sequences).to(q.dtype)  # (B, S, H, C)


def _attend(q: Tensor, parts: tuple[Tensor, Tensor, Tensor], scale: float) -> Tensor:
    """`fp8_attend` for S queries q (S, H, C + R) of one sequence, causally -> (S, H, C).

    The codes are widened once for all of them, and by `fp8.cpu.widen`: up to nine times faster.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rank, cached = parts[0].shape[-1], len(parts[0])
    queries = (q.to(wide) * scale).flatten(0, 1)  # (S * H, C + R)
    chunks = [_widened(*chunk, wide) for chunk in zip(*(part.split(AT_ONCE) for part in parts))]
    scores = torch.cat([_scores(queries, *chunk, rank) for chunk in chunks], dim=1)  # (S * H, T)
    if len(q) > 1:
        scores += causal_bias(len(q), cached, scores).repeat_interleave(q.shape[1], dim=0)
    probs = scores.softmax(dim=-1).split(AT_ONCE, dim=1)
    first, *others = (_mixed(some, *chunk[:2]) for some, chunk in zip(probs, chunks))
    mixed = sum(others, start=first)  # (S * H, C)
    return mixed.unflatten(0, q.shape[:2])  # (S, H, C)


def _widened(codes: Tensor, scales: Tensor, k_rope: Tensor, wide: torch.dtype):
    """The parts of some rows to compute with: each tile's codes, each tile's scales, the keys."""
    return widen(codes).to(wide).split(TILE, dim=-1), scales.to(wide).T, k_rope.to(wide)


def _scores(
    queries: Tensor, keys: tuple[Tensor, ...], scales: Tensor, k_rope: Tensor, rank: int
) -> Tensor:
    """Of queries (S * H, C + R) with some rows, T of them: (S * H, T)."""
    scores = F.linear(queries[:, rank:], k_rope)
    for query, key, each in zip(queries[:, :rank].split(TILE, dim=-1), keys, scales):
        scores.addcmul_(F.linear(query, key), each)
    return scores


def _mixed(probs: Tensor, keys: tuple[Tensor, ...], scales: Tensor) -> Tensor:
    """What some rows, T of them, add to the result: probs (S * H, T) -> (S * H, C)."""
    return torch.cat([(probs * each) @ key for key, each in zip(keys, scales)], dim=-1)


def _run(
    q: Tensor,
    rows: Tensor,
    lengths: Tensor,
    rank: int,
    scale: float,
    backend: str | None,
    rope_fp8: bool,
) -> Tensor:
    _check(q, rows, lengths, rank, rope_fp8)
    q = q.detach()
    exact = backend is None and (rope_fp8 or q.dtype == torch.float64)
    if exact or pick_fp8(q, backend) == "reference":
        return fp8_latent_decode_reference(q, rows, lengths, rank, scale, rope_fp8)
    if rope_fp8:
        raise BackendError(
            "backend='triton' has no kernel for a RoPE key in FP8, which is an ablation. It was "
            "forced, so nothing else was run in its place. Pass backend='reference', or None."
        )
    from dsv3_tutorial.attention import triton_decode_fp8  # Triton is imported here, nowhere else

    return triton_decode_fp8.fp8_latent_decode(q, rows, lengths, rank, scale)


def _check(q: Tensor, rows: Tensor, lengths: Tensor, rank: int, rope_fp8: bool) -> None:
    problem = _problem(q, rows, lengths, rank, rope_fp8) or lengths_problem(q, rows, lengths)
    if problem is not None:
        raise ValueError(
            f"fp8_latent_decode: {problem}. Bytes would be read as another part of their row, or "
            "rows that nobody wrote. Pass q (B, S, H, C + R), rows uint8 (B, T, bytes) as "
            "Fp8LatentCache holds them, lengths (B,) with S <= lengths <= T, and rank = C."
        )


def _problem(q: Tensor, rows: Tensor, lengths: Tensor, rank: int, rope_fp8: bool) -> str | None:
    shapes = f"q {tuple(q.shape)}, rows {tuple(rows.shape)}, lengths {tuple(lengths.shape)}"
    if (q.ndim, rows.ndim, lengths.ndim) != (4, 3, 1):
        return f"expected 4, 3 and 1 dimensions, got {shapes}"
    if not q.shape[0] == rows.shape[0] == lengths.shape[0]:
        return f"the batch sizes differ: {shapes}"
    if 0 in q.shape:
        return f"there is nothing to attend with: {shapes}"
    if not q.is_floating_point() or rows.dtype != torch.uint8:
        return f"q is {q.dtype} and rows {rows.dtype}: a float and uint8 are needed"
    if not 0 < rank < q.shape[-1]:
        return f"rank = {rank} leaves no RoPE key in a query of {q.shape[-1]} numbers"
    wanted = RowLayout(rank, q.shape[-1] - rank, rope_fp8).width
    if rows.shape[-1] != wanted:
        return f"a row has {rows.shape[-1]} bytes, and rank {rank} with this query has {wanted}"
    return None


# One operator, so that torch.compile keeps it whole: the loop over lengths would break its graph.


@torch.library.custom_op("dsv3::fp8_latent_decode", mutates_args=())
def _operator(
    q: Tensor,
    rows: Tensor,
    lengths: Tensor,
    rank: int,
    scale: float,
    backend: str | None = None,
    rope_fp8: bool = False,
) -> Tensor:
    return _run(q, rows, lengths, rank, scale, backend, rope_fp8)


@_operator.register_fake
def _(q, rows, lengths, rank, scale, backend=None, rope_fp8=False):
    return q.new_empty((*q.shape[:3], rank))
