"""A quantised layer: near the plain one, small, and the same after a copy, a cast and a save."""

import copy

import pytest
import torch
from torch import nn

from dsv3_tutorial.weights import cpu
from dsv3_tutorial.weights.formats import FORMATS, dequantize, quantize
from dsv3_tutorial.weights.layers import QuantizedLinear, QuantizedStack


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def layer(m, k, bias=True):
    torch.manual_seed(0)
    return nn.Linear(k, m, bias=bias)


def same_codes(one, two):
    return torch.equal(one.codes.view(torch.uint8), two.codes.view(torch.uint8)) and torch.equal(
        one.scale, two.scale
    )


SIZES = [(48, 64), (17, 33), (512, 640)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_it_gives_what_its_codes_stand_for_with_the_bias(fmt, size):
    plain = layer(*size)
    made = QuantizedLinear.of(plain, fmt)
    x = torch.randn(2, 3, size[1], generator=torch.Generator().manual_seed(1))
    wanted = x @ dequantize(quantize(plain.weight, fmt)).T + plain.bias
    got = made(x)
    assert got.shape == wanted.shape and got.dtype == x.dtype
    assert (got - wanted).norm() < 0.015 * wanted.norm()
    assert torch.equal(made(x.transpose(0, 1)), got.transpose(0, 1)) or made.product.name not in (
        "int8",
        "int8-bf16",
        "int4-bf16",
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_its_codes_come_out_of_the_product_as_they_went_in(fmt, size):
    plain = layer(*size)
    made, q = QuantizedLinear.of(plain, fmt), quantize(plain.weight, fmt)
    assert made.nbytes == q.nbytes
    made(torch.ones(1, size[1]))
    assert (made.codes is None) == made.product.owns
    assert same_codes(made.quantized, q)
    assert torch.equal(made.weight, dequantize(q))


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_copy_and_a_cast_keep_codes_and_scales(fmt):
    made = QuantizedLinear.of(layer(48, 64), fmt)
    made(torch.ones(1, 64))
    q = made.quantized
    other = copy.deepcopy(made).to(torch.bfloat16)
    assert same_codes(other.quantized, q) and other.scale.dtype == torch.float32
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert other(x).dtype == torch.bfloat16
    torch.testing.assert_close(other(x).float(), made(x).float(), rtol=0.02, atol=0.02)


def test_a_state_dict_holds_the_weight_that_a_plain_layer_loads():
    plain = layer(48, 64)
    made = QuantizedLinear.of(plain, "int8")
    state = made.state_dict()
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    assert torch.equal(plain.weight, dequantize(quantize(made.weight, "int8")))


def test_where_the_product_has_its_own_order_no_second_copy_is_kept():
    made = QuantizedLinear.of(layer(512, 512, bias=False), "int8")
    made(torch.ones(1, 512))
    assert made.product.owns == cpu.fbgemm_is_here()
    if made.product.owns:
        assert made.codes is None


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_stack_multiplies_each_row_with_its_own_matrix(fmt):
    weight = torch.randn(5, 24, 160, generator=torch.Generator().manual_seed(0))
    x = torch.randn(7, 160, generator=torch.Generator().manual_seed(1))
    which = torch.tensor([4, 0, 0, 3, 1, 4, 2])
    q = quantize(weight, fmt)
    stack = QuantizedStack(q)
    wanted = torch.stack([dequantize(q)[e] @ row for e, row in zip(which, x)])
    torch.testing.assert_close(stack(x, which), wanted, rtol=1e-5, atol=1e-4)
    assert torch.equal(stack.weight, dequantize(q)) and stack.nbytes == q.nbytes
    assert same_codes(copy.deepcopy(stack).to(torch.bfloat16).quantized, q)
    assert not stack.state_dict()


@pytest.mark.parametrize("fmt", ["int8", "int4", "fp8"])
def test_large_matrices_of_a_stack_lie_apart(fmt, monkeypatch):
    monkeypatch.setattr(cpu, "LARGE", 64)
    q = quantize(torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0)), fmt)
    stack = QuantizedStack(q)
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    for e, one in enumerate(stack.apart):
        torch.testing.assert_close(one(x), x @ dequantize(q)[e].T, rtol=0.05, atol=0.1)
    assert same_codes(stack.quantized, q) and not stack.state_dict()
