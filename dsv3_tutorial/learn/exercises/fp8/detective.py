"""Silicon detective: what accumulator stands behind a matmul, in at most 20 probes."""

from dataclasses import replace

from dsv3_tutorial.fp8.accumulate import HOPPER, AccumulationError, TensorCore
from dsv3_tutorial.fp8.probe import Chip, Engine, answer, plainest, tell_apart, written
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant

BIG, TINY = 2.0**16, 2.0**-12
HINTS = {  # in the order in which one builds on the other
    "bits": "Width: engine.dot([2.0**16, 2.0**(16 - j), -2.0**16]) is not 0 as long as j bits are "
    "kept. j is 8 to 20: halve what is left.",
    "rounding": "Rounding: with last = 2.0**(16 - bits), "
    "engine.dot([2.0**16, 0.75 * last, -2.0**16]) is 0 where the rest is cut, and last where it "
    "goes to the nearest.",
    "group": "Group: in [2.0**16, -2.0**16] + [2.0**-12] * 254 exactly the small terms that share "
    "the first group are lost; the sum is 2.0**-12 times the others.",
    "joint": "joint: with last = 2.0**(16 - bits), [2.0**16] + [0.0] * (group - 1) + [last / 4] * "
    "group stays 2.0**16 only if each small term is aligned with the running sum.",
    "promote": "Promotion: [2.0**16] + [0.0] * 127 + ([last / 4] + [0.0] * 127) * 63 gains "
    "last / 4 for each small term after the first promotion, so promote = 8192 - 128 * gained; "
    "None if 0.",
}


def told_apart(got: TensorCore, expected: TensorCore) -> str | None:
    """A sum that the answer and the engine take differently, in words; None where there is none.

    Where it can be, it is a sum about the first property that is wrong, followed by its hint.
    """
    products = tell_apart(got, expected)
    if products is None:
        return None
    wrong = next((name for name in HINTS if _own(plainest(got), name, plainest(expected))), None)
    products = (wrong and _telling(got, wrong, expected)) or products
    theirs, ours = answer(got, products), answer(expected, products)
    text = (
        f"a sum tells your answer from the engine: {written(products)} "
        f"is {theirs:.9g} by your answer, and the engine says {ours:.9g}"
    )
    return f"{text}. Hint: {HINTS[wrong].removesuffix('.')}" if wrong else text


def _own(got: TensorCore, name: str, expected: TensorCore) -> bool:
    return getattr(got, name) != getattr(expected, name)


def _telling(got: TensorCore, name: str, expected: TensorCore) -> list[float] | None:
    """A sum about this one property that also tells the whole answer from the engine."""
    try:
        products = tell_apart(replace(expected, **{name: getattr(got, name)}), expected)
    except AccumulationError:  # the answer's value makes no accumulator of the engine's others
        return None
    if products is None or answer(got, products) == answer(expected, products):
        return None
    return products


def _engine(seed: int):
    return lambda: (Engine(seed),)


def _bits(engine: Chip, part: float = 1.0) -> int:
    """The width by halving: the most bits at which `part` of the last one is not lost."""
    low, high = 7, 24
    while high - low > 1:
        middle = (low + high) // 2
        kept = engine.dot([BIG, part * 2.0 ** (16 - middle), -BIG]) != 0
        low, high = (middle, high) if kept else (low, middle)
    return low


def _bits_one_by_one(engine: Chip) -> int:
    bits = 1
    while engine.dot([BIG, 2.0 ** (15 - bits), -BIG]):
        bits += 1
    return bits


def _group(engine: Chip) -> int:
    return 256 - int(engine.dot([BIG, -BIG] + [TINY] * 254) / TINY)


def _group_from_survivors(engine: Chip) -> int:
    return 254 - int(engine.dot([BIG, -BIG] + [TINY] * 254) / TINY)


def _group_uncancelled(engine: Chip) -> int:
    return 256 - int((engine.dot([BIG] + [TINY] * 255) - BIG) / TINY)


