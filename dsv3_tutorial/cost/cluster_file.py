"""A cluster out of a name or a small JSON file: a chip that is known, changed, or one of your own.

{"chip": "h800", "gpus": 2048, "changes": {"memory_bytes": 141e9, "scale_up.domain": 72}}, or with
a whole chip in the schema of data/hardware.json in the place of the name. There a plain number will
do, null is "not known", and what is left out is not known either.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dsv3_tutorial import hardware
from dsv3_tutorial.hardware import FORMATS, Chip, Cluster, HardwareError, Link, Source

_PLAIN = ("memory_bytes", "memory_bandwidth", "l2_bytes", "power_w")
_LINKS = tuple(f"{way}.{n}" for way in ("scale_up", "scale_out") for n in ("bandwidth", "domain"))
_REACHED = ("scale_up.effective", "scale_out.effective")
NUMBERS = (*_PLAIN, *_LINKS, *_REACHED, *(f"rates.{fmt}" for fmt in FORMATS))
_WHOLE = ("memory_bytes", "l2_bytes", "scale_up.domain", "scale_out.domain")
_SOURCE = Source("the cluster file", "third-party")


def read(spec: str) -> Cluster:
    """A cluster written as "chip:count", or the file of one. Raises HardwareError."""
    if not spec.endswith(".json"):
        return hardware.cluster(spec)
    path = Path(spec)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = f"There is no cluster file {path.name!r}"
    except OSError as error:
        what = f"The cluster file {path.name} cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        what = f"The cluster file {path.name} is not JSON: {error}"
    else:
        return from_dict(raw)
    raise HardwareError(f"{what}. Nothing runs without chips. Give a file, or h800:2048.")


def from_dict(raw: Any) -> Cluster:
    """A cluster from a file's parsed content. Raises HardwareError with all that is wrong."""
    if not isinstance(raw, Mapping):
        _refuse([f"it is {raw!r} and no object"])
    gpus, changes = raw.get("gpus"), raw.get("changes", {})
    wrong = [f"unknown field {n!r}" for n in sorted(set(raw) - {"chip", "gpus", "changes"})]
    if not (_positive(gpus) and gpus == int(gpus)):
        wrong.append(f"gpus = {gpus!r} is no whole number of 1 or more")
    chip, found = _base(raw.get("chip"))
    wrong += found
    if not isinstance(changes, Mapping):
        wrong.append(f"changes = {changes!r} is no object of numbers by field")
        changes = {}
    wrong += _problems(changes)
    if not wrong:
        chip = _changed(chip, changes)
        wrong += _above_peak(chip)
    if wrong:
        _refuse(wrong)
    return Cluster(chip, int(gpus))


def _above_peak(chip: Chip) -> list[str]:
    """Links that are said to reach more than their peak."""
    return [
        f"{way}.effective = {link.effective:g} is above {way}.bandwidth = {link.bandwidth:g}"
        for way, link in (("scale_up", chip.scale_up), ("scale_out", chip.scale_out))
        if link.effective and link.bandwidth and link.effective > link.bandwidth
    ]


def _base(raw: Any) -> tuple[Chip | None, list[str]]:
    """The chip that the file names or describes, and what is wrong with it."""
    if isinstance(raw, str):
        known = raw in hardware.chip_names()
        names = ", ".join(hardware.chip_names())
        return (
            (hardware.chip(raw), []) if known else (None, [f"no chip {raw!r}; there are {names}"])
        )
    if not isinstance(raw, Mapping):
        return None, [f"chip = {raw!r} is neither a name nor an object"]
    title, kinds = str(raw.get("title", "a chip of the cluster file")), {}
    values, wrong = {}, []
    for name, value in raw.items():
        if name in ("title", "variant_of"):
            continue
        inner = value if name in ("rates", "scale_up", "scale_out") else None
        if inner is None:
            values[name] = _value(value)
        elif not isinstance(inner, Mapping):
            wrong.append(f"{name} = {value!r} is no object")
        else:
            kinds[name] = str(inner.get("kind", "link"))
            values |= {f"{name}.{k}": _value(v) for k, v in inner.items() if k != "kind"}
    return (None, wrong) if wrong else _own(title, kinds, values)


def _own(title: str, kinds: dict[str, str], values: dict[str, Any]) -> tuple[Chip, list[str]]:
    nothing = MappingProxyType(dict.fromkeys(FORMATS))
    reasons = dict.fromkeys(NUMBERS, "not given in the cluster file")
    links = [Link(kinds.get(way, "link"), None) for way in ("scale_up", "scale_out")]
    blank = Chip(title, title, nothing, None, None, None, *links, None, reasons=reasons)
    wrong = _problems(values)
    return blank if wrong else _changed(blank, values), wrong


def _value(cell: Any) -> Any:
    """A number as it stands, or a cell of hardware.json: {"value": 1, "source": "..."}."""
    return cell.get("value") if isinstance(cell, Mapping) else cell


def _problems(changes: Mapping[str, Any]) -> list[str]:
    found = []
    for name, value in changes.items():
        if name not in NUMBERS:
            found.append(f"no number {name!r} in a chip; there are {', '.join(NUMBERS)}")
        elif value is None:
            continue
        elif not _positive(value):
            found.append(f"{name} = {value!r} is no number above 0")
        elif name in _WHOLE and value != int(value):
            found.append(f"{name} = {value!r} is no whole number")
    return found


def _changed(chip: Chip, changes: Mapping[str, Any]) -> Chip:
    """The chip with these numbers. A new peak of a link forgets what was reached of the old one."""
    values = {n: int(v) if n in _WHOLE and v is not None else v for n, v in changes.items()}
    rates = {fmt: values.get(f"rates.{fmt}", rate) for fmt, rate in chip.rates.items()}
    links = {}
    for way in ("scale_up", "scale_out"):
        own = {n: values[f"{way}.{n}"] for n in _link_numbers(way, values)}
        if "bandwidth" in own:
            own.setdefault("effective", None)
        links[way] = replace(getattr(chip, way), **own)
    named = {name: _SOURCE for name, value in values.items() if value is not None}
    return replace(
        chip,
        rates=MappingProxyType(rates),
        **{name: values[name] for name in _PLAIN if name in values},
        **links,
        sources=MappingProxyType({**chip.sources, **named}),
        title=f"{chip.title} (changed)" if changes and chip.sources else chip.title,
    )


def _link_numbers(way: str, values: Mapping[str, Any]) -> list[str]:
    return [n for n in ("bandwidth", "domain", "effective") if f"{way}.{n}" in values]


def _positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0


def _refuse(wrong: list[str]) -> None:
    listed = "".join(f"\n  - {problem}" for problem in wrong)
    raise HardwareError(
        f"The cluster file describes no cluster:{listed}\nA plan needs each of them. Change what "
        'is named; {"chip": "h800", "gpus": 2048} is a whole file.'
    )
