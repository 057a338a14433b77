"""hint, solution, progress, predict, reveal, term, fails, explore: what each says."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial.learn import (
    explore,
    fails,
    hint,
    predict,
    predictions,
    progress,
    record,
    reveal,
    solution,
    term,
    terms,
)
from dsv3_tutorial.learn.figures import style

NAME = "start.time_s"


def said(capsys):
    return capsys.readouterr().out.strip()


def test_hints_go_one_step_further_each_time_and_end_at_the_solution(capsys):
    told = []
    for _ in range(5):
        hint(NAME)
        told.append(said(capsys))
    assert [text[:11] for text in told[:3]] == ["Hint 1 of 3", "Hint 2 of 3", "Hint 3 of 3"]
    assert (
        told[3]
        == told[4]
        == 'That was the last of 3 hints. solution("start.time_s") shows the answer.'
    )


def test_the_solution_is_the_packages_own_source(capsys):
    solution(NAME)
    text = said(capsys)
    assert text.startswith("# dsv3_tutorial.cost.roofline.time_s")
    assert "def time_s(" in text


def test_progress_counts_what_was_passed_and_passed_stays_passed(capsys):
    record.note_exercise(NAME, "passed")
    record.note_exercise(NAME, "not_yet")
    progress()
    rows = [line.split() for line in said(capsys).splitlines()]
    assert rows[0][:2] == ["concept", "passed"]
    assert ["start", "1", "of", "1", "0", "all", "done"] in rows
    assert rows[-1][:4] == ["whole", "course", "1", "of"]


@pytest.mark.parametrize(
    ("guess", "actual", "says"),
    [
        (40, 9.216, "You said 40 GB. It is 9.22 GB: 4.3x too high."),
        (2, 9.216, "You said 2 GB. It is 9.22 GB: 4.6x too low."),
        (9, 9, "You said 9 GB. It is 9 GB: exactly right."),
        (9, 9.2, "You said 9 GB. It is 9.2 GB: right to within 3 %."),
        (70272, 4096, "You said 70,272 GB. It is 4,096 GB: 17.2x too high."),
        (0, 3, "You said 0 GB. It is 3 GB: too low."),
        (1e9, 3, "You said 1,000,000,000 GB. It is 3 GB: 333,333,333x too high."),
        (torch.tensor(40.0), 9.216, "You said 40 GB. It is 9.22 GB: 4.3x too high."),
    ],
)
def test_reveal_says_how_far_off_a_prediction_was(guess, actual, says, capsys):
    predict("cache", guess, unit="GB")
    reveal("cache", actual)
    assert said(capsys).splitlines()[-1] == says


@given(st.floats(1e-9, 1e9), st.floats(1e-9, 1e9))
def test_too_high_and_too_low_are_never_swapped(guess, actual):
    words = predictions._how_far(guess, actual)
    if "too high" in words:
        assert guess > actual
    elif "too low" in words:
        assert guess < actual
    else:
        assert abs(guess / actual - 1) < 0.06


def test_without_a_prediction_only_the_answer_is_given(capsys):
    predict("cache", ..., unit="GB", question="How much does 128K of context take?")
    reveal("cache", 9.216)
    reveal("never asked", 3, unit="s")
    assert said(capsys).splitlines() == [
        "How much does 128K of context take?",
        "No prediction yet: put a number in place of ... and run the cell.",
        "It is 9.22 GB.",
        "It is 3 s.",
    ]


@pytest.mark.parametrize(
    "guess", ["40 GB", [1], float("nan"), float("inf"), True, object(), torch.ones(3), 1j]
)
def test_a_prediction_of_another_kind_gets_a_sentence(guess, capsys):
    predict("cache", guess)
    reveal("cache", 3)
    out = said(capsys)
    assert out.startswith("A prediction here is a")
    assert out.endswith("It is 3.")
    assert record.read()["predictions"] == {}


def test_a_choice_is_one_of_the_options(capsys):
    predict("growth", "cubic", options=["linear", "quadratic"])
    predict("growth", "Quadratic ", options=["linear", "quadratic"])
    reveal("growth", "linear")
    assert said(capsys).splitlines() == [
        "A prediction here is one of 'linear', 'quadratic'.",
        "Your prediction: quadratic. Run on to see.",
        "You said quadratic. It is linear: not that one.",
    ]
    assert record.read()["predictions"] == {"growth": "quadratic"}


def test_a_term_is_found_by_any_of_its_names_and_a_typo_gets_the_closest(capsys):
    for name in ("HBM", "hbm", "KV cache", "kv-cache", "FLOP/s", "MLA", "head", "tensor cores"):
        term(name)
        assert ": " in said(capsys).splitlines()[0]
    term("latant")
    assert "The closest: Latent" in said(capsys)


def test_every_glossary_entry_is_one_plain_paragraph():
    assert len(terms.entries()) >= 40
    for title, text in terms.entries().items():
        assert "\n\n" not in text, title
        assert 20 <= len(text.split()) <= 110, title
        assert "!" not in text, title


def test_a_claim_that_fails_prints_type_and_first_line(capsys):
    with fails(TypeError):
        raise TypeError("one line\nand another")
    assert said(capsys) == "TypeError: one line"


def test_a_claim_that_holds_is_an_error():
    with pytest.raises(AssertionError, match="nothing was raised"), fails(TypeError):
        pass
    with pytest.raises(AssertionError, match="ValueError was raised"), fails(TypeError):
        raise ValueError


def test_a_damaged_record_is_moved_aside_with_one_line(own_home, capsys):
    own_home.mkdir(parents=True)
    for damaged in ("{half", "[]", '{"exercises": 3}', "\x00"):
        (own_home / "progress.json").write_text(damaged)
        record.note_exercise("a.b", "passed")
        assert json.loads((own_home / "progress.json").read_text())["exercises"]["a.b"] == "passed"
    assert len(said(capsys).splitlines()) == 1
    assert (own_home / "progress.damaged.json").exists()


def test_a_home_that_cannot_be_written_is_said_once_and_progress_lasts_the_session(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DSV3_HOME", str(tmp_path / "file" / "below"))
    record.note_exercise("a.b", "passed")
    record.note_exercise("a.c", "passed")
    assert "cannot be kept" in said(capsys)
    assert set(record.read()["exercises"]) == {"a.b", "a.c"}


WRITER = """
import sys
from dsv3_tutorial.learn import record
for index in range(15):
    record.note_exercise(f"{sys.argv[1]}.{index}", "passed")
