"""Running a learner's function so that nothing it does reaches the notebook.

A time limit ends it, what it prints is kept aside, and whatever it changes in its module's globals
or in torch's settings is put back. Native calls, `list(range(10**10))`, cannot be interrupted.
"""

import contextlib
import io
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, FunctionType
from typing import Any

SHOWN_LINES = 5
SHOWN_WIDTH = 120
_PATIENCE = 30  # alarms, some 50 ms, before calls are stopped as well
_KEPT = 20_000  # characters; an endless print must not fill memory before its time is up


class TimeUp(BaseException):
    """The learner's code ran out of time. No Exception, so that `except Exception` misses it."""


class Clock:
    """The time that all calls of one verdict share. seconds: wall-clock time for the whole."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.left = seconds

    def call(self, function: Callable, args: tuple) -> Any:
        """function(*args), or TimeUp. Off the main thread, and on Windows, there is no limit."""
        if threading.current_thread() is not threading.main_thread() or not hasattr(
            signal, "setitimer"
        ):
            return function(*args)
        start = time.monotonic()
        try:
            return _timed(function, args, max(self.left, 0.01))
        finally:
            self.left -= time.monotonic() - start


def _inside(function: Callable, args: tuple) -> Any:
    # Its frame marks the learner's code on the stack: the alarm raises only above it.
    return function(*args)


def _above_marker(frame: FrameType | None) -> bool:
    here = frame
    while frame is not None:
        if frame.f_code is _inside.__code__:
            return frame is not here
        frame = frame.f_back
    return False


def _stop(*_args: Any, **_kwargs: Any) -> None:
    raise SystemExit


def _timed(function: Callable, args: tuple, seconds: float) -> Any:
    alarms, armed, stopped, depth = 0, True, {}, sys.getrecursionlimit()

    def alarm(_signal: int, frame: FrameType | None) -> None:
        nonlocal alarms
        if not armed:
            return
        alarms += 1
        if not stopped:  # a deep recursion may have left no room for this handler's own calls
            sys.setrecursionlimit(sys.getrecursionlimit() + 30)
        # At a random moment, or a loop of nested try and except could swallow every alarm in step.
        signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-5, 2e-3), 3e-3)
        if alarms >= _PATIENCE and not stopped:
            stopped.update(_stop_calls(function, frame))
        if _above_marker(frame):
            raise TimeUp

    handler = signal.signal(signal.SIGALRM, alarm)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 3e-3)
    try:
        result = _inside(function, args)
    except BaseException:
        if alarms:
            raise TimeUp from None
        raise
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        sys.setrecursionlimit(depth)
        for one, code in stopped.items():
            one.__code__ = code
        if timer[0]:
            signal.setitimer(signal.ITIMER_REAL, *timer)
    if alarms:
        raise TimeUp  # it caught every alarm and returned all the same
    return result


def _stop_calls(function: Callable, frame: FrameType | None) -> dict[FunctionType, CodeType]:
    """Makes every further call of the learner's own functions fail. Returns their code, to restore.

    A recursion that calls itself again from its `except` would take 2^1000 alarms to unwind.
    """
    function = getattr(function, "__wrapped__", function)  # an exercise may run it its own way
    space = getattr(function, "__globals__", None)
    found = [function, *(space or {}).values()]
    while frame is not None and frame.f_code is not _inside.__code__:
        if frame.f_globals is space:
            found += frame.f_locals.values()
        frame = frame.f_back
    own = {f: f.__code__ for f in found if type(f) is FunctionType and f.__globals__ is space}
    for one in own:
        with contextlib.suppress(ValueError):  # a closure takes only code with as many cells
            one.__code__ = _stop.__code__
    return own


class Printed(io.TextIOBase):
    """What a learner's code printed: the first characters are kept, the rest is only counted."""

    def __init__(self) -> None:
        self.text = ""
        self.lines = 0

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.lines += text.count("\n")
        self.text += text[: max(0, _KEPT - len(self.text))]
        return len(text)

    def first_lines(self) -> str:
        """At most five lines of it, and how many more there are."""
        lines = self.text.splitlines()
        shown = [line[:SHOWN_WIDTH] for line in lines[:SHOWN_LINES]]
        more = max(self.lines, len(lines)) - len(shown)
        if more > 0:
            shown.append(f"... and more lines ({'over 1000' if more > 1000 else more})")
        return "\n".join(shown)


@contextlib.contextmanager
def quiet() -> Iterator[Printed]:
    """Keeps stdout, stderr and display() out of the notebook while a learner's code runs."""
    printed = Printed()
    with contextlib.ExitStack() as stack:
        if "IPython" in sys.modules:
            from IPython.utils.capture import capture_output

            stack.enter_context(capture_output(stdout=False, stderr=False, display=True))
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(contextlib.redirect_stderr(printed))
        yield printed


@contextlib.contextmanager
def nothing_changed(function: FunctionType) -> Iterator[None]:
    """Binds the function's name to itself, for recursion; afterwards every global is as before."""
    names = function.__globals__
    before = dict(names)
    if function.__name__.isidentifier():
        names[function.__name__] = function
    with _torch_as_it_was():
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # an alarm inside a __del__
        state = random.getstate()
        try:
            yield
        finally:
            sys.unraisablehook = hook
            random.setstate(state)
            for name in [name for name in names if name not in before]:
                del names[name]
            names.update(before)


@contextlib.contextmanager
def _torch_as_it_was() -> Iterator[None]:
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    grad = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
