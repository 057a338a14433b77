"""Numbers that the papers print, each with where it stands: what our own code is held against.

`bench.paper` computes each again or says why not; docs/paper.md shows all of them side by side.
"""

import json
from dataclasses import dataclass, fields
from functools import cache

from dsv3_tutorial.files import data_path

CONFIDENCES = ("read in two copies", "read", "derived")


@dataclass(frozen=True)
class Row:
    """One printed number. confidence: how surely the paper says so; derived: we computed it.

    quoted: why nothing here can compute it (measured elsewhere, or chosen); "" where we do.
    """

    id: str
    value: float
    unit: str
    paper: str
    where: str
    note: str
    confidence: str
    quoted: str = ""


_NAMES = {f.name for f in fields(Row)}


def tables() -> list[str]:
    """The files of rows there are: kv_cache, training_compute, ..."""
    return sorted(path.stem for path in data_path("paper").glob("*.json"))


@cache
def rows(table: str) -> tuple[Row, ...]:
    """One file's rows, in the paper's order. Raises KeyError that lists the tables there are."""
    if table not in tables():
        known = ", ".join(tables())
        raise KeyError(f"no table {table!r}. Nothing can be compared with it. There are {known}.")
    raw = json.loads(data_path("paper", f"{table}.json").read_text(encoding="utf-8"))
    for entry in raw:
        if set(entry) | {"quoted"} != _NAMES:
            raise ValueError(f"{table}.json: a row has the fields {sorted(entry)}. Mend the file.")
    return tuple(Row(**entry) for entry in raw)


def all_rows() -> list[Row]:
    """Every printed number there is, table by table."""
    return [entry for table in tables() for entry in rows(table)]


def row(id: str) -> Row:
    """The row of an id: `row("kv_cache.deepseek-v3").value` is 70.272."""
    found = _by_id()
    if id not in found:
        known = ", ".join(sorted(found))
        raise KeyError(f"no printed number {id!r}. Nothing can be compared. There are {known}.")
    return found[id]


@cache
def _by_id() -> dict[str, Row]:
    return {entry.id: entry for entry in all_rows()}
