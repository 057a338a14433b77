import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.attention.cache import CacheError, FullCache, LatentCache
from dsv3_tutorial.config import ModelConfig


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.manual_seed(seed))


def test_a_latent_cache_holds_exactly_c_plus_r_elements_a_token():
    cfg = ModelConfig.named("tiny")
    elements = cfg.kv_lora_rank + cfg.qk_rope_head_dim
    for dtype, size in ((torch.bfloat16, 2), (torch.float32, 4)):
        cache = LatentCache.for_config(cfg, batch=3, capacity=50, dtype=dtype)
        assert cache.nbytes == 3 * 50 * elements * size


def test_a_full_cache_of_mla_holds_every_heads_key_and_value():
    cfg = ModelConfig.named("tiny")
    cache = FullCache.for_config(cfg, batch=3, capacity=50)
    per_head = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim
    assert cache.nbytes == 3 * 50 * cfg.num_attention_heads * per_head * 4


def test_a_grouped_full_cache_holds_the_key_value_heads_only():
    cfg = ModelConfig(16, 64, 16, 1, 8, model_type="llama", num_key_value_heads=2)
    assert FullCache.for_config(cfg, batch=1, capacity=10).nbytes == 10 * 2 * 2 * 8 * 4


def test_appending_writes_in_place_and_allocates_nothing():
    cache = LatentCache(2, 10, 6, 4)
    before = cache.whole.data_ptr()
    for step in range(4):
        latent = cache.append(draw(2, 2, 6, seed=step), draw(2, 2, 4, seed=step))
        assert latent.data_ptr() == before == cache.c_kv.data_ptr()
        assert latent.shape == (2, 2 * step + 2, 10)
    assert torch.equal(latent, torch.cat([cache.c_kv, cache.k_rope], dim=-1))


@settings(deadline=None, max_examples=40)
@given(data=st.data(), batch=st.integers(1, 3))
def test_a_cache_is_a_list_of_tokens_for_each_sequence(data, batch):
    cache, model = LatentCache(batch, 12, 3, 2), [[] for _ in range(batch)]
    for step in range(data.draw(st.integers(1, 6))):
        if data.draw(st.booleans()) and cache.longest:
            kept = [data.draw(st.integers(0, len(tokens))) for tokens in model]
            cache.trim(kept)
            model = [tokens[:n] for tokens, n in zip(model, kept)]
        count = data.draw(st.integers(1, 3))
        if cache.longest + count > 12:
            with pytest.raises(CacheError, match="full"):
                cache.append(draw(batch, count, 3), draw(batch, count, 2))
            continue
        new = draw(batch, count, 5, seed=step)
        cache.append(new[..., :3], new[..., 3:])
        model = [tokens + list(rows) for tokens, rows in zip(model, new)]
        lengths = [len(tokens) for tokens in model]
        assert cache.lengths.tolist() == lengths
        assert (cache.shortest, cache.longest) == (min(lengths), max(lengths))
        for b, tokens in enumerate(model):
            assert torch.equal(cache.latent[b, : len(tokens)], torch.stack(tokens))


def test_a_full_cache_gives_back_what_was_stored():
    cache, keys, values = FullCache(2, 8, 3, 5, 4), draw(2, 6, 3, 5), draw(2, 6, 3, 4)
    cache.append(keys[:, :4], values[:, :4])
    held_keys, held_values = cache.append(keys[:, 4:], values[:, 4:])
    assert torch.equal(held_keys, keys) and torch.equal(held_values, values)


def test_reset_forgets_even_what_a_shorter_sequence_would_leave_behind():
    cache = LatentCache(2, 8, 3, 2)
    cache.append(torch.full((2, 8, 3), torch.nan), torch.full((2, 8, 2), torch.nan))
    cache.reset()
    assert cache.lengths.tolist() == [0, 0] and cache.longest == 0
    assert not cache.whole.any()


def test_no_gradient_flows_through_a_cache():
    cache, new = LatentCache(1, 4, 3, 2), draw(1, 2, 3).requires_grad_()
    assert not cache.append(new, draw(1, 2, 2)).requires_grad


def test_a_cache_made_in_inference_mode_can_be_used_outside_it():
    with torch.inference_mode():
        cache = LatentCache(1, 4, 3, 2)
        cache.append(draw(1, 2, 3), draw(1, 2, 2))
    cache.append(draw(1, 2, 3), draw(1, 2, 2))
    assert cache.longest == 4


def test_a_refused_append_changes_nothing():
    cache = LatentCache(2, 4, 3, 2)
    cache.append(draw(2, 3, 3), draw(2, 3, 2))
    before = cache.whole.clone()
    with pytest.raises(CacheError, match="3 tokens held, 2 more, room for 4"):
        cache.append(draw(2, 2, 3), draw(2, 2, 2))
    with pytest.raises(CacheError, match="Got"):
        cache.append(draw(2, 1, 3), draw(2, 1, 1))
    assert torch.equal(cache.whole, before) and cache.lengths.tolist() == [3, 3]


@pytest.mark.parametrize(
    "c_kv, k_rope",
    [
        (torch.zeros(3, 1, 3), torch.zeros(3, 1, 2)),  # batch
        (torch.zeros(2, 1, 4), torch.zeros(2, 1, 2)),  # width
        (torch.zeros(2, 1, 3), torch.zeros(2, 2, 2)),  # two lengths
        (torch.zeros(2, 1, 3).int(), torch.zeros(2, 1, 2).int()),  # no real numbers
        (torch.zeros(2, 3), torch.zeros(2, 2)),  # a dimension lost
    ],
)
def test_tokens_of_another_shape_or_kind_are_refused(c_kv, k_rope):
    with pytest.raises(CacheError, match=r"Got .* holds .* for_config"):
        LatentCache(2, 4, 3, 2).append(c_kv, k_rope)


@pytest.mark.parametrize("lengths", [[4, 1], [-1, 1], [1], [[1, 1]]])
def test_lengths_that_were_never_read_cannot_be_kept(lengths):
    cache = LatentCache(2, 8, 3, 2)
    cache.append(draw(2, 3, 3), draw(2, 3, 2))
    with pytest.raises(CacheError, match=r"Give"):
        cache.trim(lengths)


def test_an_impossible_cache_is_refused():
    with pytest.raises(CacheError, match="empty side"):
        LatentCache(0, 8, 3, 2)
    llama = ModelConfig(16, 64, 16, 1, 8, model_type="llama")
    with pytest.raises(CacheError, match=r"no latent.*Use FullCache"):
        LatentCache.for_config(llama, 1, 8)
