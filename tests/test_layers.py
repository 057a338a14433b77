"""The house itself: imports point down, names say something, files and functions stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dsv3_tutorial

PACKAGE = Path(dsv3_tutorial.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "_data" not in path.parts)
EMPTY_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}

names = [path.relative_to(PACKAGE).as_posix() for path in MODULES]
each_module = pytest.mark.parametrize("path", MODULES, ids=names)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def lint(folder: Path, config: Path) -> subprocess.CompletedProcess:
    code = "from importlinter.cli import lint_imports_command as run; run()"
    words = [sys.executable, "-c", code, "--config", str(config), "--no-cache"]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="installed, not a checkout")
def test_imports_only_point_down():
    ran = lint(ROOT, ROOT / "pyproject.toml")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "1 kept, 0 broken" in ran.stdout


def test_the_linter_would_see_an_import_that_points_up(tmp_path):
    package = tmp_path / "house"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "roof.py").write_text("")
    (package / "floor.py").write_text("from house import roof\n")
    (tmp_path / "rules.toml").write_text(
        '[tool.importlinter]\nroot_package = "house"\n'
        '[[tool.importlinter.contracts]]\nname = "down"\ntype = "layers"\n'
        'containers = ["house"]\nlayers = ["roof", "floor"]\n'
    )
    ran = lint(tmp_path, tmp_path / "rules.toml")
    assert ran.returncode != 0 and "house.floor -> house.roof" in ran.stdout


@each_module
def test_a_module_is_named_for_its_idea(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    assert not EMPTY_NAMES & set(parts)


@each_module
def test_a_file_is_one_idea_of_at_most_250_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 250


@each_module
def test_a_function_is_at_most_50_lines_unless_it_is_a_kernel(path):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in ast.walk(tree(path)) if isinstance(node, kinds)]
    long = [
        f"{function.name}: {function.end_lineno - function.lineno + 1} lines"
        for function in functions
        if function.end_lineno - function.lineno >= 50 and not is_kernel(function)
    ]
    assert long == []


def is_kernel(function: ast.FunctionDef) -> bool:
    decorators = (ast.unparse(decorator) for decorator in function.decorator_list)
    return any(name.split("(")[0] in ("triton.jit", "jit") for name in decorators)


@each_module
def test_a_module_begins_with_what_it_is_for(path):
    assert ast.get_docstring(tree(path)), "no docstring"


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if path.name == "__init__.py" and "learn" not in path.parts],
    ids=lambda path: path.parent.name,
)
def test_an_init_holds_only_a_docstring(path):
    body = tree(path).body
    assert len(body) == 1 and ast.get_docstring(tree(path))


def test_importing_the_package_imports_nothing():
    code = "import sys, dsv3_tutorial; print(*[m for m in sys.modules if 'dsv3_tutorial.' in m])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.strip() == ""
