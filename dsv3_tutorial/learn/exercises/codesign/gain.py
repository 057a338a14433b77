"""What a faster network buys, and how an efficiency is found in measured times."""

from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _numbers(*numbers: float):
    return lambda: numbers


def _open(
    hidden=lambda compute, network, share: min(share * network, compute),
    faster=lambda network, factor: network / factor,
    result=lambda old, new: old / new,
):
    """`gain` with what is hidden, and what is returned, open to be got wrong."""

    def gain(compute, network, overlapped, factor):
        old = compute + network - hidden(compute, network, overlapped)
        less = faster(network, factor)
        return result(old, compute + less - hidden(compute, less, overlapped))

    return gain


def _hidden_once(compute, network, overlapped, factor):
    """The seconds that were hidden stay hidden, as if they were those of the old network."""
    hidden = min(overlapped * network, compute)
    return (compute + network - hidden) / (compute + network / factor - hidden)


def _exposed_only(compute, network, overlapped, factor):
    """Only what was exposed becomes faster: right as long as arithmetic is longer."""
    exposed = network - min(overlapped * network, compute)
    return (compute + exposed) / (compute + exposed / factor)


GAIN = Exercise(
    name="codesign.gain",
    reference="dsv3_tutorial.cost.estimate:gain",
    cases=[
        Case("nothing overlaps", _numbers(3.0, 1.0, 0.0, 2.0)),
        Case("all of it may overlap, and does", _numbers(3.0, 1.0, 1.0, 2.0)),
        Case("more messages than arithmetic", _numbers(1.0, 4.0, 1.0, 2.0)),
        Case("half of it may overlap", _numbers(5.0, 2.0, 0.5, 4.0)),
        Case("then arithmetic is longer", _numbers(3.0, 4.0, 1.0, 8.0), hidden=True),
        Case("a slower network", _numbers(2.0, 1.5, 0.75, 0.25), hidden=True),
        Case("most of it may overlap", _numbers(1.0, 6.0, 0.9, 1.6), hidden=True),
        Case("no change", _numbers(2.0, 3.0, 0.5, 1.0), hidden=True),
    ],
    hints=[
        "How long is a step? The arithmetic, and what is left of the messages when the hidden part "
        "is taken away.",
        "overlapped * network seconds may run beside arithmetic, but not more than there is "
        "arithmetic: hidden = min(overlapped * network, compute).",
        "Do that twice, with network and with network / factor; the first over the second.",
    ],
    difficulty=2,
    importance=4,
    minutes=6,
    lines=4,
    tolerance=1e-9,
    mutants=[
        Mutant(
            "no overlap",
            _open(hidden=lambda c, n, s: 0.0),
            "overlapped is not used: what runs beside arithmetic costs nothing.",
        ),
        Mutant(
            "hidden without a limit",
            _open(hidden=lambda c, n, s: s * n),
            "More is hidden here than there is arithmetic to hide it behind.",
        ),
        Mutant(
            "a share of the arithmetic",
            _open(hidden=lambda c, n, s: min(n, s * c)),
            "overlapped is a share of the network's time, not of the arithmetic's.",
        ),
        Mutant(
            "the longer of the two",
            _open(hidden=lambda c, n, s: min(n, c)),
            "This is the longer of the two: only the share `overlapped` may run beside arithmetic.",
        ),
        Mutant(
            "hidden seconds stay",
            _hidden_once,
            "The seconds hidden from the old network are taken from the new one too: it has fewer "
            "to hide.",
        ),
        Mutant(
            "exposed only",
            _exposed_only,
            "Only the exposed seconds become faster here: where messages are longer than "
            "arithmetic, the hidden ones count too.",
        ),
        Mutant(
            "Amdahl",
            lambda c, n, s, f: (c + n) / (c + n / f),
            "overlapped is not used: what runs beside arithmetic costs nothing.",
        ),
        Mutant("the factor", lambda c, n, s, f: f, "Not all of the step is the network's time."),
        Mutant(
            "upside down",
            _open(result=lambda old, new: new / old),
            "The fraction is upside down: the old step over the new one.",
        ),
        Mutant(
            "saved",
            _open(result=lambda old, new: old - new),
            "These are the seconds saved: return how many times as fast, old over new.",
        ),
        Mutant(
            "saved share",
            _open(result=lambda old, new: 1 - new / old),
            "This is the share of the step that is saved: return old over new.",
        ),
        Mutant(
            "more",
            _open(result=lambda old, new: old / new - 1),
            "This is how much faster: return how many times as fast, 1 for no change.",
        ),
        Mutant(
            "slower",
            _open(faster=lambda n, f: n * f),
            "A network that is factor times as fast takes network / factor.",
        ),
    ],
)

