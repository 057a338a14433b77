"""Chips, links and clusters: what their makers and the papers say of them, each number sourced.

Nothing here is measured. `Chip.measured` gives the machine at hand the same shape, from ceilings
that a benchmark found. Rates are dense FLOP/s, sizes bytes, bandwidths bytes/s *in one direction*:
an "NVLink 900 GB/s" of a data sheet is 450 here, and the H800's "400" is 200.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType
from typing import Any

from dsv3_tutorial.files import data_path

# fp16 and fp8 sum in float32; _acc16 is the rate with float16 sums, which GeForce runs at double.
FORMATS = ("fp64", "fp32", "tf32", "bf16", "fp16", "fp16_acc16", "fp8", "fp8_acc16", "int8")
CONFIDENCES = ("published", "paper", "third-party", "measured")
_LINK_NUMBERS = ("bandwidth", "domain", "effective")  # in the order of Link's fields
_NUMBERS = ("memory_bytes", "memory_bandwidth", "l2_bytes", "power_w")


class HardwareError(ValueError):
    """A chip that is not known, a number that nobody publishes, or data that cannot be trusted."""


@dataclass(frozen=True)
class Source:
    """Where a number is from. confidence: published by its maker, paper, third-party, measured."""

    cite: str
    confidence: str


@dataclass(frozen=True)
class Link:
    """What joins a GPU to others. bandwidth: bytes/s per GPU in one direction; None: not known."""

    kind: str
    bandwidth: float | None
    domain: int | None = None  # GPUs that reach each other over it; None: no fixed number
    effective: float | None = None  # of the bandwidth, what is reached, where somebody says


def _frozen() -> Any:
    return field(default_factory=lambda: MappingProxyType({}), hash=False)


@dataclass(frozen=True)
class Chip:
    """One GPU. A number that nobody publishes is None, and `reasons` says why.

    `sources` and `reasons` are keyed by field: "rates.fp8", "scale_up.bandwidth", "l2_bytes".
    """

    name: str
    title: str
    rates: Mapping[str, float | None] = field(hash=False)
    memory_bytes: int | None
    memory_bandwidth: float | None
    l2_bytes: int | None
    scale_up: Link
    scale_out: Link
    power_w: float | None
    variant_of: str | None = None
    sources: Mapping[str, Source] = _frozen()
    reasons: Mapping[str, str] = _frozen()

    def rate(self, fmt: str = "bf16") -> float:
        """Peak dense FLOP/s in a format. Raises HardwareError where there is none, saying why."""
        if fmt not in FORMATS:
            raise HardwareError(
                f"no format {fmt!r}. Rates differ by format. Take one of {FORMATS}."
            )
        return self._known(self.rates.get(fmt), f"rates.{fmt}")

    def bandwidth(self) -> float:
        """Memory bandwidth, bytes/s."""
        return self._known(self.memory_bandwidth, "memory_bandwidth")

    def differences(self, other: "Chip") -> dict[str, tuple[Any, Any]]:
        """Every number in which two chips differ, by field: how an H800 is not an H100."""
        mine, theirs = _flat(self), _flat(other)
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}

    @classmethod
    def measured(
        cls,
        name: str,
        rates: Mapping[str, float],
        memory_bandwidth: float,
        *,
        memory_bytes: int | None = None,
        l2_bytes: int | None = None,
        how: str = "measured on this machine",
    ) -> "Chip":
        """The machine at hand as a Chip: ceilings that it reached, not what a data sheet promises.

        rates in FLOP/s by format, memory_bandwidth in bytes/s; formats left out have no rate.
        """
        problems = [f"no format {fmt!r}" for fmt in rates if fmt not in FORMATS]
        numbers = {**rates, "memory_bandwidth": memory_bandwidth}
        problems += [f"{k} must be positive, got {v!r}" for k, v in numbers.items() if not _real(v)]
        if problems:
            raise HardwareError(_failed(f"the measured chip {name!r}", problems))
        known = [f"rates.{fmt}" for fmt in rates] + ["memory_bandwidth"]
        missing = [f"rates.{fmt}" for fmt in FORMATS if fmt not in rates]
        unlinked = Link("one machine, no other GPU", None, 1)
        return cls(
            *(name, name, MappingProxyType({fmt: rates.get(fmt) for fmt in FORMATS})),
            *(memory_bytes, memory_bandwidth, l2_bytes, unlinked, unlinked, None),
            sources=MappingProxyType(dict.fromkeys(known, Source(how, "measured"))),
            reasons=MappingProxyType(dict.fromkeys(missing, "not measured on this machine")),
        )

    def _known(self, value: float | None, name: str) -> float:
        if value is None:
            why = self.reasons.get(name, "nobody publishes it")
            what = f"{self.title} has no {name}: {why}"
            raise HardwareError(f"{what}. A time cannot be computed from it. Take another format.")
        return value


@dataclass(frozen=True)
class Cluster:
    """`gpus` chips of one kind, in scale-up domains of the chip's own size."""

    chip: Chip
    gpus: int

    @property
    def domain(self) -> int:
        """GPUs that share a scale-up network; never more than there are."""
        return min(self.gpus, self.chip.scale_up.domain or 1)

    @property
    def nodes(self) -> int:
        """Scale-up domains: servers, or racks of an NVL72."""
        return math.ceil(self.gpus / self.domain)