"""


def test_two_kernels_writing_at_once_lose_nothing(own_home):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, name]) for name in ("one", "two")]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert len(record.read()["exercises"]) == 30


def draw(model, context=1, scale=1.0):
    fig, ax = style.figure(3, 2)
    ax.plot([0, context], [0, scale], **style.series(0), label=model)
    return style.finish(fig, ax, title=f"{model} at {context}", xlabel="tokens", ylabel="GB")


def test_a_moved_control_changes_picture_and_caption():
    box = explore(
        draw,
        say=lambda model, context: f"{model} <{context}>",
        start={"context": 8192},
        model=["V3", "Qwen"],
        context=[4096, 8192],
    )
    assert box.values == {"model": "V3", "context": 8192}
    before = box.picture
    assert before.startswith(b"\x89PNG")
    assert box.caption == "V3 &lt;8192&gt;"
    box.children[0].value = "Qwen"
    assert box.picture != before
    assert box.caption == "Qwen &lt;8192&gt;"


def test_every_kind_of_control_begins_at_its_first_value():
    def any_values(**values):
        return draw("x", 2)

    box = explore(
        any_values, a=range(2, 9, 2), b=(0.5, 2.0, 0.5), c=(1, 5, 1), d={"one": 1, "two": 2}, e=True
    )
    assert box.values == {"a": 2, "b": 0.5, "c": 1, "d": 1, "e": True}
    with pytest.raises(ValueError, match="no control"):
        explore(any_values, start={"z": 1}, a=[1])
    with pytest.raises(TypeError, match="nothing to move"):
        explore(any_values, a=3.5)


def test_a_setting_that_cannot_be_drawn_is_a_sentence():
    box = explore(lambda n: draw("x", 1 // n), n=[1, 0])
    box.children[0].value = 0
    assert "cannot be drawn: ZeroDivisionError" in box.caption
    assert box.picture == b""
    box.children[0].value = 1
    assert box.picture


def test_the_stored_twin_of_an_explorer_is_the_same_for_two_of_them():
    first, second = (explore(draw, model=["V3"], scale=(1.0, 2.0, 0.5)) for _ in range(2))
    says = "Explorer: run this cell and move the controls (model, scale)."
    for box in (first, second):
        data = box._repr_mimebundle_()
        data = data[0] if isinstance(data, tuple) else data
        assert data["text/plain"] == data["text/html"] == repr(box) == says
        assert "application/vnd.jupyter.widget-view+json" in data


def test_a_figure_is_opaque_repeats_and_its_text_twin_is_its_title():
    first, second = draw("V3"), draw("V3")
    assert first.png() == second.png()
    bundle = first._repr_mimebundle_()
    assert bundle["text/plain"] == "Figure: V3 at 1"
    assert first.get_facecolor() == (1.0, 1.0, 1.0, 1.0)
    assert len(set(style.SERIES)) == len(set(style.MARKERS)) == 7
