"""Formats on numbers of a trained model: what enters its Linears, goes to experts, and is cached.

The text is the source of one of the package's own modules: everywhere the same, and never trained
on. Errors are relative and of second order, of each recorded tensor; a group's is their mean.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tokenizers import Tokenizer
from torch import Tensor, nn

from dsv3_tutorial.attention import rope
from dsv3_tutorial.cost.precision import STORAGE
from dsv3_tutorial.files import data_path
from dsv3_tutorial.fp8 import e5m6, logfmt, mxfp8, quant
from dsv3_tutorial.fp8.errors import relative_error
from dsv3_tutorial.fp8.formats import FORMATS, real_tiles, round_to
from dsv3_tutorial.learn.figures.style import (
    figure,
    finish,
    note,
    plain_log,
    series,
)
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.moe.layer import MoE

SYMBOLS = 384  # as many positions as the model was trained with
ENTERING, DISPATCHED, CACHED = "inputs of linear layers", "dispatched tokens", "KV latents"
KINDS = (ENTERING, DISPATCHED, CACHED)


def _in_tiles(x: Tensor, fmt: str) -> Tensor:
    """A format's values, and a float32 scale for every 128 that lays the largest on its largest."""
    tiles = real_tiles(x, quant.TILE)  # (..., tiles, 128)
    largest = tiles.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(largest > 0, largest / FORMATS[fmt].max, 1.0)
    return (round_to(tiles / scale, fmt) * scale).flatten(-2)[..., : x.shape[-1]]


def _log(x: Tensor, bits: int) -> Tensor:
    return logfmt.decode(*logfmt.encode(x, bits), bits)


RESTORE: dict[str, Callable[[Tensor], Tensor]] = {
    "e5m2": lambda x: _in_tiles(x, "e5m2"),
    "mxfp8": lambda x: mxfp8.dequantize_mx(*mxfp8.quantize_mx(x)),
    "mxfp8, up": lambda x: mxfp8.dequantize_mx(*mxfp8.quantize_mx(x, up=True)),
    "e4m3": lambda x: quant.dequantize_tiles(*quant.quantize_tiles(x)),
    "int8": lambda x: _in_tiles(x, "int8"),
    "logfmt-8": lambda x: _log(x, 8),
    "logfmt-10": lambda x: _log(x, 10),
    "e5m6": lambda x: e5m6.unpack_e5m6(*e5m6.pack_e5m6(x), n=x.shape[-1]),
    "bf16": lambda x: x.bfloat16().float(),
}
NAMES = {
    "mxfp8": "MXFP8",
    "mxfp8, up": "MXFP8 up",
    "logfmt-8": "LogFMT-8",
    "logfmt-10": "LogFMT-10",
}


def name(fmt: str) -> str:
    """A format's name as the lesson writes it: E4M3, LogFMT-8."""
    return NAMES.get(fmt, fmt.upper())


@cache
def recorded() -> dict[str, tuple[Tensor, ...]]:
    """The tensors of one forward pass of the trained `small` over 384 symbols: kind -> (M, n).

    What enters each Linear of the blocks, the tokens that each MoE layer sends to its experts, and
    each layer's latents as cached. The gate and the head stay out: they are never in FP8.
    """
    folder = data_path("checkpoints", "small")
    model = DeepSeekV3.from_pretrained(folder, dtype=torch.float32, mtp=False)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    symbols = tokenizer.encode(Path(rope.__file__).read_text(encoding="utf-8")).ids[:SYMBOLS]
    found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    kept = {nn.Linear: found[ENTERING], MoE: found[DISPATCHED]}
    for module in model.model.layers.modules():
        if type(module) in kept:
            module.register_forward_pre_hook(_keeper(kept[type(module)]))
    caches = model.caches(1, len(symbols))
    with torch.no_grad():
        model(torch.tensor([symbols]), caches)
    found[CACHED] = [layer.c_kv[0].clone() for layer in caches]  # (M, C)
    return {kind: tuple(tensors) for kind, tensors in found.items()}


def _keeper(seen: list[Tensor]) -> Callable:
    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2)  # (M, n)
        if not (seen and torch.equal(x, seen[-1])):  # gate and up share what enters them
            seen.append(x.clone())

    return keep


@cache
def errors(kind: str) -> dict[str, tuple[float, ...]]:
    """The relative error of each recorded tensor of a kind, by format, coarsest first."""
    tensors = recorded()[kind]
    return {
        fmt: tuple(relative_error(x, restore(x)) for x in tensors)
        for fmt, restore in RESTORE.items()
    }


def mean_error(fmt: str, kind: str) -> float:
    """The mean over the recorded tensors of a kind."""
    return float(np.mean(errors(kind)[fmt]))


def on_real_tensors() -> Figure:
    """The error of eight formats on three kinds of tensors, with what each costs a value."""
    fig, ax = figure(9.5, 5.0)
    formats = list(RESTORE)
    for index, kind in enumerate(KINDS):
        rows = np.arange(len(formats)) + 0.22 * (index - 1)
        found = [100 * np.array(errors(kind)[fmt]) for fmt in formats]
        means = [values.mean() for values in found]
        look = series(index)
        low, high = [v.min() for v in found], [v.max() for v in found]
        ax.hlines(rows, low, high, color=look["color"], linewidth=2, alpha=0.5)
        label = f"{kind} ({len(found[0])} tensors)"
        ax.plot(means, rows, linestyle="none", markersize=8, label=label, **look)
    ax.set_yticks(range(len(formats)), [_label(fmt) for fmt in formats])
    ax.set_ylim(len(formats) - 0.5, -0.6)
    plain_log(ax.xaxis, subs=(1.0, 2.0, 5.0))
    finish(fig, ax, _finding(), "relative error of a tensor, %", "", legend=False)
    ax.legend(fontsize=11, frameon=False, loc="lower right")
    note(
        fig, "the trained small model, 384 symbols of source text; line: least to most, mark: mean"
    )
    return fig


def _label(fmt: str) -> str:
    return f"{name(fmt)}, {STORAGE[fmt].bits_per_value:g} bits"


def _finding() -> str:
    e4m3, log8, int8 = (mean_error(fmt, ENTERING) for fmt in ("e4m3", "logfmt-8", "int8"))
    return f"Inputs of linear layers: E4M3 {e4m3:.1%}, INT8 {int8:.1%}, LogFMT-8 {log8:.1%}"


def formats_table() -> None:
    """Print each format's bits a value, scales included, and its mean error on each kind."""
    print(f"{'format':11}{'bits a value':>13}" + "".join(f"{kind:>25}" for kind in KINDS))
    for fmt in RESTORE:
        cells = "".join(f"{mean_error(fmt, kind):>25.2%}" for kind in KINDS)
        print(f"{name(fmt):11}{STORAGE[fmt].bits_per_value:>13.2f}{cells}")
    print("bits: the scales' share included; error: mean over the tensors of a kind")
