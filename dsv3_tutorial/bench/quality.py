"""What narrow weights and a narrow cache cost the trained model: bits per byte of held-out text.

Receipts `quality`, one a format and text. shapes: part "weights" or "cache"; form; text "library"
(held-out files of the running Python) or "module" (data/text/held_out.txt); bytes (of all weights,
or of one token in all layers' caches); windows, context, scored_bytes.
  what "bits per byte": value, and min and max over the windows.
  what "bits per byte more": value minus float32's on the same windows; q1 and q3 are where its mean
  lies as often as not, from the spread between windows.
  what "top token kept": the share of scored positions whose likeliest token is float32's.
Weights: the cache plays no part. Caches: float32 weights, absorbed attention, so that every score
and value is read from what the cache stores. B batch, S positions, V vocab_size.
"""

import argparse
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import baselines, machine, quantize_report
from dsv3_tutorial.files import data_path
from dsv3_tutorial.inference.quantize import nbytes, quantized
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.receipts import Receipt
from dsv3_tutorial.train import bpe
from dsv3_tutorial.weights.formats import FORMATS

NAME = "quality"
WIDE = "float32"
WEIGHTS = (WIDE, "bf16", *FORMATS)
CACHES = (WIDE, "bf16", "fp8", "fp8-rope")
MORE_AT_MOST = {"int8": 0.005, "fp8": 0.005, "int4": 0.02}  # bits per byte, our own bar
_QUARTER = 0.6745  # standard deviations from the middle of a normal curve to its quartiles

Text = tuple[Tensor, Tensor]  # (symbols,) int32, and the bytes of each symbol (V,)


@dataclass(frozen=True)
class Seen:
    """A model on one text, window by window: nats, bytes scored, and its best guesses."""

    nats: Tensor  # (W,) float64
    sizes: Tensor  # (W,) float64
    best: Tensor  # (positions,)

    @property
    def bits(self) -> Tensor:
        """Bits per byte of each window, (W,)."""
        return self.nats / self.sizes / math.log(2)

    @property
    def bits_per_byte(self) -> float:
        return float(self.nats.sum() / self.sizes.sum() / math.log(2))


def texts(folder: Path, vocab_size: int) -> dict[str, Text]:
    """The held-out texts in the symbols of a checkpoint's tokenizer."""
    found = {"library": quantize_report.held_out(folder, vocab_size)}
    vocabulary = (folder / "tokenizer.json").read_text("utf-8")
    module = data_path("text", "held_out.txt").read_bytes()
    return found | {"module": bpe.symbols_of(module, vocabulary)}


