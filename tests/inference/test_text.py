import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dsv3_tutorial.inference.requests import GenerationError
from dsv3_tutorial.inference.text import StopText, Vocabulary


@pytest.fixture(scope="module")
def trained_on_code(small):
    return Vocabulary(small, 512)


@pytest.fixture
def bytes_only(tmp_path):
    return Vocabulary(tmp_path, 256)


def streamed(vocabulary, tokens):
    stream = vocabulary.stream()
    return [stream.add(token) for token in tokens]


@settings(deadline=None)
@given(st.text())
def test_any_text_comes_back_from_its_tokens(trained_on_code, text):
    tokens = trained_on_code.encode(text)
    assert "".join(streamed(trained_on_code, tokens)) == text


@settings(deadline=None)
@given(text=st.text())
def test_any_text_comes_back_from_its_bytes(tmp_path_factory, text):
    vocabulary = Vocabulary(tmp_path_factory.getbasetemp(), 256)
    assert vocabulary.encode(text) == list(text.encode())
    assert "".join(streamed(vocabulary, text.encode())) == text


@settings(deadline=None)
@given(st.lists(st.integers(0, 511)))
def test_any_tokens_are_the_text_that_the_library_decodes(trained_on_code, tokens):
    pieces = streamed(trained_on_code, tokens)
    expected = trained_on_code.tokenizer.decode(tokens)
    got = "".join(pieces)
    assert expected.startswith(got)  # a letter that is not whole at the end is not shown
    assert set(expected[len(got) :]) <= {"\ufffd"}


def test_whole_tokens_are_text_again_and_half_a_letter_at_the_end_is_left_out(trained_on_code):
    tokens = trained_on_code.encode("def é():")
    assert trained_on_code.decode(tokens) == "def é():"
    assert trained_on_code.decode(trained_on_code.encode("é")[:1]) == ""


def test_a_letter_is_shown_once_it_is_whole(bytes_only):
    assert streamed(bytes_only, "aé€😀".encode()) == ["a", "", "é", "", "", "€", "", "", "", "😀"]


def test_bytes_that_are_no_text_are_shown_as_such_and_do_not_stop_what_follows(bytes_only):
    assert "".join(streamed(bytes_only, b"a\xffb\xc3c")) == "a\ufffdb\ufffdc"


def test_a_token_beyond_the_vocabulary_is_no_text(small):
    assert streamed(Vocabulary(small, 600), [599]) == [""]


def test_special_tokens_are_not_text_and_other_added_ones_are(tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.add_tokens(["<straße>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = Vocabulary(tmp_path, 300)
    assert streamed(vocabulary, vocabulary.encode("a<end>b<straße>")) == ["a", "", "b", "<straße>"]


def test_a_vocabulary_of_words_is_decoded_by_its_own_rule(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"one": 0, "two": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = Vocabulary(tmp_path, 3)
    assert "".join(streamed(vocabulary, vocabulary.encode("one two one"))) == "one two one"


def test_a_folder_whose_tokens_nobody_can_read_is_refused(tmp_path):
    with pytest.raises(GenerationError, match=r"512 tokens and no tokenizer\.json"):
        Vocabulary(tmp_path, 512)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(GenerationError, match="cannot be read"):
        Vocabulary(tmp_path, 512)


@pytest.mark.parametrize(
    ("named", "expected"), [(None, set()), (7, {7}), ([7, 9], {7, 9})], ids=["none", "one", "two"]
)
def test_the_last_tokens_are_those_the_checkpoint_names(tmp_path, named, expected):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": named}))
    assert Vocabulary(tmp_path, 256).last_tokens() == expected


def test_the_config_for_generation_comes_first_and_a_broken_one_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert Vocabulary(tmp_path, 256).last_tokens() == {2}
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(GenerationError, match=r"generation_config\.json cannot be read"):
        Vocabulary(tmp_path, 256).last_tokens()


def test_text_ends_before_a_stop_string_that_lies_across_pieces():
    stop = StopText(["\n\n", "END"])
    assert [stop.add(piece) for piece in ("one\n", "two", "\n", "\nthree")] == [
        "one",
        "\ntwo",
        "",
        "",
    ]
    assert stop.found and stop.rest() == ""


def test_what_only_began_like_a_stop_string_is_shown_in_the_end():
    stop = StopText(["abc"])
    assert [stop.add("xab"), stop.rest(), stop.found] == ["x", "ab", False]


@settings(deadline=None)
@given(
    st.text("ab", max_size=20),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_the_text_up_to_the_first_stop_string_is_let_through_however_it_is_cut(text, stops, data):
    stop, shown, at = StopText(stops), "", 0
    while at < len(text) and not stop.found:
        size = data.draw(st.integers(1, len(text) - at))
        shown += stop.add(text[at : at + size])
        at += size
        ends = [text[:at].find(s) for s in stops if s in text[:at]]
        assert text.startswith(shown) and stop.found == bool(ends)
    ends = [text[:at].find(s) for s in stops if s in text[:at]]
    assert shown + stop.rest() == (text[: min(ends)] if ends else text)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(GenerationError, match="stop string is empty"):
        StopText(["a", ""])
