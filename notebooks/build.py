"""Builds the lessons: src/NN_name.py in percent format -> NN_name.ipynb, executed.

    python notebooks/build.py [--all] [--live] [--check] [--folder FOLDER] [NAME ...]

A notebook is rebuilt when its cells (text, ids, tags) differ from its source's; --all rebuilds it
anyway, which is what a change in the package needs. (The notebooks' own test says when: it runs
them and compares.) Cells tagged live keep the output they have, unless --live runs them for as long
as a learner would. Two builds in one environment are byte-identical.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from outputs import plain
from rules import outputs_leak_nothing

ROOT = Path(__file__).resolve().parent.parent
SIZE_LIMIT = 500_000  # bytes: a page that still renders on the web
CELL_SECONDS = 300
# A learner's kernel has none of these, whatever the shell or the test run that builds has set.
NOT_PASSED_ON = {"DSV3_STRICT", "DSV3_LIVE_SECONDS", "MPLBACKEND", "TRITON_INTERPRET"}
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},  # without the patch version, which would differ by machine
}


class BuildError(ValueError):
    """A source that cannot become a lesson: what is wrong, why it matters, what to do."""


def read_source(path: Path) -> nbformat.NotebookNode:
    """The notebook that a percent-format source describes, without outputs."""
    notebook = jupytext.read(path, fmt="py:percent")
    problems, seen = [], set()
    for cell in notebook.cells:
        name = cell.metadata.pop("id", None)
        for spacing in ("lines_to_next_cell", "lines_to_end_of_cell_marker"):
            cell.metadata.pop(spacing, None)  # how the source is formatted, no part of the lesson
        at = f"the cell that begins {cell.source.strip()[:40]!r}"
        if name is None:
            problems.append(f'{at} has no id: write one in its header, # %% id="a-name"')
        elif name in seen:
            problems.append(f"the id {name!r} stands twice")
        if not cell.source.strip():
            problems.append(f"the cell {name!r} is empty")
        if "nbval-skip" in tags(cell) and not cell.metadata.get("reason"):
            problems.append(f'the cell {name!r} is skipped without saying why: add reason="..."')
        seen.add(name)
        cell["id"] = name or ""
    if problems:
        raise BuildError(
            f"{path.name} cannot be built, and the lesson stays as it was:\n  "
            + "\n  ".join(problems)
        )
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def tags(cell: nbformat.NotebookNode) -> list[str]:
    """The tags of a cell."""
    return list(cell.metadata.get("tags", []))


def same_cells(one: nbformat.NotebookNode, other: nbformat.NotebookNode) -> bool:
    """Whether two notebooks have the same cells, whatever their outputs."""

    def facts(notebook):
        return [(c.cell_type, c.get("id"), c.source, dict(c.metadata)) for c in notebook.cells]

    return facts(one) == facts(other) and one.metadata == other.metadata


def variables(home: str, live: bool = False, threads: int = 2) -> dict[str, str]:
    """The environment that a lesson is built in: fixed threads, a fresh home, short live cells."""
    fixed = {
        "DSV3_HOME": home,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    ours = {k: v for k, v in os.environ.items() if k not in NOT_PASSED_ON} | fixed
    return ours if live else ours | {"DSV3_LIVE_SECONDS": "4"}


def execute(
    notebook: nbformat.NotebookNode, folder: Path, live: bool = False, threads: int = 2
) -> None:
    """Run a notebook in a fresh kernel and leave in it only outputs that repeat."""
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(folder)}},
    )
    with tempfile.TemporaryDirectory(prefix="dsv3-home-") as home:
        client.execute(env=variables(home, live, threads))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [plain(output) for output in cell.outputs]
    notebook.metadata = nbformat.from_dict(METADATA)


def keep_live_outputs(built: nbformat.NotebookNode, old: nbformat.NotebookNode | None) -> list[str]:
    """Give unchanged live cells their old outputs back; the ids of those that have none to keep."""
    before = {c.id: c for c in old.cells if c.cell_type == "code"} if old else {}
    short = []
    for cell in built.cells:
        if cell.cell_type != "code" or "live" not in tags(cell):
            continue
        known = before.get(cell.id)
        if known is not None and known.source == cell.source and known.outputs:
            cell.outputs = known.outputs
        else:
            short.append(cell.id)
    return short


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a checked notebook whole, or leave the old one as it was."""
    text = nbformat.writes(notebook) + "\n"
    if len(text.encode()) > SIZE_LIMIT:
        raise BuildError(
            f"{path.name} would be {len(text.encode()):,} bytes. Above {SIZE_LIMIT:,} it does not "
            "render on the web. Draw smaller figures, or fewer."
        )
    nbformat.validate(notebook)
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


def build(source: Path, target: Path, live: bool = False) -> list[str]:
    """Build one lesson; the ids of live cells whose stored output comes from a short run."""
    notebook = read_source(source)
    old = nbformat.read(target, as_version=4) if target.exists() else None
    execute(notebook, target.parent, live)
    if leaks := list(outputs_leak_nothing(notebook)):
        raise BuildError(
            f"{target.name} would differ from build to build, and the lesson stays as it was:\n  "
            + "\n  ".join(leaks)
        )
    short = [] if live else keep_live_outputs(notebook, old)
    write(notebook, target)
    return short


def stale(source: Path, target: Path) -> bool:
    """Whether the built lesson is missing or has other cells than its source."""
    return not target.exists() or not same_cells(
        read_source(source), nbformat.read(target, as_version=4)
    )


def lessons(folder: Path, names: list[str]) -> list[tuple[Path, Path]]:
    """Pairs of source and notebook, of all lessons or of those whose names begin as asked."""
    found = [(s, folder / f"{s.stem}.ipynb") for s in sorted(folder.glob("src/[0-9][0-9]_*.py"))]
    return [pair for pair in found if not names or pair[0].stem.startswith(tuple(names))]


def main(arguments: list[str]) -> int:
    """Build or check; what is wrong is said lesson by lesson, and the exit status says whether."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="lessons to take, by number or name (all)")
    parser.add_argument("--all", action="store_true", help="rebuild unchanged lessons too")
    parser.add_argument("--live", action="store_true", help="run live cells in full, keep that")
    parser.add_argument("--check", action="store_true", help="only say which lessons are stale")
    parser.add_argument("--folder", type=Path, default=ROOT / "notebooks")
    options = parser.parse_args(arguments)
    failed = False
    for source, target in lessons(options.folder, options.names):
        try:
            failed |= take(source, target, options)
        except Exception as error:  # the lesson's own error: said, and the other lessons go on
            print(f"{source.stem}: FAILED\n{error}")
            failed = True
    return int(failed)


def take(source: Path, target: Path, options: argparse.Namespace) -> bool:
    """Build or check one lesson and say so; whether it is left in a bad state."""
    changed = stale(source, target)
    if options.check:
        print(f"{source.stem}: {'stale: run make notebooks' if changed else 'agrees'}")
        return changed
    if not (changed or options.all or options.live):
        print(f"{source.stem}: unchanged")
        return False
    for cell in build(source, target, options.live):
        print(f"{source.stem}: live cell {cell} holds a 4-second run: make notebooks LIVE=1")
    print(f"{source.stem}: built, {target.stat().st_size / 1000:.0f} KB")
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
