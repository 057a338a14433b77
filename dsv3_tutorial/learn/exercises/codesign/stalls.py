"""What of the communication, or of any wait, no work hides."""

import math
from itertools import pairwise

from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _spans(work: list, other: list):
    return lambda: (list(work), list(other))


def _wide(count: int):
    """Messages that overlap each other, beside work with gaps, from a fixed rule."""
    work = [(7.0 * i % 60, 7.0 * i % 60 + 1.5 + i % 3) for i in range(count)]
    other = [(11.0 * i % 64, 11.0 * i % 64 + 3.25) for i in range(count)]
    return _spans(work, other)


def _uneven(count: int):
    """Spans that no clock's tick divides, from before 0 on: thirds, sevenths and square roots."""
    work = [(5 * math.sin(3.0 * i) / 3, 5 * math.sin(3.0 * i) / 3 + 1 / 7) for i in range(count)]
    other = [(math.sqrt(i) - 2 / 3, math.sqrt(i) - 1 / 3 + i / 130) for i in range(count)]
    return _spans(work, other)


def _merged(spans: list) -> list:
    whole = []
    for start, end in sorted(spans):
        if whole and start <= whole[-1][1]:
            whole[-1] = (whole[-1][0], max(whole[-1][1], end))
        else:
            whole.append((start, end))
    return whole


def _length(spans: list) -> float:
    return sum((end - start for start, end in spans), 0.0)


def _common(some: list, others: list) -> float:
    both = ((max(a, c), min(b, d)) for a, b in some for c, d in others)
    return sum((max(0.0, end - start) for start, end in both), 0.0)


def _open(work=_merged, other=_merged, common=_common):
    """`exposed` with what is made of the spans open to be got wrong."""
    return lambda w, o: _length(other(o)) - common(work(w), other(o))


def _whole_only(some: list, others: list) -> float:
    inside = ((c, d) for c, d in others if any(a <= c and d <= b for a, b in some))
    return _length(list(inside))


def _touched(some: list, others: list) -> float:
    hit = ((c, d) for c, d in others if any(a < d and c < b for a, b in some))
    return _length(list(hit))


def _in_order(some: list, others: list) -> float:
    both = ((max(a, c), min(b, d)) for (a, b), (c, d) in zip(some, others))
    return sum((max(0.0, end - start) for start, end in both), 0.0)


def _last_end(spans: list) -> list:
    """Merged, but a span inside another one ends it early."""
    whole = []
    for start, end in sorted(spans):
        if whole and start <= whole[-1][1]:
            whole[-1] = (whole[-1][0], end)
        else:
            whole.append((start, end))
    return whole


def _unsorted(spans: list) -> list:
    whole = []
    for start, end in spans:
        if whole and start <= whole[-1][1]:
            whole[-1] = (whole[-1][0], max(whole[-1][1], end))
        else:
            whole.append((start, end))
    return whole


def _idle(w: list, o: list) -> float:
    edges = _merged([*w, *o])
    return edges[-1][1] - edges[0][0] - _length(_merged(w)) if edges else 0.0


def _gaps(w: list, o: list) -> float:
    """The gaps between work that a message touches, whole."""
    gaps = ((a[1], b[0]) for a, b in pairwise(_merged(w)))
    return _length([(a, b) for a, b in gaps if any(c < b and a < d for c, d in o)])


def _as_they_are(spans: list) -> list:
    return spans


def _sampled(w: list, o: list, tick: float = 0.25, at: float = 0.5) -> float:
    """Whole ticks in which other runs and work does not, each asked once."""
    if not o:
        return 0.0
    first, last = min(a for a, _ in o), max(b for _, b in o)
    moments = ((i + at) * tick for i in range(math.floor(first / tick), math.ceil(last / tick)))
    return sum(tick for t in moments if _at(o, t) and not _at(w, t))


def _at(spans: list, moment: float) -> bool:
    return any(a <= moment < b for a, b in spans)


def _from_zero(spans: list) -> list:
    return _merged([(max(0.0, a), b) for a, b in spans if b > 0])


_TICKS = (
    "Time is counted in ticks of one length here: spans begin and end anywhere between them, so "
    "take their own starts and ends."
)

