"""The model against transformers, and decoding against one pass."""

from dataclasses import replace

import pytest
import torch

from dsv3_tutorial.attention.cache import CacheError
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import params
from dsv3_tutorial.model import DeepSeekV3

TINY = replace(ModelConfig.named("tiny"), num_hidden_layers=2, first_k_dense_replace=2)
_PLAIN = {"kv_lora_rank": None, "head_dim": 32, "num_key_value_heads": 2}
LLAMA = replace(TINY, model_type="llama", rope_interleave=False, **_PLAIN)
QWEN = replace(TINY, model_type="qwen2", rope_interleave=False, **_PLAIN)
ALL = {"MLA": TINY, "GQA": LLAMA, "GQA with biases": QWEN}


def pair(cfg: ModelConfig):
    """Our model and transformers', with the same random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    known = {"deepseek_v3": "DeepseekV3", "llama": "Llama", "qwen2": "Qwen2"}[cfg.model_type]
    raw = cfg.to_dict()
    theirs_cfg = getattr(transformers, f"{known}Config")(**raw, attn_implementation="eager")
    theirs = getattr(transformers, f"{known}ForCausalLM")(theirs_cfg).double().eval()
    ours = DeepSeekV3(cfg).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("cfg", ALL.values(), ids=ALL)
def test_logits_and_every_gradient_equal_transformers(cfg):
    ours, theirs = pair(cfg)
    ids = torch.randint(cfg.vocab_size, (2, 9))
    got, expected = ours(ids), theirs(ids).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    other = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        scale = other[name].grad.abs().max()
        error = (parameter.grad - other[name].grad).abs().max()
        assert error <= 1e-5 * scale, name


@pytest.mark.parametrize("cfg", ALL.values(), ids=ALL)
def test_decoding_step_by_step_equals_one_pass(cfg):
    model = DeepSeekV3(cfg).double()
    ids = torch.randint(cfg.vocab_size, (2, 7))
    caches = model.caches(2, 7)
    with torch.no_grad():
        whole = model(ids)
        steps = torch.cat([model(ids[:, [i]], caches) for i in range(7)], dim=1)
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cfg", ALL.values(), ids=ALL)
def test_the_model_has_the_parameters_that_the_cost_model_counts(cfg):
    with torch.device("meta"):
        model = DeepSeekV3(cfg)
    assert sum(p.numel() for p in model.parameters()) == params.count(cfg).total


def test_a_later_token_changes_no_earlier_logit():
    model, ids = DeepSeekV3(TINY), torch.randint(256, (1, 8))
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % 256
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


def test_tied_embeddings_share_one_matrix():
    model = DeepSeekV3(replace(LLAMA, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


KINDS = {None: torch.float64, "bf16": torch.bfloat16, "fp8": torch.uint8, "fp8-rope": torch.uint8}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_decoding_over_every_kind_of_cache_stays_as_close_as_its_digits(kind):
    model = DeepSeekV3(TINY).double()
    ids = torch.randint(TINY.vocab_size, (2, 7))
    caches = model.caches(2, 7, kind=kind)
    assert {cache.parts[0].dtype for cache in caches} == {KINDS[kind]}
    with torch.no_grad():
        whole = model(ids)
        steps = torch.cat([model(ids[:, :4], caches), model(ids[:, 4:], caches)], dim=1)
    error = ((steps - whole).norm() / whole.norm()).item()
    least, most = {None: (0, 1e-12), "bf16": (1e-5, 1e-2)}.get(kind, (1e-4, 0.1))
    assert steps.dtype == torch.float64 and least <= error <= most


def test_a_cache_s_kind_says_how_many_bytes_a_token_takes():
    rank, rope = TINY.kv_lora_rank, TINY.qk_rope_head_dim
    bytes_a_token = {"bf16": 2 * (rank + rope), "fp8": rank + 4 * -(-rank // 128) + 2 * rope}
    for kind, wanted in bytes_a_token.items():
        caches = DeepSeekV3(TINY).caches(3, 10, kind=kind)
        assert [cache.nbytes for cache in caches] == [3 * 10 * wanted] * len(caches)


def test_plain_heads_are_cached_in_bf16_and_not_in_fp8():
    model, ids = DeepSeekV3(LLAMA), torch.randint(256, (1, 8))
    caches = model.caches(1, 8, kind="bf16")
    with torch.no_grad():
        steps = torch.cat([model(ids[:, :5], caches), model(ids[:, 5:], caches)], dim=1)
        whole = model(ids)
    assert 1e-5 < (steps - whole).norm() / whole.norm() < 1e-2
    with pytest.raises(CacheError, match=r"no latent.*Use FullCache"):
        model.caches(1, 8, kind="fp8")


def test_a_kind_that_does_not_exist_or_contradicts_the_dtype_is_refused():
    model = DeepSeekV3(TINY)
    with pytest.raises(CacheError, match=r"'int4' does not exist.*Pass one of"):
        model.caches(1, 8, kind="int4")
    with pytest.raises(CacheError, match=r"float32 and in BF16.*Leave out"):
        model.caches(1, 8, torch.float32, kind="bf16")
