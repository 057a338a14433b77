"""Grading submitted notebooks: run again, and every passed function checked from its source.

A stored verdict counts for nothing. The notebook is executed in a fresh kernel; what it then
reports as passed is believed only after the function, taken out of the file, has passed in a clean
process. A printed or displayed imitation of a verdict therefore earns nothing. What cannot be told
apart is an answer that was copied, since the course shows its solutions.
"""

import csv
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsv3_tutorial.learn.registry import concepts, load
from dsv3_tutorial.learn.show import MIME
from dsv3_tutorial.learn.submission import code_cells, demonstrates, statements, submitted
from dsv3_tutorial.learn.verdict import LABELS, NOT_ATTEMPTED, NOT_YET, PASSED

UNREADABLE = "unreadable"
_CELL_SECONDS = 300
_CHECK_SECONDS = 600


@dataclass(frozen=True)
class Row:
    """One exercise of one file. status as in a verdict, or `unreadable` for the whole file."""

    file: str
    exercise: str
    status: str
    message: str


def grade(files: Sequence[str | Path]) -> list[Row]:
    """The rows of all files, in their order: every exercise of each concept that a file touches."""
    return [row for file in files for row in _grade_file(Path(file))]


def to_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV with a header line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["file", "exercise", "status", "message"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: _harmless(v) for k, v in asdict(row).items()} for row in rows)
    return text.getvalue()


def main(arguments: Sequence[str]) -> int:
    """`grade FILES... [--csv]`. Exit status: 0, or 2 when a file could not be read."""
    files = [argument for argument in arguments if argument != "--csv"]
    rows = grade(files)
    if "--csv" in arguments:
        print(to_csv(rows), end="")
    else:
        for row in rows:
            label = LABELS.get(row.status, row.status.upper())
            print(f"{row.file}  {row.exercise}  [{label}] {row.message}")
        passed = sum(row.status == PASSED for row in rows)
        print(f"{passed} of {len(rows)} exercises passed")
    return 2 if any(row.status == UNREADABLE for row in rows) else 0


def _grade_file(file: Path) -> list[Row]:
    try:
        notebook = json.loads(file.read_text(encoding="utf-8"))
        if notebook.get("nbformat") != 4 or not isinstance(notebook.get("cells"), list):
            raise ValueError("not a version 4 notebook")
        found = list(submitted(statements(code_cells(notebook))))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: this is no notebook that can be read"
        return [Row(file.name, "", UNREADABLE, reason)]
    with tempfile.TemporaryDirectory(prefix="dsv3-grade-") as folder:
        reported = _reported(_rerun(notebook, folder))
    with tempfile.TemporaryDirectory(prefix="dsv3-grade-") as folder:  # clean of the run's files
        checked = {row["exercise"]: row for row in _check_again(file, folder)}
    touched = {name.partition(".")[0] for name in found}
    missing = [name for concept in concepts() if concept in touched for name in load(concept)]
    names = list(dict.fromkeys([*found, *missing]))
    silent = {n: {"status": NOT_YET, "message": "its check ended early"} for n in found}
    checked = {**silent, **checked}
    return [_row(file.name, name, reported.get(name), checked.get(name)) for name in names]


def _row(file: str, name: str, reported: dict | None, checked: dict | None) -> Row:
    if checked is None:
        return Row(file, name, NOT_ATTEMPTED, "there is no cell for it in the file")
    if checked["status"] == PASSED and (reported or {}).get("status") != PASSED:
        if reported is None:
            return Row(file, name, NOT_YET, "its cell gave no verdict when the notebook was run")
        return Row(file, name, reported["status"], reported["message"])
    return Row(file, name, checked["status"], checked["message"])


def _environment(folder: str) -> dict[str, str]:
    root = str(Path(__file__).parents[2])  # a checkout is graded from any folder
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    changes = {
        "DSV3_HOME": folder,
        "DSV3_STRICT": "0",
        "DSV3_LIVE_SECONDS": "4",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    return {**os.environ, **changes}


def _rerun(notebook: dict[str, Any], folder: str) -> Any:
    """The notebook with the outputs of this run only. A cell that fails does not stop the rest."""
    try:
        import nbformat
        from nbclient import NotebookClient
        from nbclient.exceptions import CellTimeoutError, DeadKernelError
    except ImportError:
        raise RuntimeError(
            "nbclient is not installed, so no notebook can be run again and graded; "
            "install requirements.txt"
        ) from None
    fresh = nbformat.reads(json.dumps(notebook), as_version=4)
    fresh.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python",
        "language": "python",
    }
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = NotebookClient(
        fresh, timeout=_CELL_SECONDS, allow_errors=True, kernel_name="python3", record_timing=False
    )
    try:
        client.execute(cwd=folder, env=_environment(folder))
    except (CellTimeoutError, DeadKernelError) as error:  # what ran before it counts
        print(f"the run stopped early: {type(error).__name__}", file=sys.stderr)
    return fresh


def _reported(notebook: Any) -> dict[str, dict[str, str]]:
    """The last verdict that each exercise displayed in the run."""
    found = {}
    for cell in notebook.cells:
        for output in [] if demonstrates(cell) else cell.get("outputs", []):
            verdict = output.get("data", {}).get(MIME)
            if isinstance(verdict, dict) and verdict.get("status") in LABELS:
                name, message = str(verdict.get("exercise")), str(verdict.get("message", ""))
                found[name] = {"status": verdict["status"], "message": message}
    return found


def _check_again(file: Path, folder: str) -> list[dict[str, str]]:
    answer = Path(folder, "verdicts.json")
    module = ["-P", "-m", "dsv3_tutorial.learn.submission"]  # -P: nothing from the current folder
    command = [sys.executable, *module, str(file.resolve()), str(answer)]
    try:
        subprocess.run(
            command,
            cwd=folder,
            env=_environment(folder),
            capture_output=True,
            timeout=_CHECK_SECONDS,
            check=True,
        )
        return json.loads(answer.read_text(encoding="utf-8"))
    except (subprocess.SubprocessError, OSError, ValueError):
        return []


def _harmless(text: str) -> str:
    """A cell that a spreadsheet reads as text: a leading = would be run as a formula."""
    return "'" + text if text.startswith(("=", "+", "-", "@")) else text
