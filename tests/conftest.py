"""What every test starts from: one thread, no network, a home of its own, Triton without a GPU.

The environment is set while this file is imported, before any test can import Triton or
huggingface_hub: both read theirs once.
"""

import atexit
import importlib.util
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

_HOME = tempfile.TemporaryDirectory(prefix="dsv3_tutorial_tests_")
atexit.register(_HOME.cleanup)
os.environ["DSV3_HOME"] = _HOME.name  # nothing of the learner's own is read or written
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MPLBACKEND", "agg")

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)  # two threads on a busy machine are slower than one


def load_module(name: str):
    """A module that lies in tests/, which is no package: under its own name, loaded once."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    load_module("triton_interpreter").install()


def longest_first(items):
    """Sort the files for several processes: the notebooks' proofs, then those with most tests.

    A file stays in one process, so the run is as long as what is left when the others have ended:
    the proofs, minutes in a few tests each, may not begin last.
    """
    tests = Counter(item.path for item in items)
    proofs = {item.path for item in items if item.get_closest_marker("notebooks")}
    items.sort(key=lambda item: (item.path not in proofs, -tests[item.path]))


def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        longest_first(items)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every test, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def triton_interpreter():
    """tests/triton_interpreter.py; skipped with the reason where kernels are not interpreted."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a GPU is here: kernels run on it, not in the interpreter")
    return load_module("triton_interpreter")


@pytest.fixture(scope="session")
def kernel_device():
    """Where Triton's kernels run in these tests: the GPU, or a CPU in the corrected interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def hopper_compile():
    """Compile kernels for an H100 with no GPU at hand: see tests/hopper_compile.py."""
    pytest.importorskip("triton", reason="Triton is not installed")
    return load_module("hopper_compile").compile_elsewhere
