"""A chip with some of its numbers multiplied: what a tenth more of a resource would be.

Supposed, not sourced: the name says what was changed, and so does each changed number's source.
Power, price and L2 stay, although no maker would give more of the rest for the same.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from dsv3_tutorial.hardware import Chip, HardwareError, Link, Source

RESOURCES = ("arithmetic", "memory_bandwidth", "memory", "scale_up", "scale_out")


def scaled(
    chip: Chip,
    arithmetic: float = 1,
    memory_bandwidth: float = 1,
    memory: float = 1,
    scale_up: float = 1,
    scale_out: float = 1,
    domain: int | None = None,
) -> Chip:
    """The chip with factors on its resources, and `domain` GPUs in a scale-up domain if given.

    arithmetic: every format's rate. memory: bytes. scale_up, scale_out: the peak and the rate that
    is reached. A number that nobody publishes stays unknown. Without a change: the same chip.
    Raises HardwareError, with all that is wrong, for a factor that leaves nothing.
    """
    factors = dict(zip(RESOURCES, (arithmetic, memory_bandwidth, memory, scale_up, scale_out)))
    _check(factors, domain)
    changed = [f"{name.replace('_', ' ')} x {by:g}" for name, by in factors.items() if by != 1]
    if domain not in (None, chip.scale_up.domain):
        changed.append(f"{domain} GPUs in a domain")
    if not changed:
        return chip
    rates = {fmt: _times(rate, arithmetic) for fmt, rate in chip.rates.items()}
    size = _times(chip.memory_bytes, memory)
    return replace(
        chip,
        name=f"{chip.name} ({', '.join(changed)})",
        title=f"{chip.title} ({', '.join(changed)})",
        rates=MappingProxyType(rates),
        memory_bytes=None if size is None else round(size),
        memory_bandwidth=_times(chip.memory_bandwidth, memory_bandwidth),
        scale_up=_link(chip.scale_up, scale_up, domain),
        scale_out=_link(chip.scale_out, scale_out),
        variant_of=chip.variant_of or chip.name,
        sources=_sources(chip, factors, domain),
    )


def _times(value: float | None, by: float) -> float | None:
    return value if value is None or by == 1 else value * by


def _link(link: Link, by: float, domain: int | None = None) -> Link:
    rates = {name: _times(getattr(link, name), by) for name in ("bandwidth", "effective")}
    return replace(link, **rates, domain=link.domain if domain is None else domain)


def _sources(chip: Chip, factors: Mapping[str, float], domain: int | None) -> Mapping[str, Source]:
    """Where each number is from, now that some are supposed."""
    owner = {"rates": "arithmetic", "memory_bytes": "memory"}  # else a field has its factor's name
    found = {}
    for name, source in chip.sources.items():
        field = name.split(".")[0]
        by = factors.get(owner.get(field, field), 1)
        if name == "scale_up.domain":
            by = 1
        cite = source.cite if by == 1 else f"supposed: {by:g} times that of {source.cite}"
        found[name] = replace(source, cite=cite)
    if domain not in (None, chip.scale_up.domain):
        found["scale_up.domain"] = Source(f"supposed: {domain} GPUs", "third-party")
    return MappingProxyType(found)


def _check(factors: Mapping[str, float], domain: int | None) -> None:
    wrong = [f"{name} = {by!r}" for name, by in factors.items() if not _above_zero(by)]
    whole = domain is None or (isinstance(domain, int) and not isinstance(domain, bool))
    if not (whole and (domain is None or domain >= 1)):
        wrong.append(f"domain = {domain!r}")
    if wrong:
        raise HardwareError(
            f"A chip cannot be scaled by {', '.join(wrong)}: nothing of it would remain that takes "
            "a known time. Give factors above 0, and a domain of 1 GPU or more."
        )


def _above_zero(by: object) -> bool:
    number = isinstance(by, int | float) and not isinstance(by, bool)
    return number and math.isfinite(by) and by > 0
