"""Every rule on lessons can fail: each finds its planted fault, and nothing in a good lesson."""

import build
import nbformat
import pytest
import rules
import solve
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

pytestmark = pytest.mark.notebooks


def lesson():
    """A good lesson of one exercise, as it would be read from its file."""
    prose = "Count.\n\n*Difficulty 2/5 · worth it 4/5 · 5 minutes · about 1 line*"
    stub = '@exercise("sample.double")\ndef double(x, times=2): ...'
    verdict = {"exercise": "sample.double", "status": "not_attempted", "message": ""}
    shown = new_output(
        "display_data", data={"text/plain": "[NOT ATTEMPTED]", solve.VERDICT: verdict}
    )
    cells = [
        new_markdown_cell("# A lesson", id="title"),
        new_code_cell("1 + 1", id="sum", execution_count=1, outputs=[text("2")]),
        new_markdown_cell(prose, id="ask"),
        new_code_cell(stub, id="double", execution_count=2, outputs=[shown]),
        new_markdown_cell("## Further\n\nMore words than the core has.", id="further"),
        new_code_cell("x = 1", id="more", execution_count=3),
    ]
    return nbformat.v4.new_notebook(cells=cells, metadata=nbformat.from_dict(build.METADATA))


def text(value):
    return new_output("execute_result", data={"text/plain": value})


def never_run(nb):
    nb.cells[1].execution_count = None


def with_error(nb):
    nb.cells[1].outputs = [new_output("error", ename="E", evalue="", traceback=[])]


def ignoring_most(nb):
    for at in (1, 3):
        nb.cells[at].metadata.tags = ["nbval-ignore-output"]


def silent(nb):
    nb.cells[1].outputs = nb.cells[3].outputs = []


def skipping(nb):
    nb.cells[1].metadata.tags = ["nbval-skip"]


def hoping_to_raise(nb):
    nb.cells[1].metadata.tags = ["raises-exception"]


def live_and_compared(nb):
    nb.cells[1].metadata.tags = ["live"]


def one_long_cell(nb):
    nb.cells[1].source = "\n".join(["x = 1"] * 26)


def long_cells(nb):
    for at in (1, 5):
        nb.cells[at].source = "\n".join(["x = 1"] * 7)


def without_prose(nb):
    del nb.cells[2]


def beginning_with_code(nb):
    del nb.cells[0]


def with_a_path(nb):
    nb.cells[1].outputs = [text("saved in /home/someone/x.pt")]


def with_an_address(nb):
    nb.cells[1].outputs = [text("<function f at 0x7f2b1c0d>")]


def with_a_time(nb):
    nb.cells[1].outputs = [new_output("stream", text="started 2026-11-21 22:09")]


def paired(nb):
    nb.metadata.jupytext = {"formats": "ipynb,py"}


def with_python_version(nb):
    nb.metadata.language_info.version = "3.11.7"


def timed(nb):
    nb.cells[1].metadata.execution = {"iopub.status.busy": "2026"}


FAULTS = [
    (never_run, rules.executed, "never executed"),
    (with_error, rules.executed, "ends in an error"),
    (ignoring_most, rules.compared_enough, "only 1 of 3 code cells are compared;"),
    (silent, rules.compared_enough, "only 0 of 3 code cells are compared and have text"),
    (skipping, rules.tagged_with_reason, "without a reason"),
    (hoping_to_raise, rules.tagged_with_reason, "use fails"),
    (live_and_compared, rules.tagged_with_reason, "add nbval-ignore-output"),
    (one_long_cell, rules.cells_are_small, "sum: 26 lines"),
    (long_cells, rules.cells_are_small, "median code cell has 7 lines"),
    (without_prose, rules.prose_comes_first, "double: no prose"),
    (beginning_with_code, rules.prose_comes_first, "sum: no prose"),
    (with_a_path, rules.outputs_leak_nothing, "an absolute path: '/home/someone/x.pt'"),
    (with_an_address, rules.outputs_leak_nothing, "an address"),
    (with_a_time, rules.outputs_leak_nothing, "a time of day"),
    (paired, rules.metadata_is_minimal, "jupytext"),
    (with_python_version, rules.metadata_is_minimal, "language_info"),
    (timed, rules.metadata_is_minimal, "execution"),
]


