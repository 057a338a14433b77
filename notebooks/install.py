"""Makes the course's virtual environment, once, from whatever Python is at hand.

Standard library alone. What was installed is recorded in .venv/dsv3-setup.json, written last: an
interrupted installation leaves no record, and the next run starts over. A CUDA build of torch that
is there already is used, not downloaded again.
"""

from __future__ import annotations  # so that an old Python reaches its refusal

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 11)
# Jupyter's news pop-up would cover a corner of the first lesson.
QUIET_JUPYTER = {
    "@jupyterlab/apputils-extension:notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    }
}


class SetupError(SystemExit):
    """Ends the command with a sentence instead of a traceback."""


def cuda_torch(python: str) -> bool:
    """Whether this Python has a CUDA build of torch that the course can use as it is."""
    ask = "import torch; print(torch.__version__); print(torch.version.cuda or '')"
    try:
        answer = subprocess.run([python, "-c", ask], capture_output=True, text=True)
    except OSError:
        return False
    lines = answer.stdout.splitlines()
    if answer.returncode or len(lines) < 2 or not lines[1]:
        return False
    # Two numbers only: a vendor's build may be 2.11.0a0+..., which pip counts as older than 2.11.
    major, minor = re.match(r"(\d+)\.(\d+)", lines[0]).groups()
    return (int(major), int(minor)) >= OLDEST_TORCH


def requirement_lines(path: Path, without: str | None = None) -> list[str]:
    """The lines of a requirements file, less one package that is there already."""
    name = re.compile(r"[A-Za-z0-9_.-]+")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if name.match(line)]
    return [line for line in lines if name.match(line).group() != without]


def digest(*paths: Path) -> str:
    """One hash of the contents of files."""
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


class Environment:
    """The virtual environment of a checkout, and the record of what is installed in it."""

    def __init__(self, root: Path):
        self.root = root
        self.folder = root / ".venv"
        self.bin = self.folder / "bin"
        self.python = str(self.bin / "python")
        self.record_file = self.folder / "dsv3-setup.json"
        # Says whose torch it is; absent in a user's own .venv, which is never cleared.
        self.ours = self.folder / "dsv3-made"

    def record(self) -> dict:
        """What the last finished installation wrote down; empty after an interrupted one."""
        try:
            return json.loads(self.record_file.read_text())
        except (OSError, ValueError):
            return {}

    def write_record(self, record: dict) -> None:
        """Replace the record in one step."""
        fresh = self.record_file.with_suffix(".new")
        fresh.write_text(json.dumps(record, indent=1, sort_keys=True))
        os.replace(fresh, self.record_file)

    def variables(self, **extra: str) -> dict[str, str]:
        """The variables that the environment's own programs run under."""
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        kept["PATH"] = os.pathsep.join([str(self.bin), kept.get("PATH", os.defpath)])
        kept["VIRTUAL_ENV"] = str(self.folder)
        # A kernel of the same name in the user's home must not shadow this environment's.
        kept["JUPYTER_PREFER_ENV_PATH"] = "1"
        return kept | extra

    def works(self) -> bool:
        """Whether its Python starts: it does not once the Python under it has gone."""
        try:
            ask = [self.python, "-c", "import pip"]
            return not subprocess.run(ask, capture_output=True, env=self.variables()).returncode
        except OSError:
            return False

    def make(self) -> None:
        """Make it afresh, on top of the Python at hand where that one has a CUDA torch."""
        inside = Path(sys.prefix).resolve() == self.folder.resolve()
        parent = sys._base_executable if inside else sys.executable
        on_top = cuda_torch(parent)
        print(
            f"Making .venv from {parent}" + (", with its CUDA torch" if on_top else ""), flush=True
        )
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.ours.write_text("the torch at hand" if on_top else "its own torch")
        builder = venv.EnvBuilder(with_pip=True, system_site_packages=on_top, symlinks=True)
        builder.create(self.folder)
        if on_top and not inside and sys.prefix != sys.base_prefix:
            self.see_packages_of(sys.path)

    def see_packages_of(self, path: list[str]) -> None:
        """Let it see the packages of the virtual environment that it was made from.

        --system-site-packages reaches only the Python under both, not the environment in between,
        where the torch is.
        """
        parents = [p for p in path if Path(p).name in ("site-packages", "dist-packages")]
        (site,) = self.folder.glob("lib/python*/site-packages")
        lines = [f"import site; site.addsitedir({p!r})" for p in parents]
        (site / "dsv3-parent.pth").write_text("\n".join(lines) + "\n")

    def keeps_torch(self) -> bool:
        """Whether its torch came with the Python at hand and must not be replaced."""
        if self.ours.exists():
            return self.ours.read_text() == "the torch at hand"
        return cuda_torch(self.python)

    def pip(self, *arguments: str) -> None:
        """Run pip, silent but for its errors, and end with a sentence if it fails."""
        command = [self.python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        if subprocess.run([*command, *arguments], cwd=self.root, env=self.variables()).returncode:
            raise SetupError(
                "The installation did not finish, so it is not marked as done. pip's reason is "
                "above; the common ones are no network, a full disk, and no torch for this Python "
                "(then name another: make lab PYTHON=python3.12). Put it right and run the same "
                "command again."
            )

    def pip_lines(self, lines: list[str]) -> None:
        """Install requirement lines."""
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            self.pip("-r", file.name)

    def install_course(self) -> None:
        """Install what a learner needs, and the package in editable form."""
        print("Installing the course, once (a minute or two, and the download) ...", flush=True)
        without = "torch" if self.keeps_torch() else None
        self.pip_lines(requirement_lines(self.root / "requirements.txt", without))
        self.pip("--no-deps", "-e", ".")
        settings = self.folder / "share/jupyter/lab/settings"
        settings.mkdir(parents=True, exist_ok=True)
        (settings / "overrides.json").write_text(json.dumps(QUIET_JUPYTER, indent=1) + "\n")

    def install_dev(self) -> None:
        """Install what tests and builds need; a CUDA torch has brought its own Triton."""
        print("Installing what the tests need ...", flush=True)
        without = "triton" if cuda_torch(self.python) else None
        self.pip_lines(requirement_lines(self.root / "requirements-dev.txt", without))


def set_up(environment: Environment, dev: bool = False) -> None:
    """Install what is missing: nothing, in a blink, when nothing changed since the last time."""
    if sys.version_info < OLDEST_PYTHON:
        raise SetupError(
            f"{sys.executable} is Python {sys.version.split()[0]}, and the course needs 3.11 or "
            "later. Install one, or name one that is there: make lab PYTHON=/path/to/python3.12"
        )
    root = environment.root
    course = [root / "requirements.txt", root / "pyproject.toml"]
    stages = {"course": (digest(*course), environment.install_course)}
    if dev:
        stages["dev"] = (digest(*course, root / "requirements-dev.txt"), environment.install_dev)
    works = environment.works()
    record = environment.record() if works else {}
    if record.get("at") != str(root):  # unfinished, broken, or carried here from another folder
        if environment.ours.exists() or not works:
            environment.make()
        record = {"at": str(root)}
    for stage, (wanted, install) in stages.items():
        if record.get(stage) != wanted:
            environment.record_file.unlink(missing_ok=True)
            install()
            record[stage] = wanted
            environment.write_record(record)
