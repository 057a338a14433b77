"""AdamW whose two moments are kept in BF16: 4 bytes a parameter instead of 8, updates unchanged.

DeepSeek-V3 technical report, section 3.3.3: BF16 moments lost it nothing, while the weights that
are updated and the gradients that are added up stay float32.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

MOMENTS = ("exp_avg", "exp_avg_sq")


class Bf16Moments(torch.optim.AdamW):
    """AdamW that computes as torch's does and rounds each moment when it is put away.

    A parameter's moments are in its own dtype only while it is updated: one parameter's worth of
    them at a time. BF16 keeps 8 bits, so a beta2 of 0.999 would stand still (a thousandth of the
    difference is less than half a step); 0.95 moves. Parameters may be FSDP2's shards.
    """

    def __init__(self, params: Any, moments: torch.dtype = torch.bfloat16, **options: Any):
        self.moments = moments
        super().__init__(params, **options)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        """One update of every parameter that has a gradient; what `closure` gives, if there is one.

        Same update as torch.optim.AdamW's, from the rounded moments of the step before.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which widens state to the parameter's dtype: narrowed again, without loss."""
        super().load_state_dict(state_dict)
        for kept in self.state.values():
            for name in MOMENTS:
                kept[name] = kept[name].to(self.moments)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        kept = self.state[parameter] or self._begin(parameter)
        weight, gradient = _own(parameter), _own(parameter.grad)
        narrow = [_own(kept[name]) for name in MOMENTS]
        wide = [moment.to(weight.dtype) for moment in narrow]
        adamw(
            *([weight], [gradient], *([moment] for moment in wide), [], [kept["step"]]),
            **{name: group[name] for name in ("lr", "weight_decay", "eps", "maximize", "fused")},
            **dict(zip(("beta1", "beta2"), group["betas"])),
            amsgrad=False,
        )
        for own, moment in zip(narrow, wide):
            own.copy_(moment)

    def _begin(self, parameter: Tensor) -> dict[str, Tensor]:
        kept = self.state[parameter]
        kept["step"] = torch.zeros((), dtype=torch.float32, device=_own(parameter).device)
        for name in MOMENTS:
            kept[name] = torch.zeros_like(parameter, dtype=self.moments, requires_grad=False)
        return kept


def _own(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, without a copy; the tensor itself where it is whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
