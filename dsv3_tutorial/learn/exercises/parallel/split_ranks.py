"""A split network on simulated ranks: what it returns, what it costs, and where gradients go."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dsv3_tutorial.learn.attempt import first_line
from dsv3_tutorial.learn.compare import difference
from dsv3_tutorial.learn.exercises.parallel.lockstep import Together, add_up, together

DETACHED = (
    "In training gradients must pass: make the result from x and the weights, without no_grad, "
    "detach, .data or torch.tensor"
)


def on_ranks(function, x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, world: int):
    """The function on `world` ranks that all hold the same x and the whole weights."""

    def make(rank: int, collective) -> tuple:
        tensors = (each.clone() for each in (x, w_gate, w_up, w_down))
        return *tensors, rank, world, collective("all_reduce")

    ran = together(function, make, world, {"all_reduce": add_up}, flops=True)
    if ran.trouble or x.dtype != torch.float64 or not _all_tensors(ran.results):
        return ran
    back = together(partial(_backward, function), make, world, {"all_reduce": add_up})
    return replace(ran, gradients=[list(parts) for parts in zip(*back.results, strict=True)])


def _all_tensors(results: list) -> bool:
    return all(isinstance(each, Tensor) and each.is_floating_point() for each in results)


class _Summed(torch.autograd.Function):
    """The sum over the ranks; backward every rank has the whole gradient of it already."""

    @staticmethod
    def forward(ctx, part: Tensor, all_reduce: Callable) -> Tensor:
        return all_reduce(part)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return grad, None


def _backward(function, x, w_gate, w_up, w_down, rank, world, all_reduce) -> list[Tensor | None]:
    """A rank's part of the gradients of x and the weights, None where none arrives."""
    given = [each.requires_grad_() for each in (x, w_gate, w_up, w_down)]
    with torch.enable_grad():
        y = function(*given, rank, world, lambda t: _Summed.apply(t, all_reduce))
        if not y.requires_grad:
            return [None] * len(given)
        return list(torch.autograd.grad(y.square().sum(), given, allow_unused=True))


def _wrong_gradient(got: Together, expected: Together) -> str | None:
    """The first input whose gradient, added up over the ranks, is not the whole network's."""
    names = ("x", "w_gate", "w_up", "w_down")
    both = got.gradients or (), expected.gradients or ()
    for name, parts, wanted in zip(names, *both, strict=False):
        if any(each is None for each in parts) != any(each is None for each in wanted):
            return f"the values are right, but no gradient reaches {name}. Hint: {DETACHED}"
        if any(each is None for each in parts):
            continue
        if difference(sum(parts), sum(wanted), None, False):
            return f"the values are right, but the gradient of {name} is not. Hint: {DETACHED}"
    return None


def stored_turned(error: BaseException, arguments: tuple) -> str | None:
    """After shapes that do not fit: how the weights lie."""
    text = first_line(error)
    if any(word in text for word in ("shape", "size", "subscript", "dimension")):
        return (
            "Weights are stored (out, in) and applied as x @ w.T: a column of a formula's x W is a "
            "row here. All of x meets whole rows of w_gate and w_up."
        )
    return None


def over(got: Together, expected: Together) -> str | None:
    """What is wrong where the values are right: FLOP, then the sums made, then gradients."""
    if got.flops > expected.flops:
        return (
            f"the values are right, but a rank computes {got.flops:,} FLOP; its share is "
            f"{expected.flops:,}"
        )
    cost, budget = ((each.bytes(), len(each.sent[0])) for each in (got, expected))
    if cost == budget:
        return _wrong_gradient(got, expected)
    return (
        f"the values are right, but all_reduce sums {cost[0]:,} bytes in {cost[1]} calls; the "
        f"budget is {budget[0]:,} in {budget[1]}"
    )
