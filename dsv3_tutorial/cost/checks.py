"""A printed number beside what we compute of it, and how far apart they are: rows for a table."""

from dataclasses import dataclass

from dsv3_tutorial.paper import Row


@dataclass(frozen=True)
class Check:
    """One printed number (`row`) and ours (`computed`, in the row's unit); `how` it came about."""

    row: Row
    computed: float
    how: str

    @property
    def quoted(self) -> float:
        """The printed value."""
        return self.row.value

    @property
    def off(self) -> float:
        """How far ours lies above the printed one, as a share of it: 0.03 is 3 % too high."""
        return self.computed / self.row.value - 1


def worst(checks: list[Check]) -> Check:
    """The check that is furthest off, in either direction."""
    return max(checks, key=lambda check: abs(check.off))
