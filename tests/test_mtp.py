"""Multi-token prediction: whose token it guesses, what it shares, and the order of its halves.

transformers has the module too (`MtpModel`, for `generate(use_mtp=True)`): an oracle for all of it.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dsv3_tutorial.block import Block
from dsv3_tutorial.config import ModelConfig, RopeScaling
from dsv3_tutorial.model import DeepSeekV3

CFG = ModelConfig(
    vocab_size=53,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=20,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=2,
    max_position_embeddings=640,
    rope_scaling=RopeScaling("yarn", 40.0, 16, mscale=1.0, mscale_all_dim=1.0),
    rms_norm_eps=1e-5,
)


def made(cfg=CFG, dtype=torch.float64):
    """A model whose every weight, norm and bias is large enough to be seen in its logits."""
    model, numbers = DeepSeekV3(cfg).to(dtype), torch.Generator().manual_seed(0)
    for name, weight in model.state_dict().items():
        drawn = torch.randn(weight.shape, generator=numbers, dtype=torch.float64)
        near_one = 0.2 * drawn + ("norm" in name)
        weight.copy_(near_one if weight.ndim == 1 else drawn / weight.shape[-1] ** 0.5)
    return model


@pytest.fixture
def model():
    return made()


@pytest.fixture
def ids():
    return torch.randint(53, (2, 13), generator=torch.manual_seed(1))


def changed(ids, at):
    """The same tokens with another one at position `at`."""
    other = ids.clone()
    other[:, at] = (ids[:, at] + 1) % 53
    return other


def same_until(before, after, last):
    """Equal at positions up to `last`, different in every sequence at the one after it."""
    torch.testing.assert_close(after[:, : last + 1], before[:, : last + 1], rtol=0, atol=1e-12)
    assert (after[:, last + 1] - before[:, last + 1]).abs().amax(-1).min() > 1e-6


def test_module_k_has_a_guess_for_every_position_with_a_token_to_be_guessed_after_it(model, ids):
    logits, drafts = model(ids, drafts=True)
    assert [tuple(draft.shape) for draft in drafts] == [(2, 12, 53), (2, 11, 53)]
    assert torch.equal(logits, model(ids))  # the modules take no part in the main model's answer


@pytest.mark.parametrize("token", [3, 4, 12])
def test_a_draft_sees_all_tokens_before_the_one_it_guesses_and_none_from_there(model, ids, token):
    """Draft k at position i guesses token i + 2 + k, and the last it has seen is i + 1 + k."""
    with torch.no_grad():
        _, before = model(ids, drafts=True)
        _, after = model(changed(ids, token), drafts=True)
    for k in range(2):
        first_that_sees_it = token - (k + 1)
        same_until(before[k], after[k], first_that_sees_it - 1)


def test_the_embedding_half_comes_first_in_the_projection(model, ids):
    """With [identity, 0] the block gets the normed embedding, with [0, identity] the hidden."""
    module, size = model.mtp[0], CFG.hidden_size
    hidden, embedded = torch.randn(2, 2, 5, size, dtype=torch.float64)
    one, none = torch.eye(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    with torch.no_grad():
        module.eh_proj.weight.copy_(torch.cat([one, none], dim=1))
        expected = module.shared_head.norm(Block.forward(module, module.enorm(embedded)))
        torch.testing.assert_close(module(hidden, embedded), expected, rtol=0, atol=1e-12)
        module.eh_proj.weight.copy_(torch.cat([none, one], dim=1))
        expected = module.shared_head.norm(Block.forward(module, module.hnorm(hidden)))
        torch.testing.assert_close(module(hidden, embedded), expected, rtol=0, atol=1e-12)


def test_without_the_hidden_half_the_first_token_is_unknown_to_the_first_module(model, ids):
    model.mtp[0].eh_proj.weight.data[:, CFG.hidden_size :] = 0
    with torch.no_grad():
        before, after = (model(tokens, drafts=True)[1][0] for tokens in (ids, changed(ids, 0)))
        torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
        later = model(changed(ids, 1), drafts=True)[1][0]
        assert (later - before).abs().max() > 1e-6


def test_without_the_embedding_half_a_draft_knows_no_more_than_the_main_model(model, ids):
    model.mtp[0].eh_proj.weight.data[:, : CFG.hidden_size] = 0
    with torch.no_grad():
        before, after = (model(tokens, drafts=True)[1][0] for tokens in (ids, changed(ids, 6)))
        same_until(before, after, 5)


def test_swapped_halves_give_other_drafts(model, ids):
    """A checkpoint read in the order of the report's equation 21 loads and drafts, wrongly."""
    weight = model.mtp[0].eh_proj.weight.data
    with torch.no_grad():
        before = model(ids, drafts=True)[1][0]
        weight.copy_(weight.roll(CFG.hidden_size, dims=1))
        after = model(ids, drafts=True)[1][0]
    assert (after - before).abs().mean() > 0.1 * before.abs().mean()


