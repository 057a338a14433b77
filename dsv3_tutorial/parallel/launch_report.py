"""What ranks left behind, and what it means: results, output, the failure that came first."""

import linecache
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dsv3_tutorial.parallel.launch_errors import ParallelError, RankFailed, RankTimeout

_CELL = re.compile(r'File "(?:[^"]*[/\\]ipykernel_\d+[/\\]\d+\.py|<ipython-input[^"]*>)"')
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)

_LAST_WORDS = 1500  # characters
_OFTEN = {
    "SIGKILL": " SIGKILL is often a lack of memory.",
    "SIGSEGV": " SIGSEGV is a fault in a library.",
    "SIGABRT": (
        " SIGABRT is a library that gave up, which gloo does when ranks give one collective "
        "tensors of different shapes or dtypes: compare those."
    ),
}


class Failure(NamedTuple):
    """An error in a rank: its last line, its traceback, whether it only tells of a lost peer."""

    what: str
    traceback: str
    from_a_peer: bool


@dataclass(frozen=True)
class Report:
    """A rank's end. state: "done", "failed", "runs" (to the limit), or how the system ended it."""

    rank: int
    state: str
    out: str
    err: str
    result: bytes
    stack: str

    @property
    def failure(self) -> Failure | None:
        return pickle.loads(self.result) if self.state == "failed" else None


def place(folder: Path, name: str, rank: int) -> Path:
    """The file of a rank's "out", "err", "result" or "stack"."""
    return folder / f"{name}.{rank}"


def read(folder: Path, rank: int, state: str) -> Report:
    """Read the files of a rank that has ended."""

    def text(name: str) -> str:
        path = place(folder, name, rank)
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    file = place(folder, "result", rank)
    result = file.read_bytes() if state in ("done", "failed") else b""
    return Report(rank, state, text("out"), text("err"), result, text("stack"))


def problem(reports: list[Report], timeout: float) -> ParallelError | None:
    """The error that the reports add up to. A rank that only lost a peer is never the culprit."""
    failed = [report for report in reports if report.state not in ("runs", "done")]
    if failed:
        return _failed(min(failed, key=_guilt))
    hanging = [report for report in reports if report.state == "runs"]
    return _hanging(hanging, len(reports), timeout) if hanging else None


def _guilt(report: Report) -> tuple[bool, int]:
    failure = report.failure
    return failure is not None and failure.from_a_peer, report.rank


def _failed(report: Report) -> RankFailed:
    if report.failure is None:
        return RankFailed(report.rank, _died(report))
    trace = _CELL.sub('File "notebook cell"', report.failure.traceback).rstrip()
    what = report.failure.what.splitlines()[0] if report.failure.what else ""
    text = f"Rank {report.rank} failed, and the others were ended: {what}\n{trace}"
    return RankFailed(report.rank, text, trace)


def _died(report: Report) -> str:
    """What is known of a rank that raised nothing: how it ended, and its last words on stderr."""
    said = report.err.strip()[-_LAST_WORDS:]
    return (
        f"Rank {report.rank} ended without a Python error ({report.state}). The others could only "
        f"have waited for it, and were ended.{_OFTEN.get(report.state, '')}"
        + (f" Its stderr ends:\n{said}" if said else " It wrote nothing to stderr.")
    )


def _hanging(hanging: list[Report], world: int, timeout: float) -> RankTimeout:
    stacks = {report.rank: _where(report.stack) for report in hanging}
    names = ", ".join(str(rank) for rank in stacks)
    places = "".join(f"\nrank {rank}: {stack}" for rank, stack in stacks.items())
    return RankTimeout(
        tuple(stacks),
        stacks,
        f"{len(stacks)} of {world} ranks did not end within {timeout:g} s and were ended: {names}. "
        "A collective waits until every rank of its group calls it: look for the rank that stands "
        "somewhere else, or has a tensor of another shape, or give a longer timeout."
        f"{places}",
    )


def _where(stack: str) -> str:
    """The caller's own frames of a faulthandler dump, outermost first."""
    frames = _FRAME.findall(stack.partition("Current thread")[2] or stack)
    own = [f for f in frames if "/torch/" not in f[0] and not f[0].endswith("launch_rank.py")]
    lines = [_line(*frame) for frame in _until_server(own)]
    return " > ".join(reversed(lines)) or "not in Python"


def _until_server(frames: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    names = [f[0].endswith("launch_server.py") for f in frames]
    return frames[: names.index(True)] if True in names else frames


def _line(file: str, line: str, function: str) -> str:
    source = linecache.getline(file, int(line)).strip()
    where = "cell" if _CELL.fullmatch(f'File "{file}"') else Path(file).name
    return f"{where}, line {line}, in {function}" + (f" ({source})" if source else "")
