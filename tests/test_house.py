"""The house around the code: style, layers, pins, commands, what is packed and what is said."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import install
import pytest

ROOT = Path(__file__).parents[1]
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s;]+)")


def run(*command, **options):
    """Run a command in the checkout; what it said and how it ended."""
    options.setdefault("cwd", ROOT)
    return subprocess.run(command, capture_output=True, text=True, **options)


def pins(lines):
    """Name and version of each exactly pinned requirement."""
    return dict(PIN.match(line).groups() for line in lines)


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_has_nothing_to_say(arguments):
    ended = run(sys.executable, "-m", "ruff", *arguments, ".")
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_every_requirement_is_pinned_and_the_files_agree():
    course = pins(install.requirement_lines(ROOT / "requirements.txt"))
    dev = pins(install.requirement_lines(ROOT / "requirements-dev.txt"))
    assert not set(course) & set(dev)
    conda = dict(
        re.findall(r"^\s+- ([\w.-]+)==(\S+)$", (ROOT / "environment.yml").read_text(), re.M)
    )
    assert conda == {name: version for name, version in course.items() if name != "torch"}
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {re.match(r"[\w.-]+", line)[0] for line in needed} <= set(course) | set(dev)


def test_the_package_imports_nothing_that_its_metadata_does_not_ask_for():
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    asked = {re.match(r"[\w.-]+", line)[0] for line in needed}
    asked |= {"dsv3_tutorial", "IPython", "PIL"}  # IPython comes with ipywidgets; PIL is pillow
    asked |= {"triton", "transformer_engine", "transformers"}  # looked for, never needed
    for path in (ROOT / "dsv3_tutorial").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            tops = {name.partition(".")[0] for name in names}
            assert tops <= asked | set(sys.stdlib_module_names), path.relative_to(ROOT)


def test_what_is_installed_here_is_what_the_pins_say():
    from importlib.metadata import version

    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("not run from the checkout's own .venv (make test does)")
    files = [ROOT / "requirements.txt", ROOT / "requirements-dev.txt"]
    wanted = pins(line for file in files for line in install.requirement_lines(file))
    apart = {"torch", "triton"}  # a CUDA build at hand is kept, with its own Triton
    assert {n: version(n) for n in wanted if n not in apart} == {
        n: v for n, v in wanted.items() if n not in apart
    }


def test_ci_runs_make_test_and_can_be_executed():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert re.findall(r"^make \w+", script.read_text(), re.M) == ["make test"]
    assert run("bash", "-n", str(script)).returncode == 0


def test_every_command_that_a_page_names_is_in_the_makefile():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    explained = set(re.findall(r"^#   make ([a-z]+)", (ROOT / "Makefile").read_text(), re.M))
    assert explained == targets
    for page in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"(?:`|^|&& )make ([a-z]+)", (ROOT / page).read_text(), re.M))
        assert named <= targets, page
    assert {"lab", "test"} <= set(re.findall(r"make ([a-z]+)", (ROOT / "README.md").read_text()))


def shipped_texts():
    """Each text file that is tracked or would be, with its content."""
    listed = run("git", "ls-files", "-co", "--exclude-standard", "-z")
    if listed.returncode:
        pytest.skip("not a git checkout, so what is shipped is not known")
    for name in filter(None, listed.stdout.split("\0")):
        try:
            yield name, (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue


def test_no_shipped_text_names_a_folder_of_the_machine_it_was_written_on():
    folders = ["root/", "work/", "tmp/v/", "tmp/bash", "opt/pypi", "opt/wheels", "home/user"]
    folders = re.compile("|".join(rf"(?<![\w.])/{folder}" for folder in folders))
    found = [f"{name}: {m[0]}" for name, text in shipped_texts() for m in folders.finditer(text)]
    assert not found


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_its_data_and_nothing_else(tmp_path):
    builder = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    for kind in ("standard", "editable"):
        list(builder.WheelBuilder(str(ROOT)).build(versions=[kind], directory=str(tmp_path / kind)))
    (wheel,) = (tmp_path / "standard").iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    data = {p.relative_to(ROOT / "data").as_posix() for p in (ROOT / "data").rglob("*.json")}
    assert {f"dsv3_tutorial/_data/{name}" for name in data} <= set(names)
    assert "dsv3_tutorial/config.py" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dsv3_tutorial"}
    (editable,) = (tmp_path / "editable").iterdir()
    copied = [name for name in zipfile.ZipFile(editable).namelist() if "_data" in name]
    assert copied == ["dsv3_tutorial/_data/GLOSSARY.md"]  # one file, which nothing there reads
