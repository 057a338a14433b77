"""The parts of a split network add up to the whole one."""

import pytest
import torch

from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.exercises.parallel.lockstep import add_up, together
from dsv3_tutorial.mlp import MLP
from dsv3_tutorial.parallel.split import column_row


@pytest.mark.parametrize(
    ("world", "width", "shape"), [(1, 5, (3, 4)), (2, 6, (2, 3, 4)), (8, 8, (1, 6))]
)
def test_every_rank_gets_what_the_whole_network_computes(world, width, shape):
    d = shape[-1]
    x, gate, up, down = randn(0, shape, (width, d), (width, d), (d, width), dtype=torch.float64)
    mlp = MLP(d, width).double()
    names = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    mlp.load_state_dict(dict(zip(names, (gate, up, down), strict=True)))
    ran = together(
        column_row,
        lambda rank, collective: (x, gate, up, down, rank, world, collective("all_reduce")),
        world,
        {"all_reduce": add_up},
    )
    expected = mlp(x).detach()
    assert all(torch.allclose(y, expected, rtol=0, atol=1e-12) for y in ran.results)
    assert [len(sent) for sent in ran.sent] == [1] * world
    assert ran.bytes() == x.numel() * 8
