"""Prefill and decode of one model on one roofline, and both on the machine at hand."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from matplotlib.figure import Figure

from dsv3_tutorial import hardware
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import attention, bill, roofline
from dsv3_tutorial.cost.bill import Line
from dsv3_tutorial.files import data_path
from dsv3_tutorial.hardware import Chip
from dsv3_tutorial.inference.session import Session
from dsv3_tutorial.inference.text import Vocabulary
from dsv3_tutorial.learn.figures.style import (
    COMPUTE,
    MARKERS,
    MEMORY,
    figure,
    finish,
    note,
    plain_log,
)
from dsv3_tutorial.model import DeepSeekV3

MODEL, CONTEXT = "deepseek-v3", 4096
BATCHES = (1, 32, 256)
PROMPTS = (1, 8)
READ, WRITTEN = 256, 16  # tokens of a live round


def decode(batch: int) -> list[Line]:
    """The bill of V3's step in FP8 for so many conversations of 4,096 tokens."""
    return bill.decode_bill(ModelConfig.named(MODEL), CONTEXT, batch, weights="fp8")


def prefill(prompts: int = 1) -> list[Line]:
    """The same for prompts of 4,096 tokens read at once: heads rebuilt, half of the past seen.

    The output head speaks for the last position alone. Each cached row is counted once; what a
    layer hands to the next through memory is left out.
    """
    cfg = ModelConfig.named(MODEL)
    lines = bill.decode_bill(cfg, CONTEXT, prompts, queries=CONTEXT, weights="fp8")
    seen = prompts * CONTEXT * (CONTEXT + 1) / 2  # pairs of a token and one that it sees
    width = attention.score_width(cfg, "expanded")
    scores = 2 * seen * cfg.num_hidden_layers * cfg.num_attention_heads * width
    less = {"latent cache": lambda _: scores, "output head": lambda flops: flops / CONTEXT}
    return [replace(n, flops=less.get(n.part, lambda flops: flops)(n.flops)) for n in lines]


def reached(lines: Sequence[Line], chip: Chip) -> float:
    """FLOP/s at most: bytes, or FP8 products of weights and all else in BF16, what takes longer."""
    narrow = "fp8" if chip.rates.get("fp8") else "bf16"
    wide = ("latent cache", "output head", "gate")
    compute = sum(n.flops / chip.rate("bf16" if n.part in wide else narrow) for n in lines)
    whole = bill.total(lines)
    return whole.flops / max(compute, whole.bytes / chip.bandwidth())


def prefill_and_decode(chip: str = "h800") -> Figure:
    """V3's prefill and decode under a chip's roofs in BF16 and FP8, as if one chip held it all."""
    made = hardware.chip(chip)
    fig, ax = figure(9.5, 4.4)
    across = np.geomspace(1, 8192, 200)
    for fmt, dash in (("bf16", "-"), ("fp8", "--")):
        if made.rates.get(fmt):
            roof = [roofline.attainable_flops(x, made, fmt) / 1e12 for x in across]
            label = f"{fmt.upper()} roof, ridge at {roofline.ridge(made, fmt):.0f}"
            ax.plot(across, roof, color="#777777", linestyle=dash, label=label)
    shown = [(_decoded(n), decode(n), MEMORY) for n in BATCHES]
    shown += [(_filled(n), prefill(n), COMPUTE) for n in PROMPTS]
    for (label, lines, colour), marker in zip(shown, MARKERS):
        x, y = bill.total(lines).intensity, reached(lines, made) / 1e12
        look = {"color": colour, "markersize": 12, "markeredgecolor": "white", "linestyle": "none"}
        ax.plot([x], [y], marker, label=f"{label}: {_short(x)}", zorder=3, **look)
    plain_log(ax.xaxis)
    plain_log(ax.yaxis)
    many, one = (bill.total(lines).intensity for lines in (prefill(), decode(1)))
    title = f"At {CONTEXT:,} tokens of context a byte of weights and cache serves\n"
    title += f"{many:.0f} operations in prefill, {one:.1f} in decoding"
    across = "FLOP per byte of weights and cache"
    finish(fig, ax, title, across, "TFLOP/s at most", legend=False)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center", frameon=False)
    how = "products of weights at the FP8 rate, attention, gate and output head at BF16's"
    what = f"derived: DeepSeek-V3 in FP8 as if in one {made.title}, all at {CONTEXT:,} tokens"
    left = "activations that go through memory are left out: a real prefill lies further left"
    note(fig, f"{what}; even routing;\n{how};\n{left};\n{_between(many, made)}")
    return fig


