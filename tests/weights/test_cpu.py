"""Products on a CPU: near the definition, exact where they are integers, alone or in company."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.weights import cpu
from dsv3_tutorial.weights.formats import FORMATS, dequantize, quantize

fbgemm = pytest.mark.skipif(not cpu.fbgemm_is_here(), reason="no fbgemm in this PyTorch")
TOLERANCE = {"int8": 0.02, "int8-bf16": 0.01, "int4-bf16": 0.01, "dequantized": 1e-5}
PACKED = ("int8", "int8-bf16", "int4-bf16")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def always_packed(monkeypatch):
    monkeypatch.setattr(cpu, "LARGE", 0)


@settings(max_examples=25, deadline=None)
@given(
    m=st.sampled_from([1, 16, 33, 64]),
    k=st.sampled_from([1, 7, 32, 33, 96, 256]),
    rows=st.integers(1, 9),
    fmt=st.sampled_from(FORMATS),
)
def test_every_product_is_the_dequantised_one_to_its_inputs_rounding(m, k, rows, fmt):
    weight, x = normal(m, k), normal(rows, k, seed=1)
    q = quantize(weight, fmt)
    product = cpu.product(q)
    wanted = x @ dequantize(q).T
    scale = (x.norm(dim=-1, keepdim=True) * dequantize(q).norm(dim=-1)).clamp_min(1e-6)
    assert ((product.multiply(x) - wanted).abs() / scale).max() < TOLERANCE[product.name]


@pytest.mark.parametrize("fmt", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(64, 96), (576, 512)])
def test_a_token_gets_the_same_bits_whoever_shares_its_batch(fmt, dtype, size):
    product = cpu.product(quantize(normal(*size), fmt))
    assert product.name in PACKED or not cpu.fbgemm_is_here()
    x = normal(11, size[1], seed=1).to(dtype)
    x[3] *= 1000  # one scale for the batch would drown the others
    together = product.multiply(x)
    assert together.dtype == dtype
    for row in range(11):
        assert torch.equal(product.multiply(x[row : row + 1])[0], together[row])


@fbgemm
def test_integer_products_are_the_integers_product_exactly(always_packed):
    codes_x = torch.randint(-127, 128, (6, 80), generator=torch.Generator().manual_seed(0))
    codes_x[:, 0] = 127  # the largest, so that the inputs' scale is 1
    weight = normal(24, 80)
    q = quantize(weight, "int8")
    if not torch.cpu._is_vnni_supported():
        codes_x = codes_x.clamp(-63, 63)
    product = cpu.product(q)
    assert product.name == "int8"
    sums = codes_x.double() @ q.codes.double().T
    torch.testing.assert_close(
        product.multiply(codes_x.float()), (sums * q.scale.double()).float(), rtol=1e-5, atol=1e-4
    )


@fbgemm
def test_large_codes_do_not_saturate_the_sums(always_packed):
    """Pairs of 127 x 255 overflow 16 bits, which is what some instructions sum pairs in."""
    weight = torch.ones(32, 512)
    product = cpu.product(quantize(weight, "int8"))
    assert torch.allclose(product.multiply(torch.ones(2, 512)), torch.tensor(512.0), rtol=1e-5)
    assert torch.allclose(product.multiply(-torch.ones(2, 512)), torch.tensor(-512.0), rtol=1e-5)


@fbgemm
def test_a_token_of_zeros_gives_zeros(always_packed):
    product = cpu.product(quantize(normal(32, 64), "int8"))
    assert torch.equal(product.multiply(torch.zeros(3, 64)), torch.zeros(3, 32))


def test_the_matrix_decides_the_product():
    def named(m, k, fmt):
        return cpu.path(quantize(normal(m, k), fmt))

    if cpu.fbgemm_is_here():
        assert named(512, 512, "int8") == "int8" == named(16, 33, "int8")
    assert named(64, 96, "int8") == "int8-bf16"
    assert named(64, 96, "int4") == "int4-bf16"
    assert named(63, 96, "int4") == named(64, 40, "int4") == "dequantized"
    assert named(64, 96, "fp8") == named(64, 96, "int8-tile") == "dequantized"


def test_without_fbgemm_there_is_another_way(monkeypatch):
    monkeypatch.setattr(cpu, "fbgemm_is_here", lambda: False)
    assert cpu.path(quantize(normal(512, 512), "int8")) == "int8-bf16"
    assert cpu.path(quantize(normal(16, 33), "int8")) == "dequantized"


@pytest.mark.parametrize("fmt", ["int8", "int8-tensor", "int4"])
def test_a_packed_weight_can_be_read_again(fmt, always_packed):
    q = quantize(normal(48, 96), fmt)
    back = cpu.unpacked(cpu.product(q).multiply, q.shape)
    torch.testing.assert_close(back, dequantize(q), rtol=0.01, atol=1e-6)
