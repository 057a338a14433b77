"""NVIDIA's Transformer Engine behind a small interface: FP8 layers where it can run, else why not.

The course never needs it: it cannot be installed without CUDA, and nothing here imports it before
it is asked for. FP8 is chosen by a context and a recipe around the forward pass, not by a layer's
dtype: the weights stay BF16 or float32, and are quantised in every forward. Its recipe
Float8BlockScaling is DeepSeek-V3's: 1 x 128 for inputs and gradients, 128 x 128 for weights, E4M3
throughout, but with scales that are powers of two everywhere.
"""

import importlib
import inspect
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from dsv3_tutorial import backend

BLOCK, MICRO, TENSOR = "Float8BlockScaling", "MXFP8BlockScaling", "DelayedScaling"
RECIPES = (BLOCK, "Float8CurrentScaling", TENSOR, MICRO)
ALIGNED = 16  # both sides of its FP8 products are multiples of this

# The constructor of transformer_engine.pytorch.Linear, as its source has it. `dtype` is in none of
# the versions read, and none takes **kwargs; the third in order is not `bias`.
LINEAR_SOURCE = "transformer_engine/pytorch/module/linear.py, class Linear, 2.20.2"
LINEAR_VERSIONS = ("1.13.0", "2.9.0", "2.20.2")
LINEAR_PARAMETERS: dict[str, Any] = {
    "in_features": inspect.Parameter.empty,
    "out_features": inspect.Parameter.empty,
    "sequence_parallel": False,
    "fuse_wgrad_accumulation": False,
    "tp_group": None,
    "tp_size": 1,
    "get_rng_state_tracker": None,
    "rng_tracker_name": None,
    "init_method": None,
    "bias": True,
    "return_bias": False,
    "params_dtype": None,
    "parallel_mode": None,
    "parameters_split": None,
    "device": "cuda",
    "ub_overlap_ag": False,
    "ub_overlap_rs": False,
    "ub_overlap_rs_dgrad": False,
    "ub_bulk_dgrad": False,
    "ub_bulk_wgrad": False,
    "ub_name": None,
    "delay_wgrad_compute": False,
    "symmetric_ar_type": None,
    "save_original_input": False,
    "name": None,
}


class EngineError(RuntimeError):
    """Transformer Engine was asked for what it cannot do here: why, and what to do."""


def problem() -> str | None:
    """Why no FP8 layer of Transformer Engine can run here, in words; None where one can."""
    found = backend.transformer_engine_problem()
    if found is not None:
        return found
    name, why = recipe_name(torch.cuda.get_device_capability(), torch.version.cuda)
    return why if name is None else None


def recipe_name(capability: tuple[int, int], cuda: str | None) -> tuple[str | None, str]:
    """The recipe closest to DeepSeek's that a GPU can run, and why this one.

    capability of the device, the CUDA that torch was built for -> a name in RECIPES, or None with
    the reason. Per tensor needs Ada (8.9), scales by block Hopper (9.0) and CUDA 12.9, whose cuBLAS
    is the first to have that product; Blackwell's (10.x) tensor cores take a scale for every 32.
    """
    have, built_for = ".".join(map(str, capability)), _version(cuda)
    if capability < (8, 9):
        return None, f"the device has compute capability {have}, and FP8 needs 8.9 (Ada) or newer"
    if built_for < (12, 1):
        return None, f"torch was built for CUDA {cuda}, and FP8 needs 12.1 or newer"
    if capability < (9, 0):
        return TENSOR, f"per tensor: block scaling needs compute capability 9.0, this has {have}"
    if capability < (10, 0) and built_for < (12, 9):
        return TENSOR, f"per tensor: block scaling needs CUDA 12.9, torch was built for {cuda}"
    if capability < (10, 0):
        return BLOCK, "tiles of 1 x 128 and blocks of 128 x 128, as DeepSeek-V3 was trained"
    if capability < (12, 0):
        return MICRO, "tiles of 1 x 32, which Blackwell's tensor cores scale themselves"
    return TENSOR, f"per tensor: its scaled products are not for compute capability {have} yet"


def linear(
    in_features: int,
    out_features: int,
    bias: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> nn.Module:
    """Transformer Engine's Linear with weights in `dtype`: (..., in) -> (..., out).

    It computes in FP8 where its forward runs inside `autocast()`, in `dtype` elsewhere; inputs
    have a multiple of 16 rows. Raises EngineError where it cannot run, or a side does not fit.
    """
    te = _engine()
    wrong = [side for side in (in_features, out_features) if side % ALIGNED]
    if wrong:
        raise EngineError(
            f"Sides of {in_features} x {out_features} are no multiples of {ALIGNED}. Transformer "
            "Engine's FP8 products take no others. Pad the layer, or use fp8.linear.Fp8Linear."
        )
    return te.Linear(in_features, out_features, bias=bias, params_dtype=dtype, device=device)


def autocast(recipe: str | None = None) -> AbstractContextManager:
    """Within it, forwards of Transformer Engine's layers run in FP8; their backwards then do too.

    recipe: a name in RECIPES; None takes `recipe_name`'s for this device. Raises EngineError where
    Transformer Engine cannot run, or has no such recipe.
    """
    te = _engine()
    name = recipe or recipe_name(torch.cuda.get_device_capability(), torch.version.cuda)[0]
    made = getattr(importlib.import_module("transformer_engine.common.recipe"), name, None)
    if made is None:
        raise EngineError(
            f"Transformer Engine has no recipe {name!r} here. Another would scale differently from "
            f"what was asked for. Choose one of {', '.join(RECIPES)}, or install a newer version."
        )
    if hasattr(te, "autocast"):
        return te.autocast(enabled=True, recipe=made())
    return te.fp8_autocast(enabled=True, fp8_recipe=made())  # older versions


def linear_signature() -> inspect.Signature:
    """What te.Linear takes, installed or not: the installed one's, else that of LINEAR_SOURCE."""
    if backend.transformer_engine_problem() is None:
        return inspect.signature(_pytorch().Linear)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [inspect.Parameter(name, kind, default=d) for name, d in LINEAR_PARAMETERS.items()]
    )


def te_linear(*args: Any, **kwargs: Any) -> nn.Module:
    """te.Linear(*args, **kwargs) as one would write it; arguments it has not fail as they do there.

    Where it is not installed the arguments are bound to its documented signature, so that a wrong
    one raises the same TypeError everywhere; right ones then raise EngineError.
    """
    try:
        linear_signature().bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"Linear.__init__() {error}") from None
    return _engine().Linear(*args, **kwargs)


def _engine() -> Any:
    """The module transformer_engine.pytorch, imported now, or EngineError."""
    found = problem()
    if found is not None:
        raise EngineError(
            f"Transformer Engine cannot run here: {found}. Nothing else was run in its place. "
            "Use fp8.linear.Fp8Linear, which runs everywhere; to install: requirements-gpu.txt."
        )
    return _pytorch()


def _pytorch() -> Any:
    return importlib.import_module("transformer_engine.pytorch")


def _version(cuda: str | None) -> tuple[int, ...]:
    """ "12.9" as (12, 9), which compares as versions do; (0,) for a torch without CUDA."""
    return tuple(int(part) for part in (cuda or "0").split(".")[:2])
