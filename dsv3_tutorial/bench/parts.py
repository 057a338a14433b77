"""The parts a machine lends to the course: torch, a GPU, Triton and more, each usable or why not.

A part is {usable, version, detail, reason, do}: where it is not usable, what is wrong and what to
do. Each probe survives a broken installation, since that is what it is there to find.
"""

import shutil
import subprocess
from importlib import metadata
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
Part = dict[str, Any]


def probe() -> dict[str, Part]:
    """Every part by its name. Loads torch, Triton and Transformer Engine where they are installed.

    Triton's part says besides whether it `emulates`: whether its interpreter can run here.
    """
    kernels, triton_loads, problem = _kernels()
    return {
        "torch": _torch(kernels, problem),
        "GPU": _gpu(kernels),
        "Triton": {**_triton(kernels, triton_loads), "emulates": triton_loads},
        "Transformer Engine": _transformer_engine(kernels),
        "JupyterLab": _jupyterlab(),
        "Chromium": _chromium(),
    }


def _kernels() -> tuple[Any, bool, str | None]:
    """backend.facts(), whether Triton loads, or why neither can be had: a broken torch raises."""
    try:
        from dsv3_tutorial import backend

        return backend.facts(), backend.import_problem("triton") is None, None
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        return None, False, f"{type(error).__name__}: {first_line}"


def _part(
    usable: bool, version: str | None, detail: str = "", reason: str = "", do: str = ""
) -> Part:
    return {"usable": usable, "version": version, "detail": detail, "reason": reason, "do": do}


def _torch(kernels: Any, problem: str | None) -> Part:
    if problem:
        do = "Install torch again into this environment: make lab, or see README."
        return _part(False, _version("torch"), reason=f"it does not load ({problem})", do=do)
    detail = f"built for CUDA {kernels.cuda}" if kernels.cuda else "built for the CPU"
    return _part(True, kernels.torch, detail)


def _gpu(kernels: Any) -> Part:
    seen = _nvidia_smi()
    if kernels and kernels.device:
        capability = ".".join(map(str, kernels.capability))
        detail = f"{kernels.device}, compute capability {capability}, CUDA {kernels.cuda}"
        return _part(True, None, f"{detail}{f'; driver sees: {seen}' if seen else ''}")
    if not seen:
        do = "Nothing to do: every lesson runs on the CPU, and shows recorded GPU numbers."
        return _part(False, None, reason="no NVIDIA GPU answers here", do=do)
    without = kernels is not None and kernels.cuda is None
    reason = "torch was built without CUDA" if without else "torch does not reach it"
    do = "Install a CUDA build of torch that this driver supports (README)."
    return _part(False, None, seen, f"{seen} is there, but {reason}", do)


def _triton(kernels: Any, loads: bool) -> Part:
    if kernels is None:
        return _part(
            False, _version("triton"), reason="torch does not load", do="Mend torch first."
        )
    if kernels.triton_problem is None:
        interpreted = kernels.device is None
        return _part(True, kernels.triton, "in its interpreter, slowly" if interpreted else "")
    if loads and kernels.device is None:
        do = "Nothing to do: PyTorch's reference runs instead."
        return _part(False, kernels.triton, reason="its kernels need a CUDA device", do=do)
    do = "On a CPU nothing to do; on a GPU, install the Triton that belongs to this torch."
    return _part(False, kernels.triton, reason=kernels.triton_problem, do=do)


def _transformer_engine(kernels: Any) -> Part:
    if kernels is None:
        version = _version("transformer_engine")
        return _part(False, version, reason="torch does not load", do="Mend torch first.")
    problem, version = kernels.transformer_engine_problem, kernels.transformer_engine
    if problem is None:
        return _part(True, version)
    do = "Nothing to do: it needs a CUDA device, and every lesson runs without it."
    if kernels.device:
        do = "Optional: pip install -r requirements-gpu.txt"
    return _part(False, version, reason=problem, do=do)


def _jupyterlab() -> Part:
    version = _version("jupyterlab")
    if version:
        return _part(True, version)
    return _part(False, None, reason="it is not installed", do="make lab installs and opens it.")


def _chromium() -> Part:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    missing = [] if browser else ["no Chromium on the PATH"]
    if _version("playwright") is None:
        missing.append("Playwright is not installed")
    detail = "drives the browser tests"
    do = "Only the browser tests need it: install chromium, and requirements-dev.txt."
    if missing:
        return _part(False, None, reason=" and ".join(missing), do=do)
    return _part(True, _version("playwright"), detail)


def _nvidia_smi() -> str | None:
    """What the driver itself says of its first GPU: name, memory, driver version."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return (run.stdout.strip().splitlines() or [None])[0] if run.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
