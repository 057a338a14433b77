"""Receipts: every measured number in the course, with what it takes to trust or repeat it.

One file a benchmark, data/measured/NAME.jsonl, one JSON object a line. Benchmarks append; figures
read. Nothing here is typed by hand, and nothing here imports torch.
"""

import json
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

from dsv3_tutorial.files import data_path, write_whole

DEVICE_KINDS = ("cpu", "gpu")
SPREADS = (("q1", "q3"), ("min", "max"))


class ReceiptError(ValueError):
    """A receipt that cannot be trusted, or a file of them that cannot be read. Lists `problems`."""

    def __init__(self, what: str, problems: list[str], why: str, do: str):
        self.problems = problems
        listed = "".join(f"\n  - {problem}" for problem in problems)
        super().__init__(f"{what}{':' if listed else '.'}{listed}\n{why}\n{do}")


@dataclass(frozen=True)
class Receipt:
    """One measured value: what ran, on what, when, how often, and how far the repeats lay apart.

    value, spread and fraction are floats; value is in `unit`. shapes holds what was varied (sizes,
    dtype, seed), as JSON holds it. spread is {"q1", "q3"} or {"min", "max"} around value. fraction
    is value over the measured `ceiling` of the same device. Raises ReceiptError with every problem.
    """

    what: str
    device: str
    device_kind: str
    versions: Mapping[str, str]
    date: str  # ISO day
    shapes: Mapping[str, Any]
    value: float
    unit: str
    spread: Mapping[str, float]
    repeats: int
    threads: int
    ceiling: str | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            why = "A number without its circumstances can be neither repeated nor compared."
            do = "Mend the fields named; benchmarks take most of them from bench.machine.here()."
            raise ReceiptError("This receipt cannot be kept", problems, why, do)
        for name in ("versions", "shapes", "spread"):  # held as the file holds it: tuples are lists
            object.__setattr__(self, name, json.loads(json.dumps(dict(getattr(self, name)))))


def read(name: str, *, folder: Path | None = None, **filters: Any) -> list[Receipt]:
    """The receipts of one benchmark, oldest line first; filters compare fields or shapes.

    `read("attention", device_kind="gpu", batch=1)` keeps what equals all of them. Raises
    ReceiptError for a file that is not there, a damaged line (by number), or a filter that no
    receipt in the file knows.
    """
    path = _path(name, folder)
    found = [_parse(line, path, number) for number, line in _lines(path)]
    known = {f.name for f in fields(Receipt)}.union(*(receipt.shapes for receipt in found))
    problems = [f"{key!r}, which no receipt has" for key in sorted(set(filters) - known)]
    if problems and found:
        why = "The filter would leave nothing, and an empty figure looks like a finding."
        raise ReceiptError(f"{path} was asked for", problems, why, f"Choose from {sorted(known)}.")
    return [r for r in found if filters.items() <= {**r.shapes, **asdict(r)}.items()]


def latest(name: str, *, folder: Path | None = None, **filters: Any) -> list[Receipt]:
    """Of `read`, the newest receipt for each benchmark, device, thread count and shapes.

    On the same day the later line is the newer. The order is that in which each was first measured.
    """
    newest: dict[str, Receipt] = {}
    for r in read(name, folder=folder, **filters):
        key = json.dumps([r.what, r.device, r.threads, r.unit, r.shapes], sort_keys=True)
        if key not in newest or r.date >= newest[key].date:
            newest[key] = r
    return list(newest.values())


def append(name: str, receipts: Iterable[Receipt], *, folder: Path | None = None) -> Path:
    """Add receipts to a benchmark's file, all or none; the lines already there stay as they are.

    Reads what is there first, and so refuses to add to a damaged file. Not meant for two writers at
    once. Raises ReceiptError, also where the folder cannot be written.
    """
    path = _path(name, folder)
    rows = [{k: v for k, v in asdict(r).items() if v is not None} for r in receipts]
    new = [json.dumps(row, allow_nan=False) for row in rows]
    old = _lines(path) if path.exists() else []
    for number, line in old:
        _parse(line, path, number)
    try:
        write_whole(path, "".join(f"{line}\n" for line in [line for _, line in old] + new))
    except OSError as error:
        why = "The measurement was made and would be lost."
        do = "Name a folder that can be written with --out, or folder=."
        raise ReceiptError(f"{path} cannot be written", [str(error)], why, do) from error
    return path


def names(folder: Path | None = None) -> list[str]:
    """The benchmarks that have receipts, sorted. An absent folder has none."""
    return sorted(path.stem for path in (folder or data_path("measured")).glob("*.jsonl"))


def caption(receipts: Iterable[Receipt]) -> str:
    """What stands under a figure: "NVIDIA H100 80GB HBM3, 2026-11-21, torch 2.11".

    A CPU carries its thread count. Devices are parted by semicolons. None: "not measured yet".
    """
    groups: dict[str, list[Receipt]] = {}
    for receipt in receipts:
        threads = f" ({receipt.threads} thread{'s' if receipt.threads > 1 else ''})"
        device = receipt.device + (threads if receipt.device_kind == "cpu" else "")
        groups.setdefault(device, []).append(receipt)
    parts = [f"{device}, {_days(group)}{_torch(group)}" for device, group in groups.items()]
    return "; ".join(parts) or "not measured yet"


