"""The whole model with experts against transformers: logits, loss, every gradient, text, disk."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from dsv3_tutorial.config import ModelConfig  # noqa: E402
from dsv3_tutorial.model import DeepSeekV3  # noqa: E402

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
SIZES = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 28,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "max_position_embeddings": 640,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
}
V3 = {
    "groups, dense first layer, YaRN": {"rope_parameters": YARN},
    "no groups, two shared, queries whole": {
        "n_routed_experts": 5,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 2,
        "q_lora_rank": None,
        "first_k_dense_replace": 0,
    },
    "three groups, weights not normalised, biases": {
        "n_routed_experts": 12,
        "n_group": 3,
        "num_experts_per_tok": 5,
        "norm_topk_prob": False,
        "attention_bias": True,
        "first_k_dense_replace": 2,
        "rope_parameters": {**YARN, "mscale_all_dim": 0.7},
    },
    "rope halves, one expert a token, tied head": {
        "rope_interleave": False,
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
    },
}
V2 = {
    "V2-Lite: greedy, queries whole": {
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
    },
    "V2: groups by their best, scaled, YaRN": {
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
        "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
}


def config(kind: str, changes: dict):
    """transformers' config, with the module for multi-token prediction left out."""
    known = {**SIZES, **changes}
    if kind == "V2":
        known["norm_topk_prob"] = False  # transformers' V2 never normalises
    else:
        known["num_nextn_predict_layers"] = 0
    made = getattr(transformers, f"Deepseek{kind}Config")(**known)
    made._attn_implementation = made._experts_implementation = "eager"
    return made


def settle(model) -> None:
    """Weights, norms and balance biases large enough for every one to be seen in the logits."""
    numbers = torch.Generator().manual_seed(0)
    for name, weight in model.state_dict().items():
        drawn = torch.randn(weight.shape, generator=numbers, dtype=torch.float64)
        if "e_score_correction_bias" in name:
            drawn = drawn.float() * 0.2
        elif weight.ndim == 1:
            drawn = drawn * 0.2 + ("norm" in name)
        else:
            drawn = drawn / weight.shape[-1] ** 0.5
        weight.copy_(drawn)


def pair(kind: str, changes: dict, dtype=torch.float32):
    """transformers' model and ours with the same weights, and tokens (2, 21), past YaRN's 16."""
    theirs = getattr(transformers, f"Deepseek{kind}ForCausalLM")(config(kind, changes))
    theirs = theirs.to(dtype).eval()
    for router in theirs.modules():
        if hasattr(router, "e_score_correction_bias"):  # float32, as transformers loads it
            router.e_score_correction_bias = router.e_score_correction_bias.float()
    settle(theirs)
    ours = DeepSeekV3(ModelConfig.from_dict(theirs.config.to_dict())).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours, torch.randint(61, (2, 21), generator=torch.manual_seed(1))


def cases(*kinds):
    known = {"V3": V3, "V2": V2}
    found = [(kind, changes, name) for kind in kinds for name, changes in known[kind].items()]
    return pytest.mark.parametrize(
        "kind, changes", [case[:2] for case in found], ids=[case[2] for case in found]
    )


def near(mine, theirs, tolerance, what):
    """To `tolerance` of the largest number: a gradient's small entries are sums that cancel."""
    error = (mine - theirs).abs().max()
    assert error <= tolerance * theirs.abs().max(), f"{what}: {error:.1e}"
    assert theirs.abs().max() > 0, what  # nothing to compare is no agreement


# transformers computes norms, router, attention weights and rotations in float32 whatever the
# model's dtype: in float64 the two differ by its roundings, and only by those
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 2e-6)])
@cases("V3", "V2")
def test_logits_loss_and_every_gradient_are_transformers(kind, changes, dtype, tolerance):
    theirs, ours, ids = pair(kind, changes, dtype)
    expected = theirs(ids, labels=ids)
    expected.loss.backward()
    logits = ours(ids)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    near(logits, expected.logits, tolerance, "logits")
    near(loss, expected.loss, tolerance, "loss")
    theirs_by_name = dict(theirs.named_parameters())
    assert dict(ours.named_parameters()).keys() == theirs_by_name.keys()
    for name, parameter in ours.named_parameters():
        near(parameter.grad, theirs_by_name[name].grad, tolerance, name)


