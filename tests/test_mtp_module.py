"""The MTP module written out by hand, its caches, and how many numbers the whole model holds."""

from dataclasses import replace

import pytest
import torch

from dsv3_tutorial.block import initialize
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import params
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.moe.gate import Gate
from dsv3_tutorial.mtp import MTPModule

SIZES = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 8, "vocab_size": 29}
CFG = replace(ModelConfig.named("small"), num_hidden_layers=3, **SIZES)  # dense, MoE, MoE, MTP
D = CFG.hidden_size


def model(modules=1) -> DeepSeekV3:
    """In float64, with norms and balance biases that are not all alike."""
    made = DeepSeekV3(replace(CFG, num_nextn_predict_layers=modules)).double()
    initialize(made, 0.3)
    with torch.no_grad():
        for part in made.modules():
            if isinstance(part, torch.nn.RMSNorm):
                part.weight.uniform_(0.5, 1.5)
            if isinstance(part, Gate):
                part.e_score_correction_bias.normal_(std=0.1)
    return made


def ids(batch=2, length=7):
    return torch.randint(CFG.vocab_size, (batch, length))


def rms(x, norm):
    return x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def test_the_module_projects_the_two_normalised_halves_and_runs_one_block():
    module = model().mtp[0]
    hidden, embedded = (torch.randn(2, 5, D, dtype=torch.float64) for _ in range(2))
    weight = module.eh_proj.weight  # M_k (D, 2D): embedding first, as in the checkpoint
    x = rms(embedded, module.enorm) @ weight[:, :D].T + rms(hidden, module.hnorm) @ weight[:, D:].T
    x = x + module.self_attn(rms(x, module.input_layernorm))
    x = x + module.mlp(rms(x, module.post_attention_layernorm))
    expected = rms(x, module.shared_head.norm)
    torch.testing.assert_close(module(hidden, embedded), expected, rtol=1e-11, atol=1e-11)


def test_the_papers_order_of_the_halves_is_a_permutation_of_the_projections_columns():
    module = model().mtp[0]
    hidden, embedded = (torch.randn(1, 4, D, dtype=torch.float64) for _ in range(2))
    before = module(hidden, embedded)
    enorm, hnorm = module.enorm, module.hnorm
    with torch.no_grad():
        module.eh_proj.weight.copy_(module.eh_proj.weight.roll(D, dims=1))
    module.enorm, module.hnorm = hnorm, enorm
    torch.testing.assert_close(module(embedded, hidden), before, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(module(hidden, embedded), before)


@pytest.mark.parametrize("modules", [0, 1, 2])
def test_draft_k_has_one_position_less_per_module_and_leaves_the_logits_alone(modules):
    made, tokens = model(modules), ids()
    logits, drafts = made(tokens, drafts=True)
    assert torch.equal(logits, made(tokens))
    assert [tuple(d.shape) for d in drafts] == [(2, 6 - k, CFG.vocab_size) for k in range(modules)]
    assert len(made.mtp) == modules


def test_drafts_chain_hidden_states_and_read_the_tokens_in_between():
    made, tokens = model(2), ids()
    _, drafts = made(tokens, drafts=True)
    embed, hidden = made.model.embed_tokens, made.model(tokens)
    first = made.mtp[0](hidden[:, :6], embed(tokens[:, 1:]))
    second = made.mtp[1](first[:, :5], embed(tokens[:, 2:]))
    for got, state in zip(drafts, (first, second)):
        torch.testing.assert_close(got, made.lm_head(state), rtol=1e-12, atol=1e-12)


def test_a_module_is_numbered_behind_the_layers_and_has_the_checkpoints_names():
    made = model()
    keys, block = (
        {k.split(".", 3)[3] for k in made.state_dict() if k.startswith(f"model.layers.{i}.")}
        for i in (3, 2)
    )
    new = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    assert keys == block | new
    assert isinstance(made.model.layers[3], MTPModule)


@pytest.mark.parametrize("modules", [0, 1, 2])
def test_there_is_a_cache_for_every_layer_and_every_module(modules):
    caches = model(modules).caches(2, 5)
    assert len(caches) == CFG.num_hidden_layers + modules
    assert {(cache.batch, cache.capacity) for cache in caches} == {(2, 5)}


@pytest.mark.parametrize("parts", [[1] * 7, [4, 1, 1, 1], [3, 4]], ids=str)
def test_decoding_with_caches_equals_one_pass_through_the_experts(parts):
    made, tokens = model(), ids()
    caches = made.caches(2, 7)
    with torch.no_grad():
        whole = made(tokens)
        steps = torch.cat([made(part, caches) for part in tokens.split(parts, dim=1)], dim=1)
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-10)
    assert [cache.longest for cache in caches] == [7, 7, 7, 0]  # the module's is not filled


@pytest.mark.parametrize(
    ("name", "modules"), [("small", 1), ("small", 2), ("small", 0), ("deepseek-v3", 1)]
)
def test_the_model_holds_as_many_numbers_as_the_cost_model_counts(name, modules):
    cfg = replace(ModelConfig.named(name), num_nextn_predict_layers=modules)
    with torch.device("meta"):
        made = DeepSeekV3(cfg)
    counted = params.count(cfg)
    held = sum(tensor.numel() for tensor in made.state_dict().values())
    assert held == counted.total + counted.mtp
    assert sum(t.numel() for m in made.mtp for t in m.state_dict().values()) == counted.mtp
