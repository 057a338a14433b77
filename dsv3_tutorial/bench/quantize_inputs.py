"""What each quantisable matrix of a model is multiplied with, while it reads a text."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dsv3_tutorial.checkpoint_layout import is_fp8
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.moe.experts import Experts, swiglu

Inputs = dict[str, tuple[Tensor, ...]]


def seen(model: DeepSeekV3, ids: Tensor, rows: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name on disk, weight (m, k) and inputs (up to `rows`, k) of every matrix, in float32.

    ids (B, S). An expert's inputs are those of the tokens that chose it; one that nobody chose, and
    a module for multi-token prediction's, which this pass does not visit, are left out.
    """
    inputs = _record(model, ids)
    for path, module in model.named_modules():
        if isinstance(module, Experts) and path in inputs:
            x, indices = inputs[path][:2]
            for e in range(len(module.gate_up_proj)):
                own = x[(indices == e).any(-1)][:rows].float()
                yield from _expert(path, module, e, own) if len(own) else ()
        elif isinstance(module, nn.Linear) and is_fp8(f"{path}.weight"):
            # MLA reads kv_a_proj's weight itself: its input is the layer's
            source = path if path in inputs else path.rpartition(".")[0]
            if source in inputs:
                x = inputs[source][0].flatten(0, -2)
                picked = torch.linspace(0, len(x) - 1, min(rows, len(x))).long()
                yield f"{path}.weight", module.weight.detach().float(), x[picked].float()


def _expert(path: str, module: Experts, e: int, x: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    both, down = module.gate_up_proj[e].detach().float(), module.down_proj[e].detach().float()
    gate, up = both.chunk(2)
    for name, weight, into in (
        ("gate_proj", gate, x),
        ("up_proj", up, x),
        ("down_proj", down, swiglu(x @ both.T)),
    ):
        yield f"{path}.{e}.{name}.weight", weight, into


@torch.no_grad()
def _record(model: DeepSeekV3, ids: Tensor) -> Inputs:
    """What every projection, attention and set of experts was called with, by its path."""
    found: Inputs = {}

    def keep(path: str):
        return lambda module, args: found.__setitem__(path, args)

    hooks = []
    for path, module in model.named_modules():
        listed = isinstance(module, nn.Linear | Experts) or path.endswith(".self_attn")
        if listed:
            hooks.append(module.register_forward_pre_hook(keep(path)))
    try:
        model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return found
