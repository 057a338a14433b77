"""In a real Jupyter kernel: verdicts are displays that repeat, and a grader believes none."""

import json
import re

import nbformat
import pytest
from nbclient import NotebookClient

from dsv3_tutorial.learn import grade
from dsv3_tutorial.learn.show import MIME

IMPORTS = "from dsv3_tutorial.learn import *\nfrom dsv3_tutorial.learn import exercise\n"
HEAD = '@exercise("start.time_s")\ndef time_s(flops, bytes, chip, fmt="bf16"):\n    '
RIGHT = HEAD + "return max(flops / chip.rate(fmt), bytes / chip.bandwidth())"

# Each cell with what its verdict says.
CELLS = {
    HEAD + "...": "[NOT ATTEMPTED]",
    HEAD + "return flops / chip.rate(fmt) + bytes / chip.bandwidth()": "you added the two times",
    HEAD + "return flops / nothing": "[YOUR CODE RAISED] NameError on line 3: name 'nothing'",
    HEAD + "import sys; sys.exit(1)": "[YOUR CODE RAISED] SystemExit on line 3",
    HEAD + "return time_s(flops, bytes, chip)": "[YOUR CODE RAISED] RecursionError on line 3",
    HEAD + "display(chip); print('seen'); return float('nan')": "expected a finite number",
    RIGHT: "[PASSED] 6 cases",
}
OTHERS = [
    "time_s.__module__",
    "predict('cache', ..., unit='GB')",
    "reveal('cache', 9.2)",
    "hint('start.time_s')",
    "term('HBM')",
    "progress()",
    "with fails(TypeError):\n    1 + 'a'",
    "from dsv3_tutorial.learn.figures import style\n"
    "def draw(n):\n    fig, ax = style.figure(2, 1)\n"
    "    return style.finish(fig, ax, title=str(n))\n"
    "explore(draw, n=[1, 2])",
    "draw(3)",
]


def notebook_of(sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    return nbformat.v4.new_notebook(cells=cells)


def run(sources, home, monkeypatch):
    monkeypatch.setenv("DSV3_HOME", str(home))
    notebook = notebook_of(sources)
    NotebookClient(notebook, timeout=60, kernel_name="python3", record_timing=False).execute()
    return [cell.outputs for cell in notebook.cells]


@pytest.mark.slow
def test_a_notebook_gives_the_same_outputs_twice_and_never_a_traceback(tmp_path, monkeypatch):
    sources = [IMPORTS, *CELLS, *OTHERS]
    first = run(sources, tmp_path / "one", monkeypatch)
    for outputs, says in zip(first[1:], CELLS.values(), strict=False):
        assert len(outputs) == 1
        data = outputs[0].data
        assert says in data["text/plain"]
        assert set(data[MIME]) == {"exercise", "status", "message"}
        assert "<div" in data["text/html"]
    assert "seen" in first[6][0].data["text/plain"]
    figure, box = first[-1][0].data, first[-2][0].data
    assert figure["text/plain"] == "Figure: 3"
    assert set(figure) == {"text/plain", "image/png"}
    assert box["text/plain"] == "Explorer: run this cell and move the controls (n)."
    second = run(sources, tmp_path / "two", monkeypatch)
    view = re.compile(r'"application/vnd.jupyter.widget-view\+json": \{.*?\}')
    same = [view.sub("", json.dumps(outputs)) for outputs in (first, second)]
    assert same[0] == same[1]


FORGED = f"""
from IPython.display import display
display({{"{MIME}": {{"exercise": "start.time_s", "status": "passed", "message": "5 cases"}},
         "text/plain": "[PASSED] 5 cases"}}, raw=True)
"""
PATCH = """
import dsv3_tutorial.learn.verdict
dsv3_tutorial.learn.verdict._judge_cases = lambda *_: ("passed", "5 cases")
"""


@pytest.mark.slow
def test_a_grader_believes_functions_and_not_verdicts(tmp_path, capsys):
    submissions = {
        "right": [IMPORTS, "slower = max", RIGHT.replace("max(", "slower(")],
        "forged": [IMPORTS, HEAD + "return 1.0", FORGED],
        "patched": [IMPORTS, PATCH, HEAD + "return 1.0"],
        "exits": [IMPORTS, HEAD + "import os; os._exit(0)"],
        "untouched": [IMPORTS, HEAD + "..."],
    }
    for name, sources in submissions.items():
        notebook = notebook_of(sources)
        if name == "untouched":  # a stored verdict of some other run
            notebook.cells[1].outputs = [
                nbformat.v4.new_output(
                    "display_data",
                    {MIME: {"exercise": "start.time_s", "status": "passed", "message": ""}},
                )
            ]
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    (tmp_path / "broken.ipynb").write_text("{")
    names = [*submissions, "broken"]
    status = grade.main([*(str(tmp_path / f"{name}.ipynb") for name in names), "--csv"])
    rows = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["file", "exercise", "status", "message"]
    found = {row[0]: row[2] for row in rows[1:]}
    assert found == {
        "right.ipynb": "passed",
        "forged.ipynb": "not_yet",
        "patched.ipynb": "not_yet",
        "exits.ipynb": "not_yet",
        "untouched.ipynb": "not_attempted",
        "broken.ipynb": "unreadable",
    }
    assert status == 2


def test_a_cell_of_csv_cannot_be_a_formula():
    text = grade.to_csv([grade.Row("a.ipynb", "x", "not_yet", "=HYPERLINK(1)")])
    assert text.splitlines()[1] == "a.ipynb,x,not_yet,'=HYPERLINK(1)"
