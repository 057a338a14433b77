"""What happened when a number stopped being one: the step, the batch, and the first bad tensor."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dsv3_tutorial.parallel.data import Ranks

if TYPE_CHECKING:
    from dsv3_tutorial.train.step import TrainingState


class NotFinite(FloatingPointError):
    """A loss, a gradient or a weight became NaN or infinite. No weight was changed by that step."""


ELSEWHERE = "a weight on another rank"


def report(
    state: "TrainingState",
    batch: Tensor,
    rows: Tensor,
    ranks: Ranks,
    numbers: dict[str, float],
    places: Callable[[int], str] = str,
) -> NotFinite:
    """The error to raise for update `state.step + 1`, whose gradients are still in place.

    `rows` (B, S + 1), this rank's part of `batch`, is run again, module by module, to find where.
    Every rank calls it.
    """
    said = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    starts = [places(start) for start in state.sampler.starts.flatten().tolist()]
    shown = ", ".join(starts[:SHOWN]) + (", ..." if len(starts) > SHOWN else "")
    rate = state.recipe.learning_rate(state.step)
    return NotFinite(
        f"Step {state.step + 1} stopped the run: {said}. The first tensor that is not finite is "
        f"{first_bad(state, rows, ranks)}. The batch is {len(batch)} windows of {batch.shape[1]} "
        f"symbols, which begin at {shown}.\n"
        "Going on would write it into every weight. Nothing was updated, and the last whole "
        f"checkpoint is as it was. Lower --peak-lr (the rate was {rate:.1e}) or look at that "
        "batch, then start again or --resume."
    )


SHOWN = 4  # windows of the batch


def bad_weight(model: nn.Module) -> str | None:
    """The first parameter or buffer, of this rank, that is not finite; None if all are."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not is_finite(tensor):
            return f"the weight {name}"
    return None


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are, of this rank's part of a sharded one."""
    own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return bool(own.isfinite().all())


def anywhere(found: str | None, ranks: Ranks) -> bool:
    """Whether any rank found something: all must take the same way from here."""
    return bool(ranks.sum(torch.tensor(float(found is not None), device=ranks.device)))


def first_bad(state: "TrainingState", rows: Tensor, ranks: Ranks) -> str:
    """Where it began, in words: a weight, else a module's output, else a gradient.

    Gradients are looked at from the last parameter back, the way they flow.
    """
    weight = bad_weight(state.model)
    if anywhere(weight, ranks):
        return weight or ELSEWHERE
    with torch.no_grad(), _outputs(state.worker) as bad:
        if state.pipe is not None:
            state.pipe.held_out(rows)
        else:
            drafts = {"drafts": True} if state.worker.cfg.num_nextn_predict_layers else {}
            state.worker(rows[:, :-1], **drafts)
    if bad:
        return f"the output of {bad[0] or 'the model'}"
    for name, p in reversed(list(state.model.named_parameters())):
        if p.grad is not None and not is_finite(p.grad):
            return f"the gradient of {name}"
    return "none that is kept here: a sum of finite numbers, or another rank's tensor"


@contextmanager
def _outputs(model: nn.Module) -> Iterator[list[str]]:
    """The names of modules that gave something not finite while running inside, in order."""
    bad: list[str] = []

    def look(name: str):
        def hook(module: nn.Module, inputs: tuple, output) -> None:
            tensors = output if isinstance(output, tuple | list) else (output,)
            tensors = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
            if not all(map(is_finite, tensors)):
                bad.append(name)

        return hook

    hooks = [part.register_forward_hook(look(name)) for name, part in model.named_modules()]
    try:
        yield bad
    finally:
        for hook in hooks:
            hook.remove()
