"""Copies of a weight get one gradient, one update and one place in the norm, whoever holds them."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dsv3_tutorial.parallel import replicas
from dsv3_tutorial.parallel.launch import launch
from dsv3_tutorial.parallel.mesh import Layout


def parameters(sizes):
    return [nn.Parameter(torch.zeros(size)) for size in sizes]


@given(st.lists(st.integers(1, 100), max_size=30), st.integers(1, 9))
def test_owners_share_evenly_to_within_one_parameter(sizes, ranks):
    held = parameters(sizes)
    chosen = replicas.owners(held, ranks)
    loads = [sum(s for s, owner in zip(sizes, chosen) if owner == r) for r in range(ranks)]
    assert len(chosen) == len(sizes) and sum(loads) == sum(sizes)
    assert max(loads) - min(loads) <= max(sizes, default=0)


@given(st.lists(st.integers(1, 60), max_size=30))
def test_buckets_hold_every_parameter_once_in_order_and_no_more_than_they_may(sizes):
    held = parameters(sizes)
    before = replicas.BUCKET
    replicas.BUCKET = 4 * 64
    try:
        found = list(replicas.buckets(held))
    finally:
        replicas.BUCKET = before
    assert [id(p) for bucket in found for p in bucket] == [id(p) for p in held]
    assert all(sum(p.nbytes for p in b) <= 256 or len(b) == 1 for b in found)
    for one, two in itertools.pairwise(found):
        assert sum(p.nbytes for p in (*one, two[0])) > 256  # no bucket was closed too early


WHOLE = {"plain": (6, 3), "experts": (4, 2, 3), "heads": (8, 2), "norm": (5,)}


class Split(nn.Module):
    """A parameter of each kind: replicated, split over ep, split over tp, and one-dimensional."""

    def __init__(self, grid):
        super().__init__()
        from torch.distributed.tensor import Shard, distribute_tensor

        whole = values(0)
        spread = {
            "experts": grid.experts,
            "heads": grid.mesh["tp"] if grid.size("tp") > 1 else None,
        }
        for name, tensor in whole.items():
            mesh = spread.get(name)
            tensor = tensor if mesh is None else distribute_tensor(tensor, mesh, [Shard(0)])
            self.register_parameter(name, nn.Parameter(tensor))


def values(seed):
    draw = torch.Generator().manual_seed(seed)
    drawn = {n: torch.randn(s, generator=draw, dtype=torch.float64) for n, s in WHOLE.items()}
    return drawn


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def one_step(layout):
    """In a rank: gradients drawn by its replica, reduced, clipped, applied, shared."""
    from dsv3_tutorial.parallel.data import join
    from dsv3_tutorial.parallel.replicas import Replicas

    ranks = join("cpu", layout)
    grid = ranks.grid
    model = Split(grid)
    for name, p in model.named_parameters():
        # dispatch has summed an expert's gradients over ep: the sum of those replicas' own
        first = ranks.replica[0] // layout.ep * layout.ep
        from_replicas = range(first, first + layout.ep) if name == "experts" else [ranks.replica[0]]
        gradient = sum(values(1 + r)[name] for r in from_replicas)
        axis = {"experts": "ep", "heads": "tp"}.get(name)
        size = grid.size(axis) if axis else 1
        own = gradient.chunk(size)[grid.index(axis) if axis else 0].clone()
        if hasattr(p, "placements"):
            own = type(p.data).from_local(own, p.device_mesh, p.placements)
        p.grad = own
    held = Replicas(model, ranks)
    held.reduce_gradients()
    norm = held.norm()
    held.clip_gradients(1.0, norm)
    optimizer = torch.optim.SGD([{"params": held.owned()}], lr=1.0)
    optimizer.step()
    kept = [name for name, p in model.named_parameters() if p.grad is not None]
    held.share_weights()
    return norm, {n: whole(p.detach()) for n, p in model.named_parameters()}, kept


@pytest.mark.parametrize(("longest", "factor"), [(10.0, 1.0), (5.0, 1.0), (1.0, 0.2)])
def test_gradients_that_are_short_enough_are_left_as_they_are(longest, factor):
    from dsv3_tutorial.parallel.data import join

    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    held = replicas.Replicas(model, join("cpu", Layout()))
    held.clip_gradients(longest, held.norm())
    torch.testing.assert_close(
        model.weight.grad, factor * torch.tensor([[3.0, 4.0]]), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("ways", [{"dp": 4, "ep": 2}, {"dp": 2, "ep": 2, "tp": 2}, {"dp": 4}])
def test_a_step_of_four_ranks_is_the_step_of_one_on_the_mean_gradient(ways, zero):
    layout = Layout(**ways, zero=zero)
    found = launch(one_step, 4, layout)
    mean = {n: sum(values(1 + r)[n] for r in range(layout.dp)) / layout.dp for n in WHOLE}
    length = math.sqrt(sum(g.square().sum().item() for g in mean.values()))
    assert length > 1
    for norm, weights, kept in found:
        assert norm.item() == pytest.approx(length, rel=1e-12)
        for name, start in values(0).items():
            expected = start - mean[name] / (length + 1e-6)
            torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-12, msg=name)
        assert sorted(kept) == sorted(WHOLE) if zero == 0 else len(kept) < len(WHOLE)
