"""The decode over the latent cache equals a plain softmax in float64, in PyTorch and in Triton."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.attention import decode, decode_blocks
from dsv3_tutorial.attention.decode import latent_decode
from dsv3_tutorial.attention.decode_blocks import HALF_BLOCKS, SINGLE_BLOCKS, Blocks
from dsv3_tutorial.backend import BackendError

H100 = (132, 232_448)  # SMs, bytes of shared memory a program may take
SMALL = Blocks(rows=16, tokens=16, warps=4, stages=2, shared=0, per_sm=1)


def textbook(q, latent, lengths, rank, scale):
    """One query and one head at a time, in float64, keys and values written out."""
    q, latent = q.double(), latent.double()
    n_batch, n_queries, n_heads, _ = q.shape
    out = q.new_zeros(n_batch, n_queries, n_heads, rank)
    for b, s, h in torch.cartesian_prod(*map(torch.arange, out.shape[:3])).view(-1, 3).tolist():
        keys = latent[b, : int(lengths[b]) - n_queries + s + 1]
        weights = torch.softmax(keys @ q[b, s, h] * scale, dim=0)
        out[b, s, h] = weights @ keys[:, :rank]
    return out


def case(lengths, heads=2, queries=1, rank=32, rope=16, cached=None, dtype=torch.float32):
    """A batch whose cache holds NaN wherever no sequence has a token: reading it would show."""
    lengths = torch.tensor(lengths)
    cached = cached or int(lengths.max())
    q = torch.randn(len(lengths), queries, heads, rank + rope)
    latent = torch.randn(len(lengths), cached, rank + rope)
    latent[torch.arange(cached) >= lengths[:, None]] = torch.nan
    return q.to(dtype), latent.to(dtype), lengths, rank, (rank + rope) ** -0.5


def in_triton(device, inputs, blocks, splits):
    from dsv3_tutorial.attention import triton_decode

    moved = [x.to(device) if isinstance(x, torch.Tensor) else x for x in inputs]
    return triton_decode.launch(*moved, blocks, splits).cpu()


# The reference


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_reference_is_a_plain_softmax_over_the_tokens_each_query_may_see(data):
    draw = data.draw
    queries = draw(st.integers(1, 4), label="queries")
    lengths = draw(st.lists(st.integers(queries, 20), min_size=1, max_size=4), label="lengths")
    sizes = {name: draw(st.integers(1, 9), label=name) for name in ("heads", "rank")}
    spare = draw(st.integers(0, 3), label="spare")
    rope = draw(st.integers(0, 6), label="rope")
    inputs = case(lengths, queries=queries, rope=rope, cached=max(lengths) + spare, **sizes)
    exact = textbook(*inputs)
    wide = latent_decode(inputs[0].double(), inputs[1].double(), *inputs[2:])
    torch.testing.assert_close(wide, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(latent_decode(*inputs).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_its_own_rounding(dtype):
    inputs = case([40, 7], heads=4, dtype=dtype)
    out = latent_decode(*inputs)
    assert out.dtype == dtype
    exact = textbook(*inputs)
    assert torch.equal(out, exact.to(dtype)) or (out - exact).abs().max() < (
        torch.finfo(dtype).eps * exact.abs().max()
    )


def test_several_queries_are_the_same_as_one_at_a_time():
    q, latent, lengths, rank, scale = case([9, 5], queries=3)
    together = latent_decode(q, latent, lengths, rank, scale)
    for s in range(3):
        alone = latent_decode(q[:, s : s + 1], latent, lengths - 2 + s, rank, scale)
        torch.testing.assert_close(together[:, s : s + 1], alone, rtol=1e-6, atol=1e-6)


def test_the_cache_is_read_where_it_lies():
    q, latent, lengths, rank, scale = case([6, 4], cached=8)
    larger = torch.full((2, 50, latent.shape[-1]), torch.nan)
    larger[:, :8] = latent
    a = latent_decode(q, latent, lengths, rank, scale)
    assert torch.equal(a, latent_decode(q, larger[:, :8], lengths.int(), rank, scale))


def test_the_result_does_not_depend_on_the_neighbours_in_the_batch():
    q, latent, lengths, rank, scale = case([12, 3, 7])
    together = latent_decode(q, latent, lengths, rank, scale)
    for b in range(3):
        alone = latent_decode(q[[b]], latent[[b]], lengths[[b]], rank, scale)
        assert torch.equal(together[[b]], alone)


# The operator


def inputs_with_gradient(queries=2):
    q, latent, *rest = case([5, 5], queries=queries)
    return q.double().requires_grad_(), latent.double().requires_grad_(), *rest


@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_operator_passes_opcheck(backend):
    operator = torch.ops.dsv3.latent_decode.default
    for inputs in (case([9, 5], queries=2), inputs_with_gradient()):
        results = torch.library.opcheck(operator, (*inputs, backend))
        assert set(results.values()) == {"SUCCESS"}


def test_the_operator_s_gradient_is_the_reference_s():
    inputs = inputs_with_gradient(queries=3)
    eager = latent_decode(*inputs)
    operator = torch.ops.dsv3.latent_decode(*inputs)
    assert torch.equal(eager, operator)
    given_gradient = torch.randn_like(eager)
    for a, b in zip(
        torch.autograd.grad(eager, inputs[:2], given_gradient),
        torch.autograd.grad(operator, inputs[:2], given_gradient),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_gradient_is_that_of_finite_differences():
    q, latent, *rest = inputs_with_gradient()
    for run in (latent_decode, torch.ops.dsv3.latent_decode):
        assert torch.autograd.gradcheck(lambda q, c, run=run: run(q, c, *rest), (q, latent))


def test_rows_past_a_sequence_s_length_get_no_gradient():
    q, latent, lengths, rank, scale = case([3], cached=6)
    latent = latent.nan_to_num().requires_grad_()
    torch.ops.dsv3.latent_decode(q, latent, lengths, rank, scale).sum().backward()
    assert latent.grad[:, 3:].eq(0).all() and latent.grad[:, :3].ne(0).any()


def step(q, latent, lengths):
    return latent_decode(q * 2, latent, lengths, 32, 0.2) + 1


@pytest.mark.parametrize("queries", [1, 2])
def test_the_compiler_keeps_it_in_one_graph_with_the_same_numbers_and_gradients(queries):
    q, latent, lengths, *_ = inputs_with_gradient(queries)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, latent, lengths), step(q, latent, lengths))
    (a,) = torch.autograd.grad(compiled(q, latent, lengths).sum(), q)
    (b,) = torch.autograd.grad(step(q, latent, lengths).sum(), q)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, on first use
def test_the_default_compiler_generates_code_around_it():
    q, latent, lengths, *_ = case([7, 4])
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(q, latent, lengths), step(q, latent, lengths))


# What does not fit is refused

WRONG = {
    "a query as wide as": lambda q, c, n: (q[..., 1:], c, n, 32),
    "q without a query axis": lambda q, c, n: (q[:, 0], c, n, 32),
    "a batch of another size": lambda q, c, n: (q, c[:1], n, 32),
    "no head at all": lambda q, c, n: (q[:, :, :0], c, n, 32),
    "a rank over the width": lambda q, c, n: (q, c, n, 49),
    "a rank of 0": lambda q, c, n: (q, c, n, 0),
    "two types": lambda q, c, n: (q.half(), c, n, 32),
    "float lengths": lambda q, c, n: (q, c, n.float(), 32),
    "a length over T": lambda q, c, n: (q, c, n + 1, 32),
    "a length under S": lambda q, c, n: (q, c, n * 0 + 1, 32),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_inputs_that_do_not_fit_are_refused_in_three_parts(wrong):
    q, latent, lengths, _, scale = case([6, 4], queries=2)
    with pytest.raises(ValueError, match=r"(?s)^latent_decode: .*\. Heads would .*\. Pass q "):
        latent_decode(*WRONG[wrong](q, latent, lengths), scale)


def test_a_length_outside_the_cache_is_named_with_the_bounds():
    q, latent, lengths, rank, scale = case([6, 4], queries=2)
    with pytest.raises(ValueError, match="from 5 to 7, outside S = 2 to T = 6"):
        latent_decode(q, latent, lengths + 1, rank, scale)


# The kernel, on the GPU or in the interpreter


@pytest.mark.parametrize("splits", [1, 2, 5, 7])
@pytest.mark.parametrize("queries", [1, 2])
def test_the_kernel_equals_the_reference_however_the_tokens_are_split(
    kernel_device, queries, splits
):
    """Lengths of 2 to 70 in blocks of 16: some parts are empty, some rows see nothing of theirs."""
    inputs = case([70, 33, 2, 16], heads=3, queries=queries, cached=80)
    out = in_triton(kernel_device, inputs, SMALL, splits)
    torch.testing.assert_close(out.double(), textbook(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "queries"), [(1, 1), (16, 1), (5, 4), (16, 2), (17, 1)])
def test_the_kernel_holds_any_number_of_rows(kernel_device, heads, queries):
    inputs = case([20, 9], heads=heads, queries=queries)
    out = in_triton(kernel_device, inputs, SMALL, 2)
    torch.testing.assert_close(out.double(), textbook(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rank", "rope"), [(48, 16), (96, 32), (128, 32), (512, 64), (20, 6), (16, 0)]
)
def test_the_kernel_takes_ranks_that_are_no_power_of_two(kernel_device, rank, rope):
    inputs = case([18, 5], rank=rank, rope=rope)
    out = in_triton(kernel_device, inputs, SMALL, 2)
    torch.testing.assert_close(out.double(), textbook(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("splits", [1, 3])
def test_the_kernel_rounds_to_half_precision_twice_and_no_more(kernel_device, dtype, splits):
    """Weights are rounded for the tensor cores, and the result: each to half a unit in the last."""
    inputs = case([50, 21], heads=4, dtype=dtype)
    out = in_triton(kernel_device, inputs, HALF_BLOCKS[0], splits)
    assert out.dtype == dtype
    error = (out.double() - textbook(*inputs)).abs().max()
    largest = inputs[1].nan_to_num().abs().max().double()
    assert error <= torch.finfo(dtype).eps * largest


def test_parts_are_combined_in_float32(kernel_device):
    """Under equal weights, which BF16 holds exactly, the last rounding is the only one."""
    q, *rest = case([50, 21], heads=4, dtype=torch.bfloat16)
    inputs = (q * 0, *rest)
    out = in_triton(kernel_device, inputs, SMALL, 3)
    assert torch.equal(out, textbook(*inputs).to(torch.bfloat16))


def test_the_kernel_s_scores_may_be_large_without_overflow(kernel_device):
    q, latent, lengths, rank, _ = case([40, 17])
    inputs = (q * 30, latent, lengths, rank, 1.0)
    out = in_triton(kernel_device, inputs, SMALL, 3)
    torch.testing.assert_close(out.double(), textbook(*inputs), rtol=1e-4, atol=1e-4)


def test_a_sequence_with_no_token_gives_zeros_and_harms_no_other(kernel_device):
    """Lengths are not looked at on a GPU: an idle slot of a batch must come out finite."""
    q, latent, lengths, rank, scale = case([0, 9], cached=16)
    for splits in (1, 3):
        out = in_triton(kernel_device, (q, latent, lengths, rank, scale), SMALL, splits)
        assert out[0].eq(0).all()
        alone = textbook(q[1:], latent[1:], lengths[1:], rank, scale)
        torch.testing.assert_close(out[1:].double(), alone, rtol=1e-5, atol=1e-5)


def test_a_length_over_the_cache_never_reads_past_it(kernel_device):
    q, latent, lengths, rank, scale = case([8, 8], cached=8)
    expected = in_triton(kernel_device, (q, latent, lengths, rank, scale), SMALL, 1)
    out = in_triton(kernel_device, (q, latent, lengths + 99, rank, scale), SMALL, 1)
    assert torch.equal(out, expected)


def test_a_forced_triton_goes_through_the_public_function(kernel_device):
    inputs = case([20, 9], heads=3, queries=2)
    moved = [x.to(kernel_device) if isinstance(x, torch.Tensor) else x for x in inputs]
    larger = moved[1].new_zeros(2, 64, 48)
    larger[:, :20] = moved[1]
    moved[1] = larger[:, :20]  # rows of one sequence are apart from the next one's
    for run in (latent_decode, torch.ops.dsv3.latent_decode):
        out = run(*moved, backend="triton").cpu()
        torch.testing.assert_close(out.double(), textbook(*inputs), rtol=1e-5, atol=1e-5)


def test_the_kernel_refuses_float64_and_a_cache_whose_rows_are_torn(kernel_device):
    q, latent, lengths, rank, scale = (
        x.to(kernel_device) if isinstance(x, torch.Tensor) else x for x in case([6])
    )
    with pytest.raises(BackendError, match=r"no torch\.float64.*backend='reference'"):
        latent_decode(q.double(), latent.double(), lengths, rank, scale, backend="triton")
    torn = latent.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match=r"strides .* must be adjacent.*Store the cache"):
        latent_decode(q, torn, lengths, rank, scale, backend="triton")


def test_float64_runs_the_reference_where_triton_would_be_chosen(monkeypatch):
    asked = []
    monkeypatch.setattr(decode, "pick", lambda q, backend: asked.append(backend) or "reference")
    q, latent, *rest = case([6])
    latent_decode(q.double(), latent.double(), *rest)
    latent_decode(q, latent, *rest)
    assert asked == ["reference", None]


# How the work is cut


@pytest.mark.parametrize(
    ("rows", "limit", "held"),
    [
        (1, 232_448, 16),
        (16, 232_448, 16),
        (17, 232_448, 32),
        (33, 232_448, 64),
        (128, 232_448, 64),
        (128, 166_912, 32),
        (128, 101_376, 16),
    ],
)
def test_a_program_holds_as_many_rows_as_the_device_has_room_for(rows, limit, held):
    assert decode_blocks.choose_blocks(rows, 576, 2, limit).rows == held


def test_float32_has_blocks_of_its_own_and_a_row_too_wide_is_refused():
    assert decode_blocks.choose_blocks(128, 576, 4, H100[1]) in SINGLE_BLOCKS
    with pytest.raises(BackendError, match=r"2048 numbers needs \d+ bytes.*has 101376"):
        decode_blocks.choose_blocks(16, 2048, 2, 101_376)


def test_one_sequence_is_split_over_the_whole_device_and_a_full_batch_not_at_all():
    few, many = HALF_BLOCKS[0], HALF_BLOCKS[-1]
    slots = decode_blocks.slots_of(many, *H100)
    assert slots == 132 and decode_blocks.slots_of(few, *H100) == 264
    assert decode_blocks.slots_of(few, 108, 166_912) == 108  # an A100 holds one at a time
    assert decode_blocks.choose_splits(2, 1024, many, slots) == 64  # 64k tokens: one full wave
    assert decode_blocks.choose_splits(256, 64, many, slots) == 1
    assert decode_blocks.choose_splits(1, 0, many, slots) == 1


@given(
    programs=st.integers(1, 600),
    steps=st.integers(1, 2000),
    blocks=st.sampled_from([*HALF_BLOCKS, *SINGLE_BLOCKS]),
)
def test_a_split_is_never_empty_by_plan_and_never_worse_than_none(programs, steps, blocks):
    slots = decode_blocks.slots_of(blocks, *H100)
    splits = decode_blocks.choose_splits(programs, steps, blocks, slots)
    assert 1 <= splits <= min(steps, decode_blocks.MAX_SPLITS)

    def steps_in_sequence(parts):
        return -(-programs * parts // slots) * -(-steps // parts)

    assert splits == 1 or steps_in_sequence(splits) < steps_in_sequence(1)


@given(size=st.integers(0, 5000))
def test_a_padded_side_is_the_next_power_of_two_of_at_least_16(size):
    padded = decode_blocks.padded(size)
    assert padded >= max(16, size) and padded & (padded - 1) == 0
    assert padded == 16 or padded < 2 * size


# On a GPU, at DeepSeek-V3's own sizes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "queries"), [(128, 1), (128, 2), (16, 1), (16, 2), (8, 3)])
@pytest.mark.parametrize("lengths", [[4097, 3, 1000], [16_384], [100] * 70], ids=str)
def test_a_gpu_agrees_with_float64_at_v3_s_sizes(heads, queries, lengths, dtype):
    inputs = case(lengths, heads=heads, queries=queries, rank=512, rope=64, dtype=dtype)
    moved = [x.cuda() if isinstance(x, torch.Tensor) else x for x in inputs]
    out = latent_decode(*moved)
    wide = [moved[0].double(), moved[1].double(), *moved[2:]]
    exact = latent_decode(*wide, backend="reference")
    error = (out.double() - exact).norm() / exact.norm()
    assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.gpu
def test_a_gpu_s_operator_passes_opcheck_and_has_a_gradient():
    inputs = [x.cuda() if isinstance(x, torch.Tensor) else x for x in case([33, 20], heads=4)]
    torch.library.opcheck(torch.ops.dsv3.latent_decode.default, (*inputs, "triton"))
    q = inputs[0].requires_grad_()
    (a,) = torch.autograd.grad(latent_decode(*inputs).sum(), q)
    (b,) = torch.autograd.grad(latent_decode(*inputs, backend="reference").sum(), q)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