def _rounding(engine: Chip, last: float) -> str:
    return "nearest" if engine.dot([BIG, 0.75 * last, -BIG]) else "truncate"


def _together(engine: Chip, last: float, group: int) -> bool:
    return engine.dot([BIG] + [0.0] * (group - 1) + [last / 4] * group) == BIG


def _promote(engine: Chip, last: float) -> int | None:
    sparse = [BIG] + [0.0] * 127 + ([last / 4] + [0.0] * 127) * 63
    late = int((engine.dot(sparse) - BIG) / (last / 4))
    return 8192 - 128 * late if late else None


def _promote_dense(engine: Chip, last: float) -> int | None:
    late = int((engine.dot([BIG] + [last / 4] * 8191) - BIG) / (last / 4))
    return 128 * round((8192 - late) / 128) if late else None


def _investigate(
    bits=_bits, group=_group, rounding=_rounding, together=_together, promote=_promote
):
    """`identify` with its five questions open to be asked wrongly."""

    def identify(engine):
        width = bits(engine)
        last = BIG / 2**width
        size = group(engine)
        kind = rounding(engine, last)
        joint = together(engine, last, size)
        return TensorCore(width, size, promote(engine, last), kind, joint)

    return identify


MUTANTS = [
    Mutant("Hopper", lambda engine: HOPPER, "This is Hopper's for every engine: ask this one."),
    Mutant(
        "significant bits",
        _investigate(bits=lambda engine: _bits(engine) + 1),
        "bits are fraction bits: the leading one is not counted (Hopper keeps 13, not 14).",
    ),
    Mutant(
        "width of what rounds up",
        _investigate(bits=lambda engine: _bits(engine, 1.5)),
        "Half a bit and a half of that round up to a bit on some engines: ask with powers of two.",
    ),
    Mutant(
        "one guess a probe",
        _investigate(bits=_bits_one_by_one),
        "One probe for each width is too many: halve what is left, or let one sum ask for all.",
    ),
    Mutant(
        "always truncates",
        _investigate(rounding=lambda engine, last: "truncate"),
        "It never rounds up here: 3/4 of the last bit shows it (1/2 is a tie, and goes to zero).",
    ),
    Mutant(
        "survivors subtracted from 254",
        _investigate(group=_group_from_survivors),
        "The large term and its negative belong to the group too.",
    ),
    Mutant(
        "large term left standing",
        _investigate(group=_group_uncancelled),
        "The large term still stands in the running sum: cancel it inside its own group.",
    ),
    Mutant(
        "always joint",
        _investigate(together=lambda engine, last, group: True),
        "joint is taken for granted: do small terms of a later group add up before they meet it?",
    ),
    Mutant(
        "never promoted",
        _investigate(promote=lambda engine, last: None),
        "The promotion is not looked for: after it, small terms survive beside an early large one.",
    ),
    Mutant(
        "small terms in every place",
        _investigate(promote=_promote_dense),
        "Small terms of one group can add up to what is kept: one every 128 places is enough.",
    ),
]

DETECTIVE = Exercise(
    name="fp8.detective",
    reference="dsv3_tutorial.fp8.probe:identify",
    cases=[
        Case("engine 46", _engine(46)),
        Case("engine 9", _engine(9)),
        Case("engine 5", _engine(5)),
        Case("engine 187", _engine(187)),
        Case("wide, of small groups", _engine(140), hidden=True),
        Case("narrow, promoted early", _engine(2), hidden=True),
        Case("promoted after every group", _engine(85), hidden=True),
        Case("promoted after 8192", _engine(16), hidden=True),
        Case("wide, by themselves", _engine(6), hidden=True),
        Case("cut, by themselves", _engine(76), hidden=True),
    ],
    hints=list(HINTS.values()),
    difficulty=4,
    importance=4,
    minutes=15,
    lines=11,
    mutants=MUTANTS,
    needs=("TensorCore",),
    compare=told_apart,
)

EXERCISES = [DETECTIVE]
