"""What of a notebook counts as an answer."""

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
