"""Lesson 0: the memory wall, and the roofline of a chip, published or measured."""

import numpy as np
from matplotlib.figure import Figure

from dsv3_tutorial import hardware
from dsv3_tutorial.cost import roofline as cost
from dsv3_tutorial.learn.figures.style import (
    COMPUTE,
    IDLE,
    INK,
    MEMORY,
    figure,
    finish,
    note,
    plain_log,
)

DEMAND, CAPACITY = 11.0, 1.5  # a year: grows by over 1000 %, by under 50 % (ISCA 2025, 2.1)
WORK = {"decode, batch 1": 1, "decode, batch 32": 32, "prefill, 4,096 tokens": 4096}  # tokens
BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


def memory_wall(years: int = 3) -> Figure:
    """The two rates of growth that the paper quotes, from a common start."""
    fig, ax = figure(8, 4.2)
    at = np.linspace(0, years, 50)
    demand, capacity = DEMAND**at, CAPACITY**at
    ax.plot(at, demand, color=MEMORY, linewidth=2.5, label="memory that models ask for, x11 a year")
    ax.plot(at, capacity, color=COMPUTE, linewidth=2.5, label="memory of one GPU, x1.5 a year")
    ax.fill_between(at, capacity, demand, color=IDLE, alpha=0.35)
    plain_log(ax.yaxis)
    ax.set_xticks(range(years + 1))
    gap = demand[-1] / capacity[-1]
    title = f"After {years} years of these rates the gap is {gap:,.0f}x"
    finish(fig, ax, title, "years", "size, relative to year 0")
    note(fig, "quoted rates: over 1000 % and under 50 % a year, ISCA 2025 (arXiv 2505.09343), 2.1")
    return fig


def roofline(chip: hardware.Chip, fmt: str = "bf16") -> Figure:
    """What a chip can reach against FLOP per byte, and where three kinds of work stand on it."""
    fig, ax = figure(8, 4.4)
    ridge = cost.ridge(chip, fmt)
    across = np.geomspace(0.25, 16384, 400)
    reach = np.array([cost.attainable_flops(x, chip, fmt) for x in across])
    unit, scale = ("TFLOP/s", 1e12) if chip.rate(fmt) > 5e12 else ("GFLOP/s", 1e9)
    slope = across <= ridge
    ax.plot(across[slope], reach[slope] / scale, color=MEMORY, linewidth=3, label="memory decides")
    ax.plot(
        across[~slope],
        reach[~slope] / scale,
        color=COMPUTE,
        linewidth=3,
        label="arithmetic decides",
    )
    for name, tokens in WORK.items():
        flops_per_byte = 2 * tokens / BYTES[fmt]  # a weight is read once, and serves every token
        reached = cost.attainable_flops(flops_per_byte, chip, fmt) / scale
        share = reached * scale / chip.rate(fmt)
        ax.plot(flops_per_byte, reached, "o", color=INK, markersize=8)
        text = f"{name}\n{share:.1%} of peak"
        place = {"xytext": (6, -34), "textcoords": "offset points", "fontsize": 10}
        ax.annotate(text, (flops_per_byte, reached), **place)
    plain_log(ax.xaxis, 4)
    plain_log(ax.yaxis)
    ax.set_ylim(reach.min() / scale / 3, reach.max() / scale * 2)
    ax.set_xlim(across[0], across[-1] * 8)
    title = f"{chip.title}: below {ridge:.0f} FLOP per byte, memory decides"
    return finish(fig, ax, title, "FLOP per byte moved", f"{fmt.upper()}, {unit}")


def roofline_by_batch(chip_name: str, batch: int) -> Figure:
    """One point on a published chip's roofline: a weight read once serves `batch` tokens."""
    chip = hardware.chip(chip_name)
    fig, ax = figure(8, 4.0)
    across = np.geomspace(0.5, 8192, 200)
    reach = [cost.attainable_flops(x, chip) / 1e12 for x in across]
    ax.plot(across, reach, color=INK, linewidth=2)
    flops_per_byte = float(batch)  # 2 FLOP per weight and token over 2 bytes per weight
    reached = cost.attainable_flops(flops_per_byte, chip) / 1e12
    bound = "memory" if flops_per_byte < cost.ridge(chip) else "arithmetic"
    colour = MEMORY if bound == "memory" else COMPUTE
    ax.plot(flops_per_byte, reached, "o", color=colour, markersize=13)
    ax.axvline(cost.ridge(chip), color=IDLE, linestyle="--")
    plain_log(ax.xaxis, 4)
    plain_log(ax.yaxis)
    share = reached * 1e12 / chip.rate("bf16")
    title = f"Batch {batch}: {bound} decides, {share:.1%} of the arithmetic is used"
    return finish(fig, ax, title, "FLOP per byte of weights", "BF16, TFLOP/s")


def roofline_by_batch_in_words(chip_name: str, batch: int) -> str:
    """The same in a sentence."""
    chip = hardware.chip(chip_name)
    share = cost.attainable_flops(float(batch), chip) / chip.rate("bf16")
    return (
        f"{chip.title}: at batch {batch} each weight of 2 bytes is used for {2 * batch} FLOP. "
        f"That reaches {share:.1%} of the peak; the ridge lies at {cost.ridge(chip):.0f} tokens."
    )