def live(seconds: float = 10.0) -> None:
    """Print tokens a second of prefill and of decode on this machine, and their ratio."""
    folder = data_path("checkpoints", "small")
    model = DeepSeekV3.from_pretrained(folder, dtype=torch.float32).eval()
    unseen = data_path("text", "held_out.txt").read_text(encoding="utf-8")
    prompt = Vocabulary(folder, model.cfg.vocab_size).encode(unseen)[:READ]
    _round(model, prompt)  # the first is slower
    end, rounds = time.perf_counter() + seconds, []
    while not rounds or time.perf_counter() < end:
        rounds.append(_round(model, prompt))
    read, step = (statistics.median(times) for times in zip(*rounds))
    fast, slow = len(prompt) / read, 1 / step
    print(f"prefill, {len(prompt)} tokens at once {fast:>10,.0f} tokens/s")
    print(f"decode, one token a step    {slow:>10,.0f} tokens/s")
    what = f"median of {len(rounds)} rounds, {torch.get_num_threads()} threads, float32"
    print(f"prefill is {fast / slow:.1f} times as fast ({what})")
    lines = bill.decode_bill(model.cfg, len(prompt) + 1, weights="float32", cache="float32")
    size = bill.total(lines).bytes
    print(f"a decode step reads {size / 1e6:.1f} MB, {size / step / 1e9:.1f} GB in a second")


@torch.inference_mode()
def _round(model: DeepSeekV3, prompt: list[int]) -> tuple[float, float]:
    """Seconds of one prefill, and of one step of decoding behind it."""
    session = Session(model, 1, len(prompt) + WRITTEN)
    begin = time.perf_counter()
    chosen = session.prefill([prompt]).argmax(-1)  # (1,)
    filled = time.perf_counter()
    for _ in range(WRITTEN):
        chosen = session.step(chosen[None])[0][:, -1].argmax(-1)  # (1,)
    return filled - begin, (time.perf_counter() - filled) / WRITTEN


def _between(found: float, chip: Chip) -> str:
    """Where one prompt's prefill stands among the chip's ridges."""
    formats = [fmt for fmt in ("bf16", "fp8") if chip.rates.get(fmt)]
    ridges = {fmt.upper(): roofline.ridge(chip, fmt) for fmt in formats}
    beyond = [name for name, edge in ridges.items() if found >= edge]
    short = [name for name, edge in ridges.items() if found < edge]
    said = {name: f"{name}'s ridge ({edge:.0f})" for name, edge in ridges.items()}
    who = f"one prompt's prefill ({found:.0f}) is"
    if not beyond or not short:
        return f"{who} {'short of' if short else 'beyond'} {' and '.join(said.values())}"
    return f"{who} beyond {said[beyond[-1]]} and short of {said[short[0]]}"


def _decoded(batch: int) -> str:
    return "decode, batch 1" if batch == 1 else f"decode, batch {batch}"


def _short(intensity: float) -> str:
    return f"{intensity:.1f}" if intensity < 100 else f"{intensity:,.0f}"


def _filled(prompts: int) -> str:
    return f"prefill, {prompts} x {CONTEXT:,}" if prompts > 1 else f"prefill, {CONTEXT:,} tokens"
