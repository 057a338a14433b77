"""How long a pipeline's stages wait, from their orders alone; and work that hides messages."""

from dsv3_tutorial.cost.schedule_orders import one_f_one_b_order
from dsv3_tutorial.cost.sharding import bubble
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _gpipe(stages: int, micro_batches: int) -> list[list[str]]:
    return [[f"{kind}{i}" for kind in "FB" for i in range(micro_batches)] for _ in range(stages)]


def _alternating(stages: int, micro_batches: int, *times: float):
    return lambda: (
        [one_f_one_b_order(stage, stages, micro_batches) for stage in range(stages)],
        *times,
    )


def _eager(stages: int, micro_batches: int, *times: float):
    """No forward ahead: a stage waits for each gradient before its next forward."""
    orders = [[f"{kind}{i}" for i in range(micro_batches) for kind in "FB"] for _ in range(stages)]
    return lambda: (orders.copy(), *times)


def _fixed(orders: list[list[str]], *times: float):
    return lambda: ([list(order) for order in orders], *times)


def _length(orders, t_f, t_b, before=None, times=None) -> float:
    """The step's seconds, with who waits for whom open to be got wrong."""
    before = before or {"F": -1, "B": 1}
    seconds = times or {"F": t_f, "B": t_b}
    ends, clock, left = {}, [0.0] * len(orders), [list(order) for order in orders]
    known = {(stage, name) for stage, order in enumerate(orders) for name in order}
    moved = True
    while moved:
        moved = False
        for stage, todo in enumerate(left):
            if not todo:
                continue
            step = before[todo[0][0]]
            source = (stage + step, todo[0])
            if step and source in known and source not in ends:
                continue
            name = todo.pop(0)
            clock[stage] = max(clock[stage], ends.get(source, 0.0) if step else 0.0)
            clock[stage] += seconds[name[0]]
            ends[stage, name] = clock[stage]
            moved = True
    return max(clock)


def _busy(orders, t_f, t_b) -> float:
    return len(orders[0]) / 2 * (t_f + t_b)


def _open(before=None):
    return lambda orders, t_f, t_b: _length(orders, t_f, t_b, before) - _busy(orders, t_f, t_b)


def _one_time(orders, t_f, t_b):
    same = {"F": t_f, "B": t_f}
    return _length(orders, t_f, t_b, None, same) - len(orders[0]) * t_f


def _closed_form(orders, t_f, t_b):
    return (len(orders) - 1) * (t_f + t_b)


BUBBLE = Exercise(
    name="parallel.bubble",
    reference="dsv3_tutorial.cost.sharding:bubble",
    cases=[
        Case("1F1B on 4 stages", _alternating(4, 6, 1.0, 2.0)),
        Case("all forwards first", _fixed(_gpipe(3, 4), 1.0, 2.5)),
        Case("no forward ahead", _eager(3, 4, 1.0, 2.0)),
        Case("one micro-batch", _alternating(5, 1, 2.0, 3.0)),
        Case("many", _alternating(8, 20, 1.0, 1.5), hidden=True),
        Case("one stage", _alternating(1, 3, 1.0, 2.0), hidden=True),
        Case("no forward ahead, long", _eager(5, 7, 2.0, 1.0), hidden=True),
        Case(
            "a mixed order",
            _fixed(
                [["F0", "F1", "B0", "F2", "B1", "B2"], ["F0", "B0", "F1", "B1", "F2", "B2"]], 1, 3
            ),
            hidden=True,
        ),
    ],
    hints=[
        "Keep a clock for each stage, and when each operation of each stage has ended.",
        "An operation starts when its stage is free and the same operation has ended on stage - 1 "
        "(F) or stage + 1 (B), where there is such a stage; if it has not ended yet, go on with "
        "another stage and come back.",
        "The step lasts until the last clock; a stage works micro_batches * (t_f + t_b) of that.",
    ],
    difficulty=4,
    importance=4,
    minutes=14,
    lines=10,
    tolerance=1e-9,
    mutants=[
        Mutant("nobody waits", _open({"F": 0, "B": 0}), "No stage waits for another here."),
        Mutant(
            "forwards only",
            _open({"F": -1, "B": 0}),
            "Backwards do not wait: a gradient comes from the stage after.",
        ),
        Mutant(
            "backwards only",
            _open({"F": 0, "B": 1}),
            "Forwards do not wait: a stage's input comes from the stage before.",
        ),
        Mutant(
            "one direction",
            _open({"F": -1, "B": -1}),
            "Backwards run the other way: B waits for the stage after.",
        ),
        Mutant("length", _length, "This is the whole step; subtract the time that a stage works."),
        Mutant(
            "all stages",
            lambda orders, t_f, t_b: bubble(orders, t_f, t_b) * len(orders),
            "This adds up all stages; return what one idles.",
        ),
        Mutant(
            "share",
            lambda orders, t_f, t_b: bubble(orders, t_f, t_b) / _length(orders, t_f, t_b),
            "This is a share of the step; return seconds.",
        ),
        Mutant("one time", _one_time, "A backward takes t_b, not t_f."),
        Mutant(
            "closed form",
            _closed_form,
            "This is 1F1B's closed form; other orders wait longer: use the orders.",
        ),
    ],
)


def _slow(compute, communication, sms=132, reserved=20):
    return compute * sms / (sms - reserved)


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
        "One after the other, on all SMs: compute + communication.",
        "Overlapped, sms - reserved are left to compute: compute * sms / (sms - reserved).",
        "While one micro-batch computes the other communicates, so the longer of the two decides.",
    ],
    difficulty=2,
    importance=4,
    minutes=4,
    lines=2,
    mutants=[
        Mutant(
            "no price",
            lambda compute, communication, sms=132, reserved=20: (
                (compute + communication) / max(compute, communication)
            ),
            "The reserved SMs do not compute: overlapped arithmetic takes longer.",
        ),
        Mutant(
            "price twice",
            lambda compute, communication, sms=132, reserved=20: (
                (_slow(compute, communication, sms, reserved) + communication)
                / max(_slow(compute, communication, sms, reserved), communication)
            ),
            "One after the other, all SMs compute: no price there.",
        ),
        Mutant(
            "upside down",
            lambda compute, communication, sms=132, reserved=20: (
                (compute + communication) / max(compute * (sms - reserved) / sms, communication)
            ),
            "With fewer SMs arithmetic takes longer, not shorter.",
        ),
        Mutant(
            "reserved only",
            lambda compute, communication, sms=132, reserved=20: (
                (compute + communication) / max(compute * sms / max(reserved, 1), communication)
            ),
            "The arithmetic runs on the reserved SMs here: it runs on the others.",
        ),
        Mutant(
            "the shorter",
            lambda compute, communication, sms=132, reserved=20: (
                (compute + communication)
                / min(_slow(compute, communication, sms, reserved), communication)
            ),
            "The longer of the two decides, not the shorter.",
        ),
        Mutant(
            "ratio of times",
            lambda compute, communication, sms=132, reserved=20: (
                max(_slow(compute, communication, sms, reserved), communication)
                / (compute + communication)
            ),
            "This is the fraction upside down: how much faster is the old time over the new.",
        ),
        Mutant(
            "both slowed",
            lambda compute, communication, sms=132, reserved=20: (
                (compute + communication)
                / max(
                    _slow(compute, communication, sms, reserved),
                    _slow(communication, compute, sms, reserved),
                )
            ),
            "Communication is not slowed by its own SMs: only arithmetic loses them.",
        ),
    ],
)

EXERCISES = [BUBBLE, OVERLAP_SPEEDUP]
