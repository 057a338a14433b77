"""Transformer Engine: what can run where, and what is said where it cannot. None is needed."""

import contextlib
import subprocess
import sys
import types

import pytest
import torch

from dsv3_tutorial import backend
from dsv3_tutorial.fp8 import engine
from dsv3_tutorial.fp8.engine import BLOCK, MICRO, TENSOR, EngineError

E4M3 = torch.float8_e4m3fn


class FakeLinear(torch.nn.Module):
    """Takes what the real one takes, as far as the tests go, and says if it ran in FP8."""

    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        bias=True,
        params_dtype=None,
        device="cuda",
    ):
        super().__init__()
        self.given = (in_features, out_features, bias, params_dtype, device)
        self.weight = torch.nn.Parameter(torch.randn(out_features, in_features, dtype=params_dtype))
        self.recipes = []

    def forward(self, x):
        self.recipes.append(FakeEngine.active)
        return x @ self.weight.T


class FakeEngine:
    """The state of the fake module: the recipe that is active, None outside a context."""

    active = None

    @staticmethod
    @contextlib.contextmanager
    def autocast(enabled, recipe):
        FakeEngine.active = recipe if enabled else None
        yield
        FakeEngine.active = None

    @staticmethod
    def fp8_autocast(enabled, fp8_recipe):
        return FakeEngine.autocast(enabled, fp8_recipe)


@pytest.fixture
def probed_anew():
    """What cannot be imported is remembered: not from one test to the next."""
    backend.import_problem.cache_clear()
    yield
    backend.import_problem.cache_clear()


@pytest.fixture
def installed(monkeypatch, probed_anew):
    """A fake Transformer Engine in sys.modules, on a machine that looks like an H100."""
    names = ("transformer_engine", "common", "common.recipe", "pytorch")
    top, *rest = (types.ModuleType(n if n == names[0] else f"{names[0]}.{n}") for n in names)
    for module in (top, *rest):
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    _, recipe, pytorch = rest
    for name in engine.RECIPES:
        setattr(recipe, name, type(name, (), {}))
    pytorch.Linear, pytorch.autocast = FakeLinear, FakeEngine.autocast
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return pytorch, recipe


def absent(monkeypatch, raised):
    """A machine on which importing it raises this."""
    real = backend.importlib.import_module

    def import_module(name, package=None):
        if name.startswith("transformer_engine"):
            raise raised
        return real(name, package)

    monkeypatch.setattr(backend.importlib, "import_module", import_module)


# Which recipe


@pytest.mark.parametrize(
    ("capability", "cuda", "recipe", "why"),
    [
        ((9, 0), "13.0", BLOCK, "DeepSeek-V3"),
        ((9, 0), "12.9", BLOCK, "DeepSeek-V3"),
        ((9, 0), "12.8", TENSOR, "CUDA 12.9"),
        ((9, 0), "12.10", BLOCK, "DeepSeek-V3"),  # not the number 12.1
        ((8, 9), "13.0", TENSOR, "9.0"),
        ((10, 0), "13.0", MICRO, "32"),
        ((10, 3), "12.8", MICRO, "32"),
        ((12, 0), "13.0", TENSOR, "12.0"),
        ((8, 6), "13.0", None, "8.9"),
        ((8, 0), "13.0", None, "Ada"),
        ((9, 0), "11.8", None, "CUDA 11.8"),
        ((9, 0), None, None, "CUDA None"),
    ],
)
def test_the_recipe_is_the_closest_to_deepseeks_that_the_gpu_can_run(capability, cuda, recipe, why):
    name, reason = engine.recipe_name(capability, cuda)
    assert name == recipe and why in reason


# Where it is usable


def test_a_layer_runs_forward_and_backward_in_the_recipe_of_the_device(installed):
    layer = engine.linear(32, 48, device="cpu")
    assert layer.given == (32, 48, True, torch.bfloat16, "cpu")
    x = torch.randn(16, 32, dtype=torch.bfloat16, requires_grad=True)
    with engine.autocast():
        y = layer(x)
    y.sum().backward()
    layer(x)
    assert [type(recipe).__name__ for recipe in layer.recipes] == [BLOCK, "NoneType"]
    assert x.grad.shape == x.shape and layer.weight.grad.shape == (48, 32)
    assert engine.problem() is None


