"""What drafting gains by bytes and arithmetic, by batch: a mixture of experts, a dense model."""

from matplotlib.figure import Figure

from dsv3_tutorial import hardware
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import speculation
from dsv3_tutorial.learn.figures.speculation_measured import measured as measured
from dsv3_tutorial.learn.figures.style import (
    COMPUTE,
    INK,
    SERIES,
    figure,
    finish,
    note,
)

BATCHES = tuple(2**i for i in range(13))
MODELS = {
    "deepseek-v3": ("DeepSeek-V3, 256 experts", SERIES[3], "s"),
    "llama-3.1-405b": ("Llama 3.1 405B, dense", COMPUTE, "o"),
}


def gain(
    model: str,
    batch: int,
    acceptance: float = 0.85,
    drafts: int = 1,
    chip: str = "h800",
    context: int = 0,
) -> speculation.Gain:
    """By the longer of bytes and arithmetic, with even routing and drafts for nothing.

    context: cached tokens of each sequence, in BF16; 0: weights alone. Other routing may gain more:
    as much as a pass gives tokens, where those share all experts and memory binds.
    """
    how = {"context": context, "drafted": False, "weights": "fp8", "cache": "bf16"}
    cfg = ModelConfig.named(model)
    return speculation.gain(cfg, hardware.chip(chip), batch, acceptance, drafts, **how)


def at_batch_one(acceptance: float = 0.85) -> float:
    """V3's gain at batch 1 and even routing, where a second token brings experts of its own."""
    return gain("deepseek-v3", 1, acceptance).value


def bounds(
    acceptance: float = 0.85, drafts: int = 1, chip: str = "h800", context: int = 0
) -> Figure:
    """The speed-up by bytes and arithmetic against the batch, for both models."""
    fig, ax = figure(9, 4.2)
    for model, (label, colour, marker) in MODELS.items():
        values = [gain(model, n, acceptance, drafts, chip, context).value for n in BATCHES]
        ax.plot(BATCHES, values, color=colour, marker=marker, label=label)
    ax.axhline(1, color=INK, linewidth=1)
    ax.set_xscale("log", base=2)
    ax.set_xticks(BATCHES[::2], [f"{batch:,}" for batch in BATCHES[::2]])
    ax.set_ylim(0, speculation.tokens_per_pass(acceptance, drafts) * 1.1)
    across, up = "sequences in a step", "times faster\n(bytes and arithmetic alone)"
    finish(fig, ax, _title(acceptance, drafts, chip, context), across, up, legend=False)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center", frameon=False)
    how = f"weights in FP8, arithmetic in BF16, {hardware.chip(chip).title}"
    what = f"{acceptance:.0%} accepted, drafts: {drafts}"
    cache = f"a BF16 cache of {context:,} tokens each" if context else "no cache"
    note(fig, f"derived: {how}; {what};\nassumed: drafts cost nothing, even routing, {cache}")
    return fig


def bounds_in_words(
    acceptance: float = 0.85, drafts: int = 1, chip: str = "h800", context: int = 0
) -> str:
    """The gain at three batches and what binds the longer pass, for both models."""
    tokens = speculation.tokens_per_pass(acceptance, drafts)
    said = [
        f"A pass gives {tokens:.2f} tokens; that is the gain where memory binds and those tokens "
        "share all experts. With even routing instead:"
    ]
    for model, (label, *_) in MODELS.items():
        found = {n: gain(model, n, acceptance, drafts, chip, context) for n in (1, 32, 1024)}
        parts = [f"{n:,}: {one.value:.2f}x ({one.verify})" for n, one in found.items()]
        said.append(f"{label}, at batch {', '.join(parts)}.")
    return " ".join(said)


def _title(acceptance: float, drafts: int, chip: str, context: int) -> str:
    alone, many = (
        gain("deepseek-v3", n, acceptance, drafts, chip, context).value for n in (1, 128)
    )
    long = f" and {context:,} cached tokens" if context else ""
    gap = "\n" if context else " "  # the longer title takes two lines
    subject = "a draft is" if drafts == 1 else f"{drafts} drafts are"
    head = f"With even routing{long} {subject} worth{gap}"
    return f"{head}{alone:.2f}x to V3 at batch 1, and {many:.2f}x at 128"
