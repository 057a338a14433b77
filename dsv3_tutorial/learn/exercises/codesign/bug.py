"""An estimate of a training step with the field's bugs in it."""

from collections.abc import Sequence
from itertools import product

from dsv3_tutorial.learn.registry import Case, Exercise, Mutant

RIGHT = "right"
BUGS = {
    "met": "a token is multiplied with the activated parameters, not with all",
    "bits": "a network card is sold by its gigabits a second, and a byte has 8 bits",
    "bubble": "(p - 1) / (m + p - 1) is the bubble's share of the whole; of the work it is "
    "(p - 1) / m",
}
HALF = {
    "total less activated": "the parameters that a token does not meet are counted",
    "8 the other way": "8 bits make a byte, so the seconds become more, not less",
    "gigabytes": "1e9 is gone, but a gigabit has that many bits",
    "bubble of stages": "p stages are waited for, one too many: p - 1 are",
    "share of all": "(p - 1) / m is right, but busy is that of all micro-batches already",
}
_COMPUTE = {
    RIGHT: lambda total, activated: activated,
    "met": lambda total, activated: total,
    "total less activated": lambda total, activated: total - activated,
}
_NETWORK = {
    RIGHT: lambda sent, link: 8 * sent / (link * 1e9),
    "bits": lambda sent, link: sent / (link * 1e9),
    "8 the other way": lambda sent, link: sent / (link * 8e9),
    "gigabytes": lambda sent, link: 8 * sent / link,
}
_BUBBLE = {
    RIGHT: lambda p, m: (p - 1) / m,
    "bubble": lambda p, m: (p - 1) / (m + p - 1),
    "bubble of stages": lambda p, m: p / m,
    "share of all": lambda p, m: p - 1,
}
_PARTS = ("met", "bits", "bubble")


def counted(left: Sequence[str]) -> str:
    """How many bugs are left; about the last one what it is."""
    if len(left) == 1:
        return f"One bug is left: {BUGS.get(left[0]) or HALF[left[0]]}."
    half = [HALF[one] for one in left if one in HALF]
    said = "All three bugs are left" if len(left) == 3 else "Two bugs are left"
    return f"{said}; half mended: {', and '.join(half)}." if half else f"{said}."


def buggy(*left: str, busy=max, times: float = 6, add=lambda busy, bubble: busy + bubble):
    """`step_seconds` with some of the bugs, or of their half mended forms, left in."""
    ways = [
        next((way[one] for one in left if one in way), way[RIGHT])
        for way in (_COMPUTE, _NETWORK, _BUBBLE)
    ]

    def step(total, activated, tokens, gpus, peak, sent, link, stages, micro_batches):
        compute = times * ways[0](total, activated) * tokens / (gpus * peak)
        longer = busy(compute, ways[1](sent, link))
        return add(longer, longer * ways[2](stages, micro_batches))

    return step


def _all_left() -> list[Mutant]:
    """Every way in which the three lines can be right, as they were or half mended."""
    found = []
    for kinds in product(_COMPUTE, _NETWORK, _BUBBLE):
        left = tuple(kind for kind in kinds if kind != RIGHT)
        if left and sum(kind in HALF for kind in left) <= 1:
            found.append(Mutant(" and ".join(left), buggy(*left), counted(left)))
    return found


def _numbers(*numbers: float):
    return lambda: numbers


FIND_THE_BUG = Exercise(
    name="codesign.find_the_bug",
    reference="dsv3_tutorial.cost.estimate:step_seconds",
    cases=[
        Case("arithmetic decides", _numbers(20e9, 3e9, 4e6, 64, 4e14, 2e9, 400, 4, 32)),
        Case("messages decide", _numbers(20e9, 3e9, 4e6, 64, 4e14, 3e11, 400, 4, 32)),
        Case("dense, no pipeline", _numbers(8e9, 8e9, 1e6, 16, 4e14, 1e9, 200, 1, 1)),
        Case("many stages", _numbers(671e9, 37e9, 62.9e6, 2048, 5e14, 1e11, 400, 16, 120)),
        Case("hardly any arithmetic", _numbers(3e9, 1e9, 1e5, 16, 5e14, 5e12, 400, 4, 8)),
        Case("few micro-batches", _numbers(7e9, 1e9, 2e6, 8, 3e14, 1e10, 100, 8, 8), hidden=True),
        Case("a slow card", _numbers(50e9, 5e9, 1e6, 32, 9e14, 8e10, 25, 2, 16), hidden=True),
        Case(
            "hardly any messages", _numbers(9e9, 2e9, 3e6, 24, 2e14, 1.0, 800, 6, 48), hidden=True
        ),
    ],
    hints=[
        "Put in a case that you can work out by hand: one GPU, one stage, no messages. Then one "
        "thing more at a time.",
        "Which of the parameters is a token multiplied with? In which unit is a link sold? And "
        "what is (p - 1) / (m + p - 1) a share of?",
    ],
    difficulty=3,
    importance=4,
    minutes=8,
    lines=3,
    tolerance=1e-9,
    mutants=[
        *_all_left(),
        Mutant(
            "one after the other",
            buggy(busy=lambda compute, network: compute + network),
            "Messages were right to run beside arithmetic: the longer of the two counts.",
        ),
        Mutant(
            "two",
            buggy(times=2),
            "6 was right: 2 FLOP for each parameter forward, and twice that backward.",
        ),
        Mutant(
            "the bubble alone",
            buggy(add=lambda busy, bubble: bubble),
            "This is the bubble: the work comes on top.",
        ),
    ],
)
