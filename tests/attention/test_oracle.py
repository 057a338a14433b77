"""The same weights, input and config in transformers' attention and in ours."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import DeepseekV3Config, DynamicCache, LlamaConfig, Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2 import modeling_qwen2 as qwen2

from dsv3_tutorial.attention.cache import FullCache, LatentCache
from dsv3_tutorial.attention.mha import Attention
from dsv3_tutorial.attention.mla import MLA
from dsv3_tutorial.attention.rope import attention_factor, inverse_frequencies, rotation_table
from dsv3_tutorial.config import ModelConfig

YARN = {
    "rope_type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
V3 = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
UNEQUAL = {**YARN, "mscale": 0.707, "mscale_all_dim": 1.3}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def deepseek_config(seed, scaling, **changes):
    """A random small config, sizes that have nothing in common."""
    numbers = torch.Generator().manual_seed(seed)

    def one(low, high):
        return int(torch.randint(low, high, (), generator=numbers))

    heads = one(1, 6)
    sizes = {
        "hidden_size": one(9, 60),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": one(5, 40),
        "kv_lora_rank": one(5, 40),
        "qk_nope_head_dim": one(3, 20),
        "qk_rope_head_dim": 2 * one(1, 10),
        "v_head_dim": one(3, 20),
    }
    other = {"vocab_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 2560}
    other["rms_norm_eps"] = 1e-2  # which the norms inside attention do not follow
    rope = {"rope_theta": 10000.0, **(scaling or {"rope_type": "default"})}
    theirs = DeepseekV3Config(**other, **{**sizes, **changes}, rope_parameters=rope)
    theirs._attn_implementation = "eager"
    return theirs


def plain_config(kind, scaling, **changes):
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
    other = {"vocab_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 512}
    rope = {"rope_theta": 10000.0, **(scaling or {"rope_type": "default"})}
    theirs = kind(**sizes, **other, **changes, rope_parameters=rope)
    theirs._attn_implementation = "eager"
    return theirs


def settle(layer):
    """Weights and biases large enough that every one of them is seen in the output."""
    numbers = torch.Generator().manual_seed(0)
    for name, weight in layer.named_parameters():
        fan_in = weight.shape[-1] if weight.ndim == 2 else 1
        start = 1.0 if "layernorm" in name else 0.0
        drawn = torch.randn(weight.shape, generator=numbers) / fan_in**0.5
        weight.data.copy_(start + drawn * (0.2 if weight.ndim == 1 else 1.0))


def run(layer, rotary, x, cache=None, start=0):
    """transformers' attention over x (B, S, D), causal, after `start` cached tokens."""
    queries = x.shape[1]
    angles = rotary(x, torch.arange(start, start + queries)[None])
    hidden = torch.full((queries, start + queries), float("-inf")).triu(start + 1)
    return layer(x, angles, hidden[None, None], cache)[0]


def pair(module, theirs, ours, names):
    """Their layer, their rotary embedding and our layer with the same weights, by name."""
    layer = getattr(module, f"{names}Attention")(theirs, 0).eval()
    settle(layer)
    ours.load_state_dict(layer.state_dict(), strict=True)
    return layer, getattr(module, f"{names}RotaryEmbedding")(theirs), ours


def agree(layer, rotary, ours, **how):
    """Forward and every gradient, to 1e-5 of the largest number."""
    x = torch.randn(2, 11, layer.config.hidden_size, generator=torch.manual_seed(1))
    results = []
    for call in (lambda x: run(layer, rotary, x), lambda x: ours(x, **how)):
        inputs = x.clone().requires_grad_()
        out = call(inputs)
        probe = torch.randn(out.shape, generator=torch.manual_seed(2))
        (out * probe).sum().backward()
        results.append((out, inputs.grad))
    for theirs, mine in zip(*results, strict=True):
        near(mine, theirs)
    gradients = dict(layer.named_parameters())
    for name, weight in ours.named_parameters():
        near(weight.grad, gradients[name].grad)


