"""What two micro-batches gain when one computes while the other communicates."""

from dsv3_tutorial.learn.registry import Case, Exercise, Mutant

_ONE = "Two micro-batches, twice the longer: only one of the two is in the overlapped time."
_FILL = (
    "Steady state: no fill and no drain. While one computes the other always communicates, so two "
    "micro-batches take twice the longer."
)


def _more(sms: int, reserved: int) -> float:
    return sms / (sms - reserved)


def _open(more=_more, old=lambda c, slow, m: 2 * (c + m), new=lambda c, slow, m: 2 * max(slow, m)):
    """`overlap_speedup`, the seconds of two micro-batches both ways, open to be got wrong.

    c seconds of arithmetic, slow with fewer SMs (more times as long), m of messages.
    """

    def speedup(compute, communication, sms=132, reserved=20):
        seconds = compute, compute * more(sms, reserved), communication
        return old(*seconds) / new(*seconds)

    return speedup


def _once(c, slow, m):
    return max(slow, m)


# the overlapped way with its ends counted, in the forms that people give it
_FILLED = {
    "filled and drained": lambda c, slow, m: slow + max(slow, m) + m,
    "filled on all SMs": lambda c, slow, m: c + max(slow, m) + m,
    "filled": lambda c, slow, m: slow + 2 * max(slow, m),
    "filled on all SMs, not drained": lambda c, slow, m: c + 2 * max(slow, m),
    "drained": lambda c, slow, m: 2 * max(slow, m) + m,
    "both ends beside both": lambda c, slow, m: slow + 2 * max(slow, m) + m,
}
_PRICES = {
    "priced": _more,
    "no price": lambda sms, reserved: 1.0,
    "a share more": lambda sms, reserved: 1 + reserved / sms,
}

OVERLAP_SPEEDUP = Exercise(
    name="parallel.overlap_speedup",
    reference="dsv3_tutorial.cost.sharding:overlap_speedup",
    cases=[
        Case("as long as each other", lambda: (1.0, 1.0)),
        Case("mostly messages", lambda: (1.0, 3.0)),
        Case("mostly arithmetic", lambda: (5.0, 0.5)),
        Case("no SM reserved", lambda: (2.0, 1.0, 132, 0)),
        Case("another chip", lambda: (3.0, 2.9, 78, 10), hidden=True),
        Case("balanced", lambda: (112.0, 132.0), hidden=True),
        Case("milliseconds", lambda: (1.2e-3, 0.9e-3, 108), hidden=True),
    ],
    hints=[
        "One after the other, on all SMs: 2 (compute + communication) for two micro-batches.",
        "Overlapped, sms - reserved are left to compute: compute * sms / (sms - reserved).",
        "While one micro-batch computes the other communicates, so the longer of the two decides: "
        "two micro-batches take twice the longer.",
    ],
    difficulty=2,
    importance=4,
    minutes=4,
    lines=2,
    mutants=[
        Mutant(
            "no price",
            _open(_PRICES["no price"]),
            "The reserved SMs do not compute: overlapped arithmetic takes longer.",
        ),
        Mutant(
            "a share more",
            _open(_PRICES["a share more"]),
            "sms - reserved are left, so arithmetic takes sms / (sms - reserved) as long: that is "
            "more than reserved / sms longer.",
        ),
        *(
            Mutant(
                f"{name}, {priced}", _open(more, new=seconds), _ONE if seconds is _once else _FILL
            )
            for priced, more in _PRICES.items()
            for name, seconds in {"one overlapped": _once, **_FILLED}.items()
        ),
        Mutant(
            "one after the other",
            _open(old=lambda c, slow, m: c + m),
            "One micro-batch the old way against two overlapped: count two in both.",
        ),
        Mutant(
            "price twice",
            _open(old=lambda c, slow, m: 2 * (slow + m)),
            "One after the other, all SMs compute: no price there.",
        ),
        Mutant(
            "upside down",
            _open(lambda sms, reserved: (sms - reserved) / sms),
            "With fewer SMs arithmetic takes longer, not shorter.",
        ),
        Mutant(
            "reserved only",
            _open(lambda sms, reserved: sms / max(reserved, 1)),
            "The arithmetic runs on the reserved SMs here: it runs on the others.",
        ),
        Mutant(
            "the shorter",
            _open(new=lambda c, slow, m: 2 * min(slow, m)),
            "The longer of the two decides, not the shorter.",
        ),
        Mutant(
            "ratio of times",
            _open(old=lambda c, slow, m: max(slow, m), new=lambda c, slow, m: c + m),
            "This is the fraction upside down: how much faster is the old time over the new.",
        ),
        Mutant(
            "both slowed",
            lambda compute, communication, sms=132, reserved=20: (
                (compute + communication) / (max(compute, communication) * _more(sms, reserved))
            ),
            "Communication is not slowed by its own SMs: only arithmetic loses them.",
        ),
    ],
)
