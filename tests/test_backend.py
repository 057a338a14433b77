"""One place decides what runs; a forced backend that cannot run is an error, never another one."""

import subprocess
import sys

import pytest
import torch

from dsv3_tutorial import backend
from dsv3_tutorial.backend import BackendError, pick


class OnCuda:
    """As much of a CUDA tensor as `pick` looks at."""

    is_cuda = True
    device = torch.device("cuda", 0)


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def fresh_probes():
    backend.import_problem.cache_clear()
    yield
    backend.import_problem.cache_clear()


@pytest.fixture
def capability(monkeypatch, no_interpreter):
    """Set what torch says about the device, and let Triton be importable."""
    monkeypatch.setattr(backend, "import_problem", lambda module: None)

    def say(major, minor):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, minor))

    return say


def test_a_cpu_tensor_runs_the_reference_unless_told_otherwise():
    assert pick(torch.zeros(1)) == "reference"
    assert pick(torch.zeros(1), "reference") == "reference"


@pytest.mark.parametrize(("version", "chosen"), [((9, 0), "triton"), ((7, 5), "reference")])
def test_a_cuda_tensor_runs_triton_where_the_device_has_bf16(capability, version, chosen):
    capability(*version)
    assert pick(OnCuda()) == chosen


def test_forcing_triton_on_an_old_device_names_both_capabilities(capability):
    capability(7, 5)
    with pytest.raises(BackendError, match=r"7\.5.*8\.0.*nothing else was run.*Pass backend="):
        pick(OnCuda(), "triton")


def test_forcing_triton_on_a_cpu_says_why_and_what_to_do(no_interpreter):
    with pytest.raises(BackendError, match=r"cannot run here: .*Pass backend='reference'"):
        pick(torch.zeros(1), "triton")


def test_the_interpreter_lets_triton_be_forced_on_a_cpu(triton_interpreter):
    assert pick(torch.zeros(1), "triton") == "triton"


def test_an_unknown_backend_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'cuda' does not exist.*'triton', 'reference'"):
        pick(torch.zeros(1), "cuda")


def test_a_missing_triton_is_the_reason_given(monkeypatch, fresh_probes):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert backend.triton_problem("cuda") == "it is not installed"


def test_a_module_that_needs_another_one_names_it(monkeypatch, fresh_probes, tmp_path):
    (tmp_path / "needy.py").write_text("import surely_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    assert backend.import_problem("needy") == "it needs surely_not_there, not installed"


def test_an_import_that_raises_anything_is_a_reason_and_not_a_crash(
    monkeypatch, fresh_probes, tmp_path
):
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('Found empty package.\\nMore.')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    problem = backend.transformer_engine_problem()
    assert problem == "its import raised RuntimeError: Found empty package."


def test_a_probe_is_made_once(monkeypatch, fresh_probes):
    tried = []
    monkeypatch.setattr(backend.importlib, "import_module", tried.append)
    assert backend.import_problem("triton") is backend.import_problem("triton") is None
    assert tried == ["triton"]


def test_transformer_engine_without_a_cuda_device_is_not_usable(monkeypatch):
    monkeypatch.setattr(backend, "import_problem", lambda module: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a CUDA device" in backend.transformer_engine_problem()


def test_the_facts_give_a_reason_for_whatever_is_not_usable(no_interpreter):
    facts = backend.facts()
    assert facts.torch == torch.__version__
    if not torch.cuda.is_available():
        assert facts.device is facts.capability is None
        assert facts.triton_problem and facts.transformer_engine_problem


def test_importing_the_kernel_s_front_loads_neither_triton_nor_transformer_engine():
    code = (
        "import sys, dsv3_tutorial.backend, dsv3_tutorial.attention.decode;"
        "print([m for m in ('triton', 'transformer_engine') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
