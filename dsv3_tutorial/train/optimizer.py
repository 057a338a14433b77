"""Which parameters decay, for every run: DeepSeek-V3 technical report, section 4.2."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from dsv3_tutorial.train.recipe import WEIGHT_DECAY


def groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Matrices, which decay, and the rest: norms and biases have no scale to keep small.

    Two groups, and two more for every mesh that some are laid out over: one call of a fused kernel
    takes tensors of one mesh only.
    """
    found: dict[Any, list[list[nn.Parameter]]] = {None: [[], []]}
    for p in parameters:
        found.setdefault(getattr(p, "device_mesh", None), [[], []])[p.ndim <= 1].append(p)
    used = [both for both in found.values() if any(both)] or [[[], []]]
    return [
        {"params": held, "weight_decay": decay}
        for both in used
        for held, decay in zip(both, (WEIGHT_DECAY, 0.0))
    ]
