"""A text that the trained model has not seen, and what models make of it, for a lesson."""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_tutorial.files import data_path
from dsv3_tutorial.inference.text import Vocabulary
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.moe.gate import Gate


class HeldOut:
    """`data/text/held_out.txt` in windows (B, S) of tokens, and how many bytes they stand for.

    windows: how many, the last ones; None for all. A text of the course's own, and so the same on
    every Python, unlike the library that the model read.
    """

    def __init__(self, vocabulary: Vocabulary, windows: int | None = None, length: int = 384):
        text = data_path("text", "held_out.txt").read_text(encoding="utf-8")
        tokens = torch.tensor(vocabulary.encode(text))
        whole = tokens[: len(tokens) // length * length].view(-1, length)  # (B, S)
        self.windows = whole[-(windows or 0) :]  # (B, S)
        guessed = vocabulary.tokenizer.decode_batch(self.windows[:, 1:].tolist())
        self.n_bytes = sum(len(window.encode()) for window in guessed)

    def bits_per_byte(self, logits: Tensor) -> float:
        """What logits (B, S, V) over the windows are worth; each window begins without a past."""
        wanted = self.windows[:, 1:].flatten()
        nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted, reduction="sum")
        return float(nats) / math.log(2) / self.n_bytes

    @torch.inference_mode()
    def read_by(self, model: DeepSeekV3) -> float:
        """Bits per byte of a model that reads each window at once."""
        return self.bits_per_byte(model(self.windows))


@torch.inference_mode()
def experts_of_two(model: DeepSeekV3, ids: Tensor, apart: int = 1) -> float:
    """How many different experts of a layer two tokens read, `apart` positions from each other.

    ids (B, S); the mean over pairs and MoE layers. K for two that agree, 2 K for two strangers.
    """
    chosen: list[Tensor] = []
    gates = [module for module in model.model.modules() if isinstance(module, Gate)]
    hooks = [g.register_forward_hook(lambda _, __, out: chosen.append(out.indices)) for g in gates]
    try:
        model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    seen = torch.stack([indices.view(*ids.shape, -1) for indices in chosen])  # (L, B, S, K)
    one, other = seen[:, :, :-apart], seen[:, :, apart:]
    shared = (one[..., :, None] == other[..., None, :]).sum((-2, -1)).float().mean()
    return 2 * seen.shape[-1] - float(shared)


def rounded(model: DeepSeekV3, by: Callable[[Tensor], Tensor]) -> DeepSeekV3:
    """A copy whose projections and experts went through `by`, a matrix at a time."""
    new = copy.deepcopy(model)
    for name, weight in new.named_parameters():
        if "proj" in name and "eh_proj" not in name:
            matrices = weight.data.reshape(-1, *weight.shape[-2:])  # a layer's experts are a stack
            weight.data = torch.stack([by(matrix) for matrix in matrices]).view_as(weight)
    return new


def with_tall_channel(model: DeepSeekV3, times: float = 100.0) -> DeepSeekV3:
    """A copy with one channel of every feed-forward network `times` larger, and undone behind it.

    A row of each up projection grows, the column of the down projection that reads it shrinks: in
    exact arithmetic the same function.
    """
    new = copy.deepcopy(model)
    for name, weight in new.named_parameters():
        if name.endswith("down_proj") or "down_proj." in name:
            weight.data[..., 0] /= times
        elif "gate_up_proj" in name:
            weight.data[:, weight.shape[1] // 2] *= times  # gate's rows come first
        elif "up_proj." in name:
            weight.data[0] *= times
    return new