def test_a_module_reads_what_the_head_reads_after_the_final_norm(model, ids):
    with torch.no_grad():
        hidden = model.model(ids)
        torch.testing.assert_close(model.lm_head(hidden), model(ids), rtol=0, atol=0)
        _, drafts = model(ids, drafts=True)
        first, logits = model.draft(hidden[:, :-1], ids[:, 1:], module=0)
        assert torch.equal(logits, drafts[0])
        _, logits = model.draft(first[:, :-1], ids[:, 2:], module=1)
        assert torch.equal(logits, drafts[1])
        assert torch.equal(model.lm_head(first), drafts[0])  # the second reads a normed hidden too


def test_a_module_has_no_embedding_and_no_head_of_its_own(model):
    names = {name for name, _ in model.mtp[0].named_parameters()}
    assert not any("embed_tokens" in name or "shared_head.head" in name for name in names)
    extra = names - {name for name, _ in model.model.layers[1].named_parameters()}
    assert extra == {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}


def losses(model, ids):
    """The main model's loss, and that of each module: what it guesses is its position + 2 + k."""
    logits, drafts = model(ids, drafts=True)
    found = [F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())]
    for k, draft in enumerate(drafts):
        found.append(F.cross_entropy(draft[:, :-1].flatten(0, 1), ids[:, k + 2 :].flatten()))
    return found


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_the_shared_embedding_and_head_get_the_gradients_of_all_losses_added(model, ids):
    each = [gradients(model, losses(model, ids)[i]) for i in range(3)]
    total = gradients(model, sum(losses(model, ids)))
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert all(part[name].abs().max() > 0 for part in each)
        added = sum(part[name] for part in each)
        torch.testing.assert_close(total[name], added, rtol=1e-9, atol=1e-12)


def test_a_draft_loss_trains_the_main_model_under_it_and_the_main_loss_no_module(model, ids):
    main, first, second = (gradients(model, losses(model, ids)[i]) for i in range(3))
    assert not any(name.startswith(("model.layers.2.", "model.layers.3.")) for name in main)
    assert "model.layers.0.self_attn.o_proj.weight" in first
    assert "model.layers.2.eh_proj.weight" in second  # the second module stands on the first
    assert not any(name.startswith("model.layers.3.") for name in first)


def test_drafts_of_one_token_at_a_time_with_a_cache_are_those_of_one_pass(model, ids):
    caches = model.caches(2, 13)
    with torch.no_grad():
        _, (whole, _) = model(ids, drafts=True)
        hidden = model.model(ids)
        steps = [
            model.draft(hidden[:, [i]], ids[:, [i + 1]], module=0, cache=caches[2])[1]
            for i in range(12)
        ]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-11)


