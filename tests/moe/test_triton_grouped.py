"""The grouped kernels equal a loop over experts, whoever has the rows; on a GPU or interpreted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial.backend import BackendError
from dsv3_tutorial.moe import grouped_blocks
from dsv3_tutorial.moe.grouped_blocks import HALF_BLOCKS, SINGLE_BLOCKS, Blocks

pytest.importorskip("triton", reason="Triton is not installed")
from dsv3_tutorial.moe import triton_grouped, triton_grouped_kernels
from dsv3_tutorial.moe.triton_grouped import grouped_matmul

H100 = (132, 232_448)  # SMs, bytes of shared memory a program may take
SMALL = Blocks(rows=16, columns=16, step=16, warps=4, stages=2, shared=0)
COUNTS = {
    "uneven, no multiple of a tile": [5, 17, 1, 40],
    "empty first, last and between": [0, 3, 0, 0, 20, 0],
    "one takes every row": [0, 0, 37, 0],
    "one expert": [19],
    "whole tiles": [16, 32, 16],
    "no rows at all": [0, 0, 0],
    "many experts, few rows": [1, 0, 2, 0, 0, 1, 1, 0, 3, 0, 0, 0, 1, 0, 0, 0, 2],
}


def case(counts, n=24, k=40, dtype=torch.float32, device="cpu"):
    """Rows sorted by expert, a weight each, where the rows end, and a gradient for the result."""
    counts = torch.tensor(counts)
    ends = counts.cumsum(0).to(torch.int32)
    x, weight = torch.randn(int(counts.sum()), k), torch.randn(len(counts), n, k)
    grad = torch.randn(len(x), n)
    return [t.to(device) for t in (x.to(dtype), weight.to(dtype), ends, grad.to(dtype))]


def textbook(x, weight, ends, grad):
    """One expert after the other in float64: the result, the input's and the weight's gradient."""
    x, weight, grad = x.double(), weight.double(), grad.double()
    y, grad_x, grad_weight = x.new_zeros(grad.shape), torch.zeros_like(x), torch.zeros_like(weight)
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        y[begin:end] = x[begin:end] @ weight[expert].T
        grad_x[begin:end] = grad[begin:end] @ weight[expert]
        grad_weight[expert] = grad[begin:end].T @ x[begin:end]
        begin = end
    return y, grad_x, grad_weight


def in_triton(inputs, blocks):
    """The same three with these blocks."""
    x, weight, ends, grad = inputs
    return (
        triton_grouped_kernels.launch_rows(x, weight, ends, blocks),
        triton_grouped_kernels.launch_rows(grad, weight.mT, ends, blocks),
        triton_grouped_kernels.launch_weights(grad, x, ends, blocks),
    )


def assert_close(found, inputs, tolerance):
    for a, b in zip(found, textbook(*inputs), strict=True):
        assert a.dtype == inputs[0].dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("counts", COUNTS)
def test_result_and_both_gradients_are_the_loop_s_whoever_has_the_rows(kernel_device, counts):
    inputs = case(COUNTS[counts], device=kernel_device)
    assert_close(in_triton(inputs, SMALL), inputs, 1e-5)


@pytest.mark.parametrize(("n", "k"), [(16, 16), (1, 1), (33, 7), (7, 33), (48, 64), (64, 16)])
def test_sides_need_be_no_multiple_of_a_tile(kernel_device, n, k):
    inputs = case([5, 0, 21], n=n, k=k, device=kernel_device)
    assert_close(in_triton(inputs, SMALL), inputs, 1e-5)


def test_more_than_one_band_of_tiles_is_covered_once(kernel_device):
    """Eight row tiles make a band: 11 tiles over two experts, three columns of tiles."""
    inputs = case([100, 65], n=40, k=16, device=kernel_device)
    assert_close(in_triton(inputs, SMALL), inputs, 1e-5)


@pytest.mark.parametrize("blocks", HALF_BLOCKS, ids=str)
def test_the_blocks_that_are_launched_agree_in_bf16(kernel_device, blocks):
    """Products of BF16 are exact in float32: one rounding at the end, and float32's own before."""
    inputs = case([70, 0, 140, 3], n=136, k=72, dtype=torch.bfloat16, device=kernel_device)
    for found, exact in zip(in_triton(inputs, blocks), textbook(*inputs), strict=True):
        assert found.dtype == torch.bfloat16
        error = (found.double() - exact).abs()
        assert (error <= exact.abs() * 2**-8 + 1e-4).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_kept_in_float32(kernel_device, dtype):
    """1,024 times 1, after which a BF16 sum would have stood still at 256."""
    x, weight, ends, _ = case([3], n=16, k=1024, dtype=dtype, device=kernel_device)
    out = triton_grouped_kernels.launch_rows(
        torch.ones_like(x), torch.ones_like(weight), ends, SMALL
    )
    assert out.eq(1024).all()


