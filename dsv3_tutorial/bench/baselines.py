"""What counting and compression reach on held-out text: the bar that a trained model must clear.

Everything is bits per byte of one text: the held-out split of train.corpus, its files joined. A
compressor's output is counted whole, headers included. The n-gram model and a neural model are
charged -log2 p of every byte by the chain rule, which an arithmetic coder turns into file length.
"""

import argparse
import hashlib
import lzma
import math
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import machine
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.train import corpus
from dsv3_tutorial.train.ngram import BEFORE_THE_TEXT, SMOOTHINGS, NGram

NAME = "baselines"
CONTEXT = 512
_LZMA = {"preset": 9 | lzma.PRESET_EXTREME}  # a 64 MiB window: all of the text before
_ZLIB_WINDOW = 2**15  # bytes that deflate looks back, and so all that a dictionary can hold


def compressors(train: bytes, held_out: list[bytes]) -> dict[str, Callable[[], int]]:
    """Ways to write the held-out files down, each giving the bytes it needs.

    Those that name the training text may use it as a reader of the output would have to: as what
    came before. The others know nothing but the held-out text.
    """
    whole = b"\n".join(held_out)
    return {
        "zlib -9, one stream": lambda: len(zlib.compress(whole, 9)),
        "zlib -9, each file alone": lambda: sum(len(zlib.compress(file, 9)) for file in held_out),
        "zlib -9 after the training text's last 32 KB": lambda: _zlib_after(train, whole),
        "lzma -9e, one stream": lambda: len(lzma.compress(whole, **_LZMA)),
        "lzma -9e after the training text": lambda: _lzma_after(train + b"\n", whole),
    }


def _zlib_after(before: bytes, text: bytes) -> int:
    coder = zlib.compressobj(9, zdict=before[-_ZLIB_WINDOW:])
    return len(coder.compress(text) + coder.flush())


def _lzma_after(before: bytes, text: bytes) -> int:
    """What `text` adds to the length of `before`, compressed: no dictionary can be set in lzma."""
    return len(lzma.compress(before + text, **_LZMA)) - len(lzma.compress(before, **_LZMA))


@dataclass(frozen=True)
class Window:
    """One stretch of text as a model sees it: padded[begin:end], its last `scored` bytes counted.

    The text is padded by one newline in front, so that padded[end] is the last byte predicted.
    """

    begin: int
    end: int
    scored: int


