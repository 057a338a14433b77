"""A linear layer in FP8: three products, each its own rounding away from the exact one."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dsv3_tutorial.fp8 import quant
from dsv3_tutorial.fp8.linear import Fp8Linear, fp8_linear, linear_gradients, swiglu_linear
from dsv3_tutorial.fp8.scaling import DEEPSEEK, PER_TENSOR, Scaling, quantized

HALF_STEP = 2.0**-4  # of a value, the most that rounding to three bits moves it


def tensors(m: int, n: int, k: int, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    x, w, dy = (torch.randn(*s, generator=draw) for s in ((m, k), (n, k), (m, n)))
    return x.requires_grad_(), w.requires_grad_(), dy


def step(x, w, dy, **options):
    (y,) = fp8_linear(x, w, **options)
    return (y, *torch.autograd.grad(y, (x, w), dy))


def relative(found, exact) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def bound(a: torch.Tensor, b: torch.Tensor, part_a: str, part_b: str) -> torch.Tensor:
    """How far a @ b^T may lie from the exact product: each operand's own largest error, summed.

    A value moves by half a step, or by 2^-10 of its scale among the smallest numbers of E4M3.
    """
    errors = [
        torch.maximum(t.abs() * HALF_STEP, _scale_of_each(t, part) * 2.0**-10)
        for t, part in ((a, part_a), (b, part_b))
    ]
    ea, eb = (e.double() for e in errors)
    a, b = a.double().abs(), b.double().abs()
    return (ea @ b.T + a @ eb.T + ea @ eb.T) * 1.001 + 1e-5


def _scale_of_each(t, part):
    from dsv3_tutorial.fp8.gemm import spread

    return spread(quantized(t, part, pow2=True).scale, t.shape).expand(t.shape)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 300), st.sampled_from([0, 1, 2]))
def test_each_product_is_within_its_analytic_bound_of_the_exact_one(m, n, k, seed):
    x, w, dy = tensors(m, n, k, seed)
    y, dx, dw = step(x, w, dy)
    x, w = x.detach(), w.detach()
    assert ((y - x.double() @ w.double().T).abs() <= bound(x, w, "tile", "block")).all()
    exact = dy.double() @ w.double()
    assert ((dx - exact).abs() <= bound(dy, w.T, "tile", "block")).all()
    cached = quantized(x, "tile", pow2=True).restored  # Wgrad has x as Fprop kept it
    exact = dy.double().T @ cached.double()
    assert ((dw - exact).abs() <= bound(dy.T, cached.T, "tile", "tile")).all()


def test_on_gaussians_each_product_errs_by_under_four_percent():
    x, w, dy = tensors(512, 384, 640)
    y, dx, dw = step(x, w, dy)
    for found, exact in ((y, x @ w.T), (dx, dy @ w), (dw, dy.T @ x)):
        assert 0.03 < relative(found, exact) < 0.04


def test_the_layer_does_what_the_written_out_gradients_say():
    """Without powers of two: the reference rounds x anew for Wgrad, so the cache is E4M3 twice."""

    def tiles(t):
        return quant.dequantize_tiles(*quant.quantize_tiles(t.contiguous()))

    def blocks(t):
        return quant.dequantize_blocks(*quant.quantize_blocks(t))

    x, w, dy = tensors(200, 130, 150)
    with torch.no_grad():
        x.copy_(tiles(x))  # a fixed point of the cache
    _, dx, dw = step(x, w, dy, scaling=Scaling(pow2=False))
    wanted_dx, wanted_dw = linear_gradients(dy, x.detach(), w.detach(), tiles, blocks)
    torch.testing.assert_close(dx, wanted_dx, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dw, wanted_dw, rtol=1e-5, atol=1e-5)


def test_several_weights_share_one_input_and_one_cache():
    x, w, _ = tensors(64, 40, 128)
    other = torch.randn(24, 128, requires_grad=True)
    both = fp8_linear(x, w, other)
    single = (*fp8_linear(x, w), *fp8_linear(x, other))
    assert all(torch.equal(a, b) for a, b in zip(both, single))
    (both[0].sum() + both[1].sum()).backward()
    together, x.grad = x.grad, None
    (single[0].sum() + single[1].sum()).backward()
    torch.testing.assert_close(together, x.grad)


def test_what_is_kept_for_wgrad_is_in_eight_bits_and_e5m6_is_finer():
    x, w, dy = tensors(128, 64, 256)
    kept = {}
    for cache in ("e4m3", "e5m6"):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel() * t.element_size()), t)[1], lambda t: t
        ):
            (y,) = fp8_linear(x, w, cache=cache)
        kept[cache] = sum(sizes[:2])  # of the input; the weight follows
        dw = torch.autograd.grad(y, w, dy)[0]
        error = relative(dw, dy.T @ x.detach())
        assert error < (0.05 if cache == "e4m3" else 0.04)
    assert kept == {"e4m3": 128 * 256 + 4 * 128 * 2, "e5m6": 128 * 256 * 3 // 2 + 4 * 128 * 2}


def test_swiglu_keeps_gate_and_up_and_not_their_product():
    draw = torch.Generator().manual_seed(0)
    gate, up, w = (
        torch.randn(*s, generator=draw, requires_grad=True)
        for s in ((96, 256), (96, 256), (64, 256))
    )
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (sizes.append((t.dtype, tuple(t.shape))), t)[1], lambda t: t
    ):
        out = swiglu_linear(gate, up, w)
    eight = [shape for dtype, shape in sizes if dtype == torch.float8_e4m3fn]
    assert eight == [(96, 256), (96, 256), (64, 256)]
    assert all(shape[-1] <= 2 for dtype, shape in sizes if dtype != torch.float8_e4m3fn)
    dy = torch.randn(out.shape, generator=draw)
    found = torch.autograd.grad(out, (gate, up, w), dy)
    exact_out = (F.silu(gate) * up) @ w.T
    exact = torch.autograd.grad(exact_out, (gate, up, w), dy)
    assert relative(out, exact_out) < 0.04
    assert all(relative(a, b) < 0.06 for a, b in zip(found, exact))


def test_the_modules_gradient_stays_float32_whatever_the_input_is():
    layer = Fp8Linear(96, 40, bias=True)
    x = torch.randn(2, 7, 96, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.float().sum().backward()
    assert y.shape == (2, 7, 40) and y.dtype == torch.bfloat16 and x.grad.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == torch.float32 and layer.bias.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("cache", ["e4m3", "e5m6"])
def test_float16_and_float64_are_float32_s_results_rounded_to_them(dtype, cache):
    x, w, dy = tensors(24, 40, 96)
    other = torch.randn(40, 96, requires_grad=True)
    given = x.detach().to(dtype).requires_grad_()
    dy = dy.to(dtype)
    found = fp8_linear(given, w, cache=cache)
    wanted = fp8_linear(given.detach().float().requires_grad_(), w, cache=cache)
    assert found[0].dtype == dtype and torch.equal(found[0], wanted[0].to(dtype))
    dx, dw = torch.autograd.grad(found, (given, w), [dy])
    alike = given.detach().float().requires_grad_()
    exact_dx, exact_dw = torch.autograd.grad(
        fp8_linear(alike, w, cache=cache), (alike, w), [dy.float()]
    )
    assert dx.dtype == dtype and torch.equal(dx, exact_dx.to(dtype))
    assert dw.dtype == torch.float32 and torch.equal(dw, exact_dw)
    out = swiglu_linear(given, given, other)
    assert out.dtype == dtype and torch.autograd.grad(out, given, dy)[0].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_a_module_cast_whole_keeps_its_dtype_to_the_end(dtype):
    layer = Fp8Linear(96, 40).to(dtype)
    x = torch.randn(2, 3, 96, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    kinds = {t.dtype for t in (y, x.grad, layer.weight.grad, layer.bias.grad)}
    assert kinds == {dtype} and relative(y, F.linear(x, layer.weight, layer.bias)) < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(0,), (0, 5), (3, 0)])
def test_no_tokens_give_nothing_and_gradients_of_zero_as_nn_linear_does(lead, dtype):
    layer = Fp8Linear(96, 40)
    x = torch.empty(*lead, 96, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.shape == (*lead, 40) and y.dtype == dtype
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.weight.grad.shape == (40, 96) and not layer.weight.grad.any()
    assert not layer.bias.grad.any()
    gate, up = (torch.empty(*lead, 96, dtype=dtype, requires_grad=True) for _ in range(2))
    w = torch.randn(40, 96, requires_grad=True)
    out = swiglu_linear(gate, up, w)
    assert out.shape == (*lead, 40) and out.dtype == dtype
    out.sum().backward()
    assert gate.grad.shape == up.grad.shape == gate.shape
    assert w.grad.shape == w.shape and not w.grad.any()


def test_one_token_without_a_batch_is_taken():
    layer, x = Fp8Linear(96, 40), torch.randn(96)
    assert torch.equal(layer(x), layer(x[None])[0])
    assert torch.equal(
        swiglu_linear(x, x, layer.weight), swiglu_linear(x[None], x[None], layer.weight)[0]
    )


@pytest.mark.parametrize("shape", [(5, 95), (0, 95), (96, 5), (95,), ()])
def test_an_input_of_another_width_is_refused_with_both_sizes(shape):
    x, k = torch.ones(shape), shape[-1] if shape else "none"
    with pytest.raises(ValueError, match=rf"these are {k} and 96\. There is no.*Give x"):
        Fp8Linear(96, 40)(x)
    with pytest.raises(ValueError, match=rf"^gate.*these are {k} and 96"):
        swiglu_linear(x, x, torch.ones(40, 96))


def test_operands_that_do_not_fit_each_other_are_refused():
    w = torch.ones(40, 96)
    with pytest.raises(ValueError, match=r"gate is \(5, 96\) and up \(4, 96\)"):
        swiglu_linear(torch.ones(5, 96), torch.ones(4, 96), w)
    with pytest.raises(ValueError, match="these are 96 and 7"):
        fp8_linear(torch.ones(5, 96), w, torch.ones(40, 7))
    with pytest.raises(ValueError, match="with k at least 1"):
        fp8_linear(torch.ones(5, 0), torch.ones(40, 0))


def test_a_layer_taken_over_shares_its_parameters_and_names():
    linear = nn.Linear(64, 32)
    made = Fp8Linear.of(linear)
    assert made.weight is linear.weight and made.bias is linear.bias
    assert made.state_dict().keys() == linear.state_dict().keys()
    x = torch.randn(5, 64)
    assert relative(made(x), linear(x)) < 0.06


@pytest.mark.parametrize("scaling", [DEEPSEEK, PER_TENSOR])
def test_nan_in_the_input_comes_out_as_nan_and_stops_nobody(scaling):
    x, w, _ = tensors(8, 6, 256)
    with torch.no_grad():
        x[2, 200] = torch.nan
    (y,) = fp8_linear(x, w, scaling=scaling)
    assert y[2].isnan().all()
    assert scaling is PER_TENSOR or y[[0, 1, 3]].isfinite().all()


def test_one_constant_for_all_gradients_loses_the_small_and_cuts_the_large():
    x, w, dy = tensors(64, 32, 64)
    scaling = Scaling(grad_scale=2.0**-10)
    _, good, _ = step(x, w, dy, scaling=scaling)
    assert relative(good, dy @ w.detach()) > 0.05  # beyond 448 / 1024 it is cut
    _, lost, _ = step(x, w, 1e-8 * dy, scaling=scaling)
    assert (lost == 0).all()
    _, kept, _ = step(x, w, 1e-8 * dy)
    assert relative(kept, 1e-8 * dy @ w.detach()) < 0.04


def test_a_part_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="Choose one of tile"):
        Scaling(x="column")
    with pytest.raises(ValueError, match="Choose 'block' or 'tensor'"):
        Scaling(w="tile")
    for constant in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"^scale="):
            Scaling(grad_scale=constant)
    with pytest.raises(ValueError, match="nothing would be kept"):
        Fp8Linear(8, 8, cache="bf16")
