"""Through a page table the decode kernels give the bits that they give without one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial.attention.decode_blocks import BYTE_BLOCKS, HALF_BLOCKS, Blocks, within_page
from dsv3_tutorial.attention.decode_paged import fp8_latent_decode_paged, latent_decode_paged
from dsv3_tutorial.fp8.latent import pack_latent

RANK, ROPE, SCALE = 32, 16, 0.2
SMALL = Blocks(rows=16, tokens=16, warps=4, stages=2, shared=0, per_sm=1)
KINDS = ("numbers", "bytes")


def case(kind, lengths, heads=2, queries=1, dtype=torch.float32, widths=(RANK, ROPE)):
    """Queries, the rows (B, T, W) of sequences as a cache without pages holds them, lengths."""
    lengths = torch.tensor(lengths)
    q = torch.randn(len(lengths), queries, heads, sum(widths)).to(dtype)
    rows = torch.randn(len(lengths), int(lengths.max()), sum(widths))
    if kind == "bytes":
        return q, pack_latent(*rows.split(widths, dim=-1)), lengths
    return q, rows.to(dtype), lengths


def paged(rows, lengths, page_size, spare=1):
    """The same rows in pages that follow no order, in a storage that is NaN wherever none lies.

    The table's entries behind a sequence's last page name a page that is not there.
    """
    n_pages = [-(-length // page_size) for length in lengths.tolist()]
    free = torch.randperm(sum(n_pages) + 3).tolist()
    width, fill = rows.shape[-1], 0x7F if rows.dtype == torch.uint8 else torch.nan
    storage = torch.full((len(free) * page_size, width), fill, dtype=rows.dtype)
    tables = torch.full((len(lengths), max(n_pages) + spare), 10**6, dtype=torch.int32)
    for b, (count, length) in enumerate(zip(n_pages, lengths.tolist())):
        for i in range(count):
            tables[b, i] = page = free.pop()
            part = rows[b, i * page_size : min((i + 1) * page_size, length)]
            storage[page * page_size : page * page_size + len(part)] = part
    return storage, tables


def launch(kind, device, q, rows, lengths, blocks, splits, pages=None):
    from dsv3_tutorial.attention import triton_decode, triton_decode_fp8

    module = triton_decode if kind == "numbers" else triton_decode_fp8
    if pages is not None:
        pages = triton_decode.Pages(pages[0].to(device), pages[1])
    q, rows, lengths = (x.to(device) for x in (q, rows, lengths))
    return module.launch(q, rows, lengths, RANK, SCALE, blocks, splits, pages).cpu()


@pytest.mark.parametrize("page_size", [5, 8, 16, 48, 64])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_pages_give_the_same_bits_as_rows_in_order(kernel_device, kind, splits, page_size):
    """Pages smaller than a step of 16 tokens, as large, larger, and no multiple of it."""
    q, rows, lengths = case(kind, [40, 2, 17], heads=3, queries=2)
    storage, tables = paged(rows, lengths, page_size)
    expected = launch(kind, kernel_device, q, rows, lengths, SMALL, splits)
    pages = (tables, page_size)
    out = launch(kind, kernel_device, q, storage, lengths, SMALL, splits, pages)
    assert torch.equal(out, expected)
    assert out.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_two_sequences_may_read_one_page(kernel_device, kind):
    q, rows, lengths = case(kind, [20, 20])
    rows[1, :16] = rows[0, :16]
    storage, tables = paged(rows, lengths, 16)
    tables[1, 0] = tables[0, 0]
    expected = launch(kind, kernel_device, q, rows, lengths, SMALL, 1)
    out = launch(kind, kernel_device, q, storage, lengths, SMALL, 1, (tables, 16))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_length_past_the_table_reads_no_further_and_none_reads_nothing(kernel_device, kind):
    q, rows, lengths = case(kind, [32, 32])
    storage, tables = paged(rows, lengths, 16, spare=0)
    expected = launch(kind, kernel_device, q, rows, torch.tensor([32, 0]), SMALL, 1)
    out = launch(kind, kernel_device, q, storage, torch.tensor([99, 0]), SMALL, 1, (tables, 16))
    assert torch.equal(out, expected)
    assert out[1].eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_forced_triton_goes_through_the_public_function(kernel_device, kind):
    decode = latent_decode_paged if kind == "numbers" else fp8_latent_decode_paged
    q, rows, lengths = case(kind, [40, 3, 17], heads=3, queries=2)
    storage, tables = paged(rows, lengths, 16)
    inputs = [x.to(kernel_device) for x in (q, storage, tables)]
    out = decode(*inputs, 16, lengths.to(kernel_device), RANK, SCALE, backend="triton").cpu()
    plain = decode(q, storage, tables, 16, lengths, RANK, SCALE, backend="reference")
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_the_wider_of_query_and_row_decides_the_arithmetic(kernel_device, stored):
    q, rows, lengths = case("numbers", [20, 9])
    rows = rows.to(stored)
    asked = torch.bfloat16 if stored == torch.float32 else torch.float32
    storage, tables = paged(rows, lengths, 16)
    inputs = [x.to(kernel_device) for x in (q.to(asked), storage, tables)]
    lengths = lengths.to(kernel_device)
    out = latent_decode_paged(*inputs, 16, lengths, RANK, SCALE, backend="triton")
    wide = [x.float() if x.is_floating_point() else x for x in inputs]
    plain = latent_decode_paged(*wide, 16, lengths, RANK, SCALE, backend="triton")
    assert out.dtype == asked and torch.equal(out, plain.to(asked))


@given(
    page=st.integers(1, 300),
    blocks=st.sampled_from([*HALF_BLOCKS, *BYTE_BLOCKS]),
)
def test_a_step_lies_in_one_page_wherever_pages_are_whole_steps_of_16(page, blocks):
    fitted = within_page(blocks, page)
    if page % 16 == 0:
        assert page % fitted.tokens == 0 and 16 <= fitted.tokens <= blocks.tokens
    else:
        assert fitted == blocks


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize(("heads", "queries"), [(128, 2), (16, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_reads_pages_as_it_reads_rows_in_order(kind, heads, queries, page_size):
    from dsv3_tutorial.attention import triton_decode_paged

    run = f"{'' if kind == 'numbers' else 'fp8_'}latent_decode_paged"
    q, rows, lengths = case(kind, [4097, 2, 1000], heads, queries, torch.bfloat16, (512, 64))
    storage, tables = paged(rows, lengths, page_size)
    inputs = [x.cuda() for x in (q, storage, tables)]
    out = getattr(triton_decode_paged, run)(*inputs, page_size, lengths.cuda(), 512, SCALE)
    decode = latent_decode_paged if kind == "numbers" else fp8_latent_decode_paged
    plain = decode(q.double(), storage, tables, page_size, lengths, 512, SCALE, "reference")
    error = (out.double().cpu() - plain).norm() / plain.norm()
    assert error < 4 * torch.finfo(torch.bfloat16).eps