def test_neither_result_nor_gradient_reads_another_expert_s_rows_or_weights(kernel_device):
    """NaN in the neighbour stays with the neighbour: a mask, not a product with zero."""
    x, weight, ends, grad = case([5, 6, 7], device=kernel_device)
    x[5:11], grad[5:11], weight[1] = torch.nan, torch.nan, torch.nan
    y, grad_x, grad_weight = in_triton((x, weight, ends, grad), SMALL)
    mine = torch.tensor([0, 1, 2], device=kernel_device).repeat_interleave(
        torch.tensor([5, 6, 7], device=kernel_device)
    )
    for rows in (y, grad_x):
        assert rows[mine == 1].isnan().all() and rows[mine != 1].isfinite().all()
    assert grad_weight[1].isnan().all() and grad_weight[[0, 2]].isfinite().all()


def test_an_expert_without_rows_has_a_gradient_of_exact_zeros(kernel_device):
    inputs = case([4, 0, 4], device=kernel_device)
    inputs[0][:], inputs[3][:] = 1.0, 1.0
    *_, grad_weight = in_triton(inputs, SMALL)
    assert grad_weight[1].eq(0).all() and grad_weight[[0, 2]].eq(4).all()


# The public function and its operators


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autograd_gives_the_loop_s_gradients(kernel_device, dtype):
    x, weight, ends, grad = case([9, 0, 30, 2], dtype=dtype, device=kernel_device)
    x.requires_grad_(), weight.requires_grad_()
    y = grouped_matmul(x, weight, ends)
    found = (y.detach(), *torch.autograd.grad(y, (x, weight), grad))
    inputs = [t.detach() for t in (x, weight, ends, grad)]
    assert_close(found, inputs, 1e-5 if dtype == torch.float32 else 0.05)


def test_a_gradient_that_is_not_needed_is_not_computed(kernel_device, monkeypatch):
    x, weight, ends, grad = case([9, 4], device=kernel_device)
    monkeypatch.setattr(triton_grouped, "launch_weights", None)
    y = grouped_matmul(x.requires_grad_(), weight, ends)
    assert torch.autograd.grad(y, x, grad)[0].shape == x.shape


def test_the_gradient_of_a_sum_has_no_strides_and_is_read_right(kernel_device):
    x, weight, ends, _ = case([9, 4], device=kernel_device)
    grouped_matmul(x.requires_grad_(), weight.requires_grad_(), ends).sum().backward()
    ones = torch.ones(13, weight.shape[1], device=kernel_device)
    inputs = [t.detach() for t in (x, weight, ends, ones)]
    assert_close((grouped_matmul(*inputs[:3]), x.grad, weight.grad), inputs, 1e-5)


def test_weights_and_rows_are_read_where_they_lie_or_copied(kernel_device):
    x, weight, ends, grad = case([9, 4], device=kernel_device)
    wide = torch.full((13, 2 * x.shape[1]), torch.nan, device=kernel_device)
    wide[:, ::2] = x
    lying = weight.mT.contiguous().mT
    torn = torch.stack([weight, weight], dim=-1)[..., 0]
    for rows, matrix in ((x, lying), (wide[:, ::2], torn), (x.T.contiguous().T, weight)):
        assert_close(in_triton((rows, matrix, ends, grad), SMALL), (x, weight, ends, grad), 1e-5)


def test_it_is_pytorch_s_grouped_mm(kernel_device):
    if kernel_device.type == "cuda":
        pytest.skip("PyTorch's grouped_mm on CUDA is BF16 only; the GPU tests compare it")
    x, weight, ends, grad = case([9, 0, 4], device=kernel_device)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    multiply = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    a = grouped_matmul(ours, weight, ends)
    b = multiply(theirs, weight.transpose(1, 2), offs=ends)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    a.backward(grad), b.backward(grad)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_the_operators_pass_opcheck_with_gradients_and_a_transposed_weight(kernel_device):
    x, weight, ends, grad = case([5, 0, 3], n=16, k=16, device=kernel_device)
    x.requires_grad_(), weight.requires_grad_(), grad.requires_grad_()
    across = weight.detach().mT.requires_grad_()
    operators = torch.ops.dsv3
    for operator, inputs in (
        (operators.grouped_matmul, (x, weight, ends)),
        (operators.grouped_matmul, (grad, across, ends)),
        (operators.grouped_outer, (grad, x, ends)),
    ):
        results = torch.library.opcheck(operator.default, inputs)
        assert set(results.values()) == {"SUCCESS"}


