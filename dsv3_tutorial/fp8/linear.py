"""A linear layer whose three products run in FP8, trained as DeepSeek-V3 was.

M tokens, k inputs, n outputs. Fprop Y = X W^T, Dgrad dX = dY W, Wgrad dW = dY^T X: each operand is
quantised along the axis that its product sums over. So X and dY lie in tiles of 1 x 128 channels
for Fprop and Dgrad, and of 128 tokens for Wgrad; a block of 128 x 128 serves W both ways round.
DeepSeek-V3 report, sections 3.3.1 to 3.3.3 and figures 6 and 7.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3_tutorial.fp8 import e5m6
from dsv3_tutorial.fp8.gemm import dequantize
from dsv3_tutorial.fp8.scaling import DEEPSEEK, Quantized, Scaling, product, stored

CACHES = ("e4m3", "e5m6")


def linear_gradients(
    dy: Tensor, x: Tensor, w: Tensor, tiles: Callable, blocks: Callable
) -> tuple[Tensor, Tensor]:
    """Dgrad and Wgrad, each operand rounded first, along the axis that its product sums over.

    dy (M, n), x (M, k), w (n, k) -> dx (M, k), dw (n, k). tiles(t) rounds t through 1 x 128 tiles
    along its last axis, blocks(t) through 128 x 128 blocks.
    """
    dx = tiles(dy) @ blocks(w)  # sums over n, the last axis of dy
    dw = tiles(dy.T) @ tiles(x.T).T  # sums over the tokens
    return dx, dw


def fp8_linear(
    x: Tensor,
    *weights: Tensor,
    scaling: Scaling = DEEPSEEK,
    cache: str = "e4m3",
) -> tuple[Tensor, ...]:
    """One input times several weights in FP8: x (..., k), each weight (n, k) -> each (..., n).

    In x's dtype, and its gradient too; gradients of the weights in theirs. Computed in float32 for
    float16 and float64: the one gains no range, the other no digits. x is quantised once, and kept
    for Wgrad as that: 1 byte and 1 / 32 a value, or 1.5 with cache="e5m6". Differentiable once.
    No tokens give empty results and gradients of zero. Raises ValueError where k differs.
    """
    for weight in weights:
        _check_fit("x", x, weight)
    flat = x.reshape(-1, x.shape[-1])  # (M, k)
    if len(flat) == 0:
        outs = [F.linear(flat, weight.to(x.dtype)) for weight in weights]
    else:
        outs = _Linear.apply(flat, scaling, cache, *weights)
    return tuple(out.view(*x.shape[:-1], w.shape[0]) for out, w in zip(outs, weights))


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor, scaling: Scaling = DEEPSEEK) -> Tensor:
    """(silu(gate) * up) times a weight in FP8, keeping gate and up in FP8 and not their product.

    gate, up (..., k), weight (n, k) -> (..., n) in gate's dtype. Backward computes the product
    again from the two. No tokens, and a k that differs: as in `fp8_linear`.
    """
    _check_fit("gate", gate, weight)
    if up.shape != gate.shape:
        raise ValueError(
            f"swiglu_linear: gate is {tuple(gate.shape)} and up {tuple(up.shape)}. Each value of "
            "one is multiplied with its own of the other. Give both in one shape (..., k)."
        )
    flat = [x.reshape(-1, x.shape[-1]) for x in (gate, up)]  # (M, k) each
    if gate.numel() == 0:
        out = F.linear(_swiglu(*flat).to(gate.dtype), weight.to(gate.dtype))
    else:
        out = _SwigluLinear.apply(*flat, weight, scaling)
    return out.view(*gate.shape[:-1], weight.shape[0])


class Fp8Linear(nn.Linear):
    """nn.Linear in FP8. forward: x (..., k) -> (..., n) in x's dtype, as `fp8_linear` has it.

    The weight stays as it is given, float32 as a rule: the optimizer's master, with its gradient
    added up in float32. It is quantised in every forward.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scaling: Scaling = DEEPSEEK,
        cache: str = "e4m3",
        device=None,
        dtype=None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        if cache not in CACHES:
            raise ValueError(
                f"cache={cache!r}: nothing would be kept for Wgrad. Choose one of {CACHES}."
            )
        self.scaling, self.cache = scaling, cache

    @classmethod
    def of(cls, linear: nn.Linear, scaling: Scaling = DEEPSEEK, cache: str = "e4m3") -> "Fp8Linear":
        """A linear layer as it is, in FP8 from now on: the same parameters, not copies."""
        made = cls(linear.in_features, linear.out_features, False, scaling, cache, device="meta")
        made.weight, made.bias = linear.weight, linear.bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        (out,) = fp8_linear(x, self.weight, scaling=self.scaling, cache=self.cache)
        return out if self.bias is None else out + self.bias.to(out.dtype)


