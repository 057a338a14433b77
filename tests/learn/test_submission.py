"""What of a notebook counts as an answer."""

import pytest

from dsv3_tutorial.learn import grade
from dsv3_tutorial.learn.submission import code_cells, demonstrates, statements, submitted


def cell(source, *tags):
    return {"cell_type": "code", "source": source, "metadata": {"tags": list(tags)}, "outputs": []}


MINE = '@exercise("start.time_s")\ndef time_s(flops, bytes, chip, fmt="bf16"):\n    return 1\n'
SHOWN = MINE.replace("time_s(", "wrong(").replace("return 1", "return 2")


def test_the_lessons_own_demonstration_is_no_ones_answer():
    notebook = {"cells": [cell(MINE, "exercise"), cell(SHOWN, "demonstration")]}
    assert demonstrates(notebook["cells"][1]) and not demonstrates(notebook["cells"][0])
    _, statement = submitted(statements(code_cells(notebook)))["start.time_s"]
    assert statement.name == "time_s"


def test_the_last_of_several_answers_counts():
    notebook = {"cells": [cell(MINE), cell(SHOWN)]}
    assert submitted(statements(code_cells(notebook)))["start.time_s"][1].name == "wrong"


@pytest.mark.parametrize("text", ["{}", "[]", "not JSON", '{"nbformat": 4}', '{"nbformat": 3}'])
def test_a_file_that_is_no_notebook_is_a_row_and_not_a_traceback(tmp_path, capsys, text):
    (tmp_path / "handed_in.ipynb").write_text(text)
    assert grade.main([str(tmp_path / "handed_in.ipynb")]) == 2
    assert "no notebook that can be read" in capsys.readouterr().out
