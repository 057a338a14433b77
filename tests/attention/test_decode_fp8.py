"""Attention over codes and scales equals attention over the values that they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.attention import decode_fp8
from dsv3_tutorial.attention.decode import latent_decode
from dsv3_tutorial.attention.decode_fp8 import fp8_attend, fp8_latent_decode
from dsv3_tutorial.attention.rows_fp8 import RowLayout
from dsv3_tutorial.backend import BackendError
from dsv3_tutorial.fp8.latent import latent_bytes, pack_latent, unpack_latent
from dsv3_tutorial.fp8.quant import dequantize_tiles, quantize_tiles

F64 = torch.float64
LAYOUTS = pytest.mark.parametrize("rope_fp8", [False, True])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.manual_seed(seed))


def case(lengths, queries=1, heads=3, rank=128, rope=8, cached=None, rope_fp8=False):
    """q, rows, lengths, rank, scale; what lies beyond a length are bytes that nobody wrote."""
    batch, cached = len(lengths), cached or max(lengths)
    layout = RowLayout(rank, rope, rope_fp8)
    decades = 10.0 ** torch.randint(-2, 3, (batch, cached, 1), generator=torch.manual_seed(1))
    rows = layout.pack(draw(batch, cached, rank) * decades, draw(batch, cached, rope, seed=2))
    for b, length in enumerate(lengths):
        rows[b, length:] = 0x7F  # NaN, in every part
    q = draw(batch, queries, heads, rank + rope, seed=3) / (rank + rope) ** 0.5
    return q, rows, torch.tensor(lengths), rank, (rank + rope) ** -0.5


def over_values(q, rows, lengths, rank, scale, rope_fp8=False):
    """The decode over a cache of numbers that holds what the bytes stand for, in float64."""
    parts = RowLayout(rank, q.shape[-1] - rank, rope_fp8).unpack(rows, F64)
    return latent_decode(q.double(), torch.cat(parts, dim=-1), lengths, rank, scale)


@pytest.mark.parametrize("rank", [1, 96, 128, 130, 512])
def test_attending_to_codes_is_attending_to_the_values(rank):
    c_kv, k_rope = draw(20, rank) * 2.0 ** draw(20, 1, seed=4), draw(20, 6, seed=1)
    codes, scales = quantize_tiles(c_kv)
    q_latent, q_rope = draw(3, rank, seed=2) / rank**0.5, draw(3, 6, seed=3)
    got = fp8_attend(q_latent, q_rope, codes, scales, k_rope, 0.25)
    values = dequantize_tiles(codes, scales, F64)
    scores = q_latent.double() @ values.T + q_rope.double() @ k_rope.double().T
    wanted = (scores * 0.25).softmax(-1) @ values
    assert got.shape == (3, rank) and got.dtype == torch.float32
    size = wanted.abs().max()
    torch.testing.assert_close(got / size, (wanted / size).float(), rtol=0, atol=2e-6)


def test_scales_that_are_powers_of_two_change_no_bit_of_the_values():
    """With one scale of 1 the codes are the values, and the function is plain attention."""
    codes, scales = draw(9, 64).to(torch.float8_e4m3fn), torch.ones(9, 1)
    q, q_rope, k_rope = draw(2, 64, seed=1), draw(2, 4, seed=2), draw(9, 4, seed=3)
    once = fp8_attend(q, q_rope, codes, scales, k_rope, 0.125)
    eight = fp8_attend(q, 8 * q_rope, codes, 8 * scales, k_rope, 0.125 / 8)
    assert torch.equal(eight, 8 * once)


@settings(deadline=None, max_examples=40)
@given(
    data=st.data(),
    rank=st.sampled_from([1, 7, 64, 128, 129, 300]),
    rope=st.integers(1, 9),
    heads=st.integers(1, 4),
    queries=st.integers(1, 4),
    rope_fp8=st.booleans(),
)
def test_rows_of_bytes_attend_as_the_numbers_they_stand_for(
    data, rank, rope, heads, queries, rope_fp8
):
    lengths = data.draw(st.lists(st.integers(queries, 12), min_size=1, max_size=3))
    inputs = case(lengths, queries, heads, rank, rope, rope_fp8=rope_fp8)
    got = fp8_latent_decode(*inputs, rope_fp8=rope_fp8)
    wanted = over_values(*inputs, rope_fp8).float()
    assert got.shape == (len(lengths), queries, heads, rank)
    size = wanted.abs().max()
    torch.testing.assert_close(got / size, wanted / size, rtol=0, atol=5e-6)
    in_float64 = fp8_latent_decode(inputs[0].double(), *inputs[1:], rope_fp8=rope_fp8)
    torch.testing.assert_close(in_float64.float() / size, wanted / size, rtol=0, atol=1e-6)


def test_one_query_is_the_very_function_that_learners_write():
    q, rows, lengths, rank, scale = case([11, 4], heads=4, rank=300)
    out = fp8_latent_decode(q, rows, lengths, rank, scale)
    for b, length in enumerate(lengths):
        parts = RowLayout(rank, 8).split(rows[b, :length])
        alone = fp8_attend(q[b, 0, :, :rank], q[b, 0, :, rank:], *parts, scale)
        size = alone.abs().max()
        torch.testing.assert_close(out[b, 0] / size, alone / size, rtol=0, atol=5e-6)


def test_several_queries_are_the_same_as_one_at_a_time():
    q, rows, lengths, rank, scale = case([9, 5], queries=3)
    together = fp8_latent_decode(q, rows, lengths, rank, scale)
    for s in range(3):
        alone = fp8_latent_decode(q[:, s : s + 1], rows, lengths - 2 + s, rank, scale)
        torch.testing.assert_close(together[:, s : s + 1], alone, rtol=1e-5, atol=1e-5)


def test_the_neighbours_in_the_batch_change_nothing():
    q, rows, lengths, rank, scale = case([12, 3, 7])
    together = fp8_latent_decode(q, rows, lengths, rank, scale)
    for b in range(3):
        alone = fp8_latent_decode(q[[b]], rows[[b]], lengths[[b]], rank, scale)
        assert torch.equal(together[[b]], alone)


def test_bf16_queries_give_the_float32_result_rounded_once():
    q, *rest = case([30, 8], heads=4)
    q = q.bfloat16()
    assert torch.equal(
        fp8_latent_decode(q, *rest), fp8_latent_decode(q.float(), *rest).to(torch.bfloat16)
    )


# Rows


@pytest.mark.parametrize("rank, rope", [(512, 64), (130, 6), (7, 3)])
def test_the_standard_row_is_that_of_the_packed_latent(rank, rope):
    c_kv, k_rope = draw(2, 5, rank), draw(2, 5, rope, seed=1)
    layout = RowLayout(rank, rope)
    rows = layout.pack(c_kv, k_rope)
    assert layout.width == latent_bytes(rank, rope) == rows.shape[-1]
    assert torch.equal(rows, pack_latent(c_kv, k_rope))
    for got, wanted in zip(layout.unpack(rows, F64), unpack_latent(rows, rank, rope, F64)):
        assert torch.equal(got, wanted)


def test_deepseek_v3_stores_656_bytes_and_596_with_its_rope_key_in_fp8():
    assert RowLayout(512, 64).width == 656
    assert RowLayout(512, 64, rope_fp8=True).width == 512 + 16 + 64 + 4 == 596


@LAYOUTS
@pytest.mark.parametrize("rank, rope, offset", [(512, 64, 0), (512, 64, 3), (130, 6, 1), (7, 3, 0)])
def test_the_parts_of_a_row_are_found_wherever_it_lies(rank, rope, offset, rope_fp8):
    layout = RowLayout(rank, rope, rope_fp8)
    c_kv, k_rope = draw(4, rank), draw(4, rope, seed=1)
    wide = torch.zeros(4, layout.width + offset, dtype=torch.uint8)
    rows = wide[:, offset:]
    rows.copy_(layout.pack(c_kv, k_rope))
    codes, scales, key = layout.split(rows)
    wanted = quantize_tiles(c_kv)
    assert torch.equal(codes.float(), wanted[0].float()) and torch.equal(scales, wanted[1])
    stored = dequantize_tiles(*quantize_tiles(k_rope)) if rope_fp8 else k_rope.bfloat16()
    assert torch.equal(key, stored)
    latent, turned = layout.unpack(rows, torch.float32)
    assert torch.equal(latent, dequantize_tiles(*wanted)) and torch.equal(turned, stored.float())


def test_the_parts_of_v3s_rows_are_views_of_them():
    rows = RowLayout(512, 64).pack(draw(3, 512), draw(3, 64))
    storage = rows.untyped_storage().data_ptr()
    assert all(p.untyped_storage().data_ptr() == storage for p in RowLayout(512, 64).split(rows))


def test_a_latent_with_nan_poisons_its_own_sequence_only():
    c_kv = draw(2, 3, 128)
    c_kv[0, 1, 5] = torch.nan
    rows = RowLayout(128, 8).pack(c_kv, draw(2, 3, 8))
    out = fp8_latent_decode(draw(2, 1, 2, 136), rows, torch.tensor([3, 3]), 128, 0.1)
    assert out[0].isnan().all() and out[1].isfinite().all()


# The operator, and what is refused


@LAYOUTS
def test_the_operator_passes_opcheck(rope_fp8):
    inputs = case([9, 5], queries=2, rope_fp8=rope_fp8)
    operator = torch.ops.dsv3.fp8_latent_decode.default
    for backend in (None, "reference"):
        results = torch.library.opcheck(operator, (*inputs, backend, rope_fp8))
        assert set(results.values()) == {"SUCCESS"}


def test_torch_compile_keeps_it_whole():
    inputs = case([9, 5])
    compiled = torch.compile(fp8_latent_decode, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), fp8_latent_decode(*inputs))


def refused(match, **changes):
    names = ("q", "rows", "lengths", "rank", "scale")
    inputs = dict(zip(names, case([6, 4]))) | changes
    with pytest.raises(ValueError, match=f"fp8_latent_decode: .*{match}.*Pass"):
        fp8_latent_decode(**inputs)


def test_what_does_not_fit_is_refused_with_the_reason():
    q, rows, lengths, *_ = case([6, 4])
    refused("expected 4, 3 and 1 dimensions", q=q[0])
    refused("batch sizes differ", lengths=lengths[:1])
    refused("nothing to attend with", q=q[:, :0])
    refused("a float and uint8", rows=rows.view(torch.int8))
    refused("a float and uint8", q=q.int())
    refused("leaves no RoPE key", rank=q.shape[-1])
    refused(r"a row has 148 bytes, and rank 127 .* has 149", rank=127)
    refused("a row has 148 bytes", rope_fp8=True, rows=rows, q=q[..., :-1])
    refused("not int32 or int64", lengths=lengths.float())
    refused("run from 4 to 7", lengths=lengths + torch.tensor([1, 0]))
    refused("run from 0 to 6", lengths=lengths * torch.tensor([1, 0]))


def test_a_backend_that_cannot_run_is_an_error_and_no_fallback():
    inputs = case([6, 4])
    with pytest.raises(ValueError, match="abacus"):
        fp8_latent_decode(*inputs, backend="abacus")
    with pytest.raises(BackendError):
        fp8_latent_decode(*case([6, 4], rope_fp8=True), backend="triton", rope_fp8=True)


def test_more_rows_than_are_widened_at_once_change_nothing(monkeypatch):
    inputs = case([23, 9], queries=3, rank=130)
    whole = fp8_latent_decode(*inputs)
    monkeypatch.setattr(decode_fp8, "AT_ONCE", 8)
    torch.testing.assert_close(fp8_latent_decode(*inputs), whole, rtol=1e-5, atol=1e-4)
    assert whole.abs().max() > 1  # the tolerance is a hundred thousandth of the largest


def test_no_gradient_flows_through_it():
    q, *rest = case([5])
    assert not fp8_latent_decode(q.requires_grad_(), *rest).requires_grad