def _days(group: list[Receipt]) -> str:
    days = sorted({receipt.date for receipt in group})
    return " to ".join(dict.fromkeys([days[0], days[-1]]))


def _torch(group: list[Receipt]) -> str:
    full = {receipt.versions["torch"] for receipt in group if "torch" in receipt.versions}
    short = sorted({".".join(version.split("+")[0].split(".")[:2]) for version in full})
    return f", torch {' and '.join(short)}" if short else ""


def _path(name: str, folder: Path | None) -> Path:
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        why = "It is a file's name under data/measured."
        do = "Use lower-case letters, digits, '-' and '_'."
        raise ReceiptError(f"{name!r} is no name for a benchmark", [], why, do)
    return (folder or data_path("measured")) / f"{name}.jsonl"


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = f"Nothing can be drawn from it. Receipts that exist: {names(path.parent) or 'none'}."
        do = f"Choose one of those, or measure: python -m dsv3_tutorial bench {path.stem}"
        raise ReceiptError(f"{path} cannot be read", [str(error)], why, do) from error
    return [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]


def _parse(line: str, path: Path, number: int) -> Receipt:
    try:
        row = json.loads(line)
        problems = _row_problems(row)
        if not problems:
            return Receipt(**row)
    except ReceiptError as error:
        problems = error.problems
    except (ValueError, RecursionError) as error:
        problems = [f"not JSON: {error}"]
    why = "A figure of the rest would leave a measurement out and not say so."
    do = "Restore the line from version control, or remove it and measure again."
    raise ReceiptError(f"{path}, line {number} is damaged", problems, why, do) from None


def _row_problems(row: Any) -> list[str]:
    if not isinstance(row, dict):
        return [f"a receipt is an object of fields, got a {type(row).__name__}"]
    required = {f.name: f.default is MISSING for f in fields(Receipt)}
    missing = [f"{name} is missing" for name, need in required.items() if need and name not in row]
    return missing + [f"{name!r} is not a field" for name in row if name not in required]


def _problems(r: Receipt) -> list[str]:
    texts = {"what": r.what, "device": r.device, "unit": r.unit}
    counts = {"repeats": r.repeats, "threads": r.threads}
    found = [f"{name} must be text, got {it!r}" for name, it in texts.items() if not _text(it)]
    wrong = [(name, it) for name, it in counts.items() if type(it) is not int or it < 1]
    found += [f"{name} must be a whole number of at least 1, got {it!r}" for name, it in wrong]
    if r.device_kind not in DEVICE_KINDS:
        found.append(f"device_kind must be one of {DEVICE_KINDS}, got {r.device_kind!r}")
    if not _is_day(r.date):
        found.append(f"date must be a day such as '2026-11-21', got {r.date!r}")
    return found + _version_problems(r) + _shape_problems(r) + _number_problems(r)


def _version_problems(r: Receipt) -> list[str]:
    if not isinstance(r.versions, Mapping) or not r.versions:
        return [f"versions must name the libraries that ran, got {r.versions!r}"]
    bad = [(name, it) for name, it in r.versions.items() if not (_text(name) and _text(it))]
    found = [f"versions[{name!r}] must be text, got {it!r}" for name, it in bad]
    python = r.versions.get("python", "3.11")
    if _text(python) and not re.fullmatch(r"\d+\.\d+", python):
        found.append(f"versions['python'] goes without its patch version, got {python!r}")
    return found


def _shape_problems(r: Receipt) -> list[str]:
    if not isinstance(r.shapes, Mapping) or not all(_text(name) for name in r.shapes):
        return [f"shapes must be a dictionary with text keys, got {r.shapes!r}"]
    taken = {"name", "folder", *(f.name for f in fields(Receipt))} & set(r.shapes)
    found = [f"shapes[{name!r}] would be hidden from filters: rename" for name in sorted(taken)]
    try:
        json.dumps(dict(r.shapes), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        found.append(f"shapes must be plain JSON values: {error}")
    return found


def _number_problems(r: Receipt) -> list[str]:
    found = [] if _number(r.value) else [f"value must be a finite number, got {r.value!r}"]
    held = set(r.spread) if isinstance(r.spread, Mapping) else set()
    pair = next((pair for pair in SPREADS if held == set(pair)), None)
    if pair is None or not all(_number(r.spread[name]) for name in pair):
        found.append(f"spread must hold finite numbers for one of {SPREADS}, got {r.spread!r}")
    elif not found and not r.spread[pair[0]] <= r.value <= r.spread[pair[1]]:
        found.append(f"spread {dict(r.spread)} does not enclose value {r.value!r}")
    if (r.ceiling is None) != (r.fraction is None):
        found.append("ceiling and fraction belong together: give both or neither")
    elif r.ceiling is not None and not (_text(r.ceiling) and _number(r.fraction)):
        found.append(f"ceiling is text, fraction a number, got {r.ceiling!r}, {r.fraction!r}")
    return found


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # false for nan, infinity and 10**400


def _is_day(value: Any) -> bool:
    with suppress(TypeError, ValueError):
        return date.fromisoformat(value).isoformat() == value
    return False
