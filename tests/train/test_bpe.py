"""A vocabulary changes how text is cut, and neither the text nor what a bit per byte means."""

import math

import pytest
import torch
from tokenizers import Tokenizer

from dsv3_tutorial.train import bpe, corpus, evaluate


@pytest.fixture
def folder(text_folder):
    (text_folder / "snow.txt").write_bytes("Schnee ❄ fällt\n\n\tleise\r\n".encode())
    (text_folder / "latin.txt").write_bytes(b"\xe9t\xe9")
    (text_folder / "empty.txt").write_bytes(b"")
    return text_folder


def test_symbols_give_back_every_byte_of_the_readable_files(folder):
    learned = bpe.vocabulary(folder, 300)
    made, tokenizer = bpe.load(folder, 300, learned), Tokenizer.from_str(learned)
    split = corpus.files(folder)
    for kept, symbols in ((False, made.train), (True, made.held_out)):
        texts = [text for name, text in split[kept].items() if name != "latin.txt"]
        assert tokenizer.decode(symbols.tolist()).encode() == b"\n".join(texts)
        assert made.symbol_bytes[symbols.long()].sum() == len(b"\n".join(texts))
        assert len(symbols) < len(b"\n".join(texts)) / 2


def test_the_vocabulary_is_learned_from_the_training_files_alone(folder):
    before = bpe.vocabulary(folder, 300)
    for name in corpus.files(folder)[True]:
        (folder / name).write_bytes(b"zzzzqqqq " * 500)
    assert bpe.vocabulary(folder, 300) == before


def test_places_of_symbols_begin_each_file(folder):
    made = bpe.load(folder, 300, learned := bpe.vocabulary(folder, 300))
    tokenizer, texts = Tokenizer.from_str(learned), corpus.files(folder)[False]
    for begin, name in made.places[:20]:
        head = tokenizer.decode(made.train[begin : begin + 3].tolist())
        assert (texts[name].decode() + "\n").startswith(head)


def test_a_bit_per_byte_does_not_depend_on_the_vocabulary():
    target = torch.tensor([[0, 1], [1, 2]])
    assert evaluate.bits_per_byte(math.log(2), target, torch.ones(3, dtype=torch.int64)) == 1
    longer = evaluate.bits_per_byte(math.log(2), target, torch.tensor([1, 2, 3]))
    assert longer == pytest.approx(4 / 8)


def test_the_symbols_of_a_text_stand_for_all_of_its_bytes(folder):
    learned, text = bpe.vocabulary(folder, 300), "a ❄ is\n\n  no flake".encode()
    symbols, sizes = bpe.symbols_of(text, learned)
    assert sizes[symbols.long()].sum() == len(text)
    assert Tokenizer.from_str(learned).decode(symbols.tolist()).encode() == text
