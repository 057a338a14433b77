"""A cache of bytes behaves as a latent cache of the values that the bytes stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.attention.cache import CacheError, LatentCache
from dsv3_tutorial.attention.cache_fp8 import Fp8LatentCache
from dsv3_tutorial.attention.mla import MLA
from dsv3_tutorial.attention.rows_fp8 import RowLayout
from dsv3_tutorial.config import ModelConfig

F64 = torch.float64
LAYOUTS = pytest.mark.parametrize("rope_fp8", [False, True])


def config(**changes):
    sizes = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 6}
    return ModelConfig(16, 24, 16, 1, 3, **sizes | changes)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.manual_seed(seed), dtype=dtype)


class Rounding:
    """Gives a cache of numbers the values that FP8 rows would stand for."""

    def __init__(self, cache, layout):
        self.cache, self.layout, self.append = cache, layout, cache.append
        cache.append = self.rounded

    def rounded(self, c_kv, k_rope):
        rows = self.layout.pack(c_kv, k_rope)
        return self.append(*self.layout.unpack(rows, c_kv.dtype))


@LAYOUTS
def test_it_holds_exactly_the_bytes_of_its_rows(rope_fp8):
    cfg = config(kv_lora_rank=512, qk_rope_head_dim=64)
    cache = Fp8LatentCache.for_config(cfg, batch=3, capacity=50, rope_fp8=rope_fp8)
    assert cache.nbytes == 3 * 50 * (596 if rope_fp8 else 656)


@LAYOUTS
@pytest.mark.parametrize("absorb", [None, False, True])
def test_a_layer_over_it_is_the_layer_over_the_values(absorb, rope_fp8):
    """Prefill that expands, one token, several: in float64 nothing but the stored bytes differs."""
    cfg = config()
    layer, x = MLA(cfg).double(), draw(2, 44, 24, dtype=F64)
    cache = Fp8LatentCache.for_config(cfg, 2, 44, F64, rope_fp8=rope_fp8)
    numbers = Rounding(LatentCache.for_config(cfg, 2, 44, F64), cache.layout).cache
    with torch.no_grad():
        for start, end in ((0, 30), (30, 31), (31, 34), (34, 44)):
            piece = x[:, start:end]
            got, wanted = layer(piece, cache, absorb), layer(piece, numbers, absorb)
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-7)
        assert (got - layer(x)[:, 34:]).abs().max() > 1e-4


def test_sequences_of_different_length_decode_as_if_alone():
    cfg = config()
    layer, x = MLA(cfg), draw(3, 9, 24)
    new = torch.stack([x[0, 6:9], x[1, 1:4], x[2, 4:7]])
    cache = Fp8LatentCache.for_config(cfg, 3, 9)
    with torch.no_grad():
        layer(x[:, :6], cache)
        cache.trim([6, 1, 4])
        got = torch.cat([layer(new[:, :1], cache), layer(new[:, 1:], cache)], 1)
        for b, start in enumerate((6, 1, 4)):
            alone = Fp8LatentCache.for_config(cfg, 1, 9)
            layer(x[b : b + 1, :start], alone)
            steps = [layer(new[[b], :1], alone), layer(new[[b], 1:], alone)]
            torch.testing.assert_close(got[[b]], torch.cat(steps, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_computes_in_its_own_precision_over_it(dtype):
    cfg = config(kv_lora_rank=160, qk_rope_head_dim=16)
    layer, x = MLA(cfg).to(dtype), draw(2, 12, 24).to(dtype)
    cache = Fp8LatentCache.for_config(cfg, 2, 12, dtype)
    with torch.no_grad():
        out = torch.cat([layer(x[:, :8], cache), layer(x[:, 8:], cache)], 1)
        whole = layer.double()(x.double())
    assert out.dtype == cache.c_kv.dtype == cache.k_rope.dtype == dtype
    error = (out - whole).norm() / whole.norm()
    assert 1e-3 < error < 0.1  # E4M3's 1/16 at worst; exact values would be a cache of numbers


@settings(deadline=None, max_examples=30)
@given(data=st.data(), batch=st.integers(1, 3), rope_fp8=st.booleans())
def test_it_is_a_list_of_rows_for_each_sequence(data, batch, rope_fp8):
    cache, model = Fp8LatentCache(batch, 12, 5, 2, rope_fp8=rope_fp8), [[] for _ in range(batch)]
    for step in range(data.draw(st.integers(1, 6))):
        if data.draw(st.booleans()) and cache.longest:
            kept = [data.draw(st.integers(0, len(rows))) for rows in model]
            cache.trim(kept)
            model = [rows[:n] for rows, n in zip(model, kept)]
        count = data.draw(st.integers(1, 3))
        new = draw(batch, count, 5, seed=step), draw(batch, count, 2, seed=step + 9)
        if cache.longest + count > 12:
            with pytest.raises(CacheError, match="full"):
                cache.append(*new)
            continue
        held = cache.append(*new)
        packed = RowLayout(5, 2, rope_fp8).pack(*new)
        model = [rows + list(more) for rows, more in zip(model, packed)]
        assert cache.lengths.tolist() == [len(rows) for rows in model]
        for b, rows in enumerate(model):
            assert torch.equal(held[b, : len(rows)], torch.stack(rows))


def test_appending_writes_in_place_and_reset_forgets():
    cache = Fp8LatentCache(2, 8, 3, 2)
    before = cache.parts[0].data_ptr()
    cache.append(draw(2, 5, 3), draw(2, 5, 2))
    assert cache.packed.data_ptr() == before and cache.packed.any()
    cache.reset()
    assert cache.longest == 0 and not cache.parts[0].any()


def test_torch_compile_keeps_a_decode_step_whole():
    cfg = config()
    layer, x = MLA(cfg), draw(2, 8, 24)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    caches = [Fp8LatentCache.for_config(cfg, 2, 8) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            layer(x[:, :4], cache)
        for i in range(4, 8):
            step = x[:, i : i + 1]
            got, wanted = compiled(step, caches[0]), layer(step, caches[1])
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "c_kv, k_rope",
    [
        (torch.zeros(3, 1, 3), torch.zeros(3, 1, 2)),
        (torch.zeros(2, 1, 4), torch.zeros(2, 1, 2)),
        (torch.zeros(2, 1, 3), torch.zeros(2, 2, 2)),
        (torch.zeros(2, 1, 3).int(), torch.zeros(2, 1, 2)),
    ],
)
def test_a_refused_append_changes_nothing(c_kv, k_rope):
    cache = Fp8LatentCache(2, 4, 3, 2)
    cache.append(draw(2, 3, 3), draw(2, 3, 2))
    before = cache.parts[0].clone()
    with pytest.raises(CacheError, match=r"Got .* holds .* for_config"):
        cache.append(c_kv, k_rope)
    with pytest.raises(CacheError, match="3 tokens held, 2 more, room for 4"):
        cache.append(draw(2, 2, 3), draw(2, 2, 2))
    assert torch.equal(cache.parts[0], before) and cache.lengths.tolist() == [3, 3]


def test_what_has_no_latent_is_refused():
    llama = ModelConfig(16, 64, 16, 1, 8, model_type="llama")
    with pytest.raises(CacheError, match=r"no latent.*Use FullCache"):
        Fp8LatentCache.for_config(llama, 1, 8)
    with pytest.raises(CacheError, match="empty side"):
        Fp8LatentCache(0, 8, 3, 2)
