"""Which implementation runs a tensor, and what this machine can run at all.

Every kernel has two sides under one name: a PyTorch reference that runs anywhere, and Triton where
the tensor is on CUDA. `pick` chooses between them in one place. Importing this imports neither
Triton nor Transformer Engine: each is probed when first asked for, once, and the answer is kept.
"""

import functools
import importlib
import os
import warnings
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import Tensor

BACKENDS = ("triton", "reference")
_OLDEST = (8, 0)  # Ampere: the first tensor cores that multiply BF16


class BackendError(RuntimeError):
    """A forced backend cannot run here: why, why nothing else was run instead, and what to do."""


@dataclass(frozen=True)
class Facts:
    """What this machine runs kernels with; `*_problem` is None where the thing is usable."""

    torch: str
    cuda: str | None  # the CUDA version torch was built for
    device: str | None
    capability: tuple[int, int] | None
    triton: str | None
    triton_problem: str | None
    transformer_engine: str | None
    transformer_engine_problem: str | None


def pick(tensor: Tensor, backend: str | None = None) -> str:
    """The backend that runs this tensor: the fastest that can, or the one that was forced.

    None gives "triton" for a CUDA tensor where Triton is usable, else "reference". Forcing one that
    cannot run raises BackendError: a benchmark that fell back in silence would measure the other.
    """
    if backend is None:
        usable = tensor.is_cuda and triton_problem(tensor.device) is None
        return "triton" if usable else "reference"
    if backend not in BACKENDS:
        raise ValueError(
            f"backend {backend!r} does not exist. No implementation would run. "
            f"Pass one of {BACKENDS}, or None to let the tensor's device decide."
        )
    problem = triton_problem(tensor.device) if backend == "triton" else None
    if problem is not None:
        raise BackendError(
            f"backend='triton' cannot run here: {problem}. It was forced, so nothing else was run "
            "in its place. Pass backend='reference', or None to let the tensor's device decide."
        )
    return backend


def triton_problem(device: torch.device | str) -> str | None:
    """Why Triton cannot run a tensor on this device, in words; None where it can."""
    device = torch.device(device)
    problem = import_problem("triton")
    if problem is not None or triton_is_interpreted():
        return problem
    if device.type != "cuda":
        return f"the tensor is on {device.type!r}, and Triton's kernels run on CUDA devices"
    return _capability_problem(torch.cuda.get_device_capability(device))


def triton_is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on any device and slowly: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


def transformer_engine_problem() -> str | None:
    """Why Transformer Engine cannot run here, in words; None where it can.

    Its name on PyPI installs an empty package whose import raises RuntimeError, and a build for
    another CUDA fails with OSError: whatever the import raises is the reason.
    """
    problem = import_problem("transformer_engine.pytorch")
    if problem is None and not torch.cuda.is_available():
        return "it needs a CUDA device, and torch sees none"
    return problem


def facts() -> Facts:
    """What `doctor` reports about this machine's kernels; loads what it reports on."""
    cuda = torch.cuda.is_available()
    return Facts(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        device=torch.cuda.get_device_name() if cuda else None,
        capability=torch.cuda.get_device_capability() if cuda else None,
        triton=_version("triton"),
        triton_problem=triton_problem("cuda") if cuda else triton_problem("cpu"),
        transformer_engine=_version("transformer_engine"),
        transformer_engine_problem=transformer_engine_problem(),
    )


@functools.cache
def import_problem(module: str) -> str | None:
    """Why a module cannot be imported, in words, or None; tried once."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        missing = error.name or top
        return "it is not installed" if missing == top else f"it needs {missing}, not installed"
    except Exception as error:  # a broken installation may raise anything
        first_line = (str(error).strip() or "no message").splitlines()[0]
        return f"its import raised {type(error).__name__}: {first_line}"
    return None


def _capability_problem(capability: tuple[int, int]) -> str | None:
    if capability >= _OLDEST:
        return None
    have, need = (f"{major}.{minor}" for major, minor in (capability, _OLDEST))
    return f"the device has compute capability {have}, and our kernels need {need} (BF16)"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
