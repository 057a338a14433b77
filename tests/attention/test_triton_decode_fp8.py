"""The decode kernel over rows of bytes equals attention over the values that they stand for."""

import pytest
import torch

from dsv3_tutorial.attention import decode_blocks
from dsv3_tutorial.attention.decode import latent_decode_reference
from dsv3_tutorial.attention.decode_blocks import BYTE_BLOCKS, SINGLE_BYTE_BLOCKS, Blocks
from dsv3_tutorial.attention.decode_fp8 import fp8_latent_decode
from dsv3_tutorial.backend import BackendError
from dsv3_tutorial.fp8.latent import latent_bytes, pack_latent, unpack_latent

SMALL = Blocks(rows=16, tokens=16, warps=4, stages=2, shared=0, per_sm=1)
UNUSED = 0x7F  # NaN in E4M3 and, four of them, in BF16 and float32: reading it would show


def case(lengths, heads=2, queries=1, rank=32, rope=16, cached=None, dtype=torch.float32):
    """Queries over rows of bytes; whatever no sequence has written is NaN."""
    lengths = torch.tensor(lengths)
    cached = cached or int(lengths.max())
    q = torch.randn(len(lengths), queries, heads, rank + rope).to(dtype)
    latent = torch.randn(len(lengths), cached, rank + rope) * torch.rand(len(lengths), cached, 1)
    rows = pack_latent(latent[..., :rank], latent[..., rank:])
    rows[torch.arange(cached) >= lengths[:, None]] = UNUSED
    return q, rows, lengths, rank, (rank + rope) ** -0.5


def exact(q, rows, lengths, rank, scale):
    """In float64, over the values themselves."""
    latent = torch.cat(unpack_latent(rows, rank, q.shape[-1] - rank), dim=-1).double()
    return latent_decode_reference(q.double(), latent, lengths, rank, scale)