def transformers_module():
    """transformers and its MtpModel, whose modules could not be run one by one before 5.23."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(getattr(layers, "MtpModel", None), "forward_layer"):
        pytest.skip(f"transformers {transformers.__version__} has no MtpModel.forward_layer")
    return transformers, layers.MtpModel


def theirs_beside(ours, modules):
    """transformers' main model and its module with our weights, mapped by name."""
    transformers, MtpModel = transformers_module()
    config = transformers.DeepseekV3Config(**ours.cfg.to_dict())
    config._attn_implementation = config._experts_implementation = "eager"
    main = transformers.DeepseekV3ForCausalLM(config).eval()
    mtp = MtpModel(main, modules).eval()
    depth, state = ours.cfg.num_hidden_layers, ours.state_dict()
    main.load_state_dict({n: t for n, t in state.items() if n in main.state_dict()}, strict=True)
    own = {}
    for name, tensor in state.items():
        found = name.removeprefix("model.layers.").split(".", 1)
        if name.startswith("model.layers.") and int(found[0]) >= depth:
            own[f"layers.{int(found[0]) - depth}.{their_name(found[1])}"] = tensor
    missing, unexpected = mtp.load_state_dict(own, strict=False)
    assert not unexpected
    assert all(name.startswith(("embed_tokens", "shared_head")) for name in missing)
    return main, mtp


def their_name(name):
    if name.startswith("shared_head.norm"):
        return name.replace("shared_head.norm", "post_norm")
    return name if name.startswith(("enorm", "hnorm", "eh_proj")) else f"mtp_block.{name}"


def their_drafts(main, mtp, ids):
    """Logits of each module over all of ids; positions count from the module's own token."""
    hidden, logits = main.model(ids).last_hidden_state, []
    for k in range(mtp.num_mtp_layers):
        tokens = ids[:, k + 1 :]
        positions = torch.arange(k + 1, ids.shape[1])[None]
        hidden = mtp.forward_layer(k, hidden[:, :-1], positions, None, input_ids=tokens)
        logits.append(mtp.shared_head(hidden))
    return logits


def test_drafts_and_every_gradient_are_those_of_transformers_module(ids):
    ours = made(dtype=torch.float32)
    main, mtp = theirs_beside(ours, 2)
    _, drafts = ours(ids, drafts=True)
    expected = their_drafts(main, mtp, ids)
    for mine, wanted in zip(drafts, expected, strict=True):
        close(mine, wanted, "drafts")
    for logits in (drafts, expected):
        sum(
            (one * torch.linspace(-1, 1, one.numel()).view_as(one)).sum() for one in logits
        ).backward()
    theirs = {f"main.{n}": p for n, p in main.named_parameters()}
    theirs |= {f"mtp.{n}": p for n, p in mtp.named_parameters()}
    for name, parameter in ours.named_parameters():
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        module = name.startswith("model.layers.") and int(layer) >= 2
        other = f"mtp.layers.{int(layer) - 2}.{their_name(rest)}" if module else f"main.{name}"
        close(parameter.grad, theirs[other].grad, name)


def close(mine, theirs, what):
    assert (mine - theirs).abs().max() <= 2e-5 * theirs.abs().max(), what
    assert theirs.abs().max() > 0, what


def test_transformers_loads_our_module_from_disk_and_drafts_as_we_do(tmp_path, ids):
    """Its loader knows the module at layer 61 alone, where DeepSeek-V3 has it: 61 small layers."""
    transformers, MtpModel = transformers_module()
    deep = {"num_hidden_layers": 61, "first_k_dense_replace": 60, "num_nextn_predict_layers": 1}
    ours = made(replace(CFG, **deep), dtype=torch.float32)
    ours.save_pretrained(tmp_path)
    main = transformers.DeepseekV3ForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    mtp = MtpModel.from_pretrained(main)
    with torch.no_grad():
        logits, (draft,) = ours(ids, drafts=True)
        close(logits, main(ids).logits, "logits")
        close(draft, their_drafts(main, mtp, ids)[0], "draft")