def test_every_expert_took_part_in_what_was_compared():
    _, ours, ids = pair("V3", V3["groups, dense first layer, YaRN"])
    ours(ids).square().sum().backward()
    gradient = ours.model.layers[1].mlp.experts.gate_up_proj.grad
    assert (gradient.abs().amax(dim=(1, 2)) > 0).all()


@cases("V3", "V2")
def test_greedy_text_is_transformers_with_the_latent_cache_and_without(kind, changes):
    theirs, ours, ids = pair(kind, changes, torch.float64)
    how = {"do_sample": False, "max_new_tokens": 32, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    expected = theirs.generate(ids, attention_mask=mask, eos_token_id=None, **how)
    caches, cached, whole = ours.caches(2, ids.shape[1] + 32), ids, ids
    with torch.no_grad():
        new = ids
        for _ in range(32):
            new = ours(new, caches)[:, -1:].argmax(-1)
            cached = torch.cat([cached, new], dim=1)  # (B, S + 1)
            whole = torch.cat([whole, ours(whole)[:, -1:].argmax(-1)], dim=1)  # (B, S + 1)
    assert torch.equal(cached, expected)
    assert torch.equal(whole, expected)
    assert expected[:, 21:].unique().numel() > 4  # no model that says one thing over and over


@cases("V3", "V2")
def test_decoding_step_by_step_is_one_pass_over_all(kind, changes):
    _, ours, ids = pair(kind, changes, torch.float64)
    caches = ours.caches(2, 21)
    with torch.no_grad():
        whole = ours(ids)
        pieces = [ours(part, caches) for part in ids.split([6, 1, 1, 5, 1, 7], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@cases("V3", "V2")
def test_what_transformers_saves_is_loaded_to_the_bit(kind, changes, dtype, tmp_path):
    theirs, _, ids = pair(kind, changes, dtype)
    theirs.save_pretrained(tmp_path)
    ours = DeepSeekV3.from_pretrained(tmp_path)
    same_tensors(ours.state_dict(), theirs.state_dict())
    if dtype == torch.float32:  # in bfloat16 one rounding can change the choice of an expert
        near(ours(ids), theirs(ids).logits, 2e-5, "logits")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@cases("V3", "V2")
def test_what_we_save_transformers_loads_to_the_bit(kind, changes, dtype, tmp_path):
    theirs, ours, _ = pair(kind, changes, dtype)
    ours.save_pretrained(tmp_path)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(loaded) is type(theirs)
    same_tensors(loaded.state_dict(), theirs.state_dict())


def test_transformers_reads_the_main_model_beside_a_module_for_multi_token_prediction(tmp_path):
    theirs, ours, ids = pair("V3", V3["groups, dense first layer, YaRN"])
    drafting = DeepSeekV3(replace(ours.cfg, num_nextn_predict_layers=1))
    drafting.load_state_dict({**drafting.state_dict(), **ours.state_dict()})
    drafting.save_pretrained(tmp_path)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert all(name.startswith("model.layers.3.") for name in report["unexpected_keys"])
    near(loaded(ids).logits, theirs(ids).logits, 2e-5, "logits")


def test_a_config_that_leaves_key_value_heads_open_is_read_by_transformers_as_all_heads(tmp_path):
    """Left out of the file, transformers would take the 671B model's 128."""
    _, ours, ids = pair("V3", {})
    ours = DeepSeekV3(replace(ours.cfg, num_key_value_heads=None))
    ours.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    near(loaded(ids).logits, ours(ids), 2e-5, "logits")


@cases("V3")
def test_what_we_save_we_load_to_the_bit(kind, changes, tmp_path):
    _, ours, ids = pair(kind, changes)
    ours = DeepSeekV3(replace(ours.cfg, num_nextn_predict_layers=2))
    ours.save_pretrained(tmp_path)
    again = DeepSeekV3.from_pretrained(tmp_path)
    assert again.cfg == ours.cfg
    assert all(parameter.requires_grad for parameter in again.parameters())
    same_tensors(again.state_dict(), ours.state_dict())
    for mine, wanted in zip(_logits(again, ids), _logits(ours, ids), strict=True):
        assert torch.equal(mine, wanted)


def _logits(model, ids):
    logits, drafts = model(ids, drafts=True)
    return [logits, *drafts]


def same_tensors(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
