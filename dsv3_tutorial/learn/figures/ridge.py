"""What attention over the latent does with a byte of cache, against what a chip can do with one."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_tutorial import hardware
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import attention, roofline, storage
from dsv3_tutorial.learn.figures.style import COMPUTE, INK, MEMORY, figure, finish, note, plain_log

HEADS = (8, 16, 32, 64, 128)
CACHES = {"bf16": ("BF16 latent", "o", "-"), "fp8": ("FP8 latent", "s", "--")}


def intensity(heads: int, cache: str = "bf16", queries: int = 1) -> float:
    """FLOP per byte of cache with V3's latent, for so many heads and queries that share a read."""
    cfg = ModelConfig.named("deepseek-v3")
    flops = 2 * heads * queries * attention.score_width(cfg, "absorbed")
    return flops / storage.cache_row(cfg, cache)


def gain(heads: int, chip: str = "h100-sxm", queries: int = 1) -> float:
    """The most that an FP8 latent speeds the core of attention up: until arithmetic binds."""
    edge = roofline.ridge(hardware.chip(chip))
    wide, narrow = (intensity(heads, cache, queries) for cache in CACHES)
    return min(narrow / wide, max(1.0, edge / wide))


def heads(chip: str = "h100-sxm") -> Figure:
    """FLOP per byte against heads, in both formats, and the ridge of the chip."""
    fig, ax = figure(8.5, 4.2)
    _lines(ax, 1)
    for cache in CACHES:
        _number(ax, HEADS[-1], intensity(HEADS[-1], cache))
    few, many = gain(16, chip), gain(HEADS[-1], chip)
    title = f"With V3's 128 heads an FP8 latent buys {many:.2f}x, with 16 heads {few:.2f}x"
    return _finished(fig, ax, title, chip)


def point(
    heads: int = 128, cache: str = "bf16", queries: int = 1, chip: str = "h100-sxm"
) -> Figure:
    """The same for a number of tokens verified together, with one setting ringed."""
    fig, ax = figure(8.5, 4.2)
    _lines(ax, queries)
    found = intensity(heads, cache, queries)
    ring = {"marker": "o", "markersize": 18, "markerfacecolor": "none", "markeredgewidth": 2}
    ax.plot([heads], [found], color=INK, linestyle="none", label="this setting", **ring)
    _number(ax, heads, found)
    return _finished(fig, ax, _finding(heads, cache, queries, chip), chip)


def ridge_in_words(
    heads: int = 128, cache: str = "bf16", queries: int = 1, chip: str = "h100-sxm"
) -> str:
    """Where the setting stands against the ridge, and what an FP8 latent buys there at most."""
    made = hardware.chip(chip)
    wide, narrow = (intensity(heads, cache) for cache in CACHES)
    return (
        f"{made.title}: {_finding(heads, cache, queries, chip)} (ridge: "
        f"{roofline.ridge(made):.0f}). Against BF16 an FP8 latent has "
        f"{narrow / wide:.2f} times fewer bytes and makes the core of attention at most "
        f"{gain(heads, chip, queries):.2f} times as fast here."
    )


def _finding(heads: int, cache: str, queries: int, chip: str) -> str:
    edge, found = roofline.ridge(hardware.chip(chip)), intensity(heads, cache, queries)
    what = "arithmetic" if found >= edge else "memory"
    tokens = "1 token" if queries == 1 else f"{queries} tokens"
    who = f"{heads} heads, {tokens}, {CACHES[cache][0]}"
    return f"{who}: {found:.0f} FLOP a byte, {what} binds"


def _lines(ax: Axes, queries: int) -> None:
    for cache, (label, marker, dash) in CACHES.items():
        values = [intensity(n, cache, queries) for n in HEADS]
        ax.plot(HEADS, values, color=MEMORY, marker=marker, label=label, linestyle=dash)


def _number(ax: Axes, heads: int, value: float) -> None:
    look = {"textcoords": "offset points", "va": "center", "fontsize": 11, "color": INK}
    ax.annotate(f"{value:.0f}", (heads, value), (15, 0), **look)


def _finished(fig: Figure, ax: Axes, title: str, chip: str) -> Figure:
    """The chip's ridge, the axes and the words."""
    made = hardware.chip(chip)
    edge = roofline.ridge(made)
    ax.axhspan(edge, 4000, color=COMPUTE, alpha=0.08, linewidth=0)
    ax.axhline(edge, color=COMPUTE, linewidth=1.4)
    ax.text(7.5, edge * 1.12, f"ridge: {edge:.0f} FLOP a byte; above it arithmetic binds")
    ax.set_xscale("log", base=2)
    ax.set_xticks(HEADS, [str(n) for n in HEADS])
    ax.set_xlim(7, 215)
    plain_log(ax.yaxis)
    ax.set_ylim(9, 3000)
    finish(fig, ax, title, "heads that share the latent", "FLOP a byte of cache", legend=False)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center", frameon=False)
    what = "V3's latent of 512 + 64 numbers, core of attention alone"
    note(fig, f"derived: {what}; {made.title}, BF16 rate")
    return fig
