"""How long a pipeline's stages wait, from their orders alone."""

import re

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


def _clocks(orders, t_f, t_b, before=None, times=None) -> list[float]:
    """When each stage has ended, with who waits for whom open to be got wrong."""
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
    return clock


def _length(*args) -> float:
    return max(_clocks(*args))


def _busy(orders, t_f, t_b) -> float:
    return len(orders[0]) / 2 * (t_f + t_b)


def _open(before=None):
    return lambda orders, t_f, t_b: _length(orders, t_f, t_b, before) - _busy(orders, t_f, t_b)


def _one_time(orders, t_f, t_b):
    same = {"F": t_f, "B": t_f}
    return _length(orders, t_f, t_b, None, same) - len(orders[0]) * t_f


def _last_stage(orders, t_f, t_b):
    return _clocks(orders, t_f, t_b)[-1] - _busy(orders, t_f, t_b)


def _not_halved(orders, t_f, t_b):
    return _length(orders, t_f, t_b) - len(orders[0]) * (t_f + t_b)


def _last_stage_not_halved(orders, t_f, t_b):
    return _clocks(orders, t_f, t_b)[-1] - len(orders[0]) * (t_f + t_b)


def _not_known_yet(error: BaseException, arguments: tuple) -> str | None:
    """What a KeyError or IndexError is about: a stage that is not there, or a later operation."""
    if not isinstance(error, KeyError | IndexError):
        return None
    key = error.args[0] if error.args else None
    parts = key if isinstance(key, tuple) else (key,)
    names = [part for part in parts if isinstance(part, str) and re.fullmatch(r"[FB]\d+", part)]
    stages = [part for part in parts if isinstance(part, int)]
    if isinstance(error, IndexError) or {-1, len(arguments[0])} & set(stages):
        return "The first stage's forwards and the last stage's backwards wait for no other stage."
    what = "What is looked up here" if len(names) != 1 else names[0]
    where = f" of stage {stages[0]}" if len(names) == len(stages) == 1 else ""
    return f"{what}{where} is not known yet: go on with another stage, and come back to this one."


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
            "Backwards do not wait: a gradient comes from the stage after, whose end is not known "
            "yet when the stages are gone through once.",
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
        Mutant(
            "last stage",
            _last_stage,
            "The step ends with stage 0's last backward, not with the last stage: take the latest "
            "of all clocks.",
        ),
        Mutant(
            "not halved",
            _not_halved,
            "An order holds F and B, so it is 2 x micro-batches long: halve it.",
        ),
        Mutant(
            "last stage, not halved",
            _last_stage_not_halved,
            "An order holds F and B: half its length is micro_batches. And the step ends with "
            "stage 0's last backward, not with the last stage.",
        ),
        Mutant(
            "stages for micro-batches",
            lambda orders, t_f, t_b: _length(orders, t_f, t_b) - len(orders) * (t_f + t_b),
            "len(orders) counts the stages; micro-batches are half of what an order holds.",
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
            "This is the closed form of 1F1B and of all forwards first: use the orders.",
        ),
    ],
    raised=_not_known_yet,
)
