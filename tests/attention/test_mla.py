import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.attention import latent
from dsv3_tutorial.attention.cache import Cache, CacheError, FullCache, LatentCache
from dsv3_tutorial.attention.mla import MLA
from dsv3_tutorial.attention.rope import rotate_pairs, rotation_table
from dsv3_tutorial.config import ConfigError, ModelConfig, RopeScaling
from dsv3_tutorial.cost.attention import crossover_queries

F64 = torch.float64
YARN = RopeScaling("yarn", 40.0, 64, mscale=1.0, mscale_all_dim=1.0)
PURE = (
    *("compress", "expanded_scores", "absorbed_scores", "expanded_values"),
    *("absorbed_values", "absorb_query"),
)
WAYS = [(LatentCache, None), (LatentCache, False), (LatentCache, True), (FullCache, None)]


def config(heads=3, rank=12, rope_dim=4, nope=6, value=5, **changes):
    sizes = (16, 24, 16, 1, heads)
    latent = {"kv_lora_rank": rank, "qk_rope_head_dim": rope_dim, "qk_nope_head_dim": nope}
    return ModelConfig(*sizes, **latent, v_head_dim=value, **changes)


def draw(*shape, dtype=F64, seed=0):
    return torch.randn(*shape, generator=torch.manual_seed(seed), dtype=dtype)


def close(got, wanted, tolerance):
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


def through(layer, cfg, x, kind, absorb, cuts):
    """The layer's output when it is given x piece by piece over a cache of `kind`."""
    cache = kind.for_config(cfg, len(x), x.shape[1], dtype=x.dtype)
    pieces = x.tensor_split(cuts, dim=1)
    return torch.cat([layer(piece, cache, absorb) for piece in pieces], dim=1)


sizes = st.integers(1, 5)


@settings(deadline=None, max_examples=30)
@given(
    heads=sizes,
    rank=st.integers(1, 9),
    half_rope=st.integers(1, 4),
    nope=sizes,
    value=sizes,
    q_rank=st.none() | st.integers(1, 9),
    cuts=st.sets(st.integers(1, 6), max_size=6),
    way=st.sampled_from(WAYS),
    scaled=st.booleans(),
)
def test_every_way_over_every_split_of_the_text_is_the_same_function(
    heads, rank, half_rope, nope, value, q_rank, cuts, way, scaled
):
    changes = {"q_lora_rank": q_rank, "rope_scaling": YARN if scaled else None}
    cfg = config(heads, rank, 2 * half_rope, nope, value, **changes)
    layer, x = MLA(cfg).double(), draw(2, 7, cfg.hidden_size)
    with torch.no_grad():
        whole = layer(x, absorb=False)
        close(layer(x), whole, 1e-12)
        close(layer(x, absorb=True), whole, 1e-12)
        close(through(layer, cfg, x, *way, sorted(cuts)), whole, 1e-12)


# Worst |difference| from the float64 output of the same weights, outputs being about 1 in size.
# Half an ulp at 1 is 6e-8 and 4e-3; the rest is what rounding of q, latent and probabilities adds.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize("kind, absorb", WAYS)
def test_lower_precision_stays_within_its_tolerance(dtype, tolerance, kind, absorb):
    cfg = config(heads=4, rank=64, rope_dim=16, nope=32, value=32, q_lora_rank=48)
    layer = MLA(cfg).to(dtype)
    x = draw(2, 32, cfg.hidden_size).to(dtype)
    exact = MLA(cfg).double()
    exact.load_state_dict(layer.state_dict())
    with torch.no_grad():
        wanted = exact(x.double())
        got = through(layer, cfg, x, kind, absorb, [24, 25, 30])
    scale = wanted.abs().max()
    assert got.dtype == dtype
    close(got.double() / scale, wanted / scale, tolerance)
    assert not torch.equal(got.double(), wanted)


@pytest.mark.parametrize("kind, absorb", WAYS)
def test_sequences_of_different_length_decode_as_if_alone(kind, absorb):
    cfg = config()
    layer, x = MLA(cfg).double(), draw(3, 9, cfg.hidden_size)
    cache = kind.for_config(cfg, 3, 9, dtype=F64)
    with torch.no_grad():
        layer(x[:, :6], cache, absorb)  # the padding of the shorter ones is their own later text
        cache.trim([6, 1, 4])
        new = torch.stack([x[0, 6:9], x[1, 1:4], x[2, 4:7]])
        steps = [layer(new[:, :1], cache, absorb), layer(new[:, 1:], cache, absorb)]
        got, whole = torch.cat(steps, 1), layer(x)
    close(got, torch.stack([whole[0, 6:9], whole[1, 1:4], whole[2, 4:7]]), 1e-12)


