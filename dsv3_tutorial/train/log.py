"""A run's log: one JSON row a step, as readable after a crash as after the end."""

import csv
import io
import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from dsv3_tutorial.files import write_whole

FIELDS = (
    *("step", "loss", "bits_per_byte", "mtp_loss", "balance_loss", "grad_norm", "lr"),
    *("tokens_per_s", "max_violation", "max_violation_worst", "held_out", "held_out_mtp"),
)


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows of `folder`/log.jsonl up to the first that is not whole; none without a file."""
    path = folder / "log.jsonl"
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the last line of a run that was killed
            break
    return rows


class LogError(OSError):
    """Rows that could not be written by the end of a run."""


class Log:
    """Rows appended to `folder`/log.jsonl, and to log.csv where asked, each handed on as written.

    Rows after `step` are cut away first: a resumed run writes them again, and none stands twice.
    A full disk does not end the run: its rows wait in memory, and each later row tries again.
    Raises LogError at the end when they still wait.
    """

    def __init__(self, folder: Path, step: int = 0, as_csv: bool = False):
        kept = [row for row in read(folder) if row["step"] <= step]
        write_whole(folder / "log.jsonl", "".join(f"{json.dumps(row)}\n" for row in kept))
        self._jsonl = _Appended(folder / "log.jsonl")
        self._csv: _Appended | None = None
        if as_csv:
            write_whole(folder / "log.csv", ",".join(FIELDS) + "\n" + "".join(map(_csv, kept)))
            self._csv = _Appended(folder / "log.csv")

    def write(self, row: dict[str, Any]) -> None:
        """One step's row: a number a field, only fields that were measured."""
        self._jsonl.write(json.dumps(row) + "\n")
        if self._csv is not None:
            self._csv.write(_csv(row))

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._jsonl.close()
        if self._csv is not None:
            self._csv.close()


class _Appended:
    """A file without a buffer of its own: what is written is the kernel's, or waits to be."""

    def __init__(self, path: Path):
        self.name, self.file = path.name, path.open("ab", buffering=0)
        self.waiting, self.told = b"", False

    def write(self, text: str) -> None:
        self.waiting += text.encode()
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            said = f"{self.name} cannot be written ({error.strerror}): its rows wait in memory."
            if not self.told:
                tqdm.write(said, file=sys.stderr)  # above the bar, where there is one
            self.told = True

    def close(self) -> None:
        self.write("")
        self.file.close()
        if self.waiting:
            missing = self.waiting.count(b"\n")
            raise LogError(
                f"{self.name} lacks its last {missing} rows: they could not be written. What was "
                "trained is in the checkpoints that stand. Free some space, then --resume."
            )


def _csv(row: dict[str, Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow([row.get(name, "") for name in FIELDS])
    return line.getvalue()