def in_triton(device, inputs, blocks=SMALL, splits=2):
    from dsv3_tutorial.attention import triton_decode_fp8

    moved = [x.to(device) if isinstance(x, torch.Tensor) else x for x in inputs]
    return triton_decode_fp8.launch(*moved, blocks, splits).cpu()


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("queries", [1, 2])
def test_the_kernel_equals_attention_over_the_stored_values(kernel_device, queries, splits):
    """Lengths of 2 to 70 in blocks of 16: some parts are empty, some rows see nothing of theirs."""
    inputs = case([70, 33, 2, 16], heads=3, queries=queries, cached=80)
    out = in_triton(kernel_device, inputs, splits=splits)
    torch.testing.assert_close(out.double(), exact(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rank", "rope"), [(96, 32), (128, 32), (512, 64), (20, 6), (300, 10), (132, 2)]
)
def test_every_tile_meets_its_own_scale_whatever_the_rank(kernel_device, rank, rope):
    """The tiles' sizes differ by powers of ten, so that a foreign scale is no small error."""
    q, rows, lengths, _, scale = case([18, 5], rank=rank, rope=rope)
    latent, key = unpack_latent(rows, rank, rope)
    tiles = torch.arange(rank) // 128
    rows = pack_latent(latent.nan_to_num() * 10.0**-tiles, key.nan_to_num())
    inputs = (q, rows, lengths, rank, scale)
    out, true = in_triton(kernel_device, inputs).double(), exact(*inputs)
    for tile in range(-(-rank // 128)):
        here = tiles == tile
        torch.testing.assert_close(
            out[..., here], true[..., here], rtol=1e-5, atol=1e-5 * 10.0**-tile
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocks", BYTE_BLOCKS, ids=lambda b: f"{b.rows}x{b.tokens}")
def test_a_value_is_rounded_to_half_precision_once(kernel_device, dtype, blocks):
    """Values, weights and the result are rounded: half a unit in the last place each."""
    inputs = case([50, 21], heads=20, dtype=dtype)
    out = in_triton(kernel_device, inputs, blocks, splits=1)
    assert out.dtype == dtype
    largest = unpack_latent(inputs[1], 32, 16)[0].nan_to_num().abs().max().double()
    assert (out.double() - exact(*inputs)).abs().max() <= 2 * torch.finfo(dtype).eps * largest


def test_a_cache_longer_than_its_view_is_read_where_it_lies(kernel_device):
    q, rows, lengths, rank, scale = case([20, 9])
    larger = torch.full((2, 64, rows.shape[-1]), UNUSED, dtype=torch.uint8)
    larger[:, :20] = rows
    a = in_triton(kernel_device, (q, rows, lengths, rank, scale))
    b = in_triton(kernel_device, (q, larger[:, :20], lengths.int(), rank, scale))
    assert torch.equal(a, b)


def test_a_sequence_with_no_token_gives_zeros_and_a_length_past_the_cache_reads_no_further(
    kernel_device,
):
    q, rows, lengths, rank, scale = case([0, 9], cached=9)
    for splits in (1, 3):
        out = in_triton(kernel_device, (q, rows, lengths, rank, scale), splits=splits)
        assert out[0].eq(0).all() and out[1].isfinite().all()
        further = torch.tensor([0, 99])
        assert torch.equal(
            in_triton(kernel_device, (q, rows, further, rank, scale), splits=splits), out
        )


def test_a_forced_triton_goes_through_the_public_function(kernel_device):
    inputs = case([20, 9], heads=3, queries=2)
    moved = [x.to(kernel_device) if isinstance(x, torch.Tensor) else x for x in inputs]
    out = fp8_latent_decode(*moved, backend="triton").cpu()
    torch.testing.assert_close(out.double(), exact(*inputs), rtol=1e-5, atol=1e-5)


def test_what_the_kernel_cannot_read_is_refused(kernel_device):
    from dsv3_tutorial.attention import triton_decode_fp8

    q, rows, lengths, rank, scale = case([6])
    q, rows, lengths = (x.to(kernel_device) for x in (q, rows, lengths))
    with pytest.raises(BackendError, match=r"no torch\.float64.*backend='reference'"):
        triton_decode_fp8.fp8_latent_decode(q.double(), rows, lengths, rank, scale)
    odd = torch.zeros(1, 6, latent_bytes(30, 18), dtype=torch.uint8, device=kernel_device)
    with pytest.raises(BackendError, match=r"rank 30, .*multiples of four.*backend='reference'"):
        triton_decode_fp8.fp8_latent_decode(q, odd, lengths, 30, scale)
    with pytest.raises(ValueError, match="must be adjacent"):
        torn = rows.transpose(1, 2).contiguous().transpose(1, 2)
        triton_decode_fp8.fp8_latent_decode(q, torn, lengths, rank, scale)


def test_bytes_have_blocks_of_their_own():
    choose = decode_blocks.choose_blocks
    assert choose(128, 576, 2, 232_448, True) == BYTE_BLOCKS[-1]
    assert choose(17, 576, 2, 232_448, True) == BYTE_BLOCKS[1]
    assert choose(128, 576, 2, 101_376, True) == BYTE_BLOCKS[1]  # a desktop GPU: 99 KB
    assert choose(128, 576, 4, 232_448, True) in SINGLE_BYTE_BLOCKS


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "queries"), [(128, 1), (128, 2), (16, 1), (20, 1)])
@pytest.mark.parametrize("lengths", [[4097, 3, 1000], [16_384], [100] * 70], ids=len)
def test_a_gpu_agrees_with_float64_at_v3_s_sizes(heads, queries, lengths, dtype):
    lengths = [max(length, queries) for length in lengths]
    inputs = case(lengths, heads=heads, queries=queries, rank=512, rope=64, dtype=dtype)
    moved = [x.cuda() if isinstance(x, torch.Tensor) else x for x in inputs]
    out, true = fp8_latent_decode(*moved, backend="triton"), exact(*moved)
    assert (out.double() - true).norm() / true.norm() < 4 * torch.finfo(dtype).eps
