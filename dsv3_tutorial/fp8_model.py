"""The whole model's products in FP8: which layers change, and what stays as it was.

The linear layers of attention, MLP and experts are those that DeepSeek-V3's own files hold in FP8.
Embedding, head, gates, norms and the attention operator stay in the precision they are in, and so
does the projection of a multi-token prediction module. DeepSeek-V3 report, section 3.3.1.
"""

import torch
from torch import Tensor, nn

from dsv3_tutorial.checkpoint_layout import is_fp8
from dsv3_tutorial.fp8.linear import Fp8Linear, fp8_linear, swiglu_linear
from dsv3_tutorial.fp8.scaling import DEEPSEEK, Scaling
from dsv3_tutorial.mlp import MLP
from dsv3_tutorial.moe.experts import Experts, combine, dispatch, permute


class Fp8MLP(MLP):
    """The gated network with its three products in FP8; its product of two is not kept."""

    def __init__(self, mlp: MLP, scaling: Scaling = DEEPSEEK):
        nn.Module.__init__(self)
        self.scaling = scaling
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        into = self.gate_proj.weight, self.up_proj.weight
        gate, up = fp8_linear(x, *into, scaling=self.scaling)
        return swiglu_linear(gate, up, self.down_proj.weight, self.scaling)


class Fp8Experts(Experts):
    """The routed experts with their products in FP8, one expert after the other.

    Each expert's tokens are quantised on their own: a tile of Wgrad never spans two experts.
    """

    def __init__(self, experts: Experts, scaling: Scaling = DEEPSEEK):
        nn.Module.__init__(self)
        self.engine, self.scaling = experts.engine, scaling
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj

    def run(self, x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor):
        order, counts = dispatch(indices, len(gate_up))
        rows = permute(x, order, indices.shape[1])  # (M * K, D)
        every = zip(rows.split(counts.tolist()), gate_up.unbind(), down.unbind())
        outs = [self._expert(own, into, back) for own, into, back in every if len(own)]
        return combine(torch.cat(outs), order, weights) if outs else torch.zeros_like(x)

    def _expert(self, rows: Tensor, into: Tensor, back: Tensor) -> Tensor:
        """One expert's rows (m, D) -> (m, D). Gate and up have blocks of their own, as on disk."""
        gate, up = fp8_linear(rows, *into.chunk(2), scaling=self.scaling)
        return swiglu_linear(gate, up, back, self.scaling)


def to_fp8(model: nn.Module, scaling: Scaling = DEEPSEEK) -> nn.Module:
    """Put the model's linear layers and experts in FP8, in place; parameters and names stay.

    The layer behind attention keeps its input for Wgrad in E5M6, the others in E4M3 (the report,
    section 3.3.3).
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, MLP):
            continue  # it is replaced as a whole
        for name, child in list(module.named_children()):
            replacement = _in_fp8(f"{path}.{name}", child, scaling)
            if replacement is not None:
                setattr(module, name, replacement)
    return model


def fp8_weights(model: nn.Module) -> set[str]:
    """The names of the parameters that products in FP8 read."""
    kinds = Fp8Linear | Fp8MLP | Fp8Experts
    owners = [(path, m) for path, m in model.named_modules() if isinstance(m, kinds)]
    return {
        f"{path}.{name}"
        for path, module in owners
        for name, _ in module.named_parameters()
        if name != "bias"
    }


def _in_fp8(path: str, module: nn.Module, scaling: Scaling) -> nn.Module | None:
    if type(module) is MLP:
        return Fp8MLP(module, scaling)
    if type(module) is Experts:
        return Fp8Experts(module, scaling)
    if isinstance(module, Experts) and not isinstance(module, Fp8Experts):
        raise TypeError(
            f"{path} is {type(module).__name__}: experts that are spread over ranks already would "
            "stay out of FP8. Call to_fp8 first and expert_parallel after it."
        )
    if type(module) is nn.Linear and is_fp8(f"{path}.weight"):
        cache = "e5m6" if path.endswith(".o_proj") else "e4m3"
        return Fp8Linear.of(module, scaling, cache)
    return None
