"""Heads and features over ranks: loss and every gradient are one process's, and so is decoding."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dsv3_tutorial.attention.cache import FullCache, LatentCache
from dsv3_tutorial.attention.mha import Attention
from dsv3_tutorial.attention.mla import MLA
from dsv3_tutorial.block import Block
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.mlp import MLP
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.parallel import traffic
from dsv3_tutorial.parallel.launch import launch
from dsv3_tutorial.parallel.tensor import local_config, tensor_parallel
from dsv3_tutorial.parallel.tensor_exchange import ShareError

D, Q, C, R, WIDTH = 32, 12, 16, 4, 24
FRAME = {
    "vocab_size": 64,
    "hidden_size": D,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
LATENT = {
    **FRAME,
    "model_type": "deepseek_v3",
    "q_lora_rank": Q,
    "kv_lora_rank": C,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": R,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 8,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 1,
    "attention_bias": True,
}
GROUPED = {**FRAME, "model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True}
MLA_CFG, GQA_CFG = ModelConfig.from_dict(LATENT), ModelConfig.from_dict(GROUPED)
NO_Q = ModelConfig.from_dict({**LATENT, "q_lora_rank": None})
LLAMA = ModelConfig.from_dict({**GROUPED, "model_type": "llama", "attention_bias": True})
LAYERS = {
    "mlp": lambda: MLP(D, WIDTH),
    "mla": lambda: MLA(MLA_CFG),
    "mla absorbed": lambda: MLA(MLA_CFG, absorb=True),
    "mla rebuilt": lambda: MLA(NO_Q, absorb=False),
    "gqa": lambda: Attention(GQA_CFG),
    "gqa with biases": lambda: Attention(LLAMA),
    "dense block": lambda: Block(MLA_CFG, 0),
    "moe block": lambda: Block(MLA_CFG, 1),
    "gqa block": lambda: Block(GQA_CFG, 0),
}
MODELS = {"deepseek": MLA_CFG, "qwen": GQA_CFG}
TOKENS = 8
SHAPES = {"tp 2": (2, 2), "tp 4": (1, 4)}  # of the mesh (dp, tp) of four ranks


def made(build):
    torch.manual_seed(1)
    layer = build().double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.3)
    return layer


def own_tokens(x, mesh):
    return x.chunk(mesh.size(), 1)[mesh.get_local_rank()]


@torch.no_grad()
def worst(pairs):
    """The largest difference, relative to the largest number beside it."""
    return max(((a - b).abs().max() / (b.abs().max() + 1e-30)).item() for a, b in pairs)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(layer):
    return {name: whole(p.grad) for name, p in layer.named_parameters()}


def layer_error(name, mesh, sequence):
    """How far output, input gradient and every parameter's gradient are from one process's."""
    one = made(LAYERS[name])
    shared = tensor_parallel(copy.deepcopy(one), mesh, sequence)
    x = torch.randn(2, TOKENS, D, dtype=torch.float64)
    weight = torch.randn(2, TOKENS, D, dtype=torch.float64)
    mine = own_tokens if sequence else (lambda t, _: t)
    here = mine(x, mesh).clone().requires_grad_()
    there = x.clone().requires_grad_()
    (mine(weight, mesh) * shared(here)).sum().backward()
    expected = one(there)
    (weight * expected).sum().backward()
    pairs = [(shared(here), mine(expected, mesh)), (here.grad, mine(there.grad, mesh))]
    found, wanted = gradients(shared), gradients(one)
    assert found.keys() == wanted.keys() == shared.state_dict().keys() - buffers(shared)
    return worst([*pairs, *((found[key], wanted[key]) for key in wanted)])


def buffers(layer):
    return {name for name, _ in layer.named_buffers()}


def tokens():
    torch.manual_seed(2)
    return torch.randint(0, 64, (2, TOKENS + 1))


def loss_of(model, ids):
    """Next tokens and, where there are MTP modules, the ones after them."""
    logits, drafts = model(ids[:, :-1], drafts=True)
    each = [(logits, ids[:, 1:]), *((d, ids[:, k + 2 :]) for k, d in enumerate(drafts))]
    return sum(F.cross_entropy(given.flatten(0, 1), wanted.flatten()) for given, wanted in each)


def model_error(name, mesh, sequence):
    one = made(lambda: DeepSeekV3(MODELS[name]))
    shared = tensor_parallel(copy.deepcopy(one), mesh, sequence)
    losses = [loss_of(model, tokens()) for model in (shared, one)]
    for loss in losses:
        loss.backward()
    found, wanted = gradients(shared), gradients(one)
    kept = {key: whole(value) for key, value in shared.state_dict().items()}
    assert all(torch.equal(kept[key], value) for key, value in one.state_dict().items())
    assert kept.keys() == one.state_dict().keys()
    return worst([losses, *((found[key], wanted[key]) for key in wanted)])


def decoded(name, mesh):
    """Errors of a prefill and of two steps, and the bytes of one layer's cache here and whole."""
    one = made(lambda: DeepSeekV3(MODELS[name]))
    shared = tensor_parallel(copy.deepcopy(one), mesh)
    ids, pairs = tokens(), []
    here, there = (model.caches(2, 16) for model in (shared, one))
    with torch.inference_mode():
        for part in (ids[:, :6], ids[:, 6:7], ids[:, 7:9]):
            pairs.append((shared(part, caches=here), one(part, caches=there)))
    parts = here[0].parts
    latent = isinstance(here[0], LatentCache)
    same = latent and all(torch.allclose(a, b) for a, b in zip(parts, there[0].parts))
    return worst(pairs), here[0].nbytes, there[0].nbytes, same


