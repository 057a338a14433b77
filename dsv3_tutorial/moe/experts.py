"""The routed experts' arithmetic: one contract, four engines, equal in result and gradients.

M tokens, D hidden, E experts, K experts per token, F expert width; M K rows, one per token and
chosen expert. Every engine but the first sorts the rows by expert, so that an expert's rows lie
together, multiplies group by group, and sums each token's rows with their weights.
"""

from collections.abc import Callable
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_tutorial.backend import triton_is_interpreted, triton_problem
from dsv3_tutorial.moe.grouped import Multiply, grouped_mm, grouped_mm_problem, sorted_matmul

FEW_ROWS = 32  # up to here a CPU is faster one row at a time: 3 times for a token, 1.1 for eight


class EngineError(RuntimeError):
    """A forced engine cannot run here: why, why nothing else was run instead, and what to do."""


def dispatch(indices: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """The order that puts each expert's rows together, and how many rows each expert gets.

    indices (M, K) -> order (M K,) int64, places in the flattened indices sorted by expert and,
    within an expert, by token; counts (E,) int64, 0 for an expert that nobody chose.
    """
    flat = indices.flatten()  # (M * K,)
    counts = flat.new_zeros(n_experts)
    counts.scatter_add_(0, flat, torch.ones_like(flat))  # bincount would wait for a GPU
    return flat.argsort(stable=True), counts


def permute(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """Each token's vector, once per chosen expert, in the experts' order. x (M, D) -> (M K, D)."""
    return _Permute.apply(x, order, top_k)


def unpermute(rows: Tensor, order: Tensor) -> Tensor:
    """The rows back in the tokens' order: exactly undoes `permute`'s sorting. (M K, D)."""
    return _Unpermute.apply(rows, order)


def combine(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Sum each token's K rows with their weights. rows (M K, D), weights (M, K) -> (M, D)."""
    per_token = unpermute(rows, order).unflatten(0, weights.shape)  # (M, K, D)
    return torch.einsum("mk,mkd->md", weights.to(rows.dtype), per_token)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, gate and up side by side. (..., 2F) -> (..., F)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def experts_loop(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor):
    """The definition: each expert in turn takes the tokens that chose it. Shapes as `run_experts`.

    The stacked weights are taken apart once. Indexing them inside the loop would give, in backward,
    a gradient as large as all experts for each one of them.
    """
    out = torch.zeros_like(x)  # (M, D)
    for expert, (into, back) in enumerate(zip(gate_up.unbind(), down.unbind())):
        token, choice = (indices == expert).nonzero(as_tuple=True)
        hidden = swiglu(x[token] @ into.T)  # (rows of this expert, F)
        weighted = (hidden @ back.T) * weights[token, choice, None]
        out = out.index_add(0, token, weighted.to(out.dtype))
    return out


def experts_grouped(
    multiply: Multiply,
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
) -> Tensor:
    """Sort, multiply by groups twice, combine; `multiply` is what the engines differ in."""
    order, counts = dispatch(indices, len(gate_up))
    ends = counts.cumsum(0, dtype=torch.int32)  # (E,)
    hidden = swiglu(multiply(permute(x, order, indices.shape[1]), gate_up, ends))  # (M * K, F)
    return combine(multiply(hidden, down, ends), order, weights)


def experts_few(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor):
    """A decode step's few tokens: each row times its expert's matrices, nothing moved or padded.

    Shapes as `run_experts`; no gradient. Rows of one expert follow each other, so that the second
    finds the expert's matrices in the cache: two tokens to verify cost less than two steps. Narrow
    types are widened, expert by expert: a CPU multiplies a narrow vector 4 times slower.
    """
    chosen, top_k = indices.flatten().tolist(), indices.shape[1]  # (M K,)
    groups = [(e, list(rows)) for e, rows in groupby(_by_expert(chosen), chosen.__getitem__)]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # (M, D)
    hidden, out = wide.new_empty(len(chosen), gate_up.shape[1]), torch.zeros_like(wide)  # (M K, 2F)
    tokens, into, sums = wide.unbind(), hidden.unbind(), out.unbind()
    for expert, rows in groups:
        matrix = gate_up[expert].to(wide.dtype)
        for row in rows:
            torch.mv(matrix, tokens[row // top_k], out=into[row])
    weighted = (swiglu(hidden) * weights.reshape(-1, 1)).to(wide.dtype).unbind()  # M K times (F,)
    for expert, rows in groups:
        matrix = down[expert].to(wide.dtype)
        for row in rows:
            sums[row // top_k].addmv_(matrix, weighted[row])
    return out.to(x.dtype)


def _by_expert(chosen: list[int]) -> list[int]:
    """The rows in the order of their experts, and of their tokens within one."""
    return sorted(range(len(chosen)), key=chosen.__getitem__)


def run_experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    engine: str | None = None,
) -> Tensor:
    """The weighted sum of each token's experts; no token is dropped, however uneven the load.

    x (M, D), indices (M, K) int64, weights (M, K), gate_up (E, 2F, D), down (E, D, F) -> (M, D).
    `engine` is one of ENGINES; None takes the fastest that can. 6 K D F FLOP a token, whichever.
    Raises ValueError for an unknown engine, EngineError for a forced one that cannot run.
    """
    x, gate_up, down = _autocast(x, gate_up, down)
    if engine is None and _is_few(x, indices):
        return experts_few(x, indices, weights, gate_up, down)
    engine = engine or fastest(x, gate_up.shape[1] // 2)
    if engine not in ENGINES:
        raise ValueError(
            f"Engine {engine!r} does not exist. No expert would run. "
            f"Pass one of {ENGINES}, or None for the fastest that can."
        )
    problem = engine_problem(engine, x, gate_up.shape[1] // 2)
    if problem is not None:
        raise EngineError(
            f"engine={engine!r} cannot run here: {problem}. It was forced, so nothing else was run "
            "in its place. Pass engine='sorted', which runs anywhere, or None."
        )
    if engine == "loop":
        return experts_loop(x, indices, weights, gate_up, down)
    return experts_grouped(_MULTIPLY[engine](), x, indices, weights, gate_up, down)


def _is_few(x: Tensor, indices: Tensor) -> bool:
    """Whether `experts_few` serves: few rows, on a CPU, nobody to ask for a gradient."""
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return not (recorded or x.is_cuda) and 0 < indices.numel() <= FEW_ROWS


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast would do to a plain product: our own autograd functions are unknown to it."""
    kind = tensors[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    narrow = torch.get_autocast_dtype(kind)  # float64 is left alone, as autocast leaves it
    return tuple(t if t.dtype == torch.float64 else t.to(narrow) for t in tensors)


def engine_problem(engine: str, x: Tensor, width: int = 0) -> str | None:
    """Why an engine cannot take x (M, D) and experts of this width F; None where it can."""
    if engine == "grouped_mm":
        return grouped_mm_problem(x, x.shape[-1], width)
    if engine == "triton" and x.dtype == torch.float64:
        return "the kernel has no float64: no tensor core multiplies it"
    return triton_problem(x.device) if engine == "triton" else None


def fastest(x: Tensor, width: int = 0) -> str:
    """The engine that is fastest for x (M, D) and experts of this width F, of those that can."""
    if x.is_cuda and not triton_is_interpreted():
        order = ("grouped_mm", "triton", "sorted")
        return next(e for e in order if engine_problem(e, x, width) is None)
    compiled = torch.compiler.is_compiling() and x.dtype != torch.bfloat16  # inductor has it not
    usable = not compiled and engine_problem("grouped_mm", x, width) is None
    return "grouped_mm" if usable else "sorted"


def _triton() -> Multiply:
    from dsv3_tutorial.moe.triton_grouped import grouped_matmul

    return grouped_matmul


_MULTIPLY: dict[str, Callable[[], Multiply]] = {
    "sorted": lambda: sorted_matmul,
    "grouped_mm": lambda: grouped_mm,
    "triton": _triton,
}
ENGINES = ("loop", *_MULTIPLY)


class Experts(nn.Module):
    """All routed experts of a layer, in transformers' layout. forward as `run_experts`."""

    def __init__(self, n_experts: int, hidden_size: int, width: int, engine: str | None = None):
        super().__init__()
        self.engine = engine
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(n_experts, hidden_size, width))

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return self.run(x, indices, weights, self.gate_up_proj, self.down_proj)

    def run(self, x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor):
        """What this kind of experts computes, with matrices that are handed in."""
        return run_experts(x, indices, weights, gate_up, down, self.engine)


class _Permute(torch.autograd.Function):
    """Gather forward, and gather backward too: a scatter-add would be slower and unordered."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (order,) = ctx.saved_tensors
        return (
            grad.index_select(0, order.argsort()).unflatten(0, (-1, ctx.top_k)).sum(1),
            None,
            None,
        )


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, order.argsort())

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.index_select(0, ctx.saved_tensors[0]), None
