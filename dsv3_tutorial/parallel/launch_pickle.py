"""What travels between a caller and its ranks: functions by value, tensors without a device."""

import io
import linecache
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn

from dsv3_tutorial.parallel.launch_errors import ParallelError

_PRELOADED = ("dsv3_tutorial", "torch", "numpy", "transformers", "safetensors", "_pytest")
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PICKLED = {  # dtypes that pickle knows; the others, FP8 above all, travel as integers
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}
_OTHERS_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


class Pickler(cloudpickle.Pickler):
    """Tensors go to the CPU, and a view without the rest of its storage; no DTensor."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            if hasattr(obj, "device_mesh"):
                raise TypeError(
                    "a DTensor means nothing outside its ranks; return its .full_tensor() or "
                    ".to_local()"
                )
            if type(obj) is Tensor and _wasteful(obj):
                lean = obj.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
                return lean.requires_grad_(obj.requires_grad).__reduce_ex__(self.proto)
            if type(obj) is nn.Parameter and obj.device.type != "cpu":
                return nn.Parameter, (obj.detach(), obj.requires_grad)
            if type(obj) is Tensor and obj.dtype not in _PICKLED:
                return _as_dtype, (obj.detach().view(_INTEGERS[obj.element_size()]), obj.dtype)
        return super().reducer_override(obj)


def dumps(value: Any) -> bytes:
    """`value` as bytes that pickle.loads reads, here or in a rank."""
    target = io.BytesIO()
    Pickler(target).dump(value)
    return target.getvalue()


def job_bytes(
    fn: Callable, args: Sequence, world: int, timeout: float, backend: str, gpus: Sequence[str]
) -> bytes:
    """All that a rank needs: the call, and the caller's environment, folder, paths and filters.

    Raises ParallelError when the function or an argument cannot be pickled.
    """
    if not callable(fn):
        raise ParallelError(
            f"{fn!r} is no function. The ranks would have nothing to run. Give launch a function, "
            "the number of ranks, and the function's arguments."
        )
    call = _call_bytes(fn, args)
    environment = {k: v for k, v in os.environ.items() if k not in _OTHERS_RANKS}
    rest = {
        "world": world,
        "timeout": timeout,
        "backend": backend,
        "gpus": list(gpus),
        "environment": environment,
        "folder": os.getcwd(),
        "path": [str(path) for path in sys.path],
        "filters": _filters(),
        "sources": _cells(),
        "modules": _named_in(call),
        "call": call,
    }
    return dumps(rest)


def visible_gpus(world: int, backend: str) -> list[str]:
    """One GPU for each rank, as CUDA_VISIBLE_DEVICES names it; [] where they are too few.

    Raises ParallelError for NCCL without a GPU each.
    """
    count = torch.cuda.device_count()  # asks the driver, and makes no CUDA context
    if count < world and "nccl" in backend:
        raise ParallelError(
            f'backend="{backend}" needs a GPU for each of {world} ranks; this machine shows '
            f'{count}. NCCL refuses ranks that share one. Use backend="gloo", or fewer ranks.'
        )
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = named if len(named) >= count and all(named) else [str(i) for i in range(count)]
    return names[:world] if count >= world else []


def preloaded() -> list[str]:
    """The modules here, oldest first, that a fork server may import for all its ranks."""
    return [name for name in list(sys.modules) if name.partition(".")[0] in _PRELOADED]


def _call_bytes(fn: Callable, args: Sequence) -> bytes:
    """(fn, args), pickled; modules that are no installed package go by value."""
    lent = [module for module in map(_module_of, (fn, *args)) if module is not None]
    added = []
    try:
        for module in lent:
            if module.__name__ not in cloudpickle.list_registry_pickle_by_value():
                cloudpickle.register_pickle_by_value(module)
                added.append(module)
        return dumps((fn, tuple(args)))
    except Exception as error:
        name = getattr(fn, "__name__", repr(fn))
        raise ParallelError(
            f"{name} or its arguments cannot be sent to other processes ({type(error).__name__}: "
            f"{error}). Ranks share no memory with the caller. Let the function make what cannot "
            "be copied (files, locks, generators, modules with hooks) itself."
        ) from error
    finally:
        for module in added:
            cloudpickle.unregister_pickle_by_value(module)


def _module_of(value: Any) -> ModuleType | None:
    """The module to send with a function: a test's or a script's, which ranks may not find."""
    value = getattr(value, "func", value)  # functools.partial
    module = sys.modules.get(getattr(value, "__module__", None) or "")
    if module is None or not callable(value) or module.__name__ == "__main__":
        return None
    file = getattr(module, "__file__", None) or ""
    installed = "site-packages" in file or file.startswith(os.path.dirname(os.__file__))
    ours = module.__name__.partition(".")[0] in _PRELOADED
    return None if installed or ours or not file else module


def _named_in(call: bytes) -> list[str]:
    """Modules that the pickle names: imported once in the server rather than in every rank."""
    head = call[: 2**18]  # names stand before the tensors they belong to
    return [name for name in preloaded() if name.encode() in head]


def _cells() -> dict[str, tuple]:
    """Source lines that are in no file, for a rank's traceback: notebook cells."""
    entries = {k: v for k, v in linecache.cache.items() if len(v) == 4 and not os.path.exists(k)}
    return {name: (size, None, lines, full) for name, (size, _, lines, full) in entries.items()}


def _filters() -> list[tuple]:
    """The caller's filters for warnings, as far as every process knows their categories."""
    return [f for f in warnings.filters if f[2].__module__ in ("builtins", "torch")]


def _as_dtype(integers: Tensor, dtype: torch.dtype) -> Tensor:
    return integers.view(dtype)


def _wasteful(tensor: Tensor) -> bool:
    if tensor.device.type != "cpu":
        return True
    if tensor.layout is not torch.strided:
        return False
    return tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