EXPOSED = Exercise(
    name="codesign.exposed",
    reference="dsv3_tutorial.cost.overlap:exposed",
    cases=[
        Case("half hidden", _spans([(0.0, 4.0)], [(2.0, 6.0)])),
        Case("nothing hidden", _spans([(0.0, 1.0), (5.0, 6.0)], [(1.0, 2.0), (3.0, 4.5)])),
        Case("two messages at once", _spans([(0.0, 1.0)], [(2.0, 5.0), (3.0, 6.0)])),
        Case("two kernels at once", _spans([(0.0, 4.0), (1.0, 3.0)], [(2.0, 6.0)])),
        Case("not in order", _spans([(8.0, 9.0), (0.0, 3.0)], [(7.0, 9.5), (2.0, 4.0)])),
        Case("one wholly hidden", _spans([(0.0, 4.0)], [(1.0, 2.0), (3.0, 5.0)])),
        Case("no work", _spans([], [(1.0, 2.0), (1.5, 4.0)])),
        Case("milliseconds", _spans([(0.013, 0.0301)], [(0.0, 0.0144), (0.0275, 0.0412)])),
        Case("before zero", _spans([(-2.5, -1.1)], [(-3.75, -2.0), (-0.6, 1.3)])),
        Case("no message", _spans([(0.0, 2.0)], []), hidden=True),
        Case("many", _wide(17), hidden=True),
        Case("more", _wide(40), hidden=True),
        Case("odd fractions", _uneven(13), hidden=True),
        Case("one inside the other", _spans([(3.0, 4.0)], [(0.0, 10.0), (2.0, 5.0)]), hidden=True),
        Case(
            "a message over many kernels",
            _spans([(float(i), i + 0.75) for i in range(9, -1, -1)], [(0.5, 9.5), (20.0, 21.0)]),
            hidden=True,
        ),
    ],
    hints=[
        "Put all starts and ends, of both lists, into one sorted list. Between two neighbours in "
        "it nothing begins and nothing ends.",
        "So a stretch between two neighbours lies wholly in a span or wholly outside: it is in "
        "(a, b) if a <= start and end <= b.",
        "Add up the stretches that lie in some span of other and in none of work.",
    ],
    difficulty=3,
    importance=5,
    minutes=8,
    lines=6,
    tolerance=1e-9,
    mutants=[
        Mutant(
            "all of it",
            lambda w, o: _length(_merged(o)),
            "work is not used: what runs beside work costs nothing.",
        ),
        Mutant(
            "durations",
            lambda w, o: max(0.0, _length(o) - _length(w)),
            "Durations are subtracted: work hides only what runs at the same moment.",
        ),
        Mutant(
            "unions' durations",
            lambda w, o: max(0.0, _length(_merged(o)) - _length(_merged(w))),
            "The unions' durations are subtracted: work hides only what runs at the same moment.",
        ),
        Mutant(
            "messages twice",
            _open(other=_as_they_are),
            "Where two spans of other overlap, their seconds are counted twice: time passes once.",
        ),
        Mutant(
            "work twice",
            _open(work=_as_they_are),
            "Where two spans of work overlap, what they hide is subtracted twice.",
        ),
        Mutant(
            "both twice",
            _open(_as_they_are, _as_they_are),
            "Spans of one list may overlap each other: take each list's union first.",
        ),
        Mutant(
            "pairs",
            _open(common=_in_order),
            "The i-th message is compared with the i-th kernel only: any kernel may hide it.",
        ),
        Mutant(
            "whole messages",
            _open(common=_whole_only),
            "A message is hidden only as a whole here: the part beside work is hidden too.",
        ),
        Mutant(
            "touched",
            _open(common=_touched),
            "A message that meets any work counts as hidden: only the part beside work is.",
        ),
        Mutant(
            "ends early",
            _open(_last_end, _last_end),
            "A span that lies inside another one ends the union early: keep the later end.",
        ),
        Mutant(
            "not sorted",
            _open(_unsorted, _unsorted),
            "Spans are merged in the order of the lists: sort them first.",
        ),
        Mutant(
            "hidden",
            lambda w, o: _common(_merged(w), _merged(o)),
            "These are the seconds that work hides: return those that it does not.",
        ),
        Mutant(
            "work alone",
            lambda w, o: _length(_merged(w)) - _common(_merged(w), _merged(o)),
            "This is the work that no message runs beside: it is the other way round.",
        ),
        Mutant(
            "all idle time",
            _idle,
            "These are all seconds without work: only those in which other runs count.",
        ),
        Mutant(
            "whole gaps",
            _gaps,
            "The whole gap between two kernels is counted: only the part in which other runs is.",
        ),
        Mutant("quarters", _sampled, _TICKS),
        Mutant("quarters from their starts", lambda w, o: _sampled(w, o, at=0.0), _TICKS),
        Mutant("thousandths", lambda w, o: _sampled(w, o, 0.001), _TICKS),
        Mutant(
            "from zero",
            _open(_from_zero, _from_zero),
            "What lies before 0 is left out: begin at the first start, not at 0.",
        ),
    ],
)
