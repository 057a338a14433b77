"""Taking a learner's functions out of a notebook, to check them again where nothing else has run.

Of a notebook's code only the decorated function and the statements that define the names it uses
are taken: imports, helper functions, assignments. Whatever else stands in the file is not run.
"""

import ast
import builtins
import contextlib
import json
import linecache
import sys
from pathlib import Path
from typing import Any

from dsv3_tutorial.learn.limits import Clock, quiet
from dsv3_tutorial.learn.registry import UnknownExercise, find
from dsv3_tutorial.learn.verdict import NOT_YET, RAISED, judge

_SECONDS_TO_DEFINE = 20.0
Placed = tuple[int, ast.stmt]  # the index of a cell, and a statement in it


def code_cells(notebook: dict[str, Any]) -> list[str]:
    """The sources of a notebook's code cells, as plain Python: lines of magics become comments."""
    cells = [c for c in notebook.get("cells", []) if c.get("cell_type") == "code"]
    cells = [c for c in cells if not demonstrates(c)]
    sources = ["".join(cell.get("source", "")) for cell in cells]
    return ["\n".join(map(_no_magic, source.split("\n"))) for source in sources]


def demonstrates(cell: dict[str, Any]) -> bool:
    """Whether a cell shows a verdict of the lesson's own making: it is no one's answer."""
    return "demonstration" in cell.get("metadata", {}).get("tags", [])


def _no_magic(line: str) -> str:
    return f"# {line}" if line.lstrip().startswith(("%", "!")) else line


def submitted(every: list[Placed]) -> dict[str, Placed]:
    """Exercise name -> its last definition among a notebook's statements."""
    found = {}
    for index, statement in every:
        for name in map(_exercise_name, getattr(statement, "decorator_list", [])):
            if name:
                found[name] = (index, statement)
    return found


def statements(cells: list[str]) -> list[Placed]:
    """All top-level statements, each with the index of its cell. A cell with an error has none."""
    found: list[Placed] = []
    for index, source in enumerate(cells):
        with contextlib.suppress(SyntaxError, ValueError):
            found += [(index, statement) for statement in ast.parse(source).body]
    return found


def _exercise_name(decorator: ast.expr) -> str | None:
    match decorator:
        case ast.Call(
            func=ast.Name(id="exercise") | ast.Attribute(attr="exercise"),
            args=[ast.Constant(value=str(name))],
        ):
            return name
    return None


def _defines(statement: ast.stmt) -> set[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {(a.asname or a.name).partition(".")[0] for a in statement.names}
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        nodes = ast.walk(statement)
        return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return set()


def _uses(statement: ast.stmt) -> set[str]:
    names = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name)}
    return names - set(dir(builtins))


def definitions(every: list[Placed], last: Placed) -> list[Placed]:
    """What must be executed, in order, for the function in the statement `last` to be defined."""
    chosen, wanted = [last], _uses(last[1])
    while True:
        fresh = [s for s in every if s not in chosen and _defines(s[1]) & wanted]
        if not fresh:
            return [s for s in every if s in chosen]
        chosen += fresh
        wanted |= set().union(*(_uses(s[1]) for s in fresh))


def recheck(cells: list[str], name: str) -> dict[str, str]:
    """The verdict on one exercise from its source alone: {exercise, status, message}."""
    every = statements(cells)
    placed = submitted(every)[name]
    last = placed[1]
    try:
        declared = find(name)
    except UnknownExercise as unknown:
        return {"exercise": name, "status": NOT_YET, "message": str(unknown)}
    namespace: dict[str, Any] = {"__name__": "submission"}
    clock = Clock(_SECONDS_TO_DEFINE)
    with quiet():
        for index, statement in definitions(every, placed):
            try:
                clock.call(_execute, (cells[index], index, statement, namespace))
            except BaseException as error:
                if statement is last:
                    message = f"{type(error).__name__} where the function is defined"
                    return {"exercise": name, "status": RAISED, "message": message}
    verdict = judge(declared, namespace[last.name])
    return {"exercise": name, "status": verdict.status, "message": verdict.message}


def _execute(source: str, index: int, statement: ast.stmt, namespace: dict[str, Any]) -> None:
    filename = f"<cell {index + 1}>"  # with its lines, so that a verdict can name one
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    if hasattr(statement, "decorator_list"):
        statement.decorator_list = [d for d in statement.decorator_list if not _exercise_name(d)]
    tree = ast.Module([statement], type_ignores=[])
    exec(compile(tree, filename, "exec"), namespace)


def main(notebook: str, answer: str) -> None:
    """Checks every exercise of a notebook in this process and writes the verdicts as JSON."""
    cells = code_cells(json.loads(Path(notebook).read_text(encoding="utf-8")))
    verdicts = [recheck(cells, name) for name in submitted(statements(cells))]
    Path(answer).write_text(json.dumps(verdicts), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
