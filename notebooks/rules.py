"""What every lesson keeps to, as functions from a built notebook to a list of what breaks it.

The design's rules on cells, time and truth, so that a lesson stays readable, fits a workshop, and
its proofs cannot pass by comparing nothing.
"""

import ast
import re
from collections.abc import Callable, Iterator
from statistics import median

from nbformat import NotebookNode

LINES_MEDIAN, LINES_MOST = 6, 25
CORE_CELLS = range(40, 61)
CORE_EXERCISES, CORE_MINUTES, CORE_WORDS = 6, 40, 3500
COMPARED_FLOOR = 0.6  # of all code cells: compared, if only to print nothing
SPEAKING_FLOOR = 0.35  # of all code cells: with stored text that the comparison reads
UNCOMPARED = {"nbval-ignore-output", "nbval-skip"}
PICTURES = {"image/png", "image/jpeg"}  # nbval does not compare them
DECLARED = re.compile(
    r"\*Difficulty (\d)/5 · worth it (\d)/5 · (\d+) minutes? · about (\d+) lines?\*"
)
LEAKS = {
    "an absolute path": re.compile(r"(?<![\w.:/])/(?:home|root|tmp|Users|usr|opt|var|work)/\S+"),
    "an address": re.compile(r"\bat 0x[0-9a-f]+|\b0x[0-9a-f]{9,}"),
    "a time of day": re.compile(r"\b20\d\d-\d\d-\d\d[T ]\d\d:\d\d"),
}

Problems = Iterator[str]


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell: NotebookNode) -> set[str]:
    """The tags of a cell."""
    return set(cell.metadata.get("tags", []))


def core(notebook: NotebookNode) -> list[NotebookNode]:
    """The cells of the workshop's path: all that stand above the heading Further."""
    for at, cell in enumerate(notebook.cells):
        heading = re.search(r"^##? (?:\d+ · )?Further\b", cell.source, re.MULTILINE)
        if cell.cell_type == "markdown" and heading:
            return notebook.cells[:at]
    return notebook.cells


def stubs(cell: NotebookNode) -> dict[str, ast.FunctionDef]:
    """The functions of a cell that stand under @exercise("name"), by that name.

    A cell tagged demonstration shows what becomes of a given answer: it asks nothing.
    """
    asks = cell.cell_type == "code" and "demonstration" not in tags(cell)
    if not asks or "@exercise(" not in cell.source:
        return {}
    found = {}
    for node in ast.walk(ast.parse(cell.source)):
        for call in getattr(node, "decorator_list", []):
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("exercise"):
                found[call.args[0].value] = node
    return found


def words(notebook_cells: list[NotebookNode]) -> int:
    """How many words of prose the cells hold, without code, formulas and tags."""
    prose = "\n".join(c.source for c in notebook_cells if c.cell_type == "markdown")
    for other in (r"```.*?```", r"\$\$.*?\$\$", r"\$[^$\n]*\$", r"<[^>]*>", r"\]\([^)]*\)"):
        prose = re.sub(other, " ", prose, flags=re.DOTALL)
    return len(re.findall(r"[^\W\d_][\w'’-]*", prose))


def stored_text(cell: NotebookNode) -> str:
    """All text that a cell's outputs hold."""
    parts = []
    for output in cell.get("outputs", []):
        parts.append(output.get("text", ""))
        parts += [str(v) for k, v in output.get("data", {}).items() if k not in PICTURES]
    return "\n".join(parts)


def executed(notebook: NotebookNode) -> Problems:
    """A cell without an execution count is not compared, and an error is no lesson."""
    for cell in code_cells(notebook):
        if cell.execution_count is None:
            yield f"{cell.id}: was never executed, so nothing of it is compared"
        if any(output.output_type == "error" for output in cell.outputs):
            yield f"{cell.id}: ends in an error; show one that must happen with fails(...)"


