"""Whether a function was attempted at all, and where in it an error arose."""

import ast
import dis
import inspect
import re
import textwrap
from collections.abc import Callable
from types import CodeType

_EMPTY_OPS = {
    *("RESUME", "LOAD_CONST", "RETURN_CONST", "RETURN_VALUE", "NOP", "LOAD_GLOBAL", "PUSH_NULL"),
    *("PRECALL", "CALL", "RAISE_VARARGS", "POP_TOP"),
}
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{4,}")
_PATH = re.compile(r"(?<![\w.])(?:/[\w.@+-]+){2,}/?|[A-Za-z]:\\[\w.\\-]+")


def attempted(function: Callable) -> bool:
    """False while the body is only a docstring and `...`, `pass` or `raise NotImplementedError`."""
    code = getattr(function, "__code__", None)
    if code is None:
        return True
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # made by exec, or a lambda inside a larger line
        return not _is_empty_code(code)
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef | ast.AsyncFunctionDef):
        return not _is_empty_code(code)
    return not all(_is_placeholder(line) for line in tree.body[0].body)


def _is_placeholder(line: ast.stmt) -> bool:
    if isinstance(line, ast.Pass):
        return True
    if isinstance(line, ast.Raise):
        raised = line.exc.func if isinstance(line.exc, ast.Call) else line.exc
        return isinstance(raised, ast.Name) and raised.id == "NotImplementedError"
    value = getattr(line, "value", None)
    if not isinstance(value, ast.Constant):
        return False
    if isinstance(line, ast.Return):
        return value.value is ...
    return isinstance(line, ast.Expr) and (value.value is ... or isinstance(value.value, str))


def _is_empty_code(code: CodeType) -> bool:
    steps = list(dis.get_instructions(code))
    raises = any(step.opname == "RAISE_VARARGS" for step in steps)
    loads = [s.argval for s in steps if s.opname in ("LOAD_CONST", "RETURN_CONST")]
    return (
        {step.opname for step in steps} <= _EMPTY_OPS
        and set(code.co_names) <= {"NotImplementedError"}
        and (raises or all(value is None for value in loads))
    )


def line_of(error: BaseException, function: Callable) -> int | None:
    """The line of the learner's own code, counted in its cell, in which the error arose."""
    code = getattr(function, "__code__", None)
    found, step = None, error.__traceback__
    while step is not None:
        if code is not None and step.tb_frame.f_code.co_filename == code.co_filename:
            found = step.tb_lineno
        step = step.tb_next
    return found


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without addresses or folders, which change each run."""
    try:
        text = str(error)
    except Exception:
        return "(its message cannot be shown)"
    lines = text.strip().splitlines()
    return stable(lines[0].strip())[:300] if lines else ""


def stable(text: str) -> str:
    """Text in which memory addresses and paths are replaced: it reads the same in every run."""
    text = _ADDRESS.sub("0x...", text)
    return _PATH.sub(lambda m: re.split(r"[/\\]", m.group().rstrip("/\\"))[-1], text)


def forget(error: BaseException) -> None:
    """Frees what the error's traceback keeps alive: tensors, after an out-of-memory error."""
    error.__traceback__ = None
    error.__context__ = None