@pytest.mark.parametrize("absorb", [None, False, True])
def test_gradients_are_the_same_absorbed_or_not(absorb):
    cfg = config(q_lora_rank=8)
    layer, x = MLA(cfg).double(), draw(2, 6, cfg.hidden_size)

    def gradients(way):
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        layer(inputs, absorb=way).square().sum().backward()
        return [inputs.grad, *(p.grad.clone() for p in layer.parameters())]

    for got, wanted in zip(gradients(absorb), gradients(False), strict=True):
        assert wanted.abs().max() > 0
        close(got, wanted, 1e-12)


def test_a_long_prefill_expands_and_a_short_one_absorbs(monkeypatch):
    cfg = config(rank=8, nope=6, value=6)
    assert crossover_queries(cfg) == 8 * 12 / 4 == 24
    layer, decoded = MLA(cfg).double(), []
    real = LatentCache.attend
    monkeypatch.setattr(
        LatentCache, "attend", lambda c, q, *rest: decoded.append(q.shape[1]) or real(c, q, *rest)
    )
    x = draw(1, 60, cfg.hidden_size)
    with torch.no_grad():
        got = through(layer, cfg, x, LatentCache, None, [24, 47, 48])
        close(got, layer(x), 1e-12)
    assert decoded == [23, 1, 12]  # 24 at first went through whole heads


def test_the_backend_asked_for_is_the_one_that_decodes():
    cfg = config()
    layer = MLA(cfg, backend="abacus").double()
    with pytest.raises(ValueError, match="abacus"):
        layer(draw(1, 1, cfg.hidden_size), LatentCache.for_config(cfg, 1, 4, dtype=F64))


def test_deepseek_v3_expands_from_171_queries():
    v3 = config(heads=128, rank=512, rope_dim=64, nope=128, value=128)
    assert 170 < crossover_queries(v3) < 171
    assert crossover_queries(config(rank=4, nope=6, value=6)) == float("inf")


def test_a_latent_cache_of_a_running_layer_holds_only_its_claim():
    cfg = config()
    layer, cache = MLA(cfg), LatentCache.for_config(cfg, 2, 50)
    with torch.no_grad():
        layer(draw(2, 50, cfg.hidden_size, dtype=torch.float32), cache)
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in held_tensors(cache)}
    kept = sum(storage.nbytes() for storage in tensors.values()) - 2 * 2 * 8  # lengths and rows
    assert kept == cache.nbytes == 2 * 50 * (12 + 4) * 4


def held_tensors(cache):
    for value in vars(cache).values():
        yield from (
            v for v in (value if isinstance(value, tuple) else (value,)) if hasattr(v, "dim")
        )


def test_the_up_weights_are_views_of_the_one_weight():
    layer = MLA(config())
    w_uk, w_uv = layer.up_weights()
    assert w_uk.shape == (3, 6, 12) and w_uv.shape == (3, 5, 12)
    storage = layer.kv_b_proj.weight.untyped_storage().data_ptr()
    assert w_uk.untyped_storage().data_ptr() == w_uv.untyped_storage().data_ptr() == storage


def test_yarns_temperature_reaches_the_scores():
    plain, scaled = config(), config(rope_scaling=YARN)
    assert scaled.softmax_scale / plain.softmax_scale == pytest.approx(1.8739, abs=1e-4)
    layer, other, x = MLA(plain).double(), MLA(scaled).double(), draw(1, 1, 24)
    other.load_state_dict(layer.state_dict())
    close(layer(x), other(x), 1e-12)  # one token attends to itself, whatever the scale
    x = draw(1, 6, 24)
    assert not torch.allclose(layer(x), other(x), atol=1e-4)


@pytest.mark.parametrize("absorb", [None, False, True])
def test_torch_compile_keeps_the_layer_whole(absorb):
    cfg = config()
    layer, x = MLA(cfg).double(), draw(2, 6, cfg.hidden_size)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    close(compiled(x, absorb=absorb), layer(x), 1e-12)


