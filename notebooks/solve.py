"""Turns a lesson into the one a learner has solved: the package's references under the decorators.

And compares what a lesson says about its exercises with what the registry says.
"""

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterator

from nbformat import NotebookNode
from rules import DECLARED, stubs, tags

VERDICT = "application/vnd.dsv3.exercise+json"


def source_of(function: Callable) -> ast.FunctionDef:
    """The definition of a function, without decorators."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    definition.decorator_list = []
    return definition


def pasted(function: Callable, name: str) -> str:
    """The function's own text, under another name, from def to its last line."""
    lines = textwrap.dedent(inspect.getsource(function)).split("\n")
    definition = ast.parse("\n".join(lines)).body[0]
    text = "\n".join(lines[definition.lineno - 1 : definition.end_lineno])
    return text.replace(f"def {definition.name}(", f"def {name}(", 1)


def solved_cell(text: str, answers: dict[str, Callable]) -> str:
    """A cell's text with each stub replaced by its answer's source; the decorators stay."""
    lines = text.split("\n")
    definitions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    for node in sorted(definitions, key=lambda n: -n.lineno):  # from below: line numbers stay true
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("exercise"):
                answer = pasted(answers[call.args[0].value], node.name)
                lines[node.lineno - 1 : node.end_lineno] = answer.split("\n")
    return "\n".join(lines)


def solved(notebook: NotebookNode, answers: dict[str, Callable]) -> NotebookNode:
    """A copy of a lesson with every exercise answered, without its live cells and its outputs."""
    copied = copy.deepcopy(notebook)
    copied.cells = [cell for cell in copied.cells if "live" not in tags(cell)]
    for cell in copied.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            if stubs(cell):
                cell.source = solved_cell(cell.source, answers)
    return copied


def verdicts(notebook: NotebookNode) -> dict[str, dict]:
    """The verdicts that a run stored under its exercises, by exercise."""
    outputs = [o for c in notebook.cells if stubs(c) for o in c.outputs]
    found = [o.data[VERDICT] for o in outputs if VERDICT in o.get("data", {})]
    return {verdict["exercise"]: verdict for verdict in found}


def bare_arguments(definition: ast.FunctionDef) -> str:
    """The parameters of a function as written, without annotations: names, order, defaults."""
    arguments = copy.deepcopy(definition.args)
    for node in ast.walk(arguments):
        if isinstance(node, ast.arg):
            node.annotation = None
    return ast.unparse(arguments)


def disagreements(notebook: NotebookNode, exercises: dict) -> Iterator[str]:
    """Where a lesson's exercises differ from the registry: name, signature, declared numbers."""
    prose = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            prose += "\n" + cell.source
            continue
        declared = DECLARED.findall(prose)
        names = list(stubs(cell))
        if names and len(declared) != len(names):
            yield f"{cell.id}: {len(names)} exercise(s) and {len(declared)} *Difficulty ...* lines"
        for name, numbers in zip(names, declared, strict=False):
            if name not in exercises:
                yield f"{cell.id}: the registry has no exercise {name!r}"
                continue
            entry = exercises[name]
            ours = (entry.difficulty, entry.importance, entry.minutes, entry.lines)
            if ours != tuple(map(int, numbers)):
                yield f"{cell.id}: says {numbers}, the registry {ours}"
            stub = bare_arguments(stubs(cell)[name])
            reference = bare_arguments(source_of(entry.function))
            if stub != reference:
                yield f"{cell.id}: the stub takes ({stub}), the reference ({reference})"
        prose = ""
