"""The whole model in FP8: what changes, what stays, and that the names and weights are the same."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.fp8.linear import Fp8Linear
from dsv3_tutorial.fp8_model import Fp8Experts, Fp8MLP, fp8_weights, to_fp8
from dsv3_tutorial.mlp import MLP
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.moe.experts import Experts
from dsv3_tutorial.moe.gate import Gate
from dsv3_tutorial.train.precision import give_gradients, recompute_blocks, take_weights, worker_for

CFG = replace(ModelConfig.named("small"), num_hidden_layers=2, vocab_size=64)


def model(cfg: ModelConfig = CFG) -> DeepSeekV3:
    torch.manual_seed(0)
    return DeepSeekV3(cfg)


def ids() -> torch.Tensor:
    return torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))


def test_attention_and_feed_forward_change_and_nothing_else_does():
    made = to_fp8(model())
    kinds = {name: type(m) for name, m in made.named_modules()}
    layer = "model.layers.1"
    assert kinds[f"{layer}.mlp.experts"] is Fp8Experts
    assert kinds[f"{layer}.mlp.shared_experts"] is Fp8MLP and kinds["model.layers.0.mlp"] is Fp8MLP
    for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
        assert kinds[f"{layer}.self_attn.{name}"] is Fp8Linear
    assert kinds["lm_head"] is nn.Linear and kinds["model.layers.2.eh_proj"] is nn.Linear
    assert kinds[f"{layer}.mlp.gate"] is Gate and kinds["model.embed_tokens"] is nn.Embedding
    assert made.model.layers[1].self_attn.o_proj.cache == "e5m6"
    assert made.model.layers[1].self_attn.q_b_proj.cache == "e4m3"


def test_parameters_keep_their_names_order_and_identity():
    before = model()
    wanted = [(name, id(p)) for name, p in before.named_parameters()]
    after = to_fp8(before)
    assert [(name, id(p)) for name, p in after.named_parameters()] == wanted
    high = {"embed_tokens", "lm_head", "norm", "gate.weight", "layernorm", "eh_proj"}
    named = fp8_weights(after)
    assert {name for name, _ in wanted} - named == {
        name for name, _ in wanted if any(part in name for part in high)
    }


def test_a_dense_model_without_latents_is_converted_too():
    cfg = ModelConfig.named("qwen2.5-72b")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    cfg = replace(cfg, **sizes, **heads)
    made = to_fp8(model(cfg))
    assert type(made.model.layers[0].self_attn.k_proj) is Fp8Linear
    assert made(ids()).isfinite().all()


def test_the_result_is_as_near_float32_s_as_its_roundings_let_it():
    """Every product is off by some 4 %: after two layers and a draft, by a few such."""
    with torch.no_grad():
        wanted, found = model()(ids()), to_fp8(model())(ids())
    assert 0.01 < ((found - wanted).norm() / wanted.norm()).item() < 0.2


def test_experts_agree_with_the_float32_loop_and_idle_ones_get_no_gradient():
    torch.manual_seed(0)
    plain = Experts(6, 64, 32)
    for p in plain.parameters():
        nn.init.normal_(p, std=0.1)
    eight = Fp8Experts(plain)
    x = torch.randn(40, 64, requires_grad=True)
    indices = torch.randint(0, 4, (40, 2))  # experts 4 and 5 are idle
    weights = torch.rand(40, 2)
    wanted, found = plain(x, indices, weights), eight(x, indices, weights)
    assert ((found - wanted).norm() / wanted.norm()).item() < 0.07
    grads = torch.autograd.grad(found.square().sum(), (x, *eight.parameters()))
    exact = torch.autograd.grad(wanted.square().sum(), (x, *plain.parameters()))
    for a, b in zip(grads, exact):
        assert ((a - b).norm() / b.norm()).item() < 0.15
    assert (grads[1][4:] == 0).all() and (grads[2][4:] == 0).all()
    nobody = eight(x[:0], indices[:0], weights[:0])
    assert nobody.shape == (0, 64)


def test_recomputing_a_block_changes_no_gradient():
    gradients = []
    for again in (False, True):
        master = model()
        worker = worker_for(master, "fp8")
        if again:
            recompute_blocks(worker)
        worker(ids()).float().square().mean().backward()
        give_gradients(worker, master)
        gradients.append([p.grad.clone() for p in master.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_workers_share_the_masters_that_fp8_reads_and_copy_the_rest():
    master = model()
    worker = worker_for(master, "fp8")
    shared = fp8_weights(worker)
    for name, own in worker.named_parameters():
        assert (own is master.get_parameter(name)) == (name in shared)
        assert own.dtype == (torch.float32 if name in shared else torch.bfloat16)
    alone = worker_for(master, "fp8", share=False)
    assert all(p.dtype == torch.bfloat16 for p in alone.parameters())
    with torch.no_grad():
        master.model.norm.weight.fill_(3.0)
    take_weights(worker, master)
    assert (worker.model.norm.weight == 3.0).all()


def test_gradients_of_two_micro_batches_add_up_in_float32():
    master = model()
    worker = worker_for(master, "fp8")
    parts = []
    for part in ids().chunk(2):
        worker(part).float().square().mean().backward()
        give_gradients(worker, master)
        parts.append(
            {n: p.grad.clone() for n, p in master.named_parameters() if p.grad is not None}
        )
    name = "model.layers.0.self_attn.o_proj.weight"
    assert parts[1][name].dtype == torch.float32
    assert not torch.equal(parts[1][name], parts[0][name])
    assert (parts[1][name].bfloat16().float() != parts[1][name]).any()


@pytest.mark.parametrize("kind", [MLP, Fp8MLP])
def test_a_feed_forward_by_itself_runs_in_either(kind):
    torch.manual_seed(0)
    mlp = MLP(32, 48)
    made = mlp if kind is MLP else Fp8MLP(mlp)
    x = torch.randn(3, 5, 32)
    assert ((made(x) - mlp(x)).norm() / mlp(x).norm()).item() < 0.08