def cover(length: int, context: int, windows: int | None = None) -> list[Window]:
    """Windows that score each of `length` bytes once, with `context` / 2 bytes of context or more.

    Only the first window's bytes have less: what there is before them. With `windows`, that many
    of them evenly spread. Halving the stride again would cost twice as much for little context.
    """
    stride = max(1, context // 2)
    ends = [*range(stride, length, stride), length]
    begins = [0, *ends[:-1]]
    all_of_them = [Window(max(0, e - context), e, e - b) for b, e in zip(begins, ends)]
    if windows is None or windows >= len(all_of_them):
        return all_of_them
    picked = torch.linspace(0, len(all_of_them) - 1, windows).long().tolist()
    return [all_of_them[i] for i in picked]


@dataclass(frozen=True)
class Score:
    """A model on held-out text: mean bits per scored byte; how often the draft agreed.

    `draft_agreement`: the share of scored positions where the first MTP module's best guess is the
    main model's own best guess, on the text itself and not on what the model would write: a proxy
    for the acceptance of greedy speculation. None without an MTP module.
    """

    bits_per_byte: float
    scored_bytes: int
    draft_agreement: float | None


@torch.no_grad()
def score(
    model: DeepSeekV3,
    text: Tensor,
    context: int = CONTEXT,
    windows: int | None = None,
    batch: int = 8,
    sizes: Tensor | None = None,
) -> Score:
    """Run `model` over `text` (symbols,), as `cover` lays it out; sizes (V,): bytes of a symbol.

    Without sizes the symbols are bytes. One forward over twice as many symbols as are scored, the
    loss summed in float64 and divided by the bytes that the scored symbols stand for.
    """
    device = model.lm_head.weight.device
    sizes = (torch.ones(256) if sizes is None else sizes).long().to(device)
    before = text.new_full((1,), BEFORE_THE_TEXT) if len(sizes) == 256 else text[:1]
    padded = torch.cat([before, text]).to(device)
    nats, scored, agreements = 0.0, 0, []
    for group in _batches(cover(len(text), context, windows), batch):
        at = torch.stack([padded[w.begin : w.end + 1] for w in group]).long()  # (B, S + 1)
        last = group[0].scored
        logits, drafts = model(at[:, :-1], drafts=True)
        tail = logits[:, -last:].flatten(0, 1).double()  # (B * last, V)
        nats += F.cross_entropy(tail, at[:, -last:].flatten(), reduction="sum").item()
        scored += int(sizes[at[:, -last:]].sum())
        agreements += [_agreements(logits, guessed, last) for guessed in drafts[:1]]
    agreement = torch.cat(agreements).double().mean().item() if agreements else None
    return Score(nats / scored / math.log(2), scored, agreement)  # per byte, in bits


def _agreements(logits: Tensor, guessed: Tensor, last: int) -> Tensor:
    """Where both have the same best guess: logits (B, S, V), guessed (B, S - 1, V) -> flat bools.

    The draft at i and the main model at i + 1 guess the same token.
    """
    same = logits[:, 1:].argmax(-1) == guessed.argmax(-1)  # (B, S - 1)
    return same[:, -last:].flatten()  # (B * last,)


def _batches(windows: list[Window], batch: int) -> Iterator[list[Window]]:
    """Neighbours of the same shape, `batch` of them at a time."""
    for _, alike in groupby(windows, key=lambda w: (w.end - w.begin, w.scored)):
        held = list(alike)
        yield from (held[at : at + batch] for at in range(0, len(held), batch))


def _receipt(
    by: str, value: float, text: Tensor, device: str = "cpu", **shapes: object
) -> receipts.Receipt:
    known = {
        "by": by,
        "held_out_bytes": len(text),
        "held_out_sha256": hashlib.sha256(text.numpy().tobytes()).hexdigest()[:16],
    }
    return receipts.Receipt(
        what="held-out text",
        shapes={**known, **shapes},
        value=round(value, 5),
        unit="bits per byte",
        spread={"min": round(value, 5), "max": round(value, 5)},
        repeats=1,
        **machine.here(device),
    )


def baselines(text: corpus.Corpus, files: list[bytes]) -> Iterator[receipts.Receipt]:
    """Every baseline on one split, as receipts. The n-gram models are fitted on its training text.

    11 MB of training text: half a minute, most of it lzma's.
    """
    train, held_out = text.train.numpy(), text.held_out.numpy()
    for order, smoothing in [*((n, SMOOTHINGS[0]) for n in (3, 5, 7)), (5, SMOOTHINGS[1])]:
        value = NGram.fit(train, order, smoothing).bits_per_byte(held_out)
        facts = {"order": order, "smoothing": smoothing, "train_bytes": len(train)}
        yield _receipt(f"order-{order} n-gram, {smoothing}", value, text.held_out, **facts)
    for by, length in compressors(train.tobytes(), files).items():
        yield _receipt(by, 8 * length() / len(held_out), text.held_out)


def held_out_files(folder: Path | None) -> list[bytes]:
    """The held-out files of `corpus.load(folder)`, one by one."""
    folder = Path(folder or sysconfig.get_path("stdlib"))
    names = [name for name in corpus.text_files(folder) if corpus.is_held_out(name)]
    return [(folder / name).read_bytes() for name in names]


def of_model(options: argparse.Namespace, text: Tensor) -> Iterator[receipts.Receipt]:
    """The model in a folder, on the same text, as receipts; in the symbols of its tokenizer.json.

    Raises ValueError for a model of other symbols than bytes whose tokenizer is not there.
    """
    dtype = getattr(torch, options.dtype)
    model = DeepSeekV3.from_pretrained(options.model, dtype=dtype, device=options.device).eval()
    symbols, sizes = text, None
    vocabulary = options.model / "tokenizer.json"
    if vocabulary.exists():
        from dsv3_tutorial.train import bpe

        files = corpus.files(options.text)[True].values()
        symbols, sizes = bpe.symbols_of(b"\n".join(files), vocabulary.read_text("utf-8"))
    elif model.cfg.vocab_size != 256:
        raise ValueError(
            f"The model in {options.model} has {model.cfg.vocab_size} symbols, not the 256 bytes, "
            "and no tokenizer.json. Its loss per symbol is not bits per byte. Put the tokenizer "
            "that it was trained with into the folder."
        )
    context = min(options.context, model.cfg.max_position_embeddings)
    found = score(model, symbols, context, options.windows, options.batch, sizes)
    facts = {"context": context, "stride": context // 2, "scored_bytes": found.scored_bytes}
    facts |= {"dtype": options.dtype, "draft_agreement": found.draft_agreement}
    name = f"model {options.model.resolve().name}"
    yield _receipt(name, found.bits_per_byte, text, options.device, **facts)


def main(argv: list[str] | None = None) -> int:
    """`bench baselines`: the baselines, or with --model a trained model on the same text."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_tutorial bench baselines")
    add = parser.add_argument
    add("--text", type=Path, help="folder of text (default: the standard library)")
    add("--model", type=Path, help="score this model folder, and no baseline")
    add("--context", type=int, default=CONTEXT, help=f"symbols a model sees (default {CONTEXT})")
    add("--windows", type=int, help="score that many windows, evenly spread (default: all bytes)")
    add("--batch", type=int, default=8, help="windows at a time (default 8)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--device", default="cpu", help="where the model runs (default cpu)")
    add("--out", type=Path, help="folder of the receipts (default data/measured)")
    options = parser.parse_args(argv)
    text = corpus.load(options.text)
    if options.model:
        found = of_model(options, text.held_out)
    else:
        found = baselines(text, held_out_files(options.text))
    for receipt in found:
        share = receipt.shapes.get("draft_agreement")
        drafted = f"   draft agrees {share:.1%}" if share is not None else ""
        print(f"{receipt.value:8.4f}  {receipt.shapes['by']}{drafted}", flush=True)
        receipts.append(NAME, [receipt], folder=options.out)
    return 0
