"""A stage's backward in two parts: what the stage before waits for, and what can wait itself.

Every weight is used at nodes of autograd's graph that lie on the way to the stage's input. The
first part stops at the input and keeps the gradients that arrive at those nodes; the second goes
from them to the weights. Together they do the arithmetic of one backward, where no weight is used
twice; and they are right where one is.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node


def backward(root: Tensor, gradient: Tensor | None, x: Tensor) -> Tensor | None:
    """The whole backward of a stage: weights' gradients added to their .grad, x's returned.

    root: (...) with its gradient, None for a scalar; x: the stage's input, a leaf. None where x
    wants no gradient.
    """
    if root.requires_grad:
        root.backward(gradient)
    return torch.zeros_like(x) if x.requires_grad and x.grad is None else x.grad


@dataclass(frozen=True)
class Use:
    """What leads off from a node on the way to the input: the next nodes, and to which weights."""

    off: set[Node]
    weights: set[Tensor]


Uses = dict[Node, Use]


class LaterGradients:
    """A backward of which only the input's part is done: `finish` does the weights'.

    root, gradient, x: as in `backward`. Keeps the stage's graph and activations until `finish`.
    """

    def __init__(self, root: Tensor, gradient: Tensor | None, x: Tensor):
        # root alone keeps a function written in Python alive: its node does not.
        self._root, self._gradient, self._x = root, gradient, x
        self._arrived: dict[Node, tuple[Tensor | None, ...]] = {}
        self._groups: list[tuple[Uses, list[Tensor]]] | None = None
        self.input_gradient = self._to_input() if x.requires_grad else None

    def _to_input(self) -> Tensor:
        x = self._x
        uses = _uses(self._root.grad_fn, x) if self._root.requires_grad else None
        if uses is None:  # x has no part in root
            return torch.zeros_like(x)
        keeping = [node.register_prehook(self._keep(node)) for node in uses]
        try:
            with _asked_for(uses, weights=False):
                (found,) = torch.autograd.grad(self._root, x, self._gradient, retain_graph=True)
        finally:
            for hook in keeping:
                hook.remove()
        self._groups = list(_groups(uses))
        return found

    def _keep(self, node: Node):
        def keep(gradients: tuple[Tensor | None, ...]) -> None:
            self._arrived[node] = gradients

        return keep

    def finish(self) -> None:
        """Add the gradients of the weights to their .grad, and let the graph go. Once."""
        if self._groups is None:  # no input that wants a gradient: all of the backward is here
            backward(self._root, self._gradient, self._x)
        for uses, weights in self._groups or ():
            with _asked_for(uses, weights=True):
                found = self._to_weights(uses, weights)
            for weight, gradient in zip(weights, found, strict=True):
                weight.grad = gradient if weight.grad is None else weight.grad + gradient
        self._arrived, self._groups = {}, []
        self._root = self._gradient = self._x = None

    def _to_weights(self, nodes: Uses, weights: list[Tensor]) -> tuple[Tensor, ...]:
        """A weight used twice: what flows from its later use to the earlier one has come already.

        So each node is handed what arrived in the first part, whatever arrives now.
        """
        starts = [
            (GradientEdge(node, i), gradient)
            for node in nodes
            for i, gradient in enumerate(self._arrived[node])
            if gradient is not None
        ]
        edges, gradients = zip(*starts, strict=True)
        holding = [
            node.register_prehook(lambda _, kept=self._arrived[node]: kept) for node in nodes
        ]
        try:
            return torch.autograd.grad(edges, weights, gradients, retain_graph=True)
        finally:
            for hook in holding:
                hook.remove()


@contextlib.contextmanager
def _asked_for(uses: Uses, weights: bool) -> Iterator[None]:
    """Tell functions written in Python, which otherwise compute all, which gradients are wanted.

    PyTorch's own learn it from the engine.
    """
    own = {node: node.needs_input_grad for node in uses if hasattr(node, "needs_input_grad")}
    try:
        for node, needs in own.items():
            behind = (child for child, _ in node.next_functions if child is not None)
            node.needs_input_grad = tuple(
                need and (next(behind) in uses[node].off) == weights for need in needs
            )
        yield
    finally:
        for node, needs in own.items():
            node.needs_input_grad = needs


def _uses(root: Node, x: Tensor) -> Uses | None:
    """The nodes on the way from root to x from which a way leads off to weights.

    None where no way leads from root to x.
    """
    to_x: dict[Node, bool] = {}
    weights: dict[Node, set[Tensor]] = {}
    uses: Uses = {}
    for node, behind in _children_first(root):
        leaf = getattr(node, "variable", None)
        to_x[node] = leaf is x or any(to_x[child] for child in behind)
        off = {child for child in behind if weights[child] and not to_x[child]}
        weights[node] = set().union(*(weights[child] for child in off))
        if leaf is not None and leaf is not x:
            weights[node] = {leaf}
        if to_x[node] and off:
            uses[node] = Use(off, weights[node])
    return uses if to_x[root] else None


def _children_first(root: Node) -> Iterator[tuple[Node, list[Node]]]:
    """Every node behind root, after all those behind it. No recursion: graphs are deep."""
    seen: set[Node] = set()
    stack = [(root, False)]
    while stack:
        node, entered = stack.pop()
        behind = [child for child, _ in node.next_functions if child is not None]
        if entered:
            yield node, behind
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((child, False) for child in behind)


def _groups(uses: Uses) -> Iterator[tuple[Uses, list[Tensor]]]:
    """Nodes that share weights, together with them: each group is one call of autograd."""
    left = dict(uses)
    while left:
        node, use = left.popitem()
        group, weights = {node: use}, use.weights
        while more := {n: other for n, other in left.items() if other.weights & weights}:
            group |= more
            for n, other in more.items():
                weights = weights | other.weights
                del left[n]
        yield group, list(weights)