def test_an_older_version_has_its_context_under_another_name(installed):
    pytorch, _ = installed
    del pytorch.autocast
    pytorch.fp8_autocast = FakeEngine.fp8_autocast
    with engine.autocast(TENSOR):
        assert type(FakeEngine.active).__name__ == TENSOR


def test_a_recipe_that_this_version_lacks_is_an_error_with_the_others_named(installed):
    _, recipe = installed
    delattr(recipe, BLOCK)
    with pytest.raises(EngineError, match=f"no recipe '{BLOCK}'.*{TENSOR}"):
        engine.autocast()


def test_sides_that_its_products_do_not_take_are_refused(installed):
    with pytest.raises(EngineError, match="100 x 48 are no multiples of 16"):
        engine.linear(100, 48)


def test_the_popular_call_fails_on_the_installed_one(installed):
    with pytest.raises(TypeError, match="unexpected keyword argument 'dtype'"):
        engine.te_linear(1024, 1024, dtype=E4M3)
    assert engine.te_linear(16, 32, params_dtype=torch.float32).given[:2] == (16, 32)


def test_a_gpu_that_is_too_old_is_the_reason(installed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert "8.9 (Ada)" in engine.problem()
    with pytest.raises(EngineError, match=r"8\.9 \(Ada\).*Nothing else was run.*Fp8Linear"):
        engine.autocast()


# Where it is not


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (ModuleNotFoundError(name="transformer_engine"), "it is not installed"),
        (
            RuntimeError("Found empty `transformer-engine` meta package"),
            "RuntimeError: Found empty",
        ),
        (OSError("libnccl.so.2: cannot open"), "OSError: libnccl"),
    ],
)
def test_whatever_its_import_raises_is_the_reason(monkeypatch, probed_anew, raised, reason):
    absent(monkeypatch, raised)
    assert reason in engine.problem()
    for call in (lambda: engine.linear(16, 16), engine.autocast, lambda: engine.te_linear(16, 16)):
        with pytest.raises(EngineError, match="cannot run here"):
            call()


def test_the_popular_call_fails_without_it_too_with_the_same_words(monkeypatch, probed_anew):
    absent(monkeypatch, ModuleNotFoundError(name="transformer_engine"))
    with pytest.raises(TypeError) as failed:
        engine.te_linear(1024, 1024, bias=True, dtype=E4M3)
    assert str(failed.value) == "Linear.__init__() got an unexpected keyword argument 'dtype'"


def test_the_documented_signature_has_a_dtype_for_its_parameters_alone(monkeypatch, probed_anew):
    absent(monkeypatch, ModuleNotFoundError(name="transformer_engine"))
    parameters = engine.linear_signature().parameters
    assert "dtype" not in parameters and parameters["params_dtype"].default is None
    assert parameters["in_features"].default is parameters["in_features"].empty
    assert list(parameters)[2] == "sequence_parallel"  # not bias
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def test_the_call_that_transformer_engine_documents_is_no_type_error(monkeypatch, probed_anew):
    absent(monkeypatch, ModuleNotFoundError(name="transformer_engine"))
    with pytest.raises(EngineError):
        engine.te_linear(1024, 1024, bias=True, params_dtype=torch.bfloat16)


def test_importing_the_module_imports_no_transformer_engine():
    code = (
        "import sys; import dsv3_tutorial.fp8.engine; "
        "print(any(name.startswith('transformer_engine') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.gpu
def test_the_real_one_runs_forward_and_backward_in_fp8():
    if engine.problem() is not None:
        pytest.skip(engine.problem())
    layer = engine.linear(256, 384, bias=False)
    x = torch.randn(128, 256, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    with engine.autocast():
        y = layer(x)
    y.sum().backward()
    exact = x.float() @ layer.weight.float().T
    error = ((y.float() - exact).norm() / exact.norm()).item()
    assert 0.01 < error < 0.08  # eight bits were used, and used well
    assert x.grad.isfinite().all() and layer.weight.grad.isfinite().all()
    with pytest.raises(TypeError, match="dtype"):
        engine.te_linear(256, 384, dtype=E4M3)
