"""Four of the five proofs that each committed lesson passes; the browser's is test_browser.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import build
import nbformat
import pytest
import rules
import solve

from dsv3_tutorial.learn.registry import every_exercise

ROOT = Path(__file__).parents[2]
LESSONS = sorted(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb"))
EXERCISES = {exercise.name: exercise for exercise in every_exercise()}
THREADS = 1  # the build ran on two, so nothing compared can depend on it
SHORT = {"DSV3_LIVE_SECONDS": "1"}  # no output of a live cell is compared: it has only to run

pytestmark = pytest.mark.notebooks


def said(problems):
    """The problems as one text for an assertion to show."""
    return "\n".join(problems)


def test_every_stored_output_is_what_the_cell_says_today(lesson, tmp_path):
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(lesson.parent)]
    command += ["-p", "no:cacheprovider", "-q", "--nbval", "--nbval-current-env"]
    # Of pytest's plugins nbval alone: finding and importing the others takes seconds a lesson.
    command += ["--disable-plugin-autoload", "-p", "nbval.plugin"]
    command += [f"--nbval-cell-timeout={build.CELL_SECONDS}", str(lesson)]
    variables = build.variables(str(tmp_path), threads=THREADS) | SHORT
    ended = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
    cells = len(rules.code_cells(nbformat.read(lesson, as_version=4)))
    assert re.search(rf"\b{cells} passed", ended.stdout), "nbval ran other cells than it has"


@pytest.mark.parametrize("rule", rules.ALWAYS, ids=lambda rule: rule.__name__)
def test_the_lesson_keeps_the_rule(built, rule):
    assert not said(rule(built))


def test_the_core_path_fits_a_workshop(built, lesson):
    shortest = 1 if lesson.name.startswith("00_") else rules.CORE_CELLS.start
    assert not said(rules.core_fits_a_workshop(built, shortest))


def test_every_exercise_passes_with_the_source_of_its_reference(built, lesson):
    names = {name for cell in built.cells for name in rules.stubs(cell)}
    answers = {name: EXERCISES[name].function for name in names}
    run = solve.solved(built, answers)
    build.execute(run, lesson.parent, threads=THREADS)
    assert not said(rules.executed(run))
    wrong = [v for v in solve.verdicts(run).values() if v["status"] != "passed"]
    assert not wrong
    assert set(solve.verdicts(run)) == names


def test_source_ids_and_tags_agree_with_the_built_lesson(lesson):
    source = lesson.parent / "src" / f"{lesson.stem}.py"
    assert source.exists(), f"{lesson.name} has no source: it cannot be rebuilt"
    assert not build.stale(source, lesson), "make notebooks, and commit what it writes"


def test_every_source_has_its_built_lesson():
    sources = {path.stem for path in ROOT.glob("notebooks/src/[0-9][0-9]_*.py")}
    assert sources == {path.stem for path in LESSONS}


def test_the_file_is_small_enough_for_the_web(lesson):
    assert lesson.stat().st_size <= build.SIZE_LIMIT


def test_exercises_are_what_the_registry_says(built):
    assert not said(solve.disagreements(built, EXERCISES))


def test_every_exercise_stands_in_exactly_one_lesson():
    if not LESSONS:
        pytest.skip("no lesson is built")
    cells = [cell for path in LESSONS for cell in nbformat.read(path, as_version=4).cells]
    asked = [name for cell in cells for name in rules.stubs(cell)]  # demonstrations ask nothing
    assert sorted(asked) == sorted(EXERCISES)
