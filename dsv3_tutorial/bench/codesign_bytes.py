"""What a run holds in memory, counted on its own tensors: weights, optimizer, kept activations."""

from collections.abc import Iterable

import torch
from torch import Tensor

from dsv3_tutorial.train.step import TrainingState, losses


def held_bytes(state: TrainingState, rows: Tensor) -> dict[str, float]:
    """Bytes of weights (masters and copies) and optimizer, and of activations per token.

    rows (B, S + 1): the micro-batch whose forward is counted. The optimizer's state is there from
    the first update on. Gradients are not in it: 4 bytes a parameter in every rung.
    """
    weights = [*state.model.parameters(), *state.worker.parameters()]
    moments = [t for kept in state.optimizer.state.values() for t in kept.values()]
    return {
        "weight_bytes": _bytes(weights),
        "optimizer_bytes": _bytes(t for t in moments if t.ndim),  # the step counts are no matter
        "activation_bytes_per_token": activation_bytes_per_token(state, rows),
    }


def activation_bytes_per_token(state: TrainingState, rows: Tensor) -> float:
    """Bytes that one more token of a forward makes it keep for its backward.

    rows (B, S + 1), B even. All of them against their first half: what does not grow with the
    tokens, such as the codes of quantised weights, is no activation and drops out.
    """
    half = rows[: len(rows) // 2]
    return (_kept_bytes(state, rows) - _kept_bytes(state, half)) / half[:, 1:].numel()


def _kept_bytes(state: TrainingState, rows: Tensor) -> int:
    """Bytes that a forward over rows (B, S + 1) keeps, each storage once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in state.worker.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        where = tensor.untyped_storage().data_ptr()
        if where not in own:
            kept[where] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = losses(state.worker, rows, state.recipe, 0)
        held = sum(t.untyped_storage().nbytes() for t in kept.values())
    del found
    return held


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors' storages, each once: FP8's products read the masters themselves."""
    each = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(each.values())
