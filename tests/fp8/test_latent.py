"""The KV latent as bytes, against Python's own `struct`."""

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.fp8.latent import latent_bytes, pack_latent, pack_rows, unpack_latent
from dsv3_tutorial.fp8.quant import QuantizationError, dequantize_tiles, quantize_tiles


def row_by_hand(stored, scale, key):
    """One token: E4M3 bytes, float32 scales, the upper half of each float32 key. Little endian."""
    keys = [struct.pack("<f", value)[2:] for value in key.bfloat16().tolist()]
    codes = bytes(stored.view(torch.uint8).tolist())
    return codes + struct.pack(f"<{len(scale)}f", *scale.tolist()) + b"".join(keys)


def test_deepseek_v3s_latent_takes_656_bytes_instead_of_1152():
    assert latent_bytes(512, 64) == 512 + 16 + 128 == 656
    assert pack_latent(torch.randn(3, 512), torch.randn(3, 64)).shape == (3, 656)
    assert 2 * (512 + 64) == 1152


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 600),
    rope=st.integers(0, 70),
    lead=st.lists(st.integers(1, 3), max_size=3),
    seed=st.integers(0, 999),
)
def test_every_row_is_its_parts_one_after_another_and_comes_back(rank, rope, lead, seed):
    made = torch.Generator().manual_seed(seed)
    c_kv = torch.randn(*lead, rank, generator=made)
    c_kv = c_kv * torch.exp(3 * torch.randn(*lead, 1, generator=made))
    k_rope = torch.randn(*lead, rope, generator=made)
    packed = pack_latent(c_kv, k_rope)
    assert packed.dtype == torch.uint8 and packed.shape == (*lead, latent_bytes(rank, rope))
    stored, scale = quantize_tiles(c_kv)
    tokens = math.prod(lead)
    rows = zip(*(part.reshape(tokens, part.shape[-1]) for part in (stored, scale, k_rope)))
    by_hand = [row_by_hand(*row) for row in rows]
    assert [bytes(row.tolist()) for row in packed.view(tokens, -1)] == by_hand
    latent, key = unpack_latent(packed, rank, rope)
    assert torch.equal(latent, dequantize_tiles(stored, scale))
    assert torch.equal(key, k_rope.bfloat16().float())


def test_tokens_in_any_memory_order_are_read_and_written():
    c_kv, k_rope = torch.randn(130, 5, 2).permute(2, 1, 0), torch.randn(6, 2, 5).permute(1, 2, 0)
    packed = pack_latent(c_kv, k_rope)
    assert torch.equal(packed, pack_latent(c_kv.contiguous(), k_rope.contiguous()))
    wide = torch.zeros(2, 5, packed.shape[-1] + 3, dtype=torch.uint8)
    wide[..., 3:] = packed  # a view that starts at an odd byte
    for mine, other in zip(unpack_latent(wide[..., 3:], 130, 6), unpack_latent(packed, 130, 6)):
        assert torch.equal(mine, other)


def test_the_dtype_is_the_callers_and_unpacking_leaves_the_bytes_alone():
    packed = pack_latent(torch.randn(4, 128).bfloat16(), torch.randn(4, 8).bfloat16())
    kept = packed.clone()
    exact = unpack_latent(packed, 128, 8)
    for part, whole in zip(unpack_latent(packed, 128, 8, torch.bfloat16), exact):
        assert part.dtype == torch.bfloat16 and torch.equal(part, whole.bfloat16())
        part.zero_()
    assert torch.equal(packed, kept)


def test_packing_rows_keeps_the_bits_of_codes_and_scales_and_rounds_the_key_alone():
    codes, scales = quantize_tiles(torch.randn(3, 200, generator=torch.manual_seed(0)))
    key = torch.randn(3, 6, dtype=torch.float64, generator=torch.manual_seed(1))
    rows = pack_rows(codes, scales, key)
    parts = rows.split([200, 8, 12], dim=-1)
    assert torch.equal(parts[0].contiguous(), codes.view(torch.uint8))
    assert torch.equal(parts[1].contiguous().view(torch.float32), scales)
    assert torch.equal(parts[2].contiguous().view(torch.bfloat16), key.bfloat16())


def test_no_tokens_are_no_rows():
    packed = pack_latent(torch.zeros(0, 512), torch.zeros(0, 64))
    assert packed.shape == (0, 656)
    assert [part.shape for part in unpack_latent(packed, 512, 64)] == [(0, 512), (0, 64)]


def test_the_latent_is_within_a_sixteenth_and_the_key_within_a_256th():
    c_kv, k_rope = torch.randn(64, 512), torch.randn(64, 64)
    latent, key = unpack_latent(pack_latent(c_kv, k_rope), 512, 64)
    small = c_kv.abs().amax() * 2.0**-18
    assert ((latent - c_kv).abs() <= (c_kv.abs() / 16).clamp_min(small)).all()
    assert ((key - k_rope).abs() <= k_rope.abs() / 256).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_a_latent_is_refused_or_marks_its_tile(value):
    c_kv, k_rope = torch.ones(2, 256), torch.ones(2, 4)
    c_kv[1, 200] = value
    with pytest.raises(QuantizationError, match="NaN or infinity"):
        pack_latent(c_kv, k_rope)
    latent, _ = unpack_latent(pack_latent(c_kv, k_rope, checked=False), 256, 4)
    assert latent[1, 128:].isnan().all()
    torch.testing.assert_close(latent[0], c_kv[0], rtol=1e-6, atol=0)


def test_latents_and_keys_of_different_tokens_are_refused():
    c_kv = torch.ones(2, 3, 64)
    wrong = [torch.ones(2, 4, 8), torch.ones(3, 8), torch.ones(2, 3, 8).int(), torch.tensor(1.0)]
    for k_rope in wrong:
        with pytest.raises(QuantizationError, match=r"not of the same tokens.*Give two"):
            pack_latent(c_kv, k_rope)
    with pytest.raises(QuantizationError, match="floating-point"):
        pack_latent(c_kv.int(), torch.ones(2, 3, 8))


def test_bytes_of_another_layout_are_refused():
    packed = pack_latent(torch.ones(2, 512), torch.ones(2, 64))
    for wrong in (packed[:, :-1], packed.int(), packed.view(torch.int8), packed[0, 0]):
        with pytest.raises(QuantizationError, match=r"wrong byte.*656"):
            unpack_latent(wrong, 512, 64)
    for rank, rope in ((0, 64), (512, -1)):
        with pytest.raises(QuantizationError, match=r"has no layout.*Give a rank"):
            unpack_latent(packed, rank, rope)
