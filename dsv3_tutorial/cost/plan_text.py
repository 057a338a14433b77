"""Numbers and tables as the planner prints them: at most 90 columns, one unit a column."""

import textwrap
from collections.abc import Iterable, Mapping, Sequence

WIDTH = 90
_BAR = 30
_UNITS = ("", "K", "M", "B", "T")


def count(value: float, digits: int = 4) -> str:
    """A count with a unit of thousands: 671.0B, 14.80T, 2,048."""
    if value < 10_000:
        return f"{value:,.0f}"
    power = 0
    while power < len(_UNITS) - 1 and value >= 999.95 * 1000**power:
        power += 1
    shown = value / 1000**power
    whole = len(f"{shown:.0f}")
    return f"{shown:,.{max(0, digits - whole)}f}{_UNITS[power]}"


def given(value: float) -> str:
    """A count as somebody wrote it, without zeros behind: 14.8T."""
    shown = count(value)
    number, unit = (shown[:-1], shown[-1]) if shown[-1].isalpha() else (shown, "")
    return (number.rstrip("0").rstrip(".") if "." in number else number) + unit


def dollars(value: float) -> str:
    """Dollars: 5.328M, 42.1K, 12.34."""
    return f"${count(value)}" if value >= 10_000 else f"${value:,.2f}"


def energy(kwh: float | None) -> str:
    """Energy in the unit that has digits: kWh, MWh, GWh; None: the chip's power is not known."""
    if kwh is None:
        return "energy unknown"
    for unit, size in (("GWh", 1e6), ("MWh", 1e3)):
        if kwh >= size:
            return f"{kwh / size:,.3g} {unit}"
    return f"{kwh:,.3g} kWh"


def seconds(value: float) -> str:
    """A time in s or ms, four digits."""
    return f"{value:,.3f} s" if value >= 1 else f"{1e3 * value:,.3g} ms"


def bars(
    title: str, parts: Mapping[str, float], unit: str, scale: float = 1.0, digits: int = 2
) -> list[str]:
    """A table of parts, their share of the sum as number and as bar; parts of 0 are left out."""
    whole = sum(parts.values())
    lines = [f"{title:<26}{unit:>10}{'share':>9}"]
    for name, value in parts.items():
        if value:
            share = value / whole
            drawn = "#" * round(_BAR * share)
            lines.append(
                f"  {name:<24}{value / scale:>10,.{digits}f}{share:>9.1%}  {drawn}".rstrip()
            )
    lines.append(f"  {'all':<24}{whole / scale:>10,.{digits}f}")
    return lines


def fields(rows: Mapping[str, str]) -> list[str]:
    """Name and text in two columns; long texts go on below."""
    return [line for name, text in rows.items() for line in _wrapped(f"{name:<12}", text)]


def bullets(texts: Iterable[str]) -> list[str]:
    """Sentences with a dash before each."""
    return [line for text in texts for line in _wrapped("  - ", text)]


def columns(
    head: Sequence[str], rows: Iterable[Sequence[str]], first: int = 22, each: int | None = None
) -> list[str]:
    """Columns to the right behind a first one to the left; what has no heading is put behind."""
    number = len(head) - 1
    width = each or (WIDTH - first) // number
    return [
        (
            f"{row[0]:<{first}}"
            + "".join(f"{cell:>{width}}" for cell in row[1 : number + 1])
            + "".join(row[number + 1 :])
        ).rstrip()
        for row in (head, *rows)
    ]


def _wrapped(start: str, text: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_on_hyphens=False,
    )