@pytest.mark.parametrize("rule", rules.ALWAYS, ids=lambda rule: rule.__name__)
def test_a_good_lesson_breaks_no_rule(rule):
    assert list(rule(lesson())) == []


@pytest.mark.parametrize(
    ("plant", "rule", "complaint"), FAULTS, ids=[f[0].__name__ for f in FAULTS]
)
def test_a_planted_fault_is_found(plant, rule, complaint):
    notebook = lesson()
    plant(notebook)
    assert complaint in "\n".join(rule(notebook))


def test_every_rule_has_a_planted_fault():
    assert {rule for _, rule, _ in FAULTS} == set(rules.ALWAYS)


def test_the_workshop_rule_counts_what_stands_above_further_and_nothing_below():
    notebook = lesson()
    assert list(rules.core_fits_a_workshop(notebook, shortest=4)) == []
    assert "4 cells above Further" in "\n".join(rules.core_fits_a_workshop(notebook))
    notebook.cells[4].source += " word" * 4000
    notebook.cells += [notebook.cells[3]] * 7 + [notebook.cells[2]] * 9
    assert list(rules.core_fits_a_workshop(notebook, shortest=4)) == []
    notebook.cells[4].source = notebook.cells[4].source.replace("## Further", "")
    said = "\n".join(rules.core_fits_a_workshop(notebook, shortest=4))
    for wrong in ("8 exercises", "50 declared minutes", "words above"):
        assert wrong in said


def test_words_are_prose_without_code_formulas_and_tags():
    prose = "One *two* [three](https://example.org/four).\n\n$x y z$ <b>four</b>\n```\na b\n```\n"
    assert rules.words([new_markdown_cell(prose)]) == 4


class Entry:
    """As much of a registry's exercise as the comparison reads."""

    difficulty, importance, minutes, lines = 2, 4, 5, 1

    @staticmethod
    def function(x: float, times: int = 2) -> float:
        """Twice x."""
        return x * times


@pytest.mark.parametrize(
    ("was", "becomes", "complaint"),
    [
        ("sample.double", "sample.triple", "no exercise 'sample.triple'"),
        ("times=2", "times=3", "the stub takes (x, times=3)"),
        ("double(x,", "double(y,", "the stub takes (y, times=2)"),
        ("5 minutes", "6 minutes", "the registry (2, 4, 5, 1)"),
        ("*Difficulty", "Difficulty", "0 *Difficulty ...* lines"),
    ],
)
def test_a_lesson_that_disagrees_with_the_registry_is_found(was, becomes, complaint):
    notebook = lesson()
    assert list(solve.disagreements(notebook, {"sample.double": Entry})) == []
    for cell in notebook.cells:
        cell.source = cell.source.replace(was, becomes)
    assert complaint in "\n".join(solve.disagreements(notebook, {"sample.double": Entry}))


def test_solving_pastes_the_reference_under_the_decorator_and_drops_live_cells():
    notebook = lesson()
    notebook.cells[5].metadata.tags = ["live"]
    notebook.cells[3].source = "before = 1\n\n\n" + notebook.cells[3].source + "\n\nafter = double"
    solved = solve.solved(notebook, {"sample.double": Entry.function})
    assert [cell.id for cell in solved.cells] == ["title", "sum", "ask", "double", "further"]
    assert solved.cells[3].outputs == [] and notebook.cells[3].outputs
    shown = []
    names = {"exercise": lambda name: lambda f: (shown.append((name, f(4))), f)[1]}
    exec(solved.cells[3].source, names)
    assert shown == [("sample.double", 8)] and names["after"](3) == 6 and names["before"] == 1


def test_verdicts_are_read_from_the_machine_readable_outputs():
    assert solve.verdicts(lesson())["sample.double"]["status"] == "not_attempted"


def test_a_demonstration_is_no_exercise_and_is_not_solved():
    notebook = lesson()
    notebook.cells[3].metadata.tags = ["demonstration"]
    solved = solve.solved(notebook, {"sample.double": Entry.function})
    assert solved.cells[3].source == notebook.cells[3].source
    assert solve.verdicts(notebook) == {} and rules.stubs(notebook.cells[3]) == {}
