"""A small byte-level vocabulary: fewer, longer symbols, learned from the training files alone."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from dsv3_tutorial.train import corpus


def vocabulary(folder: Path | None, vocab_size: int) -> str:
    """A byte-level BPE of `vocab_size` symbols or fewer, bytes and their merges: a tokenizer.json.

    It can write any text that is UTF-8, and gives it back byte for byte.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = _readable(corpus.files(folder)[False])
    tokenizer.train_from_iterator(map(bytes.decode, texts.values()), trainer)
    return tokenizer.to_str(pretty=True)


def symbol_bytes(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """How many bytes each symbol is, (vocab_size,) int64: a byte is one letter of its name."""
    sizes = torch.ones(vocab_size, dtype=torch.int64)
    for name, symbol in tokenizer.get_vocab().items():
        sizes[symbol] = len(name)
    return sizes


def load(folder: Path | None, vocab_size: int, vocabulary: str) -> corpus.Corpus:
    """The corpus in the symbols (int32) of a vocabulary that `vocabulary` made.

    Files that are not UTF-8 are left out: text is what the tokenizer reads.
    """
    tokenizer = Tokenizer.from_str(vocabulary)

    def encode(text: bytes) -> Tensor:
        return torch.tensor(tokenizer.encode(text.decode()).ids, dtype=torch.int32)

    split = {kept: _readable(texts) for kept, texts in corpus.files(folder).items()}
    return corpus.joined(split, encode, symbol_bytes(tokenizer, vocab_size))


def symbols_of(text: bytes, vocabulary: str) -> tuple[Tensor, Tensor]:
    """A text in a vocabulary's symbols (symbols,) int32, and the bytes of each symbol (V,)."""
    tokenizer = Tokenizer.from_str(vocabulary)
    encoded = torch.tensor(tokenizer.encode(text.decode()).ids, dtype=torch.int32)
    return encoded, symbol_bytes(tokenizer, tokenizer.get_vocab_size())


def _readable(texts: dict[str, bytes]) -> dict[str, bytes]:
    def is_utf8(text: bytes) -> bool:
        try:
            text.decode()
        except UnicodeDecodeError:
            return False
        return True

    return {name: text for name, text in texts.items() if is_utf8(text)}
