"""Setting up and opening the course: nothing lost, nothing half done, nothing replaced."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import install
import lab
import pytest

ROOT = Path(__file__).parents[1]


def run(*command, **options):
    """Run a command; what it said and how it ended."""
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture
def checkout(tmp_path):
    """A small checkout, in a folder with a space: the commands, two lessons and a package."""
    root = tmp_path / "a checkout"
    (root / "notebooks").mkdir(parents=True)
    for name in ("Makefile", "notebooks/lab.py", "notebooks/install.py", "requirements.txt"):
        shutil.copy(ROOT / name, root / name)
    for name in ("requirements-dev.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    for number in ("00_start_here", "01_second"):
        (root / f"notebooks/{number}.ipynb").write_text(f"as committed: {number}")
    return root


def test_missing_lessons_are_copied_and_edited_ones_left_alone(checkout):
    assert lab.copy_lessons(checkout) == ["00_start_here.ipynb", "01_second.ipynb"]
    mine = checkout / "my/01_second.ipynb"
    mine.write_text("my answers")
    (checkout / "notebooks/01_second.ipynb").write_text("a newer lesson")
    (checkout / "my/00_start_here.ipynb").unlink()
    assert lab.copy_lessons(checkout) == ["00_start_here.ipynb"]
    assert mine.read_text() == "my answers"
    there = sorted(path.name for path in (checkout / "my").iterdir())
    assert there == ["00_start_here.ipynb", "01_second.ipynb"]


def make(checkout, *arguments):
    return run("make", "-s", *arguments, f"PYTHON={sys.executable}", cwd=checkout)


def test_reset_gives_a_fresh_copy_and_keeps_every_earlier_one(checkout):
    lab.copy_lessons(checkout)
    mine = checkout / "my/01_second.ipynb"
    for answers in ("first answers", "second answers"):
        mine.write_text(answers)
        ended = make(checkout, "reset", "LESSON=01")
        assert ended.returncode == 0, ended.stderr
        assert "Yours is kept as my/backups/01_second." in ended.stdout
        assert mine.read_text() == "as committed: 01_second"
    kept = sorted((checkout / "my/backups").iterdir())
    assert [path.read_text() for path in kept] == ["first answers", "second answers"]


@pytest.mark.parametrize("lesson", ["", "9", "07", "../01"])
def test_reset_of_no_known_lesson_changes_nothing_and_says_what_to_type(checkout, lesson):
    lab.copy_lessons(checkout)
    ended = make(checkout, "reset", f"LESSON={lesson}")
    assert ended.returncode != 0
    assert "make reset LESSON=01 (there are: 00, 01)" in ended.stderr
    assert not (checkout / "my/backups").exists()


class Pretended(install.Environment):
    """An environment that writes down what would be installed instead of installing it."""

    def __init__(self, root, fails_at=None):
        super().__init__(root)
        self.asked, self.fails_at = [], fails_at

    def works(self):
        return self.folder.exists()

    def make(self):
        self.asked.append("make")
        self.folder.mkdir(exist_ok=True)
        self.ours.write_text("its own torch")

    def pip(self, *arguments):
        self.asked.append("pip")
        if self.asked.count("pip") == self.fails_at:
            raise install.SetupError("interrupted")

    def pip_lines(self, lines):
        self.lines = lines
        self.pip()


def test_a_second_set_up_installs_nothing(checkout):
    first, second = Pretended(checkout), Pretended(checkout)
    install.set_up(first)
    assert first.asked == ["make", "pip", "pip"]
    install.set_up(second)
    assert second.asked == []
    settings = checkout / ".venv/share/jupyter/lab/settings/overrides.json"
    assert json.loads(settings.read_text()) == install.QUIET_JUPYTER


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_an_interrupted_installation_leaves_no_record_and_starts_over(checkout, fails_at):
    with pytest.raises(install.SetupError):
        install.set_up(Pretended(checkout, fails_at), dev=True)
    again = Pretended(checkout)
    assert again.record() == {}
    install.set_up(again, dev=True)
    assert again.asked[-1] == "pip" and set(again.record()) == {"at", "course", "dev"}


@pytest.mark.parametrize("name", ["requirements.txt", "pyproject.toml"])
def test_changed_requirements_are_installed_into_the_environment_that_is_there(checkout, name):
    install.set_up(Pretended(checkout))
    (checkout / name).write_text((checkout / name).read_text() + "\n")
    again = Pretended(checkout)
    install.set_up(again)
    assert again.asked == ["pip", "pip"]


def test_a_checkout_that_was_moved_gets_a_new_environment(checkout):
    install.set_up(Pretended(checkout))
    moved = checkout.rename(checkout.with_name("moved"))
    again = Pretended(moved)
    install.set_up(again)
    assert again.asked[0] == "make"


def test_an_environment_of_the_users_own_is_used_and_never_cleared(checkout, monkeypatch):
    monkeypatch.setattr(install, "cuda_torch", lambda python: True)
    (checkout / ".venv").mkdir()
    environment = Pretended(checkout)
    install.set_up(environment, dev=True)
    assert "make" not in environment.asked
    assert not [line for line in environment.lines if line.startswith("triton")]


@pytest.mark.parametrize("torch", ["the torch at hand", "its own torch"])
def test_a_torch_at_hand_is_not_replaced(checkout, torch):
    environment = Pretended(checkout)
    environment.make()
    environment.ours.write_text(torch)
    environment.install_course()
    named = [line for line in environment.lines if line.startswith("torch")]
    assert bool(named) == (torch == "its own torch")


@pytest.mark.parametrize(
    ("answer", "usable"),
    [
        ("echo 2.11.0+cu130; echo 13.0", True),
        ("echo 2.11.0a0+f2e8; echo 13.1", True),  # a vendor's build, older than 2.11 only to pip
        ("echo 3.0.1; echo 14.0", True),
        ("echo 2.10.1+cu128; echo 12.8", False),
        ("echo 2.13.0+cpu; echo", False),
        ("exit 1", False),
    ],
)
def test_only_a_recent_cuda_build_counts_as_a_torch_at_hand(tmp_path, answer, usable):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{answer}\n")
    python.chmod(0o755)
    assert install.cuda_torch(str(python)) is usable


@pytest.mark.slow
def test_the_torch_of_a_virtual_environment_at_hand_is_seen_from_ours(checkout):
    parent = checkout.parent / "parent"
    run(sys.executable, "-m", "venv", "--without-pip", str(parent))
    (site,) = parent.glob("lib/python*/site-packages")
    (site / "torch").mkdir()
    text = (
        "import types\n__version__ = '2.11.0+cu130'\nversion = types.SimpleNamespace(cuda='13')\n"
    )
    (site / "torch/__init__.py").write_text(text)
    code = "from pathlib import Path; from install import Environment as E; E(Path('..')).make()"
    made = run(str(parent / "bin/python"), "-c", code, cwd=checkout / "notebooks")
    assert "with its CUDA torch" in made.stdout, made.stderr
    ask = "import torch, pip; print(torch.__version__)"
    assert "2.11.0+cu130" in run(str(checkout / ".venv/bin/python"), "-c", ask).stdout


def test_a_python_that_is_too_old_is_refused_with_what_to_type(checkout, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    with pytest.raises(install.SetupError, match=r"needs 3\.11 or later.*make lab PYTHON="):
        install.set_up(Pretended(checkout))


def test_jupyter_stays_on_loopback_with_its_own_token(checkout, monkeypatch):
    lab.copy_lessons(checkout)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    command = lab.jupyter_command(install.Environment(checkout), no_browser=False)
    assert "--ServerApp.ip=127.0.0.1" in command and "--no-browser" not in command
    assert "--LabApp.default_url=/lab/tree/my/00_start_here.ipynb" in command
    assert not [part for part in command if "token" in part.lower() or "password" in part.lower()]
    assert "--no-browser" in lab.jupyter_command(install.Environment(checkout), no_browser=True)
