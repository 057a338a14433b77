import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.attention.cache import CacheError, FullCache, LatentCache
from dsv3_tutorial.attention.mha import Attention, attend, attend_one, visible
from dsv3_tutorial.config import ConfigError, ModelConfig


def config(heads=4, kv_heads=2, model_type="llama", **changes):
    sizes = (16, 8 * heads, 16, 1, heads)
    return ModelConfig(*sizes, model_type=model_type, num_key_value_heads=kv_heads, **changes)


def draw(*shape):
    return torch.randn(*shape, generator=torch.manual_seed(0), dtype=torch.float64)


def by_hand(q, keys, values, scale):
    """Query s of head h, one after the other, as the definition stands."""
    batch, queries, heads, _ = q.shape
    cached, shared = keys.shape[1], heads // keys.shape[2]
    out = q.new_zeros(batch, queries, heads, values.shape[-1])
    for b in range(batch):
        for s in range(queries):
            upto = cached - queries + s + 1
            for h in range(heads):
                k, v = keys[b, :upto, h // shared], values[b, :upto, h // shared]
                out[b, s, h] = (k @ q[b, s, h] * scale).softmax(0) @ v
    return out


@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 4),
    before=st.integers(0, 4),
    kv_heads=st.integers(1, 3),
    shared=st.integers(1, 3),
)
def test_every_path_is_the_definition(batch, queries, before, kv_heads, shared):
    cached = queries + before
    q = draw(batch, queries, kv_heads * shared, 6)
    keys, values = draw(batch, cached, kv_heads, 6), draw(batch, cached, kv_heads, 5)
    cache = FullCache(batch, cached, kv_heads, 6, 5, dtype=torch.float64)
    cache.append(keys, values)
    wanted = by_hand(q, keys, values, 0.3)
    torch.testing.assert_close(attend(q, keys, values, 0.3, cache), wanted, rtol=0, atol=1e-12)
    each = [attend_one(*one, 0.3) for one in zip(q, keys, values)]
    torch.testing.assert_close(torch.stack(each), wanted, rtol=0, atol=1e-12)


def test_a_query_sees_itself_and_the_past_but_no_padding():
    seen = visible(torch.tensor([5, 3]), queries=2, cached=5)
    assert seen.int().tolist() == [
        [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
        [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]],
    ]


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["MHA", "GQA", "MQA"])
def test_decoding_step_by_step_is_one_prefill(kv_heads):
    cfg = config(kv_heads=kv_heads)
    layer, x = Attention(cfg).double(), draw(2, 9, cfg.hidden_size)
    cache = FullCache.for_config(cfg, 2, 9, dtype=torch.float64)
    with torch.no_grad():
        steps = [layer(x[:, a:b], cache) for a, b in ((0, 4), (4, 7), (7, 8), (8, 9))]
        torch.testing.assert_close(torch.cat(steps, 1), layer(x), rtol=0, atol=1e-12)


def test_sequences_of_different_length_decode_as_if_alone():
    cfg = config()
    layer, x = Attention(cfg).double(), draw(2, 9, cfg.hidden_size)
    cache = FullCache.for_config(cfg, 2, 9, dtype=torch.float64)
    with torch.no_grad():
        layer(x[:, :6], cache)
        cache.trim([6, 3])
        new = torch.stack([x[0, 6:9], x[1, 3:6]])
        steps = torch.cat([layer(new[:, :1], cache), layer(new[:, 1:], cache)], 1)
        whole = layer(x)
    torch.testing.assert_close(steps[0], whole[0, 6:9], rtol=0, atol=1e-12)
    torch.testing.assert_close(steps[1], whole[1, 3:6], rtol=0, atol=1e-12)


def test_grouped_heads_are_full_heads_repeated():
    grouped, full = config(kv_heads=2), config(kv_heads=4)
    narrow, wide = Attention(grouped).double(), Attention(full).double()
    weights = narrow.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        heads = weights[name].unflatten(0, (2, -1))
        weights[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    wide.load_state_dict(weights)
    x = draw(2, 5, grouped.hidden_size)
    torch.testing.assert_close(narrow(x), wide(x), rtol=0, atol=1e-12)


def test_later_tokens_change_nothing_before_them():
    layer, x = Attention(config()).double(), draw(1, 6, 32)
    changed = x.clone()
    changed[:, 4:] += 1
    assert torch.equal(layer(x)[:, :4], layer(changed)[:, :4])


def test_biases_stand_where_each_model_has_them():
    def biased(**changes):
        return {n for n, _ in Attention(config(**changes)).named_parameters() if "bias" in n}

    qkv = {"q_proj.bias", "k_proj.bias", "v_proj.bias"}
    assert biased() == set()
    assert biased(model_type="qwen2") == qkv
    assert biased(attention_bias=True) == qkv | {"o_proj.bias"}


def test_what_cannot_be_attended_is_refused():
    cfg = config()
    layer = Attention(cfg)
    with pytest.raises(ValueError, match=r"\(2, 5, 31\).*cannot be"):
        layer(torch.zeros(2, 5, 31))
    with pytest.raises(ValueError, match="batch dimension"):
        layer(torch.zeros(5, 32))
    with pytest.raises(CacheError, match=r"LatentCache.*Use FullCache"):
        layer(torch.zeros(1, 1, 32), LatentCache(1, 4, 8, 8))
    with pytest.raises(ConfigError, match="this config is MLA"):
        Attention(ModelConfig.named("tiny"))


def test_scores_are_divided_by_the_root_of_the_head_size():
    assert config().softmax_scale == pytest.approx(1 / math.sqrt(8))


def test_torch_compile_keeps_it_whole_over_texts_of_any_length():
    torch._dynamo.reset()
    layer = Attention(ModelConfig(16, 64, 16, 1, 8, model_type="llama")).double()
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    for length in (6, 7, 1):
        x = torch.randn(2, length, 64, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=1e-12)
