"""`python -m dsv3_tutorial quantize IN OUT --to FORMAT`: writes the folder, and says what it cost.

By kind of layer: bytes, how far the weights moved, and what that does to the layer's outputs on
held-out text, predicted before and measured after. For the whole: bits per byte, before and after.
"""

import argparse
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsv3_tutorial.bench import baselines
from dsv3_tutorial.bench.quantize_inputs import seen
from dsv3_tutorial.inference.quantize import load, nbytes, quantize_folder
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.train import bpe, corpus
from dsv3_tutorial.weights.formats import dequantize, quantize, spacing

WINDOWS, SEQ = 24, 384
ROWS = 64  # tokens that a matrix's output error is measured on


@dataclass(frozen=True)
class Kind:
    """All matrices of one name: bytes, and three errors relative to what they are errors of."""

    name: str
    matrices: int
    before: int
    after: int
    weights: float
    predicted: float
    measured: float


def main(argv: list[str] | None = None) -> int:
    """Quantise a folder, and print the report unless told not to."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_tutorial quantize", description=__doc__)
    parser.add_argument("src", metavar="IN", help="a folder with a plain checkpoint")
    parser.add_argument("dst", metavar="OUT", help="the folder to write")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="fp8, int8 or int4")
    parser.add_argument("--no-report", action="store_true", help="write, and measure nothing")
    options = parser.parse_args(argv)
    src, dst = Path(options.src), Path(options.dst)
    quantize_folder(src, dst, options.to)
    print(f"wrote {dst.name}: {options.to}, {_megabytes(dst)}, from {_megabytes(src)}")
    if not options.no_report:
        print("\n".join(report(src, dst, options.to)))
    return 0


@torch.no_grad()
def report(src: Path, dst: Path, fmt: str, windows: int = WINDOWS, seq: int = SEQ) -> list[str]:
    """The lines that `quantize` prints below its first. Bits per byte need a tokenizer in src."""
    model = DeepSeekV3.from_pretrained(src, torch.float32).eval()
    small = load(dst, torch.float32)
    text = held_out(src, model.cfg.vocab_size)
    seq = min(seq, model.cfg.max_position_embeddings)
    if text is None:
        size = (4, min(seq, 128))
        ids = torch.randint(model.cfg.vocab_size, size, generator=torch.Generator().manual_seed(0))
    else:
        ids = torch.stack([text[0][at : at + seq] for at in range(0, 4 * seq, seq)]).long()
    lines = [*table(kinds(model, ids, fmt)), ""]
    lines.append(f"weights in memory: {nbytes(model):,} bytes in float32, {nbytes(small):,} now")
    if text is None:
        return [*lines, "no tokenizer.json: errors on random tokens, and no bits per byte"]
    before, after = (bits_per_byte(m, text, windows, seq) for m in (model, small))
    lines.append(
        f"held-out bits per byte: {before:.4f} before, {after:.4f} after ({after - before:+.4f})"
    )
    return lines


@functools.cache
def held_out(folder: Path, vocab_size: int) -> tuple[Tensor, Tensor] | None:
    """The held-out text in a checkpoint's symbols, and the bytes of each symbol; None without any.

    (symbols,) int32 and (V,) int64. A vocabulary of 256 without a tokenizer is bytes.
    """
    path = Path(folder) / "tokenizer.json"
    texts = corpus.files()[True].values()
    if path.is_file():
        readable = b"\n".join(text for text in texts if _is_utf8(text))
        return bpe.symbols_of(readable, path.read_text("utf-8"))
    if vocab_size != 256:
        return None
    return corpus.as_bytes(b"\n".join(texts)).int(), torch.ones(256, dtype=torch.int64)


@torch.no_grad()
def bits_per_byte(
    model: DeepSeekV3, text: tuple[Tensor, Tensor], windows: int = WINDOWS, seq: int = SEQ
) -> float:
    """Bits a byte of held-out text costs the model, over `windows` windows of seq symbols each.

    text as `held_out` gives it. The same windows for every model: differences are the model's.
    """
    symbols, sizes = text
    return baselines.score(model, symbols, seq, windows, sizes=sizes).bits_per_byte


@torch.no_grad()
def kinds(model: DeepSeekV3, ids: Tensor, fmt: str) -> list[Kind]:
    """What a format does to each kind of layer, on the inputs that ids (B, S) bring there."""
    found: dict[str, list[tuple[Tensor, ...]]] = {}
    for name, weight, x in seen(model, ids, ROWS):
        found.setdefault(_kind(name), []).append(_errors(weight, x, fmt))
    return [_joined(name, rows) for name, rows in found.items()]


def table(found: list[Kind]) -> list[str]:
    """The kinds, one a line, and their sum in the last."""
    head = ("", "matrices", "bytes", "weights", "predicted", "measured")
    lines = ["{:22}{:>9}{:>24}{:>10}{:>11}{:>10}".format(*head)]
    for row in found:
        moved = f"{row.before:,} -> {row.after:,}"
        errors = f"{row.weights:>9.2%} {row.predicted:>10.2%} {row.measured:>9.2%}"
        lines.append(f"{row.name:22}{row.matrices:>9}{moved:>24} {errors}")
    before, after = sum(row.before for row in found), sum(row.after for row in found)
    total = f"{before:,} -> {after:,}"
    lines.append(f"{'all of them':22}{sum(row.matrices for row in found):>9}{total:>24}")
    return [*lines, "errors: of the weights, and of the outputs as predicted and as measured"]


def _errors(weight: Tensor, x: Tensor, fmt: str) -> tuple[Tensor, ...]:
    """Bytes before and after, and squared sums: weights, their error, outputs, predicted, real.

    `weights.formats.predicted_error` for every format: each weight has its own step.
    """
    q, out = quantize(weight, fmt), x @ weight.T
    moved = dequantize(q) - weight
    predicted = (x.square() @ spacing(q).square().T) / 12
    squares = (weight.square(), moved.square(), out.square(), predicted, (x @ moved.T).square())
    return (
        torch.tensor(weight.numel() * 2.0),  # in BF16, as checkpoints are published
        torch.tensor(float(q.nbytes)),
        *(s.double().sum() for s in squares),
    )


def _joined(name: str, rows: list[tuple[Tensor, ...]]) -> Kind:
    before, after, weights, moved, out, predicted, real = (
        float(sum(column)) for column in zip(*rows)
    )
    errors = (moved / weights, predicted / out, real / out)
    return Kind(name, len(rows), int(before), int(after), *(e**0.5 for e in errors))


def _kind(name: str) -> str:
    """`experts.down_proj` for model.layers.3.mlp.experts.7.down_proj.weight."""
    owner = next((part for part in ("shared_experts", "experts") if f".{part}." in name), None)
    own = name.split(".")[-2]
    return own if owner is None else f"{owner}.{own}"


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _megabytes(folder: Path) -> str:
    files: Iterable[Path] = folder.glob("*.safetensors")
    return f"{sum(path.stat().st_size for path in files) / 1e6:.1f} MB"