def _check_fit(name: str, x: Tensor, weight: Tensor) -> None:
    """Refuses an input whose last axis is not the one that the weight sums over."""
    if x.ndim and weight.ndim == 2 and x.shape[-1] == weight.shape[1] > 0:
        return
    raise ValueError(
        f"{name} {tuple(x.shape)} times a weight {tuple(weight.shape)}: both end in k, the axis "
        f"that is summed, and here these are {x.shape[-1] if x.ndim else 'none'} and "
        f"{weight.shape[-1] if weight.ndim else 'none'}. There is no product of these. "
        f"Give {name} (..., k) and a weight (n, k), with k at least 1."
    )


def _keep(x: Tensor, own: Quantized, cache: str) -> tuple[Tensor, ...]:
    """What is kept of x (M, k) for Wgrad."""
    return own.kept if cache == "e4m3" else e5m6.pack_e5m6(x, checked=False)


def _kept(kept: tuple[Tensor, ...], cache: str, k: int) -> Tensor:
    """x (M, k) in float32, as it was kept."""
    return dequantize(*kept) if cache == "e4m3" else e5m6.unpack_e5m6(*kept, k)


def _weight_gradient(dy: Quantized, x: Tensor, scaling: Scaling, dtype: torch.dtype) -> Tensor:
    """Wgrad: dy (n, M), x (M, k) -> (n, k), both quantised along the tokens."""
    return product(dy, scaling.input(x.T, keep=False), torch.float32).to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scaling: Scaling, cache: str, *weights: Tensor):
        own = scaling.input(x)
        held = [scaling.weight(weight) for weight in weights]
        ctx.scaling, ctx.cache, ctx.like = scaling, cache, x[:0]
        ctx.dtypes = [weight.dtype for weight in weights]
        ctx.save_for_backward(*_keep(x, own, cache), *(part for w in held for part in w.kept))
        return tuple(product(own, w, x.dtype) for w in held)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        first, second, *rest = ctx.saved_tensors
        held = [stored(*pair) for pair in zip(rest[::2], rest[1::2])]
        scaling, needs = ctx.scaling, ctx.needs_input_grad
        x = _kept((first, second), ctx.cache, ctx.like.shape[1]) if any(needs[3:]) else None
        dx, dws = None, []
        for dy, w, needed, dtype in zip(grads, held, needs[3:], ctx.dtypes):
            if needs[0]:
                part = product(scaling.gradient(dy), w.T, ctx.like.dtype)
                dx = part if dx is None else dx + part
            across = scaling.gradient(dy.T) if needed else None
            dws.append(_weight_gradient(across, x, scaling, dtype) if needed else None)
        return dx, None, None, *dws


class _SwigluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor, scaling: Scaling):
        own, held = scaling.input(_swiglu(gate, up), keep=False), scaling.weight(weight)
        ctx.scaling, ctx.like, ctx.dtype = scaling, gate[:0], weight.dtype
        ctx.save_for_backward(*scaling.input(gate).kept, *scaling.input(up).kept, *held.kept)
        return product(own, held, gate.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor):
        g, g_scale, u, u_scale, *held = ctx.saved_tensors
        gate, up = dequantize(g, g_scale), dequantize(u, u_scale)
        w, scaling = stored(*held), ctx.scaling
        needs_weight = ctx.needs_input_grad[2]
        dhidden = product(scaling.gradient(dy), w.T, torch.float32)  # (M, k)
        dw = None
        if needs_weight:
            across = scaling.gradient(dy.T)
            dw = _weight_gradient(across, _swiglu(gate, up), scaling, ctx.dtype)
        gated = gate.sigmoid()
        dgate = dhidden * up * gated * (1 + gate * (1 - gated))
        dup = dhidden * gate * gated
        return dgate.to(ctx.like.dtype), dup.to(ctx.like.dtype), dw, None


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """In float32, whatever the two are in: (M, k)."""
    return F.silu(gate.float()) * up.float()
