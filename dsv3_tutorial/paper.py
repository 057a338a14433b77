"""Numbers that the papers print, each with where it stands: what our own code is held against."""

import json
from dataclasses import dataclass, fields
from functools import cache

from dsv3_tutorial.files import data_path

CONFIDENCES = ("read in two copies", "read", "derived")


@dataclass(frozen=True)
class Row:
    """One printed number. confidence: how surely the paper says so; derived: we computed it."""

    id: str
    value: float
    unit: str
    paper: str
    where: str
    note: str
    confidence: str


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
        if set(entry) != {f.name for f in fields(Row)}:
            raise ValueError(f"{table}.json: a row has the fields {sorted(entry)}. Mend the file.")
    return tuple(Row(**entry) for entry in raw)


def row(id: str) -> Row:
    """The row of an id: `row("kv_cache.deepseek-v3").value` is 70.272."""
    found = {entry.id: entry for table in tables() for entry in rows(table)}
    if id not in found:
        known = ", ".join(sorted(found))
        raise KeyError(f"no printed number {id!r}. Nothing can be compared. There are {known}.")
    return found[id]