def compared_enough(notebook: NotebookNode) -> Problems:
    """Enough cells are compared, and enough of them have something to compare."""
    cells = code_cells(notebook)
    compared = [c for c in cells if not tags(c) & UNCOMPARED]
    speaking = [c for c in compared if stored_text(c).strip()]
    for kind, some, floor in (
        ("compared", compared, COMPARED_FLOOR),
        ("compared and have text", speaking, SPEAKING_FLOOR),
    ):
        if len(some) < floor * len(cells):
            yield f"only {len(some)} of {len(cells)} code cells are {kind}; {floor:.0%} must be"


def tagged_with_reason(notebook: NotebookNode) -> Problems:
    """Whoever leaves a cell out of the comparison says why; live cells say it by being live."""
    for cell in code_cells(notebook):
        if "nbval-skip" in tags(cell) and not cell.metadata.get("reason"):
            yield f"{cell.id}: skipped without a reason in its metadata"
        if tags(cell) & {"raises-exception", "nbval-raises-exception"}:
            yield f"{cell.id}: that tag also passes when nothing raises; use fails(...)"
        if "live" in tags(cell) and "nbval-ignore-output" not in tags(cell):
            yield f"{cell.id}: a live cell's output cannot be compared: add nbval-ignore-output"


def cells_are_small(notebook: NotebookNode) -> Problems:
    """One idea a cell."""
    sizes = {c.id: sum(bool(x.strip()) for x in c.source.split("\n")) for c in code_cells(notebook)}
    if sizes and median(sizes.values()) > LINES_MEDIAN:
        yield f"the median code cell has {median(sizes.values()):g} lines, not {LINES_MEDIAN}"
    for name, size in sizes.items():
        if size > LINES_MOST:
            yield f"{name}: {size} lines; above {LINES_MOST} the code belongs in the package"


def prose_comes_first(notebook: NotebookNode) -> Problems:
    """No code cell without a word before it."""
    before = None
    for cell in notebook.cells:
        if cell.cell_type == "code" and (before is None or before.cell_type != "markdown"):
            yield f"{cell.id}: no prose stands before it"
        before = cell


def core_fits_a_workshop(notebook: NotebookNode, shortest: int = CORE_CELLS.start) -> Problems:
    """The path above Further can be walked in a workshop."""
    cells = core(notebook)
    exercises = sum(len(stubs(cell)) for cell in cells)
    minutes = sum(int(m[3]) for c in cells for m in DECLARED.finditer(c.source))
    if not shortest <= len(cells) < CORE_CELLS.stop:
        yield f"{len(cells)} cells above Further; {shortest} to {CORE_CELLS.stop - 1} are meant"
    for kind, count, most in (
        ("exercises", exercises, CORE_EXERCISES),
        ("declared minutes", minutes, CORE_MINUTES),
        ("words", words(cells), CORE_WORDS),
    ):
        if count > most:
            yield f"{count} {kind} above Further; {most} at most"


def outputs_leak_nothing(notebook: NotebookNode) -> Problems:
    """No output tells where or when it was made: it would differ on the next machine."""
    for cell in code_cells(notebook):
        for kind, pattern in LEAKS.items():
            if found := pattern.search(stored_text(cell)):
                yield f"{cell.id}: its output holds {kind}: {found[0]!r}"


def metadata_is_minimal(notebook: NotebookNode) -> Problems:
    """Nothing in the file pairs it with a source or names the machine's Python."""
    extra = set(notebook.metadata) - {"kernelspec", "language_info"}
    if extra or set(notebook.metadata.language_info) != {"name"}:
        yield f"notebook metadata holds more than it should: {sorted(extra) or 'language_info'}"
    allowed = {"tags", "jupyter", "reason"}
    for cell in notebook.cells:
        if more := set(cell.metadata) - allowed:
            yield f"{cell.id}: metadata {sorted(more)} is not for a lesson"


ALWAYS: list[Callable[[NotebookNode], Problems]] = [
    executed,
    compared_enough,
    tagged_with_reason,
    cells_are_small,
    prose_comes_first,
    outputs_leak_nothing,
    metadata_is_minimal,
]
