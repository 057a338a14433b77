"""A whole model with its experts spread: gradients, counts, checkpoints, FSDP2 and decoding."""

import copy
import tempfile
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.moe.balance import watch
from dsv3_tutorial.parallel.expert import ParallelExperts, expert_parallel
from dsv3_tutorial.parallel.launch import launch
from dsv3_tutorial.train.precision import recompute_blocks

# whole models

CFG = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 0,
}


KINDS = ("down_proj", "gate_up_proj")


def distance(a, b):
    return (a - b).abs().max().item() if a.numel() else 0.0


def model(dtype=torch.float64):
    torch.manual_seed(5)
    return DeepSeekV3(replace(ModelConfig.named("tiny"), **CFG)).to(dtype)


def loss_of(net, ids):
    return torch.nn.functional.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def batch():
    return torch.randint(0, 64, (8, 9), generator=torch.Generator().manual_seed(2))


def whole_gradients(ids):
    net = model()
    loss_of(net, ids).backward()
    return {name: p.grad for name, p in net.named_parameters()}


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain_model_facts():
    """Data parallel by hand around spread experts, with the mean left to this function."""
    rank, world = dist.get_rank(), dist.get_world_size()
    wanted, ids = whole_gradients(batch()), batch()
    net = expert_parallel(model(), dispatch="two_stage", ranks_per_node=2)
    recompute_blocks(net)  # all collectives of forward run again in backward
    with watch(net) as seen:
        loss_of(net, ids.chunk(world)[rank]).backward()
    counts = seen.counts()
    dist.all_reduce(counts)
    with watch(whole := model()) as seen_whole:
        whole(ids[:, :-1])
    errors = {}
    for name, p in net.named_parameters():
        spread = isinstance(p, DTensor)
        grad = p.grad.full_tensor() if spread else p.grad
        if not spread:
            dist.all_reduce(grad)
        errors[name] = distance(grad / world, wanted[name])
    return {
        "errors": errors,
        "keys": list(net.state_dict()) == list(whole.state_dict()),
        "spread": sorted(n for n, p in net.named_parameters() if isinstance(p, DTensor)),
        "local": net.model.layers[1].mlp.experts.down_proj.to_local().shape,
        "placements": net.model.layers[1].mlp.experts.down_proj.placements == (Shard(0),),
        "counts": torch.equal(counts, seen_whole.counts()),
        "copied": distance(copy.deepcopy(net)(ids[:1]), whole(ids[:1])),
    }


@torch.no_grad()
def decode_facts():
    """Prompts of the ranks' own, then a token at a time, one rank having none to serve."""
    rank = dist.get_rank()
    whole = model()
    net = expert_parallel(model(), dispatch="deduplicated")
    ids = batch()[rank : rank + (rank != 2)]
    make = (lambda n: n.caches(len(ids), 9, torch.float64)) if len(ids) else (lambda n: None)
    caches, whole_caches = make(net), make(whole)
    found = distance(net(ids[:, :5], caches), whole(ids[:, :5], whole_caches))
    for place in range(5, 9):
        step = ids[:, place : place + 1]
        found = max(found, distance(net(step, caches), whole(step, whole_caches)))
    return found


def sharded_facts(folder):
    """Experts over ep, and over outer again by FSDP2; the rest over both."""
    rank, world = dist.get_rank(), dist.get_world_size()
    wanted, ids = whole_gradients(batch()), batch()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "ep"))
    dp = mesh["outer", "ep"]._flatten("dp")
    net = expert_parallel(model(), mesh["ep"], gradients="mean")
    for block in net.model.layers:
        if isinstance(getattr(block.mlp, "experts", None), ParallelExperts):
            fully_shard(block.mlp.experts, mesh=mesh["outer"])
        fully_shard(block, mesh=dp)
    fully_shard(net, mesh=dp)
    loss_of(net, ids.chunk(world)[rank]).backward()
    errors = {n: distance(full(p.grad), wanted[n]) for n, p in net.named_parameters()}

    before = model().state_dict()
    gathered = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))
    same = rank > 0 or all(torch.equal(gathered[name], before[name]) for name in before)
    dcp.save(get_model_state_dict(net), checkpoint_id=folder)
    other = expert_parallel(model(), dispatch="deduplicated")  # ep 4 now
    for p in other.parameters():
        p.data.zero_()
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state)
    back = {n: distance(full(t), before[n]) for n, t in other.state_dict().items()}
    return {"errors": errors, "gathered": same, "back": back}


@pytest.fixture(scope="module")
def models():
    with tempfile.TemporaryDirectory(prefix="dsv3_") as folder:
        return launch(
            lambda: (plain_model_facts(), decode_facts(), sharded_facts(folder)), 4, timeout=120
        )


def test_a_models_every_gradient_and_its_counts_equal_one_process(models):
    for found, _, _ in models:
        assert max(found["errors"].values()) < 1e-10, found["errors"]
        assert len(found["errors"]) == len(list(model().parameters()))
        assert found["counts"] and found["copied"] < 1e-12


def test_names_stay_and_each_rank_holds_its_share_of_the_experts(models):
    for found, _, _ in models:
        assert found["keys"] and found["placements"]
        assert found["local"] == (2, 16, 8)
        assert found["spread"] == [
            f"model.layers.{i}.mlp.experts.{name}" for i in (1, 2) for name in KINDS
        ]


def test_decoding_with_a_rank_that_serves_nobody_equals_one_process(models):
    assert max(error for _, error, _ in models) < 1e-12


def test_fsdp_over_the_rest_and_over_the_experts_again_gives_the_mean_of_all_ranks(models):
    for *_, found in models:
        assert max(found["errors"].values()) < 1e-10, found["errors"]
        assert len(found["errors"]) == len(list(model().parameters()))


def test_checkpoints_are_whole_and_are_read_with_another_split(models):
    for *_, found in models:
        assert found["gathered"]
        assert max(found["back"].values()) == 0.0
