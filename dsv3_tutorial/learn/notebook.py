"""The words a notebook uses around its exercises: exercise, hint, solution, progress, fails."""

import html
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any

from dsv3_tutorial.learn import record
from dsv3_tutorial.learn.attempt import first_line
from dsv3_tutorial.learn.registry import Exercise, UnknownExercise, every_exercise, find
from dsv3_tutorial.learn.show import show, show_verdict
from dsv3_tutorial.learn.verdict import PASSED, judge

_hints_given: dict[str, int] = {}


class NotPassed(AssertionError):
    """With DSV3_STRICT=1, an exercise that is not passed stops the run."""


def exercise(name: str) -> Callable[[Callable], Callable]:
    """Checks the function below it and shows the verdict.

    The name is then bound to the learner's function if it passed, and to the package's if not, so
    that the rest of the notebook runs either way. With DSV3_STRICT=1 anything but passed raises
    NotPassed.
    """
    if callable(name):
        show('Write @exercise("name") above the function: the name says what to check.')
        return name

    def check(function: Callable) -> Callable:
        declared = _find_or_say(name)
        if declared is None:
            return function
        verdict = judge(declared, function)
        record.note_exercise(name, verdict.status)
        show_verdict(verdict)
        if verdict.status != PASSED and os.environ.get("DSV3_STRICT") == "1":
            raise NotPassed(f"{name}: {verdict.line}")
        return function if verdict.status == PASSED else declared.function

    return check


def hint(name: str) -> None:
    """Shows the next hint for an exercise: one step further each time in a session."""
    declared = _find_or_say(name)
    if declared is None:
        return
    given, count = _hints_given.get(name, 0), len(declared.hints)
    if given >= count:
        show(f'That was the last of {count} hints. solution("{name}") shows the answer.')
        return
    _hints_given[name] = given + 1
    show(f"Hint {given + 1} of {count}: {declared.hints[given]}")


def solution(name: str) -> None:
    """Shows the source of the package's own function, on which the course runs."""
    declared = _find_or_say(name)
    if declared is not None:
        where = declared.reference.replace(":", ".")
        markdown = f"From `{where}`:\n\n```python\n{declared.source}\n```"
        show(f"# {where}\n{declared.source}", text_markdown=markdown)


def progress() -> None:
    """Shows what is passed of the whole course, by concept, and the minutes that are left."""
    kept = record.read()["exercises"]
    concepts: dict[str, list[Exercise]] = {}
    for one in every_exercise():
        concepts.setdefault(one.concept, []).append(one)
    rows = [_progress_row(name, group, kept) for name, group in concepts.items()]
    every = [one for group in concepts.values() for one in group]
    rows.append(_progress_row("whole course", every, kept))
    head = ("concept", "passed", "exercise minutes left", "next")
    table = [head, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    text = "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in table)
    show(text, text_html=_html_table(table))


def _progress_row(name: str, group: list[Exercise], kept: dict[str, Any]) -> tuple[str, ...]:
    left = [one for one in group if kept.get(one.name) != PASSED]
    minutes = sum(one.minutes for one in left)
    following = left[0].name if left else "all done"
    return name, f"{len(group) - len(left)} of {len(group)}", str(minutes), following


def _html_table(rows: list[tuple[str, ...]]) -> str:
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in r) + "</tr>" for r in body]
    return f"<table>{''.join(lines)}</table>"


def _find_or_say(name: str) -> Exercise | None:
    try:
        return find(name)
    except UnknownExercise as unknown:
        if os.environ.get("DSV3_STRICT") == "1":
            raise
        sentence = str(unknown)
        show(sentence[0].upper() + sentence[1:] + ".")
        return None


class fails:
    """Shows a claim fail: prints the error's type and first line, and ends in no traceback.

    Raises AssertionError if nothing is raised, or an error of another kind: then the claim held.
    """

    def __init__(self, *kinds: type[BaseException]):
        self.kinds = kinds or (Exception,)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> bool:
        wanted = " or ".join(one.__name__ for one in self.kinds)
        if error is None:
            raise AssertionError(
                f"the claim did not fail: {wanted} was expected, nothing was raised"
            )
        if not isinstance(error, self.kinds):
            raise AssertionError(
                f"{wanted} was expected, but {kind.__name__} was raised"
            ) from error
        text = first_line(error)
        print(f"{kind.__name__}: {text}" if text else kind.__name__)
        return True  # dropping the error also frees the tensors that its traceback holds
