"""Judging a learner's function: one status and one line, never an exception.

In this order, each with its own message: attempted, runs in time, type, shape, dtype, finite,
values, input left alone, cost. A wrong result is compared with what known wrong answers return, so
that the line can name the mistake.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from dsv3_tutorial.learn.attempt import attempted, first_line, forget, line_of, stable
from dsv3_tutorial.learn.compare import difference
from dsv3_tutorial.learn.limits import Clock, TimeUp, nothing_changed, quiet
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant

PASSED, NOT_YET = "passed", "not_yet"
RAISED, NOT_ATTEMPTED = "raised", "not_attempted"
LABELS = {
    PASSED: "PASSED",
    NOT_YET: "NOT YET",
    RAISED: "YOUR CODE RAISED",
    NOT_ATTEMPTED: "NOT ATTEMPTED",
}


@dataclass(frozen=True)
class Verdict:
    """What became of an attempt. printed: the first lines that the learner's code printed."""

    exercise: str
    status: str
    message: str
    printed: str = ""

    @property
    def line(self) -> str:
        return f"[{LABELS[self.status]}] {self.message}".rstrip()


@dataclass(frozen=True)
class Outcome:
    """One call: the result or the error, and whether the arguments were left as they were."""

    result: Any = None
    error: BaseException | None = None
    line: int | None = None
    changed: str | None = None


def judge(exercise: Exercise, function: Any) -> Verdict:
    """The verdict on a learner's function. Raises nothing, whatever the function does."""
    if not attempted(function):
        message = "Replace the ... with your code; until then the course uses its own version."
        return Verdict(exercise.name, NOT_ATTEMPTED, message)
    wrong = _wrong_form(exercise, function)
    if wrong:
        return Verdict(exercise.name, NOT_YET, wrong)
    with quiet() as printed, nothing_changed(function):
        status, message = _judge_cases(exercise, function, Clock(exercise.seconds))
    return Verdict(exercise.name, status, message, printed.first_lines())


def _wrong_form(exercise: Exercise, function: Any) -> str | None:
    """What can be said without running it: a plain function that takes the arguments."""
    if not isinstance(function, FunctionType):
        kind = "a class" if isinstance(function, type) else f"a {type(function).__name__}"
        return f"this is {kind}; write a function, with def"
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        return "this is an async function; write def without async"
    if inspect.isgeneratorfunction(function):
        return "the function holds a yield, so it returns a generator; use return"
    try:
        names = inspect.signature(exercise.function).parameters
        inspect.signature(function).bind(*(names if exercise.run else exercise.cases[0].make()))
    except TypeError:
        wanted = ", ".join(names)
        return f"the function must take ({wanted}); the first line of the cell was changed"
    return None


def _judge_cases(exercise: Exercise, function: Callable, clock: Clock) -> tuple[str, str]:
    for case in exercise.cases:
        outcome = _run(exercise, function, case, clock)
        wrong = _what_is_wrong(exercise, case, outcome) or _cost(exercise, function, case, clock)
        if wrong is None:
            continue
        status, text = wrong
        if isinstance(outcome.error, TimeUp):
            return NOT_YET, f"{exercise.case_title(case)}: {text}"
        named = _name_mistake(exercise, function, case, outcome, clock)
        return status, _with_hint(text, named, _first_hint(exercise, case, outcome))
    count = len(exercise.cases)
    return PASSED, f"{count} case{'s' if count > 1 else ''}"


def _first_hint(exercise: Exercise, case: Case, outcome: Outcome) -> str | None:
    """The exercise's first hint; after an error, what the exercise says of it."""
    if outcome.error is not None:
        return exercise.raised(outcome.error, case.make()) if exercise.raised else None
    return exercise.hints[0] if exercise.hints else None


def _with_hint(text: str, named: str | None, first: str | None) -> str:
    """One hint: a known mistake's, else the comparison's own in text, else the exercise's first."""
    text, _, own = text.partition(" Hint: ")
    hint = named or own or first
    return f"{text} Hint: {hint}" if hint else text


