"""What ranks exchange after the backward pass leaves them with one process's step."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.exercises.parallel.lockstep import add_up, together
from dsv3_tutorial.moe.balance import update_bias
from dsv3_tutorial.parallel.gradients import flat_gradient, synchronised
from dsv3_tutorial.parallel.launch import launch

WORLD, TOKENS, D = 4, 6, 3


def _one_process(max_norm):
    """A replicated matrix and one expert a rank, trained on all tokens by autograd and torch."""
    shared, *experts = randn(0, (D, D), *[(D,)] * WORLD, dtype=torch.float64)
    parameters = [weight.requires_grad_() for weight in (shared, *experts)]
    x, target = randn(1, (WORLD, TOKENS, D), (WORLD, TOKENS), dtype=torch.float64)
    chosen = torch.randint(0, WORLD, (WORLD, TOKENS), generator=torch.Generator().manual_seed(2))
    y = torch.stack([x[r] @ shared for r in range(WORLD)])
    out = (y * torch.stack(experts)[chosen]).sum(dim=-1)
    losses = (out - target).square().mean(dim=1)  # of each rank's own tokens
    return parameters, losses, chosen


def test_gradients_norm_and_bias_equal_one_process():
    bias = randn(3, (WORLD,), dtype=torch.float64)[0] / 9
    for max_norm in (0.1, 1e9):
        parameters, losses, chosen = _one_process(max_norm)
        own = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        inputs = [
            # the dispatch brings every rank's tokens to the expert, and so sums its gradient
            (
                own[r][0].flatten(),
                sum(grads[1 + r] for grads in own),
                chosen[r].bincount(minlength=4),
            )
            for r in range(WORLD)
        ]
        ran = together(
            synchronised,
            lambda rank, collective, inputs=inputs, limit=max_norm: (
                *inputs[rank],
                bias.clone(),
                0.01,
                limit,
                WORLD,
                collective("all_reduce"),
            ),
            WORLD,
            {"all_reduce": add_up},
        )
        losses.mean().backward()
        norm = torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt()
        shrink = min(1.0, max_norm / norm.item())
        moved = update_bias(bias, chosen.flatten().bincount(minlength=WORLD), 0.01)
        for rank, (replicated, expert, new) in enumerate(ran.results):
            assert torch.allclose(replicated, parameters[0].grad.flatten() * shrink, atol=1e-12)
            assert torch.allclose(expert, parameters[1 + rank].grad * shrink, atol=1e-12)
            assert torch.equal(new, moved)


def test_the_flat_gradient_holds_every_gradient_in_the_parameters_order():
    layer = torch.nn.Linear(2, 3)
    layer(torch.ones(1, 2)).sum().backward()
    expected = torch.tensor([1.0] * 9)
    assert torch.equal(flat_gradient(layer), expected)


def _shared() -> torch.Tensor:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(4, 4, bias=False).double(), torch.ones(2, 4, dtype=torch.float64)
    layer.weight = torch.nn.Parameter(
        distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (2,)), [Shard(0)])
    )
    (layer.weight.full_tensor() @ x.T).square().sum().backward()
    return flat_gradient(layer)


def test_a_gradient_that_is_shared_over_ranks_comes_whole():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(4, 4, bias=False).double(), torch.ones(2, 4, dtype=torch.float64)
    (layer.weight @ x.T).square().sum().backward()
    for found in launch(_shared, 2):
        torch.testing.assert_close(found, layer.weight.grad.flatten())