def decoded_in_full(mesh):
    """MLA over a cache of expanded heads: those of a rank are its own."""
    one = made(lambda: MLA(MLA_CFG))
    shared = tensor_parallel(copy.deepcopy(one), mesh)
    x = torch.randn(2, 5, D, dtype=torch.float64)
    sizes = {"batch": 2, "capacity": 8, "dtype": torch.float64}
    caches = [FullCache.for_config(layer.cfg, **sizes) for layer in (shared, one)]
    with torch.no_grad():
        pairs = [
            tuple(layer(part, cache) for layer, cache in zip((shared, one), caches))
            for part in (x[:, :4], x[:, 4:])
        ]
    return worst(pairs), caches[0].nbytes, caches[1].nbytes


def sent(name, mesh, sequence):
    """Collectives of a layer's forward and backward, as (kind, numbers)."""
    shared = tensor_parallel(made(LAYERS[name]), mesh, sequence)
    x = torch.randn(1, TOKENS, D, dtype=torch.float64).requires_grad_()
    here = own_tokens(x, mesh) if sequence else x
    with traffic.record() as forward:
        y = shared(here)
    with traffic.record() as backward:
        y.sum().backward()
    return [[(c.kind, c.n // 8) for c in seen.calls] for seen in (forward, backward)], forward.flops


def with_fsdp(root):
    """Heads over tp and everything over dp: two steps of AdamW, against one process on all rows."""
    one = made(lambda: DeepSeekV3(MLA_CFG))
    both = tensor_parallel(copy.deepcopy(one), root["tp"])
    for block in both.model.layers:
        fully_shard(block, mesh=root["dp"])
    fully_shard(both, mesh=root["dp"])
    torch.manual_seed(3)
    rows = torch.randint(0, 64, (4, TOKENS + 1))
    mine = rows.chunk(root["dp"].size())[root["dp"].get_local_rank()]
    pairs = []
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=False) for m in (both, one)]
    for _ in range(2):
        losses = [loss_of(both, mine), loss_of(one, rows)]
        for loss, optimizer in zip(losses, optimizers):
            optimizer.zero_grad()
            loss.backward()
        mean = losses[0].detach().clone()
        dist.all_reduce(mean, group=root["dp"].get_group())
        pairs.append((mean / root["dp"].size(), losses[1].detach()))
        found, wanted = gradients(both), gradients(one)
        pairs += [(found[key], wanted[key]) for key in wanted]
        for optimizer in optimizers:
            optimizer.step()
    weights = dict(one.named_parameters())
    return worst([*pairs, *((whole(p), weights[key]) for key, p in both.named_parameters())])


def refused(root):
    """What is said of sizes that do not divide, and that nothing was changed."""
    cfg = ModelConfig.from_dict({**LATENT, "num_attention_heads": 6, "num_key_value_heads": 6})
    model = DeepSeekV3(cfg)
    said = []
    for module, mesh in ((model, root["tp"]), (MLP(8, 10), root["tp"]), (MLP(8, 12), root)):
        try:
            tensor_parallel(module, mesh)
        except ShareError as error:
            said.append(str(error))
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    model = tensor_parallel(DeepSeekV3(MLA_CFG), root["tp"], sequence=True)
    for again in (lambda: model(tokens()[:, :7]), lambda: tensor_parallel(model, root["tp"])):
        try:
            again()
        except ShareError as error:
            said.append(str(error))
    return said


def everything():
    """All cases in one launch of four ranks."""
    roots = {
        name: init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        for name, shape in SHAPES.items()
    }
    found = {}
    for tp, root in roots.items():
        mesh = root["tp"]
        for sequence in (False, True):
            for name in LAYERS:
                found[tp, name, sequence] = layer_error(name, mesh, sequence)
            for name in MODELS:
                found[tp, name, sequence] = model_error(name, mesh, sequence)
            for name in ("mlp", "mla", "gqa"):
                found[tp, "sent", name, sequence] = sent(name, mesh, sequence)
        for name in MODELS:
            found[tp, "decoded", name] = decoded(name, mesh)
        found[tp, "full"] = decoded_in_full(mesh)
        found[tp, "fsdp"] = with_fsdp(root)
    found["refused"] = refused(roots["tp 4"])
    return found


@pytest.fixture(scope="module")
def found():
    """One dictionary a rank."""
    return launch(everything, 4, timeout=120)


CASES = [(tp, name, s) for tp in SHAPES for s in (False, True) for name in (*LAYERS, *MODELS)]


@pytest.mark.parametrize(("tp", "name", "sequence"), CASES)
def test_results_and_every_gradient_are_one_processs(found, tp, name, sequence):
    assert max(each[tp, name, sequence] for each in found) < 1e-10


@pytest.mark.parametrize("tp", SHAPES)
def test_fsdp_over_the_other_dimension_trains_as_one_process(found, tp):
    assert max(each[tp, "fsdp"] for each in found) < 1e-10


@pytest.mark.parametrize("tp", SHAPES)
def test_a_layer_has_one_all_reduce_forward_and_one_backward(found, tp):
    whole = TOKENS * D
    for name in ("mlp", "gqa"):
        calls = found[0][tp, "sent", name, False][0]
        assert calls[0] == [("all_reduce", whole)]
        assert calls[1][-1] == ("all_reduce", whole)
        kv_heads_ran_out = (tp, name) == ("tp 4", "gqa")
        assert len(calls[1]) == 1 + 4 * kv_heads_ran_out  # k's and v's weights and biases


@pytest.mark.parametrize("tp", SHAPES)
def test_mla_meets_behind_its_latents_in_backward(found, tp):
    calls = found[0][tp, "sent", "mla", False][0]
    assert calls[0] == [("all_reduce", TOKENS * D)]
    assert sorted(calls[1]) == [("all_reduce", TOKENS * Q), ("all_reduce", TOKENS * (C + R))]


@pytest.mark.parametrize("tp", SHAPES)
def test_by_tokens_a_gather_and_a_scatter_stand_for_the_all_reduce(found, tp):
    calls = found[0][tp, "sent", "mlp", True][0]
    assert calls[0] == [("all_gather", TOKENS * D), ("reduce_scatter", TOKENS * D)]
    assert calls[1] == calls[0]


def test_a_ranks_products_are_its_share(found):
    """An MLP's all, counted on real ranks; of MLA the down projections stay whole."""
    mlp = 6 * TOKENS * D * WIDTH
    down = 2 * TOKENS * D * (Q + C + R)
    flops = {tp: {n: found[0][tp, "sent", n, False][1] for n in ("mlp", "mla")} for tp in SHAPES}
    assert flops["tp 2"]["mlp"] == mlp // 2 and flops["tp 4"]["mlp"] == mlp // 4
    assert flops["tp 2"]["mla"] - down == 2 * (flops["tp 4"]["mla"] - down)


@pytest.mark.parametrize("tp", SHAPES)
def test_decoding_is_one_processs_and_the_latent_cache_does_not_shrink(found, tp):
    for each in found:
        error, here, there, same = each[tp, "decoded", "deepseek"]
        assert error < 1e-10 and here == there and same


@pytest.mark.parametrize("tp", SHAPES)
def test_the_cache_of_grouped_heads_shrinks_until_they_run_out(found, tp):
    for each in found:
        error, here, there, _ = each[tp, "decoded", "qwen"]
        assert error < 1e-10 and here == there // 2  # two key-value heads: no further at four


@pytest.mark.parametrize("tp", SHAPES)
def test_expanded_heads_are_cached_where_they_are_made(found, tp):
    for each in found:
        error, here, there = each[tp, "full"]
        assert error < 1e-10 and here == there // SHAPES[tp][1]


def test_sizes_that_do_not_divide_are_all_named_before_anything_changes(found):
    model, mlp, mesh, odd, twice = found[0]["refused"]
    assert "6 heads" in model and "4 ranks" in model
    assert "10 features of the MLP" in mlp
    assert "2 dimensions ('dp', 'tp')" in mesh
    assert "7 tokens cannot be shared by 4 ranks" in odd
    assert "is shared over ranks already" in twice and "divides" not in twice


def test_a_local_config_keeps_the_width_of_a_head():
    here = local_config(GQA_CFG, 4)
    assert (here.num_attention_heads, here.kv_heads, here.head_size) == (1, 1, GQA_CFG.head_size)
    assert here.softmax_scale == GQA_CFG.softmax_scale
    latent = local_config(MLA_CFG, 2)
    assert latent.kv_heads == latent.num_attention_heads == 2
    assert latent.softmax_scale == MLA_CFG.softmax_scale
