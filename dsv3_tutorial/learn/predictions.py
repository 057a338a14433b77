"""Committing to a number before the machine answers, and hearing how far off it was."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsv3_tutorial.learn import record
from dsv3_tutorial.learn.show import show

_CLOSE = 0.05  # within this fraction a prediction counts as right


@dataclass
class _Asked:
    unit: str = ""
    guess: Any = None


_asked: dict[str, _Asked] = {}


def predict(
    name: str,
    guess: Any = ...,
    unit: str = "",
    question: str = "",
    options: Sequence[Any] | None = None,
) -> None:
    """Records a prediction, a number of `unit` or one of `options`. `...` means none yet."""
    asked = _asked[name] = _Asked(unit)
    start = f"{question}\n" if question else ""
    value, wrong = _read(guess, options)
    if wrong:
        show(start + wrong)
        return
    asked.guess = value
    record.note_prediction(name, value)
    show(f"{start}Your prediction: {_said(value, unit)}. Run on to see.")


def reveal(name: str, actual: Any, unit: str | None = None) -> None:
    """Shows the answer to `predict(name, ...)`, and with a prediction how far off that was."""
    asked = _asked.get(name, _Asked())
    unit = asked.unit if unit is None else unit
    actual = _plain(actual)
    if asked.guess is None:
        show(f"It is {_said(actual, unit)}.")
        return
    guess = _said(asked.guess, unit)
    show(f"You said {guess}. It is {_said(actual, unit)}: {_how_far(asked.guess, actual)}.")


def _read(guess: Any, options: Sequence[Any] | None) -> tuple[Any, str | None]:
    """The prediction as plain Python, or what is wrong with it."""
    wanted = "one of " + ", ".join(map(repr, options)) if options else "a number"
    if guess is ... or guess is None:
        return None, f"No prediction yet: put {wanted} in place of ... and run the cell."
    guess = _plain(guess)
    if options:
        by_text = {str(one).strip().casefold(): one for one in options}
        found = by_text.get(str(guess).strip().casefold())
        return found, None if found is not None else f"A prediction here is {wanted}."
    if isinstance(guess, bool) or not isinstance(guess, numbers.Real):
        kind = "text" if isinstance(guess, str) else f"a {type(guess).__name__}"
        return None, f"A prediction here is a number without its unit, such as 12; this is {kind}."
    if not math.isfinite(guess):
        return None, "A prediction here is a finite number, such as 12."
    return guess, None


def _plain(value: Any) -> Any:
    """A one-element tensor or array as the number in it, everything else as it is."""
    if not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except (ValueError, RuntimeError):
        return value


def _said(value: Any, unit: str) -> str:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        text = str(value)
    elif float(value).is_integer() and abs(value) < 1e15:
        text = f"{int(value):,}"
    else:
        text = f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.3g}"
    return f"{text} {unit}".rstrip()


def _how_far(guess: Any, actual: Any) -> str:
    numeric = all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in (guess, actual))
    if guess == actual:
        return "exactly right"
    if not numeric:
        return "not that one"
    if guess == 0 or actual == 0 or (guess < 0) != (actual < 0):
        return "too high" if guess > actual else "too low"
    # A factor speaks of sizes: below zero the larger size is the lower number.
    factor = max(guess / actual, actual / guess)
    if factor <= 1 + _CLOSE:
        return f"right to within {math.ceil((factor - 1) * 100)} %"
    digits = 0 if factor >= 100 else 1
    return f"{factor:,.{digits}f}x too {'high' if guess > actual else 'low'}"
