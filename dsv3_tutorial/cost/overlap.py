"""What is left of a wait once work covers it: the arithmetic of every overlap in the course.

Spans are (start, end) in seconds. A step is as long as its work and what no work covers.
"""

from collections.abc import Iterable

Span = tuple[float, float]


class SpanError(ValueError):
    """A span that ends before it begins, or has no end."""


def exposed(work: list[Span], other: list[Span]) -> float:
    """Seconds of `other` that no `work` covers: what a step waits for, however much is going on.

    Lists of (start, end) in seconds, in any order; spans of one list may overlap, and a moment that
    two of `other` share counts once. O(n log n) for n spans in all.
    """
    edges = [(at, busy, 0) for span in work for at, busy in zip(span, (1, -1))]
    edges += [(at, 0, waits) for span in other for at, waits in zip(span, (1, -1))]
    total, before, working, waiting = 0.0, 0.0, 0, 0
    for at, busy, waits in sorted(edges):
        if waiting and not working:
            total += at - before
        before, working, waiting = at, working + busy, waiting + waits
    return total


def covered(spans: Iterable[Span]) -> float:
    """Seconds in which at least one of the spans is going on."""
    return exposed([], checked(spans))


def hidden(work: Iterable[Span], other: Iterable[Span]) -> float:
    """Seconds of `other` that cost a step nothing, as `work` goes on meanwhile."""
    work, other = checked(work), checked(other)
    return covered(other) - exposed(work, other)


def checked(spans: Iterable[Span]) -> list[Span]:
    """The spans as a list. Raises SpanError for one that ends before it begins, or never."""
    listed = list(spans)
    wrong = [span for span in listed if not 0 <= span[1] - span[0] < float("inf")]
    if wrong:
        raise SpanError(
            f"{len(wrong)} of {len(listed)} spans, {wrong[0]} first, end before they begin or never"
            "; their seconds would be taken from the others'. Give (start, end), in seconds."
        )
    return listed
