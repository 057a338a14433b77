"""A product with a quantised weight is the product with the weight that its codes stand for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial.backend import BackendError
from dsv3_tutorial.fp8.checks import QuantizationError
from dsv3_tutorial.weights import matmul
from dsv3_tutorial.weights.formats import FORMATS, Quantized, dequantize, quantize
from dsv3_tutorial.weights.matmul import quantized_matmul
from dsv3_tutorial.weights.matmul_blocks import HALF_BLOCKS, SINGLE_BLOCKS, Blocks, choose_blocks

H100 = (132, 232_448)  # SMs, bytes of shared memory a program may take
WIDE = Blocks(rows=32, tokens=16, step=128, warps=4, stages=2, shared=0)
NARROW = Blocks(rows=16, tokens=16, step=32, warps=4, stages=2, shared=0)


def case(fmt, tokens=3, m=40, k=300, dtype=torch.float32):
    """Groups of 128 columns and of 128 rows that differ by powers of ten: a foreign scale shows."""
    rows, columns = torch.arange(m)[:, None] // 128, torch.arange(k) // 128
    weight = torch.randn(m, k) * torch.rand(m, 1) * 10.0 ** (columns % 3 - rows)
    return torch.randn(tokens, k).to(dtype), quantize(weight, fmt)


def exact(x, q):
    return x.double() @ dequantize(q, torch.float64).T


def budget(x, q):
    """What rounding each product once to float32 could add up to, generously: (M, m)."""
    return 4e-7 * (x.double().abs() @ dequantize(q, torch.float64).abs().T) + 1e-12


def in_triton(device, x, q, blocks=WIDE, splits=1):
    from dsv3_tutorial.weights import triton_matmul_kernels as kernels

    parts = [part.to(device) for part in (x, q.codes, q.scale)]
    return kernels.launch(*parts, q.fmt, q.shape, blocks, splits).cpu()


# The reference


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_reference_multiplies_with_what_the_codes_stand_for(fmt):
    x, q = case(fmt)
    out = quantized_matmul(x.view(1, 3, 300), q)
    assert out.shape == (1, 3, 40)
    assert ((out[0] - exact(x, q)).abs() <= budget(x, q)).all()
    assert torch.equal(quantized_matmul(x.double(), q), exact(x, q))


@pytest.mark.parametrize("fmt", FORMATS)
def test_half_precision_is_rounded_once_at_the_end(fmt):
    x, q = case(fmt, dtype=torch.bfloat16)
    out = quantized_matmul(x, q)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, quantized_matmul(x.float(), q).bfloat16())


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_gradient_is_the_weight_s_eager_and_as_an_operator(fmt):
    x, q = case(fmt, k=130)
    x = x.double().requires_grad_()
    grad = torch.randn(3, 40, dtype=torch.float64)
    (eager,) = torch.autograd.grad(quantized_matmul(x, q), x, grad)
    args = (q.codes, q.scale, fmt, *q.shape)
    (operator,) = torch.autograd.grad(torch.ops.dsv3.quantized_matmul(x, *args), x, grad)
    torch.testing.assert_close(eager, grad @ dequantize(q, torch.float64), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operator, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_the_operator_passes_opcheck(fmt):
    x, q = case(fmt, k=130)
    operator = torch.ops.dsv3.quantized_matmul.default
    inputs = (x.requires_grad_(), q.codes, q.scale, fmt, *q.shape, None)
    assert set(torch.library.opcheck(operator, inputs).values()) == {"SUCCESS"}


def test_the_compiler_keeps_it_in_one_graph():
    x, q = case("int8")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, codes, scale: quantized_matmul(x, Quantized("int8", codes, scale, q.shape)) + 1,
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(x, q.codes, q.scale), quantized_matmul(x, q) + 1)


def test_no_token_gives_no_output():
    x, q = case("int8", tokens=0)
    assert quantized_matmul(x, q).shape == (0, 40)


def with_parts(q, **parts):
    return Quantized(**{"fmt": q.fmt, "codes": q.codes, "scale": q.scale, "shape": q.shape} | parts)


WRONG = {
    "another k": lambda x, q: (x[:, 1:], q),
    "tokens that are integers": lambda x, q: (x.long(), q),
    "a stack of matrices": lambda x, q: (x, with_parts(q, shape=(1, *q.shape))),
    "no output": lambda x, q: (x, with_parts(q, shape=(0, 300))),
    "codes of another format": lambda x, q: (x, with_parts(q, codes=q.codes.to(torch.uint8))),
    "codes of another weight": lambda x, q: (x, with_parts(q, codes=q.codes[:-1])),
    "scales of another format": lambda x, q: (x, with_parts(q, fmt="int8-tile")),
    "half scales": lambda x, q: (x, with_parts(q, scale=q.scale.half())),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_refused_in_three_parts(wrong):
    with pytest.raises(
        QuantizationError, match=r"(?s)^quantized_matmul: .*\. Codes would .*\. Pass x "
    ):
        quantized_matmul(*WRONG[wrong](*case("int8")))


def test_an_unknown_format_is_refused():
    x, q = case("int8")
    with pytest.raises(QuantizationError, match="no weight format 'int3'"):
        quantized_matmul(x, with_parts(q, fmt="int3"))


# The kernel, on the GPU or in the interpreter


@pytest.mark.parametrize(("m", "k"), [(40, 300), (130, 256), (16, 17), (33, 128), (1, 1)])
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_kernel_equals_the_definition_at_any_size(kernel_device, fmt, m, k):
    x, q = case(fmt, m=m, k=k)
    for blocks in (WIDE, NARROW):
        out = in_triton(kernel_device, x, q, blocks)
        assert ((out - exact(x, q)).abs() <= budget(x, q)).all()


@pytest.mark.parametrize(("tokens", "splits"), [(1, 2), (17, 5), (40, 1)])
@pytest.mark.parametrize("fmt", FORMATS)
def test_tokens_and_parts_of_the_sum_may_be_any_number(kernel_device, fmt, tokens, splits):
    """Three steps in five parts: some have nothing to add."""
    x, q = case(fmt, tokens=tokens)
    out = in_triton(kernel_device, x, q, splits=splits)
    assert ((out - exact(x, q)).abs() <= budget(x, q)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("fmt", FORMATS)
def test_codes_are_exact_in_half_precision_so_only_the_result_is_rounded(
    kernel_device, fmt, splits, dtype
):
    x, q = case(fmt, dtype=dtype)
    out, true = in_triton(kernel_device, x, q, HALF_BLOCKS[0], splits), exact(x, q)
    assert out.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2 * true.abs() + torch.finfo(dtype).smallest_normal
    assert ((out.double() - true).abs() <= 1.01 * rounding + budget(x, q)).all()


def test_every_code_is_read_as_the_number_it_is(kernel_device):
    """One column at a time, so that no sum can hide a wrong one; scales are 1."""
    eye = torch.eye(256)
    integers = torch.arange(-127, 129, dtype=torch.int16).clamp(max=127).to(torch.int8)
    q = Quantized("int8", integers[None], torch.ones(1), (1, 256))
    assert torch.equal(in_triton(kernel_device, eye, q)[:, 0], integers.float())
    bytes_ = torch.arange(256).to(torch.uint8)
    halves = torch.stack([bytes_ % 16, bytes_ // 16], dim=-1).flatten().float() - 8
    q = Quantized("int4", bytes_[None], torch.ones(1, 4), (1, 512))
    assert torch.equal(in_triton(kernel_device, torch.eye(512), q)[:, 0], halves)
    codes = bytes_[(bytes_ & 0x7F) != 0x7F].view(torch.float8_e4m3fn)  # all but NaN
    q = Quantized("fp8", codes[None], torch.ones(1, 2), (1, 254))
    assert torch.equal(in_triton(kernel_device, torch.eye(254), q)[:, 0], codes.float())


def test_a_weight_inside_a_stack_and_tokens_across_are_read_where_they_lie(kernel_device):
    x, q = case("int8-tile", k=256)
    stack = torch.full((3, 40, 512), 99, dtype=torch.int8)
    stack[1, :, :256] = q.codes
    apart = with_parts(q, codes=stack[1, :, :256])
    expected = in_triton(kernel_device, x, q)
    assert torch.equal(in_triton(kernel_device, x, apart), expected)
    assert torch.equal(in_triton(kernel_device, x.T.contiguous().T, q), expected)


@pytest.mark.parametrize("tokens", [3, 70])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_forced_triton_goes_through_the_public_function(kernel_device, fmt, tokens):
    x, q = case(fmt, tokens=tokens)
    moved = with_parts(q, codes=q.codes.to(kernel_device), scale=q.scale.to(kernel_device))
    out = quantized_matmul(x.to(kernel_device), moved, backend="triton").cpu()
    assert ((out - exact(x, q)).abs() <= budget(x, q)).all()


def test_the_kernel_refuses_float64(kernel_device):
    x, q = case("int8")
    moved = with_parts(q, codes=q.codes.to(kernel_device), scale=q.scale.to(kernel_device))
    with pytest.raises(BackendError, match=r"no torch\.float64.*backend='reference'"):
        quantized_matmul(x.double().to(kernel_device), moved, backend="triton")


@pytest.mark.parametrize(("tokens", "kernel"), [(64, True), (65, False)])
def test_many_tokens_go_through_a_dequantised_copy_unless_triton_is_forced(
    monkeypatch, kernel_device, tokens, kernel
):
    from dsv3_tutorial.weights import triton_matmul

    asked = []

    def spy(x, codes, scale, fmt, shape):
        asked.append(len(x))
        return x.new_zeros(len(x), shape[0])

    monkeypatch.setattr(triton_matmul, "quantized_matmul", spy)
    monkeypatch.setattr(matmul, "pick", lambda x, backend: "triton")
    x, q = case("int8", tokens=tokens)
    out = quantized_matmul(x, q)
    assert bool(asked) == kernel
    assert kernel or ((out - exact(x, q)).abs() <= budget(x, q)).all()
    quantized_matmul(x, q, backend="triton")
    assert asked[-1] == tokens


# How the work is cut


def test_one_program_holds_all_tokens_where_it_can():
    tokens = {n: choose_blocks(n, 2048, 7168, 2, *H100)[0].tokens for n in (1, 16, 17, 64, 65)}
    assert tokens == {1: 16, 16: 16, 17: 32, 64: 64, 65: 64}
    assert choose_blocks(1, 2048, 7168, 4, *H100)[0] in SINGLE_BLOCKS
    with pytest.raises(BackendError, match=r"needs 53248 bytes .* has 49152\..*backend="):
        choose_blocks(1, 2048, 7168, 2, 132, 49_152)


def test_a_weight_with_few_outputs_is_split_along_k_and_a_large_one_is_not():
    assert choose_blocks(1, 576, 7168, 2, *H100)[1] == 8  # V3's kv_a_proj: 9 tiles for 132 SMs
    assert choose_blocks(1, 24_576, 1536, 2, *H100)[1] == 1  # its q_b_proj: 384 tiles


@given(
    tokens=st.integers(1, 200),
    m=st.integers(1, 40_000),
    k=st.integers(1, 20_000),
    size=st.sampled_from([2, 4]),
)
def test_k_is_split_into_parts_of_several_steps_and_a_step_into_no_group_s_half(tokens, m, k, size):
    blocks, splits = choose_blocks(tokens, m, k, size, *H100)
    steps = -(-k // blocks.step)
    assert splits == 1 or splits * 4 <= steps
    assert 128 % blocks.step == 0


# On a GPU, at DeepSeek-V3's own sizes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "k"), [(576, 7168), (7168, 2048), (129, 1000)])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_gpu_agrees_with_float64_at_v3_s_sizes(fmt, m, k, dtype):
    q = quantize(torch.randn(m, k), fmt)
    q = with_parts(q, codes=q.codes.cuda(), scale=q.scale.cuda())
    for tokens, backend in ((1, None), (7, None), (32, None), (64, None), (200, "triton")):
        x = torch.randn(tokens, k).to(dtype).cuda()
        out, true = quantized_matmul(x, q, backend), exact(x, q)
        tolerance = max(torch.finfo(dtype).eps, 1e-5)
        assert (out.double() - true).norm() / true.norm() < tolerance
    x = torch.randn(200, k).to(dtype).cuda()  # through a copy, which is rounded to dtype too
    out, true = quantized_matmul(x, q), exact(x, q)
    assert (out.double() - true).norm() / true.norm() < 4 * max(torch.finfo(dtype).eps, 1e-5)