def test_the_second_derivative_is_the_loop_s(kernel_device):
    """The family is closed: each gradient is again a grouped product."""

    def second(multiply, dtype):
        x, weight, grad = (t.to(dtype).requires_grad_() for t in (inputs[0], inputs[1], inputs[3]))
        pair = torch.autograd.grad(multiply(x, weight), (x, weight), grad, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in pair), (x, weight, grad))

    def loop(x, weight):
        parts = x.split(inputs[2].diff(prepend=inputs[2][:1] * 0).tolist())
        return torch.cat([p @ w.T for p, w in zip(parts, weight, strict=True)])

    inputs = case([5, 0, 7], n=16, k=16, device=kernel_device)
    ours = second(lambda x, w: grouped_matmul(x, w, inputs[2]), torch.float32)
    for a, b in zip(ours, second(loop, torch.float64), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


WRONG = {
    "x of three dimensions": lambda x, w, e: (x[None], w, e),
    "another k": lambda x, w, e: (x[:, 1:], w, e),
    "an expert without an end": lambda x, w, e: (x, w, e[1:]),
    "no experts": lambda x, w, e: (x, w[:0], e[:0]),
    "ends of 64 bits": lambda x, w, e: (x, w, e.long()),
    "two dtypes": lambda x, w, e: (x.bfloat16(), w, e),
    "rows without an expert": lambda x, w, e: (x, w, e - 1),
    "ends that fall": lambda x, w, e: (x, w, e.flip(0)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_inputs_that_do_not_fit_are_refused_in_three_parts(wrong):
    x, weight, ends, _ = case([4, 5])
    with pytest.raises(ValueError, match=r"(?s)^grouped_matmul: .*\. Rows would .*\. Pass x "):
        grouped_matmul(*WRONG[wrong](x, weight, ends))


def test_float64_and_a_machine_without_triton_are_refused(kernel_device, monkeypatch):
    x, weight, ends, _ = case([4, 5], device=kernel_device)
    with pytest.raises(BackendError, match=r"no torch\.float64.*engine 'sorted'"):
        grouped_matmul(x.double(), weight.double(), ends)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match="CUDA devices"):
        grouped_matmul(x.cpu(), weight.cpu(), ends.cpu())


# How the work is cut


@given(
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=40), rows=st.sampled_from([16, 128])
)
def test_the_grid_has_a_tile_for_every_row_and_few_too_many(counts, rows):
    needed = sum(-(-count // rows) for count in counts)
    most = grouped_blocks.most_tiles(sum(counts), len(counts), rows)
    assert needed <= most <= sum(counts) // rows + len(counts)


@given(n_rows=st.integers(0, 500), n_groups=st.integers(1, 40))
def test_no_smaller_grid_would_do(n_rows, n_groups):
    """The worst counts: one row to every group that gets any, all the rest to one of them."""
    begun = min(n_rows, n_groups)
    counts = [1] * begun
    if begun:
        counts[0] += n_rows - begun
    needed = sum(-(-count // 16) for count in counts)
    assert grouped_blocks.most_tiles(n_rows, n_groups, 16) == needed


@pytest.mark.parametrize(
    ("groups", "rows", "columns", "chosen"),
    [
        (64, 1024, 4096, (128, 256)),  # training: the tile that reads the fewest bytes
        (64, 8, 4096, (16, 128)),  # decoding: reading weights is the cost
        (64, 40, 4096, (64, 128)),
        (256, 1024, 100, (128, 128)),  # a narrow side leaves half of 256 columns idle
        (4, 512, 512, (64, 128)),  # 16 programs of the largest would leave 116 SMs idle
    ],
)
def test_blocks_are_as_large_as_they_can_be_filled(groups, rows, columns, chosen):
    assert grouped_blocks.choose_blocks(groups, rows, columns, 2, *H100)[:2] == chosen


def test_float32_has_blocks_of_its_own_and_a_device_with_too_little_memory_is_refused():
    assert grouped_blocks.choose_blocks(8, 100, 100, 4, *H100) in SINGLE_BLOCKS
    largest = grouped_blocks.choose_blocks(64, 1024, 4096, 2, 108, 101_376)
    assert largest.shared <= 101_376  # a desktop GPU
    with pytest.raises(BackendError, match=r"needs 55296 bytes .* has 1000.*'sorted'"):
        grouped_blocks.choose_blocks(8, 100, 100, 2, 132, 1000)


# On a GPU, at real sizes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 2048, 7168), (256, 7168, 2048), (16, 1000, 520)], ids=str)
@pytest.mark.parametrize("tokens", [16, 1024])
def test_a_gpu_agrees_with_float64_at_v3_s_sizes(shape, tokens, dtype):
    n_groups, n, k = shape
    counts = torch.multinomial(torch.rand(n_groups), tokens * 8, replacement=True)
    counts = counts.bincount(minlength=n_groups).tolist()
    inputs = case(counts, n, k, dtype, "cuda")
    x, weight, ends, grad = inputs
    y = grouped_matmul(x.requires_grad_(), weight.requires_grad_(), ends)
    y.backward(grad)
    exact = textbook(*(t.detach() for t in inputs))
    for found, wanted in zip((y, x.grad, weight.grad), exact, strict=True):
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error < 2 * torch.finfo(dtype).eps


@pytest.mark.gpu
def test_a_gpu_s_grouped_mm_of_pytorch_agrees():
    x, weight, ends, _ = case([100, 0, 37, 512], 512, 1024, torch.bfloat16, "cuda")
    multiply = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    theirs = multiply(x, weight.transpose(1, 2), offs=ends)
    torch.testing.assert_close(grouped_matmul(x, weight, ends), theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_a_gpu_is_never_waited_for():
    x, weight, ends, grad = case([100, 0, 37, 512], 512, 1024, torch.bfloat16, "cuda")
    x.requires_grad_(), weight.requires_grad_()
    grouped_matmul(x, weight, ends).backward(grad)  # compiled here, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        grouped_matmul(x, weight, ends).backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