def _what_is_wrong(exercise: Exercise, case: Case, outcome: Outcome) -> tuple[str, str] | None:
    title = exercise.case_title(case)
    if isinstance(outcome.error, TimeUp):
        seconds = f"{exercise.seconds:g} s"
        return NOT_YET, f"it did not finish within {seconds}. Is there a loop without an end?"
    if outcome.error is not None:
        return RAISED, _error_text(outcome)
    expected = _bound(exercise, exercise.function)(*case.make())
    text = _differ(exercise, outcome.result, expected, not case.hidden)
    text = text or outcome.changed
    return (NOT_YET, f"{title}: {text}.") if text else None


def _bound(exercise: Exercise, function: Callable) -> Callable:
    """What a case is put to: the function, or the exercise's own way to run it."""
    if exercise.run is None:
        return function

    @functools.wraps(function)  # the time limit finds the learner's own functions through it
    def run(*args: Any) -> Any:
        return exercise.run(function, *args)

    return run


def _run(exercise: Exercise, function: Callable, case: Case, clock: Clock | None) -> Outcome:
    args, call = case.make(), _bound(exercise, function)
    try:
        result = clock.call(call, args) if clock else call(*args)
    except BaseException as error:  # sys.exit, TimeUp and the stop button included
        line = line_of(error, function)
        forget(error)
        return Outcome(error=error, line=line)
    return Outcome(result, changed=_changed(function, args, case.make()))


def _changed(function: Callable, args: tuple, before: tuple) -> str | None:
    names = list(inspect.signature(function).parameters)
    for index, (now, then) in enumerate(zip(args, before, strict=True)):
        if _safe_difference(now, then, 0.0, False):
            name = names[index] if index < len(names) else f"argument {index + 1}"
            return f"the input {name} was changed; work on a copy"
    return None


def _differ(exercise: Exercise, got: Any, expected: Any, spoil: bool) -> str | None:
    """What is wrong with a result: by the exercise's own comparison, where it has one."""
    wrong = _safe_difference(got, expected, exercise.tolerance, spoil)
    if wrong is None or exercise.compare is None or type(got) is not type(expected):
        return wrong
    return exercise.compare(got, expected)


def _safe_difference(got: Any, expected: Any, tolerance: float | None, spoil: bool) -> str | None:
    try:
        wrong = difference(got, expected, tolerance, spoil)
    except Exception:  # a result whose own methods fail
        return f"the result, a {type(got).__name__}, cannot be compared with what is expected"
    return stable(wrong) if wrong else None


def _error_text(outcome: Outcome) -> str:
    error = outcome.error
    where = f" on line {outcome.line}" if outcome.line else ""
    if isinstance(error, RecursionError):
        return f"RecursionError{where}: the function calls itself without end."
    if isinstance(error, SystemExit):
        return f"SystemExit{where}: exit would leave the notebook; use return."
    text = first_line(error)
    return f"{type(error).__name__}{where}: {text}" if text else f"{type(error).__name__}{where}."


def _cost(
    exercise: Exercise, function: Callable, case: Case, clock: Clock
) -> tuple[str, str] | None:
    budget = exercise.budget
    if budget is None:
        return None
    try:
        spent = clock.call(budget.measure, (function, *case.make()))
    except BaseException as error:
        forget(error)
        return NOT_YET, f"{exercise.case_title(case)}: its cost could not be measured."
    if spent <= budget.limit:
        return None
    over = f"it costs {spent:,g} {budget.unit}, the budget is {budget.limit:,g}"
    return NOT_YET, f"{exercise.case_title(case)}: the values are right, but {over}."


def _name_mistake(
    exercise: Exercise, function: Callable, case: Case, outcome: Outcome, clock: Clock
) -> str | None:
    """The message of the mutant that does just what the learner's function does, if one does."""

    def like(known: Mutant, one: Outcome, at: Case) -> bool:
        return _alike(one, _run(exercise, known.function, at, None), exercise)

    alike = [m for m in exercise.mutants if like(m, outcome, case)]
    for other in exercise.cases:  # until one is left: two mistakes can agree on one case
        if len(alike) < 2:
            break
        mine = _run(exercise, function, other, clock)
        alike = [m for m in alike if like(m, mine, other)] or alike
    return alike[0].message if alike else None


def _alike(one: Outcome, other: Outcome, exercise: Exercise) -> bool:
    if one.error is not None or other.error is not None:
        return type(one.error) is type(other.error) and first_line(one.error) == first_line(
            other.error
        )
    same = _differ(exercise, one.result, other.result, False) is None
    return same and one.changed == other.changed
