"""Who made each token, and pictures of quality, acceptance and speed from receipts."""

import html
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.files import data_path
from dsv3_tutorial.inference.generate import generate
from dsv3_tutorial.inference.sample import Sampling
from dsv3_tutorial.inference.text import Vocabulary
from dsv3_tutorial.learn.figures import guessed
from dsv3_tutorial.learn.figures.guessed import Made, Pieces
from dsv3_tutorial.model import DeepSeekV3

PROMPT = "def read(self, size=None):\n"


@pytest.fixture(scope="module")
def trained():
    folder = data_path("checkpoints", "small")
    model = DeepSeekV3.from_pretrained(folder, dtype=torch.float32).eval()
    return model, Vocabulary(folder, model.cfg.vocab_size)


@pytest.fixture
def letters(tmp_path):
    """A vocabulary of bytes."""
    return Vocabulary(tmp_path, 256)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=2), Sampling(0.7, 8, seed=5)])
@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_who_made_each_token_adds_up_to_what_generate_counts(trained, drafts, sampling):
    model, vocabulary = trained
    prompt = vocabulary.encode(PROMPT)
    plain = generate(model, [prompt], 40, sampling, speculate=drafts)
    made = guessed.run(model, prompt, 40, drafts, sampling)
    assert [one.token for one in made] == plain.sequences[0]
    assert sum(one.drafted for one in made) == plain.accepted
    assert sum(one.drafted + len(one.refused) for one in made) == plain.drafted
    assert sum(not one.drafted for one in made) == plain.passes + 1
    assert all(one.token not in one.refused[:1] for one in made)
    assert not model.model._forward_pre_hooks


def test_a_watch_that_is_told_to_stop_stops(trained):
    model, vocabulary = trained
    with guessed.Watch(model, lambda one: True) as watch:
        generate(model, [vocabulary.encode(PROMPT)], 40, speculate=1, on_token=watch)
    assert len(watch.made) == 1


runs = st.lists(
    st.builds(
        Made,
        st.integers(0, 255),
        st.booleans(),
        st.lists(st.integers(0, 255), max_size=2).map(tuple),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(runs, st.text(max_size=5))
def test_the_text_in_colours_and_the_text_with_marks_hold_every_letter_in_order(
    tmp_path_factory, made, prompt
):
    pieces = Pieces(Vocabulary(tmp_path_factory.getbasetemp(), 256), prompt, made)
    text = "".join(piece for piece, who in pieces.parts if who != "refused")
    whole = prompt + bytes(one.token for one in made).decode(errors="replace")
    assert whole.startswith(text), "half a letter at the end may be missing"
    page = re.sub(r"<s .*?</s>|</pre>.*", "", pieces.as_html(), flags=re.DOTALL)
    assert html.unescape(re.sub(r"<[^>]*>", "", page)) == text
    marked = pieces.marked()
    assert "\n".join(line for line, _ in marked) == text
    assert all(len(line) == len(marks) for line, marks in marked)


def test_marks_lie_under_the_letters_that_they_speak_of(letters):
    made = [
        Made(ord("a")),
        Made(ord("b"), True),
        Made(ord("\n"), True),
        Made(ord("c"), False, (120,)),
    ]
    pieces = Pieces(letters, "p", made)
    assert pieces.as_text().split("\n")[:4] == ["pab", "  ~", "c", "x"]
    assert pieces.in_words() == "4 tokens: 2 by the model itself, 2 drafts kept, 1 draft refused"
    page = pieces.as_html()
    assert "<u " in page and ">b</u>" in page and re.search(r"<s [^>]*>x</s>c", page)


def test_a_refused_draft_shows_its_spaces_and_half_a_letter(letters):
    assert guessed.alone(letters, ord(" ")) == "\u00b7"
    assert guessed.alone(letters, ord("\n")) == "\u21b5"
    assert guessed.alone(letters, 0xC3) == "\ufffd"


def test_the_mark_of_half_a_letter_goes_to_the_whole_one(letters):
    made = [Made(0xC3, False, (65,)), Made(0xA4), Made(ord("b"))]
    assert Pieces(letters, "", made).as_text().split("\n")[:2] == ["\u00e4b", "x"]


def test_coloured_text_is_printed_with_its_marks(letters, capsys):
    guessed.coloured(letters, "a", [Made(ord("b"), True)])
    assert capsys.readouterr().out.startswith(
        "ab\n ~\n1 token: 0 by the model itself, 1 draft kept"
    )


def test_the_passes_of_a_run_hold_every_token_and_its_title_counts_them(trained):
    model, vocabulary = trained
    made = guessed.run(model, vocabulary.encode(PROMPT), 40, drafts=3)
    passes = guessed.passes(made)
    again = [made[0].token]
    for last, drafted, kept, own in passes:
        assert last == again[-1]
        again += [*drafted[:kept], own]
    assert again == [one.token for one in made][: len(again)]
    fig = guessed.steps(vocabulary, made, most=6)
    won = sum(kept for *_, kept, _ in passes[:6])
    assert str(fig) == f"Figure: 6 passes gave {6 + won} tokens, {won} of them drafted"
    shown = [text.get_text() for text in fig.axes[0].texts]
    assert sum(text.startswith("\u2717") for text in shown) == sum(
        len(drafted) - kept for _, drafted, kept, _ in passes[:6]
    )