@torch.no_grad()
def seen(
    model: DeepSeekV3, text: Text, windows: int, context: int, cache: str | None = None
) -> Seen:
    """Read `windows` windows of `context` symbols, the second half of each scored.

    cache: a kind of model.caches, or "float32", that every layer then attends through, absorbed.
    """
    symbols, sizes = text
    padded, parts = torch.cat([symbols[:1], symbols]), []
    for group in baselines._batches(baselines.cover(len(symbols), context, windows), 8):
        at = torch.stack([padded[w.begin : w.end + 1] for w in group]).long()  # (B, S + 1)
        last, wanted = group[0].scored, at[:, -group[0].scored :]
        logits = _read(model, at[:, :-1], cache)[:, -last:].double()  # (B, last, V)
        nats = F.cross_entropy(logits.mT, wanted, reduction="none").sum(-1)
        parts.append((nats, sizes[wanted].double().sum(-1), logits.argmax(-1).flatten()))
    return Seen(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _read(model: DeepSeekV3, ids: Tensor, cache: str | None) -> Tensor:
    if cache is None:
        return model(ids)
    caches = model.caches(*ids.shape, kind=None if cache == WIDE else cache)
    return torch.cat([model(some, caches) for some in ids.split(64, dim=1)], dim=1)  # (B, S, V)


def weight_receipts(model: DeepSeekV3, found: dict[str, Text], size: tuple) -> Iterator[Receipt]:
    """Every format of the weights on every text; BF16 also computes in BF16."""
    made = {form: _in_format(model, form) for form in WEIGHTS}
    held = {form: nbytes(other) for form, other in made.items()}
    for name, text in found.items():
        yield from _compared(
            "weights", name, {form: seen(other, text, *size) for form, other in made.items()}, held,
            size[1],
        )  # fmt: skip


def cache_receipts(model: DeepSeekV3, found: dict[str, Text], size: tuple) -> Iterator[Receipt]:
    """Every kind of cache on every text, under float32 weights."""
    through = copy.deepcopy(model)
    for layer in through.model.layers:
        layer.self_attn.absorb = True
    kinds = {form: None if form == WIDE else form for form in CACHES}
    held = {
        form: sum(c.nbytes for c in through.caches(1, 64, kind=kind)) // 64
        for form, kind in kinds.items()
    }
    for name, text in found.items():
        runs = {form: seen(through, text, *size, cache=form) for form in CACHES}
        yield from _compared("cache", name, runs, held, size[1])


def _in_format(model: DeepSeekV3, form: str) -> DeepSeekV3:
    if form == WIDE:
        return model
    return copy.deepcopy(model).bfloat16() if form == "bf16" else quantized(model, form)


def _compared(
    part: str, text: str, runs: dict[str, Seen], held: dict[str, int], context: int
) -> Iterator[Receipt]:
    """Three receipts a format: as it is, against float32, and how often the best guess is its."""
    wide = runs[WIDE]
    for form, run in runs.items():
        shapes = {"part": part, "form": form, "text": text, "bytes": held[form]}
        shapes |= {"windows": len(run.nats), "context": context}
        shapes |= {"scored_bytes": int(run.sizes.sum())}
        value, bits = run.bits_per_byte, run.bits
        spread = {"min": min(value, float(bits.min())), "max": max(value, float(bits.max()))}
        yield _receipt("bits per byte", shapes, value, "bits per byte", spread, len(bits))
        more, off = value - wide.bits_per_byte, _error(run, wide) * _QUARTER
        spread = {"q1": more - off, "q3": more + off}
        yield _receipt("bits per byte more", shapes, more, "bits per byte", spread, len(bits))
        kept = float((run.best == wide.best).double().mean())
        yield _receipt("top token kept", shapes, kept, "share", {"min": kept, "max": kept}, 1)


def _error(run: Seen, wide: Seen) -> float:
    """The standard error of the mean difference, from how windows differ; 0 for one window."""
    if len(run.nats) < 2:
        return 0.0
    return float((run.bits - wide.bits).std() / len(run.nats) ** 0.5)


def _receipt(
    what: str, shapes: dict, value: float, unit: str, spread: dict[str, float], repeats: int
) -> Receipt:
    return Receipt(
        what=what, shapes=shapes, value=value, unit=unit, spread=spread, repeats=repeats,
        **machine.here("cpu"),
    )  # fmt: skip


def lines(rows: Sequence[Receipt]) -> list[str]:
    """A table a part and text: bytes, bits per byte, what is lost, and our bar beside it."""
    by = {(r.shapes["part"], r.shapes["text"]): [] for r in rows}
    for r in rows:
        by[r.shapes["part"], r.shapes["text"]].append(r)
    out = []
    for (part, text), group in by.items():
        first = next(r for r in group if r.what == "bits per byte").shapes
        unit = "bytes" if part == "weights" else "bytes a token"
        out += ["", f"{part}, {text}: {first['scored_bytes']:,} bytes scored"]
        out.append(f"  {'':<12}{unit:>14}{'bits/byte':>11}{'more':>10}{'':>11}{'kept':>8}")
        forms = dict.fromkeys(r.shapes["form"] for r in group)
        out += [_line([r for r in group if r.shapes["form"] == form]) for form in forms]
    return out[1:]


def _line(rows: Sequence[Receipt]) -> str:
    bits, more, kept = rows
    form, off = bits.shapes["form"], (more.spread["q3"] - more.value) / _QUARTER
    line = f"  {form:<12}{bits.shapes['bytes']:>14,}{bits.value:>11.4f}"
    line += f"{more.value:>+10.4f} +- {off:.4f}{kept.value:>8.2%}"
    most = MORE_AT_MOST.get(form)
    if most is None:
        return line
    return f"{line}  target at most {most:g}: {'' if more.value <= most else 'not '}reached"


def main(argv: list[str] | None = None) -> int:
    """`bench quality`: measure, keep receipts, print the tables."""
    parser = argparse.ArgumentParser(prog="dsv3_tutorial bench quality", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the receipts (default: data/measured)")
    parser.add_argument("--model", type=Path, help="a plain checkpoint (default: the trained one)")
    parser.add_argument("--quick", action="store_true", help="few windows, to try the benchmark")
    options = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = list(measured(options.model or data_path("checkpoints", "small"), options.quick))
    finally:
        torch.set_num_threads(threads)
    print("\n".join(lines(rows)))
    print(receipts.append(NAME, rows, folder=options.out))
    return 0


def measured(folder: Path, quick: bool = False) -> Iterator[Receipt]:
    """All receipts of one checkpoint. On one thread about two minutes; quick: seconds."""
    model = DeepSeekV3.from_pretrained(folder, torch.float32, mtp=False).eval()
    found = texts(folder, model.cfg.vocab_size)
    context = min(64 if quick else 384, model.cfg.max_position_embeddings)
    yield from weight_receipts(model, found, (1 if quick else 96, context))
    yield from cache_receipts(model, found, (1 if quick else 48, context))
