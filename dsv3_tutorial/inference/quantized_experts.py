"""A layer's routed experts as codes: a step reads the chosen ones, and nothing is kept wide.

M tokens, D hidden, E experts, K experts per token, F expert width.
"""

import torch
from torch import Tensor, nn

from dsv3_tutorial.moe.experts import (
    Experts,
    combine,
    dispatch,
    permute,
    run_experts,
    swiglu,
)
from dsv3_tutorial.weights.formats import Quantized, quantize
from dsv3_tutorial.weights.layers import QuantizedStack

BY_ROW = ("int8", "int8-tile", "int4")  # no scale spans two rows: gate and up are one matrix


class QuantizedExperts(Experts):
    """forward as `run_experts`, with each expert's three matrices quantised by themselves.

    Up to E rows (M K of them) each gathers its expert's codes; more, and all experts are
    dequantised for the step, which then runs as it does in a plain model. Experts that are large
    go one by one on a CPU, through the products of `weights.cpu`.
    """

    def __init__(
        self,
        gate: Quantized,
        up: Quantized,
        down: Quantized,
        dtype: torch.dtype | None = None,
        engine: str | None = None,
    ):
        nn.Module.__init__(self)
        self.engine, self.n_experts = engine, down.shape[0]
        into = [_side_by_side(gate, up)] if gate.fmt in BY_ROW else [gate, up]
        self.into = nn.ModuleList(QuantizedStack(q, dtype) for q in into)
        self.down = QuantizedStack(down, dtype)

    @classmethod
    def of(cls, experts: Experts, fmt: str) -> "QuantizedExperts":
        gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
        matrices = (quantize(w, fmt) for w in (gate, up, experts.down_proj.detach()))
        return cls(*matrices, experts.down_proj.dtype, experts.engine)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        if self.down.apart or any(stack.apart for stack in self.into):
            return self._one_by_one(x, indices, weights)
        if indices.numel() > self.n_experts:
            both, down = self.gate_up_proj.to(x.dtype), self.down_proj.to(x.dtype)
            return run_experts(x, indices, weights, both, down, self.engine)
        rows, which = x.repeat_interleave(indices.shape[1], dim=0), indices.flatten()
        hidden = swiglu(torch.cat([stack(rows, which) for stack in self.into], dim=-1))
        each = self.down(hidden, which).view(*indices.shape, -1)  # (M, K, D)
        return torch.einsum("mk,mkd->md", weights.to(each.dtype), each)

    def _one_by_one(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        if len(x) == 1:  # a decode step has nothing to sort; the sum is the same to the last bit
            outs = torch.cat([self._expert(e, x) for e in indices[0].tolist()])  # (K, D)
            return torch.einsum("mk,mkd->md", weights.to(outs.dtype), outs[None])
        order, counts = dispatch(indices, self.n_experts)
        rows = permute(x, order, indices.shape[1]).split(counts.tolist())
        outs = [self._expert(e, own) for e, own in enumerate(rows) if len(own)]
        return combine(torch.cat(outs), order, weights) if outs else torch.zeros_like(x)

    def _expert(self, e: int, rows: Tensor) -> Tensor:
        hidden = swiglu(torch.cat([_one(stack, e, rows) for stack in self.into], dim=-1))
        return _one(self.down, e, hidden)

    @property
    def gate_up_proj(self) -> Tensor:
        """What the codes stand for: (E, 2F, D)."""
        return torch.cat([stack.weight for stack in self.into], dim=1)  # (E, 2F, D)

    @property
    def down_proj(self) -> Tensor:
        """What the codes stand for: (E, D, F)."""
        return self.down.weight

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}gate_up_proj"] = self.gate_up_proj
        destination[f"{prefix}down_proj"] = self.down_proj


def _one(stack: QuantizedStack, e: int, rows: Tensor) -> Tensor:
    if stack.apart:
        return stack.apart[e](rows)
    return stack(rows, torch.full((len(rows),), e, device=rows.device))


def _side_by_side(gate: Quantized, up: Quantized) -> Quantized:
    """Gate's rows and behind them up's, expert by expert."""
    codes, scale = (
        torch.cat(two, dim=1) for two in zip((gate.codes, gate.scale), (up.codes, up.scale))
    )
    experts, rows, columns = gate.shape
    return Quantized(gate.fmt, codes, scale, (experts, 2 * rows, columns))