H800 = ([1.0e12, 4.0e12, 9.0e12], [2.4e-3, 7.1e-3, 15.2e-3], 989.4e12)


def _measured(flops: list[float], seconds: list[float], peak: float):
    return lambda: (list(flops), list(seconds), peak)


def _dot(some, others) -> float:
    return sum(a * b for a, b in zip(some, others))


def _with_intercept(flops, seconds, peak):
    f, t = sum(flops) / len(flops), sum(seconds) / len(seconds)
    spread = sum((a - f) ** 2 for a in flops)
    slope = sum((a - f) * (b - t) for a, b in zip(flops, seconds)) / spread if spread else t / f
    return 1 / (slope * peak)


FIT_EFFICIENCY = Exercise(
    name="codesign.fit_efficiency",
    reference="dsv3_tutorial.cost.estimate:fit_efficiency",
    cases=[
        Case("one measurement", _measured([5e14], [1.0], 1e15)),
        Case("three products on an H800", _measured(*H800)),
        Case("small ones that are slow", _measured([1e9, 1e10, 1e12], [1e-5, 3e-5, 2e-3], 1e15)),
        Case("a fixed time in each", _measured([1e12, 2e12, 3e12], [3e-3, 5e-3, 7e-3], 1e15)),
        Case("two", _measured([3e11, 7e11], [1e-3, 4e-3], 312e12), hidden=True),
        Case(
            "many",
            _measured(
                [i * 1e12 for i in range(1, 20)],
                [i * 2e-3 + i % 4 / 1e3 for i in range(1, 20)],
                1e15,
            ),
            hidden=True,
        ),
    ],
    hints=[
        "seconds = a * flops, with one a for all measurements: a = 1 / (efficiency * peak). "
        "Find a first.",
        "The squared errors, sum((t - a f)^2), are least where their derivative is 0: "
        "sum(f (t - a f)) = 0.",
        "So a = sum(f t) / sum(f f), and the efficiency is 1 / (a * peak).",
    ],
    difficulty=2,
    importance=3,
    minutes=6,
    lines=2,
    tolerance=1e-9,
    mutants=[
        Mutant(
            "mean of efficiencies",
            lambda flops, t, peak: sum(f / s / peak for f, s in zip(flops, t)) / len(flops),
            "This is the mean of the efficiencies: short measurements count as much as long ones.",
        ),
        Mutant(
            "mean of slopes",
            lambda flops, t, peak: len(flops) / sum(s / f for f, s in zip(flops, t)) / peak,
            "This is the mean of seconds for a FLOP: it is no least-squares fit.",
        ),
        Mutant(
            "sum over sum",
            lambda flops, t, peak: sum(flops) / sum(t) / peak,
            "All FLOP over all seconds: near, but least squares weighs by f: sum(f t) / sum(f f).",
        ),
        Mutant(
            "the other way",
            lambda flops, t, peak: _dot(flops, t) / _dot(t, t) / peak,
            "FLOP are fitted to seconds here: the errors are in the seconds.",
        ),
        Mutant(
            "an intercept",
            _with_intercept,
            "This line has an intercept: it goes through zero.",
        ),
        Mutant(
            "best",
            lambda flops, t, peak: max(f / s for f, s in zip(flops, t)) / peak,
            "This is the best measurement: fit all of them.",
        ),
        Mutant(
            "slope",
            lambda flops, t, peak: _dot(flops, t) / _dot(flops, flops),
            "This is a, the seconds for a FLOP: the efficiency is 1 / (a * peak).",
        ),
        Mutant(
            "upside down",
            lambda flops, t, peak: _dot(flops, t) / _dot(flops, flops) * peak,
            "This is a * peak, how many times longer than at the peak: the efficiency is its "
            "inverse.",
        ),
        Mutant(
            "FLOP a second",
            lambda flops, t, peak: _dot(flops, flops) / _dot(flops, t),
            "These are FLOP a second: divide by peak.",
        ),
    ],
)
