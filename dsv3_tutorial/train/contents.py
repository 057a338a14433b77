"""What a checkpoint of a run contains: named tensors and a few plain values, and how both go back.

Names: model.<key>, optimizer.<parameter>.<key>, sampler.<key>, random.<rank>.<generator>.
Every random state is a uint8 tensor, so that no object has to be pickled.
"""

import json
import random
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dsv3_tutorial.train.sealed import StateError


class Sampler(Protocol):
    """Where a run stands in its text: a dict of CPU tensors and plain values."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


class Resumable(Protocol):
    """A run between two steps. `recipe.to_dict()` gives plain values, compared and not restored."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    sampler: Sampler
    recipe: Any
    step: int


def tensor_state(state: Resumable, rank: int) -> dict[str, Tensor]:
    """Every tensor of a run by its name, not copied. The balance bias is a buffer of the model.

    In the order of their names: equal states make equal files.
    """
    named = {f"model.{key}": value for key, value in state.model.state_dict().items()}
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            named[f"optimizer.{name}.{key}"] = value
    for key, value in state.sampler.state_dict().items():
        if isinstance(value, Tensor):
            named[f"sampler.{key}"] = value
    named |= {f"random.{rank}.{key}": value for key, value in random_states().items()}
    return dict(sorted(named.items()))


def plain_state(state: Resumable) -> dict[str, Any]:
    """What of a run is no tensor and yet moves: the sampler's numbers and the learning rates."""
    position = state.sampler.state_dict()
    return {
        "sampler": {k: v for k, v in position.items() if not isinstance(v, Tensor)},
        "learning_rates": [float(group["lr"]) for group in state.optimizer.param_groups],
    }


def model_kinds(state: Resumable) -> dict[str, list]:
    """Each tensor of the model that this rank holds, whole or in part: name -> [dtype, shape]."""
    held = state.model.state_dict().items()
    return {f"model.{key}": described(value.dtype, value.shape) for key, value in held}


def targets(
    state: Resumable, saved: Mapping[str, Any], rank: int, ours: Mapping[str, list] | None = None
) -> dict[str, Tensor]:
    """Tensors to read a checkpoint into, by name: the model's own, fresh ones for the rest.

    saved: name -> [dtype, shape]. ours: `model_kinds` of all ranks together, where they hold other
    layers. A sharded parameter gets sharded optimizer state, and one that another rank updates
    none. Raises StateError, before anything is read, when the model is not the one that was saved.
    """
    ours = model_kinds(state) if ours is None else ours
    _refuse_other_model(ours, {k: v for k, v in saved.items() if k.startswith("model.")})
    into = {f"model.{key}": value for key, value in state.model.state_dict().items()}
    updated = {id(p) for group in _groups(state) for p in group["params"]}
    parameters = {n: p for n, p in state.model.named_parameters() if id(p) in updated}
    fused = any(group.get("fused") or group.get("capturable") for group in _groups(state))
    for name, (dtype, shape) in saved.items():
        kind, rest = name.split(".", 1)
        if kind == "optimizer":
            of = parameters.get(rest.rpartition(".")[0])
            if of is not None:
                into[name] = _beside(of, getattr(torch, dtype), shape, fused)
        elif kind == "sampler" or (kind == "random" and rest.startswith(f"{rank}.")):
            into[name] = torch.empty(shape, dtype=getattr(torch, dtype))
    return into


def put_back(
    state: Resumable, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], rank: int
) -> None:
    """Hand the tensors that were read into `targets` to the run. The step stays the caller's."""
    state.model.load_state_dict(_under("model.", tensors))
    state.optimizer.state.clear()
    parameters = dict(state.model.named_parameters())
    for name, value in _under("optimizer.", tensors).items():
        of, _, key = name.rpartition(".")
        state.optimizer.state[parameters[of]][key] = value
    rates = plain["learning_rates"]
    if len(rates) != len(_groups(state)):  # another layout has other groups, and one rate for all
        rates = [rates[0]] * len(_groups(state))
    for group, rate in zip(_groups(state), rates, strict=True):
        group["lr"] = rate
    state.sampler.load_state_dict({**plain["sampler"], **_under("sampler.", tensors)})
    restore_random_states(_under(f"random.{rank}.", tensors))


def random_states() -> dict[str, Tensor]:
    """This process's generators, each as uint8 (bytes,); CUDA's is that of the device in use."""
    states = {
        "torch": torch.get_rng_state(),
        "python": _as_bytes(random.getstate()),
        "numpy": _as_bytes(np.random.get_state(legacy=False)),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: Mapping[str, Tensor]) -> None:
    """Set the generators to what `random_states` saw. One that is not there stays as it is."""
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    if "python" in states:
        version, numbers, gauss = _from_bytes(states["python"])
        random.setstate((version, tuple(numbers), gauss))
    if "numpy" in states:
        found = _from_bytes(states["numpy"])
        found["state"]["key"] = np.array(found["state"]["key"], dtype=np.uint32)
        np.random.set_state(found)
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _refuse_other_model(ours: Mapping[str, list], saved: Mapping[str, Any]) -> None:
    other = sorted(n for n in ours.keys() | saved.keys() if ours.get(n) != saved.get(n))
    if other:
        first = other[0]
        raise StateError(
            f"The checkpoint is of another model: {len(other)} tensors differ, {first} first "
            f"({saved.get(first, 'absent')} in the checkpoint, {ours.get(first, 'absent')} here). "
            "Some weights would stay untrained. Resume with the config that the run began with."
        )


def described(dtype: torch.dtype, shape: torch.Size) -> list:
    """A tensor's kind as JSON has it: ["float32", [3, 4]]."""
    return [str(dtype).removeprefix("torch."), list(shape)]


def _beside(parameter: Tensor, dtype: torch.dtype, shape: list[int], fused: bool) -> Tensor:
    if list(parameter.shape) == shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype, device=parameter.device if fused else "cpu")


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _groups(state: Resumable) -> list[dict[str, Any]]:
    return state.optimizer.param_groups


def _as_bytes(value: Any) -> Tensor:
    text = json.dumps(value, default=lambda array: array.tolist())
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _from_bytes(tensor: Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()))
