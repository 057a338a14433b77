"""The course's commands, as the Makefile calls them: set up, open the lessons, prove everything.

Runs under whatever Python is at hand, so it uses the standard library alone; the work happens in
.venv.
"""

from __future__ import annotations  # so that an old Python reaches its refusal

import argparse
import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from install import Environment, SetupError, set_up

ROOT = Path(__file__).resolve().parent.parent
IMPORT_LINTER = "from importlinter.cli import lint_imports_command; lint_imports_command()"
FIRST_LESSON = "00_start_here.ipynb"
# The proofs run the lessons on one thread, the build ran them on two: nothing compared may depend
# on it. One thread also stays graceful on a busy machine.
TEST_VARIABLES = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file so that the target is there complete or not at all."""
    fresh = target.with_name(f".{target.name}.new")
    shutil.copyfile(source, fresh)
    os.replace(fresh, target)


def copy_lessons(root: Path = ROOT) -> list[str]:
    """Copy to my/ the lessons that are not there yet; what is there is the learner's own."""
    mine = root / "my"
    mine.mkdir(exist_ok=True)
    missing = [p for p in sorted(root.glob("notebooks/*.ipynb")) if not (mine / p.name).exists()]
    for lesson in missing:
        copy_whole(lesson, mine / lesson.name)
    return [lesson.name for lesson in missing]


def reset_lesson(number: str, root: Path = ROOT) -> str:
    """Put a fresh copy of one lesson into my/; the learner's goes to my/backups/, dated."""
    lessons = {p.name[:2]: p for p in sorted(root.glob("notebooks/[0-9][0-9]_*.ipynb"))}
    if number not in lessons:
        known = ", ".join(lessons) or "none is built yet"
        raise SetupError(
            f"There is no lesson {number!r}. Nothing was changed. Say which one: "
            f"make reset LESSON=01 (there are: {known})."
        )
    lesson = lessons[number]
    copy = root / "my" / lesson.name
    said = f"my/{lesson.name} is a fresh copy."
    if copy.exists():
        kept = root / "my/backups" / f"{copy.stem}.{datetime.now():%Y-%m-%d_%H-%M-%S_%f}.ipynb"
        kept.parent.mkdir(exist_ok=True)
        os.replace(copy, kept)
        said += f" Yours is kept as {kept.relative_to(root)}."
    copy.parent.mkdir(exist_ok=True)
    copy_whole(lesson, copy)
    return said


def wants_browser() -> bool:
    """Whether a browser window can be opened from here."""
    if sys.platform == "darwin":
        return "SSH_CONNECTION" not in os.environ
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def jupyter_command(environment: Environment, no_browser: bool) -> list[str]:
    """The command that serves the checkout on loopback, with Jupyter's own token."""
    first = environment.root / "my" / FIRST_LESSON
    page = f"/lab/tree/my/{FIRST_LESSON}" if first.exists() else "/lab"
    command = [environment.python, "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.root_dir={environment.root}", f"--LabApp.default_url={page}"]
    # What is left on the screen is the address, not a list of what was not found.
    command += ["--ServerApp.log_level=WARN", "--LanguageServerManager.autodetect=False"]
    if no_browser or not wants_browser():
        command.append("--no-browser")
    # A rented GPU machine's only user is often root, and Jupyter refuses root unless told.
    return command + (["--allow-root"] if os.geteuid() == 0 else [])


def run(environment: Environment, *arguments: str, **variables: str) -> int:
    """Run the environment's Python in the checkout; its exit status."""
    command = [environment.python, *arguments]
    return subprocess.run(
        command, cwd=environment.root, env=environment.variables(**variables)
    ).returncode


def open_lab(environment: Environment, options: argparse.Namespace) -> int:
    """Set up, copy what is missing, and become JupyterLab."""
    set_up(environment)
    for name in copy_lessons(environment.root):
        print(f"my/{name} is your copy of the lesson; make lab never overwrites it.")
    print("Opening JupyterLab; Ctrl-C twice ends it.", flush=True)
    command = jupyter_command(environment, options.no_browser) + options.rest
    os.chdir(environment.root)
    os.execve(command[0], command, environment.variables())


def prove(environment: Environment, options: argparse.Namespace) -> int:
    """Set up and run every test, lint and the notebooks' proofs among them, as one pytest run."""
    set_up(environment, dev=True)
    arguments = options.rest or ["tests"]
    # A thread watches for hangs: the signal's timer belongs to the exercises' own time limit.
    timing = ["--durations=15", "--durations-min=2", "--timeout=900", "--timeout-method=thread"]
    halves = ["-n", "2", "--dist", "loadfile"]  # a file's fixtures and ranks stay in one process
    halves += ["--no-loadscope-reorder"]  # tests/conftest.py sorts the files: the longest first
    return run(environment, "-m", "pytest", "-q", *halves, *timing, *arguments, **TEST_VARIABLES)


def lint(environment: Environment, options: argparse.Namespace) -> int:
    """Run ruff and import-linter; tests/test_house.py runs the same two in make test."""
    set_up(environment, dev=True)
    worst = run(environment, "-m", "ruff", "check", ".")
    worst |= run(environment, "-m", "ruff", "format", "--check", ".")
    return worst | run(environment, "-c", IMPORT_LINTER)


def build(environment: Environment, options: argparse.Namespace) -> int:
    """Rebuild the lessons."""
    set_up(environment, dev=True)
    flags = ["--live"] * options.live + ["--all"] * options.all
    return run(environment, "notebooks/build.py", *flags, *options.rest)


def package(environment: Environment, options: argparse.Namespace) -> int:
    """Run one of the package's own commands."""
    set_up(environment)
    return run(environment, "-m", "dsv3_tutorial", *options.rest)


def reset(environment: Environment, options: argparse.Namespace) -> int:
    """Start one lesson over."""
    print(reset_lesson(options.lesson, environment.root))
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command and its options."""
    parser = argparse.ArgumentParser(prog="lab.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    table = {"lab": open_lab, "test": prove, "lint": lint, "notebooks": build, "run": package}
    table["reset"] = reset
    # run's own --help belongs to the package's command behind it.
    made = {name: commands.add_parser(name, add_help=name != "run") for name in table}
    for name, action in table.items():
        made[name].set_defaults(action=action)
    made["lab"].add_argument("--no-browser", action="store_true")
    made["notebooks"].add_argument("--live", action="store_true")
    made["notebooks"].add_argument("--all", action="store_true")
    made["reset"].add_argument("lesson")
    options, rest = parser.parse_known_args(arguments)
    if rest and options.action in (lint, reset):
        parser.error(f"not understood: {' '.join(rest)}")
    return argparse.Namespace(**vars(options), rest=rest)


def main(arguments: list[str]) -> int:
    """Run one command; Ctrl-C is an end, not an error to be explained."""
    options = parse(arguments)
    try:
        return options.action(Environment(ROOT), options)
    except KeyboardInterrupt:
        print("\nInterrupted.")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