def chip_names() -> list[str]:
    """The chips that `chip` knows."""
    return sorted(_chips())


def chip(name: str) -> Chip:
    """One chip of data/hardware.json. Raises HardwareError that lists the names there are."""
    if name not in _chips():
        known = ", ".join(chip_names())
        raise HardwareError(f"no chip {name!r}. Nothing is known of it. There are {known}.")
    return _chips()[name]


def cluster(spec: str) -> Cluster:
    """A cluster written as "chip:count": `cluster("h800:2048")`. One GPU without a count."""
    name, colon, count = spec.partition(":")
    if colon and not (count.isascii() and count.isdigit() and int(count) > 0):
        what = f"{spec!r} names no number of GPUs"
        raise HardwareError(f"{what}. A cluster has at least one. Write for example h800:2048.")
    return Cluster(chip(name), int(count) if colon else 1)


@cache
def _chips() -> dict[str, Chip]:
    return load(json.loads(data_path("hardware.json").read_text(encoding="utf-8")))


def load(data: Mapping[str, Any]) -> dict[str, Chip]:
    """Chips from the parsed data. Raises HardwareError with all that breaks the schema."""
    sources = {key: Source(**value) for key, value in data["sources"].items()}
    problems = [
        f"sources.{key}: confidence {s.confidence!r} is not one of {CONFIDENCES}"
        for key, s in sources.items()
        if s.confidence not in CONFIDENCES
    ]
    for name, raw in data["chips"].items():
        problems += [f"{name}: {problem}" for problem in _schema_problems(raw, sources)]
    if problems:
        raise HardwareError(_failed("hardware.json", problems))
    return {name: _chip(name, raw, sources) for name, raw in data["chips"].items()}


def _schema_problems(raw: Mapping[str, Any], sources: Mapping[str, Source]) -> list[str]:
    fields = {"title", "rates", "scale_up", "scale_out", *_NUMBERS}
    if wrong := fields ^ (set(raw) - {"variant_of"}):
        return [f"fields missing or unknown: {', '.join(sorted(wrong))}"]
    if wrong := set(FORMATS) ^ set(raw["rates"]):
        return [f"rates missing or unknown: {', '.join(sorted(wrong))}"]
    found = []
    for name, cell in _cells(raw).items():
        if cell.get("value") is None:
            if set(cell) != {"value", "reason"} or not cell["reason"]:
                found.append(f"{name} is unknown and needs a reason, and nothing else")
        elif not _real(cell["value"]):
            found.append(f"{name} must be a positive number, got {cell['value']!r}")
        elif set(cell) != {"value", "source"} or cell["source"] not in sources:
            found.append(f"{name} needs a source out of those listed, got {cell.get('source')!r}")
    return found


def _cells(raw: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Every number of a chip by its name, as {value, source} or {value: null, reason}."""
    links = {
        f"{link}.{name}": raw[link][name]
        for link in ("scale_up", "scale_out")
        for name in _LINK_NUMBERS
        if name in raw[link]
    }
    rates = {f"rates.{fmt}": cell for fmt, cell in raw["rates"].items()}
    return {**rates, **{name: raw[name] for name in _NUMBERS}, **links}


def _chip(name: str, raw: Mapping[str, Any], sources: Mapping[str, Source]) -> Chip:
    cells = _cells(raw)
    values = {key: cell["value"] for key, cell in cells.items()}
    links = [
        Link(raw[way]["kind"], *(values.get(f"{way}.{n}") for n in _LINK_NUMBERS))
        for way in ("scale_up", "scale_out")
    ]
    named = {key: sources[cell["source"]] for key, cell in cells.items() if "source" in cell}
    return Chip(
        *(name, raw["title"], MappingProxyType({f: values[f"rates.{f}"] for f in FORMATS})),
        *(values["memory_bytes"], values["memory_bandwidth"], values["l2_bytes"]),
        *(*links, values["power_w"], raw.get("variant_of")),
        sources=MappingProxyType(named),
        reasons=MappingProxyType({k: c["reason"] for k, c in cells.items() if "reason" in c}),
    )


def _flat(chip: Chip) -> dict[str, Any]:
    links = {"scale_up": chip.scale_up, "scale_out": chip.scale_out}
    numbers = {f"rates.{fmt}": chip.rates[fmt] for fmt in FORMATS}
    numbers |= {name: getattr(chip, name) for name in _NUMBERS}
    numbers |= {f"{way}.bandwidth": link.bandwidth for way, link in links.items()}
    return numbers | {f"{way}.domain": link.domain for way, link in links.items()}


def _real(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0


def _failed(what: str, problems: list[str]) -> str:
    listed = "".join(f"\n  - {problem}" for problem in problems)
    return f"{what} has numbers that cannot be trusted:{listed}\nNothing was loaded. Mend them."