def test_torch_compile_keeps_a_decode_step_whole():
    cfg = config()
    layer, x = MLA(cfg).double(), draw(2, 8, cfg.hidden_size)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    cache = LatentCache.for_config(cfg, 2, 8, dtype=F64)
    with torch.no_grad():
        steps = [layer(x[:, :4], cache), *(compiled(x[:, i : i + 1], cache) for i in range(4, 8))]
        close(torch.cat(steps, dim=1), layer(x), 1e-12)
    assert cache.longest == 8


@pytest.mark.parametrize("of_the_layer", [None, False, True])
@pytest.mark.parametrize("absorb", [False, True])
def test_the_class_runs_the_very_functions_that_learners_write(monkeypatch, absorb, of_the_layer):
    called = []
    for name in PURE:
        function = getattr(latent, name)
        spied = lambda *a, _f=function: called.append(_f.__name__) or _f(*a)  # noqa: E731
        monkeypatch.setattr(latent, name, spied)
    cfg = config()
    x = draw(1, 4, cfg.hidden_size)
    if of_the_layer == absorb:
        MLA(cfg, absorb=absorb).double()(x)
    else:
        MLA(cfg, absorb=of_the_layer).double()(x, absorb=absorb)
    kind = "absorbed" if absorb else "expanded"
    assert called == ["compress", f"{kind}_scores", f"{kind}_values"]


def test_what_is_not_mla_is_refused():
    with pytest.raises(ConfigError, match="this config is not MLA"):
        MLA(ModelConfig(16, 64, 16, 1, 8, model_type="llama"))
    cfg = config()
    layer = MLA(cfg)
    with pytest.raises(ValueError, match=r"\(2, 5, 23\).*cannot be"):
        layer(torch.zeros(2, 5, 23))
    with pytest.raises(CacheError, match=r"got a Cache.*Use LatentCache"):
        layer(torch.zeros(1, 1, 24), Cache(1, 4, (16,)))


def test_a_cache_too_small_or_of_another_model_is_refused():
    cfg = config()
    layer, x = MLA(cfg), torch.zeros(2, 5, 24)
    with pytest.raises(CacheError, match="full: 0 tokens held, 5 more, room for 4"):
        layer(x, LatentCache.for_config(cfg, 2, 4))
    with pytest.raises(CacheError, match="Got"):
        layer(x, LatentCache.for_config(config(rank=13), 2, 8))
    with pytest.raises(CacheError, match="Got"):
        layer(x, LatentCache.for_config(cfg, 1, 8))


@pytest.mark.parametrize("kind, absorb", WAYS)
def test_a_narrow_cache_under_a_wide_model_rounds_what_it_keeps_and_nothing_else(kind, absorb):
    cfg = config(rank=8, nope=6, value=6)  # expands from 24 queries on
    layer, x = MLA(cfg).double(), draw(2, 40, cfg.hidden_size)
    narrow = kind.for_config(cfg, 2, 40, dtype=torch.bfloat16)
    rounded = Rounding(kind.for_config(cfg, 2, 40, dtype=F64))
    with torch.no_grad():
        for start, end in ((0, 30), (30, 31), (31, 40)):
            got = layer(x[:, start:end], narrow, absorb)
            wanted = layer(x[:, start:end], rounded.cache, absorb)
            assert got.dtype == F64
            close(got, wanted, 1e-12)
        assert not torch.equal(wanted, layer(x)[:, 31:])


class Rounding:
    """A float64 cache that is given BF16's values: what the narrow one must be equal to."""

    def __init__(self, cache):
        self.cache, self.append = cache, cache.append
        cache.append = lambda *new: self.append(*(part.bfloat16().double() for part in new))


@pytest.mark.parametrize("absorb", [None, False, True])
def test_the_readable_whole_is_what_the_layer_computes(absorb):
    cfg = config()
    layer, x = MLA(cfg).double(), draw(2, 6, cfg.hidden_size)
    down, norm = layer.kv_a_proj_with_mqa, layer.kv_a_layernorm
    c_kv, k_rope = latent.compress(x, down.weight, norm.weight)
    cos, sin = rotation_table(cfg, 6, dtype=F64)
    q_nope, q_rope = layer.queries(x)
    parts = q_nope, rotate_pairs(q_rope, cos, sin), c_kv, rotate_pairs(k_rope[:, :, None], cos, sin)
    out = latent.latent_attention(*parts[:3], parts[3][:, :, 0], *layer.up_weights())
    close(layer.o_proj(out.flatten(2)), layer(x, absorb=absorb), 1e-12)
