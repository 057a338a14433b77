"""Decoding over MLA's latent cache: all heads of a token share one read of its C + R numbers.

The absorbed query of a head (W_UK folded in) meets the cached row directly: keys are the whole row,
values its first C entries. Nothing per head is ever stored or rebuilt. Letters: B batch, S queries,
T cached positions, H heads, C latent, R rope head dim.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3_tutorial.backend import pick

_INTEGERS = (torch.int32, torch.int64)
AT_ONCE = 1024  # cached rows in one product: a CPU multiplies few rows by many slower, up to 1.3x


def latent_decode(
    q: Tensor,
    latent: Tensor,
    lengths: Tensor,
    rank: int,
    scale: float,
    backend: str | None = None,
) -> Tensor:
    """Attend from the last S tokens of each sequence to its cached latent, causally.

    q (B, S, H, C + R): absorbed query beside its rotated part. latent (B, T, C + R): the cache as
    stored, never copied. lengths (B,) int32 or int64: cached tokens of each sequence, the S queries
    included, so S <= lengths <= T. rank = C; scale multiplies the scores. Returns (B, S, H, C) in
    q's dtype, accumulated in float32 (float64 stays float64).
    Costs 2 H (2C + R) FLOPs and (C + R) elements read for a query and cached token. Values in
    `lengths` are checked on a CPU only: on a GPU a look at them would wait for the device.
    Raises ValueError for shapes, dtypes or lengths that do not fit, BackendError for a forced
    backend that cannot run. DeepSeek-V2 report, section 2.1.2.
    """
    if torch.compiler.is_compiling() or (q.is_cuda and _needs_gradient(q, latent)):
        return torch.ops.dsv3.latent_decode(q, latent, lengths, rank, scale, backend)
    return _run(q, latent, lengths, rank, scale, backend)


def latent_decode_reference(
    q: Tensor, latent: Tensor, lengths: Tensor, rank: int, scale: float
) -> Tensor:
    """`latent_decode` in plain PyTorch, one sequence after the other; differentiable.

    A loop over 2-D products beats a batched one here: no padding is multiplied, and on a CPU
    `F.linear` of all heads against one matrix is 2 to 6 times faster than SDPA with broadcast keys.
    """
    n_queries, n_heads = q.shape[1:3]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scaled = (q.to(wide) * scale).flatten(1, 2)  # (B, S * H, C + R)
    mixed = []
    for b, length in enumerate(lengths.tolist()):
        cached = latent[b, :length].to(wide)  # no copy when it is wide already
        mixed.append(_weights(scaled[b], cached, n_queries, n_heads) @ cached[:, :rank])
    out = torch.stack(mixed).view(-1, n_queries, n_heads, rank)  # (B, S, H, C)
    return out.to(q.dtype)


def _weights(rows: Tensor, latent: Tensor, n_queries: int, n_heads: int) -> Tensor:
    """How much each scaled query row (S * H, C + R) attends to each cached row: (S * H, T)."""
    if len(latent) <= AT_ONCE:
        scores = F.linear(rows, latent)
    else:
        scores = torch.cat([F.linear(rows, part) for part in latent.split(AT_ONCE)], dim=1)
    if n_queries > 1:
        bias = causal_bias(n_queries, len(latent), latent)  # (S, T)
        scores = scores + bias.repeat_interleave(n_heads, dim=0)
    return scores.softmax(-1)


def causal_bias(n_queries: int, n_cached: int, like: Tensor) -> Tensor:
    """-inf where a query would see a later token (S, T): query s is token T - S + s."""
    bias = like.new_full((n_queries, n_cached), float("-inf"))
    return bias.triu(n_cached - n_queries + 1)


def _run(
    q: Tensor,
    latent: Tensor,
    lengths: Tensor,
    rank: int,
    scale: float,
    backend: str | None,
) -> Tensor:
    _check(q, latent, lengths, rank)
    if backend is None and q.dtype == torch.float64:
        backend = "reference"  # tensor cores take no part in a float64 check
    if pick(q, backend) == "reference":
        return latent_decode_reference(q, latent, lengths, rank, scale)
    from dsv3_tutorial.attention import triton_decode  # Triton is imported here and nowhere else

    return triton_decode.latent_decode(q, latent, lengths, rank, scale)


def _check(q: Tensor, latent: Tensor, lengths: Tensor, rank: int) -> None:
    problem = _shape_problem(q, latent, lengths, rank) or _value_problem(q, latent, lengths)
    if problem is not None:
        raise ValueError(
            f"latent_decode: {problem}. Heads would read rows that are not theirs, or none. "
            "Pass q (B, S, H, C + R), latent (B, T, C + R), lengths (B,) with S <= lengths <= T, "
            "and rank = C."
        )


def _shape_problem(q: Tensor, latent: Tensor, lengths: Tensor, rank: int) -> str | None:
    shapes = f"q {tuple(q.shape)}, latent {tuple(latent.shape)}, lengths {tuple(lengths.shape)}"
    if (q.ndim, latent.ndim, lengths.ndim) != (4, 3, 1):
        return f"expected 4, 3 and 1 dimensions, got {shapes}"
    if not q.shape[0] == latent.shape[0] == lengths.shape[0]:
        return f"the batch sizes differ: {shapes}"
    if 0 in q.shape:
        return f"there is nothing to attend with: {shapes}"
    if q.shape[-1] != latent.shape[-1]:
        return f"a query is {q.shape[-1]} wide and a cached row {latent.shape[-1]}"
    if not 0 < rank <= latent.shape[-1]:
        return f"rank = {rank} does not fit in a cached row of {latent.shape[-1]} numbers"
    return None


def _value_problem(q: Tensor, latent: Tensor, lengths: Tensor) -> str | None:
    if not q.is_floating_point() or q.dtype != latent.dtype:
        return f"q is {q.dtype} and latent {latent.dtype}: one floating-point type is needed"
    return lengths_problem(q, latent, lengths)


def lengths_problem(q: Tensor, cached: Tensor, lengths: Tensor) -> str | None:
    """What is wrong with lengths (B,) for q (B, S, ...) over cached (B, T, ...); None if nothing.

    The lengths themselves are read on a CPU only, as Python's: the fastest way for a few.
    """
    if not q.device == cached.device == lengths.device:
        return f"q is on {q.device}, the cache on {cached.device}, lengths on {lengths.device}"
    if lengths.dtype not in _INTEGERS:
        return f"lengths is {lengths.dtype}, not int32 or int64"
    if lengths.device.type == "cpu":
        each = lengths.tolist()
        if min(each) < q.shape[1] or max(each) > cached.shape[1]:
            bounds = f"S = {q.shape[1]} to T = {cached.shape[1]}"
            return f"lengths run from {min(each)} to {max(each)}, outside {bounds}"
    return None


def _needs_gradient(q: Tensor, latent: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or latent.requires_grad)


# The same computation as one operator, so that torch.compile keeps it whole and never looks inside
# (the loop over lengths would break its graph), and so that Triton's result has a gradient.


@torch.library.custom_op("dsv3::latent_decode", mutates_args=())
def _operator(
    q: Tensor, latent: Tensor, lengths: Tensor, rank: int, scale: float, backend: str | None = None
) -> Tensor:
    return _run(q, latent, lengths, rank, scale, backend)


@_operator.register_fake
def _(q, latent, lengths, rank, scale, backend=None):
    return q.new_empty((*q.shape[:3], rank))


@torch.library.custom_op("dsv3::latent_decode_backward", mutates_args=())
def _backward_operator(
    grad: Tensor, q: Tensor, latent: Tensor, lengths: Tensor, rank: int, scale: float
) -> tuple[Tensor, Tensor]:
    grad_q, grad_latent = torch.empty_like(q), torch.zeros_like(latent)
    for b, length in enumerate(lengths.tolist()):
        pair = _attend_backward(grad[b], q[b], latent[b, :length], rank, scale)
        grad_q[b], grad_latent[b, :length] = pair
    return grad_q, grad_latent


@_backward_operator.register_fake
def _(grad, q, latent, lengths, rank, scale):
    return torch.empty_like(q), torch.empty_like(latent)


def _attend_backward(
    grad: Tensor, q: Tensor, latent: Tensor, rank: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The gradient of `_attend`: of q (S, H, C + R) and of the rows (T, C + R), in closed form.

    Written out because no graph is recorded inside an operator. A cached row has two gradients, as
    a key in all its width and as a value in its first C columns.
    """
    kind, wide = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    grad, rows, latent = (x.to(wide).flatten(0, -2) for x in (grad, q, latent))
    weights = _weights(rows * scale, latent, *q.shape[:2])  # (S * H, T)
    grad_weights = F.linear(grad, latent[:, :rank])
    offset = (grad_weights * weights).sum(-1, keepdim=True)
    grad_scores = weights * (grad_weights - offset) * scale
    grad_latent = grad_scores.T @ rows  # (T, C + R)
    grad_latent[:, :rank] += weights.T @ grad
    return (grad_scores @ latent).view(q.shape).to(kind), grad_latent.to(kind)


def _save(ctx, inputs, output) -> None:
    q, latent, lengths, ctx.rank, ctx.scale, _ = inputs
    ctx.save_for_backward(q, latent, lengths)


def _backward(ctx, grad: Tensor):
    pair = torch.ops.dsv3.latent_decode_backward(grad, *ctx.saved_tensors, ctx.rank, ctx.scale)
    return *pair, None, None, None, None


_operator.register_autograd(_backward, setup_context=_save)