def near(mine, theirs):
    scale = theirs.abs().max().clamp(min=1e-6)
    torch.testing.assert_close(mine / scale, theirs / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("absorb", [None, False, True])
@pytest.mark.parametrize("scaling", [None, V3, UNEQUAL], ids=["plain", "yarn", "unequal"])
@pytest.mark.parametrize("seed", range(4))
def test_mla_is_transformers_forward_and_backward(seed, scaling, absorb):
    changes = [
        {},
        {"q_lora_rank": None},
        {"attention_bias": True},
        {"q_lora_rank": None, "rope_interleave": False},
    ][seed]
    theirs = deepseek_config(seed, scaling, **changes)
    ours = MLA(ModelConfig.from_dict(theirs.to_dict()))
    agree(*pair(deepseek, theirs, ours, "DeepseekV3"), absorb=absorb)


@pytest.mark.parametrize("kind", [LatentCache, FullCache])
@pytest.mark.parametrize("seed", range(3))
def test_mla_decodes_what_transformers_decodes(seed, kind):
    theirs = deepseek_config(10 + seed, V3)
    cfg = ModelConfig.from_dict(theirs.to_dict())
    layer, rotary, ours = pair(deepseek, theirs, MLA(cfg), "DeepseekV3")
    x = torch.randn(2, 90, theirs.hidden_size, generator=torch.manual_seed(1))
    cache, their_cache = kind.for_config(cfg, 2, 90), DynamicCache()
    with torch.no_grad():
        near(ours(x[:, :80], cache), run(layer, rotary, x[:, :80], their_cache))
        for at in range(80, 90):  # past original_max_position_embeddings, where YaRN works
            step = x[:, at : at + 1]
            near(ours(step, cache), run(layer, rotary, step, their_cache, start=at))


@pytest.mark.parametrize(
    "module, kind, names, changes",
    [
        (llama, LlamaConfig, "Llama", {}),
        (llama, LlamaConfig, "Llama", {"attention_bias": True, "head_dim": 12}),
        (qwen2, Qwen2Config, "Qwen2", {}),
    ],
)
@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN], ids=["plain", "llama3", "yarn"])
def test_attention_is_transformers_forward_and_backward(module, kind, names, changes, scaling):
    theirs = plain_config(kind, scaling, **changes)
    ours = Attention(ModelConfig.from_dict(theirs.to_dict()))
    agree(*pair(module, theirs, ours, names))


@pytest.mark.parametrize("scaling", [V3, YARN, UNEQUAL], ids=["v3", "bare", "unequal"])
@pytest.mark.parametrize("rope_dim, original", [(64, 4096), (32, 64), (2, 4096), (128, 6)])
@pytest.mark.parametrize("theta", [1e2, 1e4, 5e5])
def test_yarn_frequencies_are_transformers(scaling, rope_dim, original, theta):
    rope = {**scaling, "original_max_position_embeddings": original, "rope_theta": theta}
    theirs = deepseek_config(0, rope, qk_rope_head_dim=rope_dim)
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    cfg = ModelConfig.from_dict(theirs.to_dict())
    torch.testing.assert_close(inverse_frequencies(cfg), frequencies, rtol=1e-6, atol=0)
    assert attention_factor(cfg) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("head_dim, original", [(128, 8192), (16, 64), (2, 8192)])
def test_llama3_frequencies_are_transformers(head_dim, original):
    rope = {**LLAMA3, "original_max_position_embeddings": original}
    theirs = plain_config(LlamaConfig, rope, head_dim=head_dim)
    frequencies, factor = ROPE_INIT_FUNCTIONS["llama3"](theirs)
    cfg = ModelConfig.from_dict(theirs.to_dict())
    torch.testing.assert_close(inverse_frequencies(cfg), frequencies, rtol=1e-6, atol=0)
    assert attention_factor(cfg) == factor == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tables_are_transformers(dtype):
    theirs = deepseek_config(0, UNEQUAL, qk_rope_head_dim=32)
    rotary = deepseek.DeepseekV3RotaryEmbedding(theirs)
    cos, sin = rotary(torch.zeros(1, dtype=dtype), torch.arange(200)[None])
    ours = rotation_table(ModelConfig.from_dict(theirs.to_dict()), 200, dtype=dtype)
    for mine, wanted in zip(ours, (cos, sin), strict=True):
        # the last bit of a frequency, times the position; and one unit in the last place of dtype
        atol = 1e-4 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(mine, wanted[0, :, :16], rtol=0, atol=atol)
