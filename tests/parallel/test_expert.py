"""Experts spread over ranks do what one process does: every output, every gradient, every byte."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dsv3_tutorial.fp8_model import Fp8Experts, fp8_weights, to_fp8
from dsv3_tutorial.moe.experts import Experts, experts_loop
from dsv3_tutorial.parallel.expert import expert_parallel
from dsv3_tutorial.parallel.launch import RankFailed, launch

E, D, F = 16, 8, 6
WAYS = [("flat", None), ("deduplicated", None), ("two_stage", 1), ("two_stage", 2)]
LOADS = ["uneven", "a rank without tokens", "few experts", "one expert", "only the last rank"]


def experts(dtype=torch.float64, **sizes):
    size = {"n_experts": E, "hidden_size": D, "width": F} | sizes
    made = Experts(**size)
    draw = torch.Generator().manual_seed(3)
    for p in made.parameters():
        p.data = torch.randn(p.shape, generator=draw, dtype=dtype)
    return made


class Layer(torch.nn.Module):
    """Something that has experts."""

    def __init__(self, own):
        super().__init__()
        self.experts = own


def tokens(load, world, seed=7, dtype=torch.float64, width=D):
    """Each rank's x, indices, weights and the gradient that its output gets."""
    draw = torch.Generator().manual_seed(seed)
    sizes = [(5 * r + 3) % 7 + 1 for r in range(world)]
    if load == "a rank without tokens":
        sizes[world // 2] = 0
    if load == "only the last rank":
        sizes = [0] * (world - 1) + [4]
    k, pool = {"few experts": (3, [1, 2, 9, 15]), "one expert": (1, [5])}.get(load, (3, range(E)))
    pool = torch.tensor(list(pool))
    made = []
    for m in sizes:
        order = torch.rand(m, len(pool), generator=draw).argsort(dim=1)[:, :k]
        x = torch.randn(m, width, generator=draw, dtype=dtype)
        weights = torch.rand(m, k, generator=draw, dtype=dtype)
        made.append((x, pool[order], weights, torch.randn(m, width, generator=draw, dtype=dtype)))
    return made


def together(parts):
    x, indices, weights, given = (torch.cat(part) for part in zip(*parts))
    return x.requires_grad_(), indices, weights.requires_grad_(), given


def distance(a, b):
    return (a - b).abs().max().item() if a.numel() else 0.0


def one_case(load, way, per_node):
    """The largest difference from one process, in the output and each gradient."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parts = tokens(load, world)
    x, indices, weights, given = together(parts)
    whole = experts()
    out = experts_loop(x, indices, weights, whole.gate_up_proj, whole.down_proj)
    (out * given).sum().backward()
    begin = sum(len(p[0]) for p in parts[:rank])
    mine = slice(begin, begin + len(parts[rank][0]))

    layer = expert_parallel(Layer(experts()), dispatch=way, ranks_per_node=per_node)
    own_x, own_indices, own_weights, own_given = together(parts[rank : rank + 1])
    own = layer.experts(own_x, own_indices, own_weights)
    (own * own_given).sum().backward()
    held = slice(rank * E // world, (rank + 1) * E // world)
    return {
        "output": distance(own, out[mine]),
        "x": distance(own_x.grad, x.grad[mine]),
        "weights": distance(own_weights.grad, weights.grad[mine]),
        "gate_up": distance(
            layer.experts.gate_up_proj.grad.to_local(), whole.gate_up_proj.grad[held]
        ),
        "down": distance(layer.experts.down_proj.grad.to_local(), whole.down_proj.grad[held]),
    }


def all_cases(cases):
    return {case: one_case(*case) for case in cases}


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_output_and_every_gradient_equal_one_process(world):
    ways = [(way, n) for way, n in WAYS if not n or world % n == 0]
    cases = [(load, *way) for load in LOADS for way in ways]
    for found in launch(all_cases, world, cases):
        for case, errors in found.items():
            assert max(errors.values()) < 1e-10, (case, errors)


# kinds of experts, dtypes, and what is refused


def fp8_experts_case(load, way, per_node):
    """Experts that compute in FP8, spread: each sees the same rows in the same order."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parts = tokens(load, world, dtype=torch.float32, width=32)
    whole = Fp8Experts(experts(torch.float32, hidden_size=32, width=32))
    x, indices, weights, given = together(parts)
    out = whole(x, indices, weights)
    (out * given).sum().backward()
    begin = sum(len(p[0]) for p in parts[:rank])
    mine = slice(begin, begin + len(parts[rank][0]))
    held = slice(rank * E // world, (rank + 1) * E // world)
    layer = Layer(Fp8Experts(experts(torch.float32, hidden_size=32, width=32)))
    names = fp8_weights(layer)
    expert_parallel(layer, dispatch=way, ranks_per_node=per_node)
    own_x, own_indices, own_weights, own_given = together(parts[rank : rank + 1])
    own = layer.experts(own_x, own_indices, own_weights)
    (own * own_given).sum().backward()
    pairs = [(own, out[mine]), (own_x.grad, x.grad[mine]), (own_weights.grad, weights.grad[mine])]
    grads = [
        (p.grad.to_local(), q.grad[held]) for p, q in zip(layer.parameters(), whole.parameters())
    ]
    return {
        "error": max(
            distance(a, b) / b.abs().max().clamp(min=1e-9).item() if b.numel() else 0.0
            for a, b in [*pairs, *grads]
        ),
        "kind": isinstance(layer.experts, Fp8Experts) and fp8_weights(layer) == names,
    }


def autocast_case(way, load):
    """Under autocast the rows are BF16 on every rank, also where none arrive."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parts = tokens(load, world, dtype=torch.float32)
    whole = experts(torch.float32)
    layer = expert_parallel(Layer(experts(torch.float32)), dispatch=way)
    x, indices, weights, given = together(parts[rank : rank + 1])
    with torch.autocast("cpu", torch.bfloat16):
        out = layer.experts(x, indices, weights)
        wanted = whole(x, indices, weights)
    (out * given).sum().backward()
    error = distance(out, wanted) / max(1e-9, distance(wanted, 0 * wanted))
    return out.dtype == wanted.dtype, error, x.grad.dtype


def frozen_case():
    """Experts that take no gradient still hand one to their tokens."""
    rank = dist.get_rank()
    own = experts().requires_grad_(False)
    layer = expert_parallel(Layer(own))
    x, indices, weights, given = together(tokens("one expert", 4)[rank : rank + 1])
    (layer.experts(x, indices, weights) * given).sum().backward()
    alone = x.detach().clone().requires_grad_()
    (own(alone, indices, weights.detach()) * given).sum().backward()
    quiet = all(p.grad is None and not p.requires_grad for p in layer.parameters())
    return quiet, distance(x.grad, alone.grad)


def subgroup_case():
    """Two groups of four ranks, each with nodes of two: other ranks' tokens are not mine."""
    mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("outer", "ep"))
    rank, place = dist.get_rank(), mesh["ep"].get_local_rank()
    parts = tokens("uneven", 8)
    layer = expert_parallel(Layer(experts()), mesh["ep"], "two_stage", 2, gradients="mean")
    x, indices, weights, given = together(parts[rank : rank + 1])
    out = layer.experts(x, indices, weights)
    (out * given).sum().backward()
    whole, group = experts(), rank // 4
    ax, ai, aw, ag = together(parts[4 * group : 4 * group + 4])
    wanted = whole(ax, ai, aw)
    (wanted * ag).sum().backward()
    begin = sum(len(p[0]) for p in parts[4 * group : rank])
    held = slice(place * E // 4, (place + 1) * E // 4)
    return (
        distance(out, wanted[begin : begin + len(x)]),
        distance(layer.experts.down_proj.grad.to_local(), whole.down_proj.grad[held] / 4),
    )


def refusals():
    """What expert_parallel says to what cannot be."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "ep"))
    spread = expert_parallel(Layer(experts()))
    sharded = Layer(experts())
    fully_shard(sharded, mesh=mesh["ep"])
    wrong = [
        (Layer(torch.nn.Linear(2, 2)), {}),
        (spread, {}),
        (sharded, {}),
        (Layer(experts(n_experts=6)), {"dispatch": "twice", "gradients": "median"}),
        (Layer(experts()), {"dispatch": "two_stage"}),
        (Layer(experts()), {"dispatch": "two_stage", "ranks_per_node": 3}),
        (Layer(experts()), {"over": mesh}),
    ]
    said = []
    for module, options in wrong:
        with pytest.raises(ValueError) as caught:
            expert_parallel(module, **options)
        said.append(str(caught.value))
    with pytest.raises(TypeError, match="Call to_fp8 first") as caught:
        to_fp8(spread)
    return said


def other_facts():
    ways = [*WAYS[:2], ("two_stage", 2)]
    return {
        "fp8": {(load, *way): fp8_experts_case(load, *way) for load in LOADS for way in ways},
        "autocast": [autocast_case(way, load) for way, _ in WAYS[:2] for load in LOADS],
        "frozen": frozen_case(),
        "refused": refusals(),
    }


@pytest.fixture(scope="module")
def others():
    return launch(other_facts, 4, timeout=120)


def test_experts_in_fp8_are_spread_too_and_see_the_rows_in_the_same_order(others):
    for found in others:
        for case, facts in found["fp8"].items():
            assert facts["error"] < 1e-5 and facts["kind"], (case, facts)


def test_autocast_narrows_rows_on_every_rank(others):
    for found in others:
        for same_dtype, error, gradient in found["autocast"]:
            assert same_dtype and error < 0.02 and gradient == torch.float32


def test_frozen_experts_pass_gradients_on(others):
    for found in others:
        quiet, error = found["frozen"]
        assert quiet and error < 1e-12


def test_groups_inside_a_world_keep_to_themselves_and_the_mean_is_over_the_group():
    assert max(max(errors) for errors in launch(subgroup_case, 8)) < 1e-12


def test_everything_that_does_not_fit_is_said(others):
    nothing, spread, sharded, several, no_nodes, odd_nodes, grid = others[0]["refused"]
    assert "there are no experts in this module" in nothing
    assert "spread already" in spread and "FSDP comes after this" in sharded
    assert "'twice' is none of flat, deduplicated, two_stage" in several
    assert "'median' is none of sum, mean" in several and "4 ranks do not divide 6" in several
    assert "ranks_per_node=None" in no_nodes and "ranks_per_node=3" in odd_nodes
    assert "the mesh has 2 dimensions" in grid


def test_a_rank_that_fails_ends_the_others_that_wait_for_its_tokens():
    def one_fails():
        layer = expert_parallel(Layer(experts()))
        x, indices, weights, _ = together(tokens("uneven", 2)[:1])
        if dist.get_rank() == 1:
            raise ValueError("no tokens from me")
        layer.experts(x, indices, weights)

    with pytest.raises(RankFailed, match="no tokens from me") as caught:
        launch(one_fails, 2, timeout=30)
    assert caught.value.rank == 1
