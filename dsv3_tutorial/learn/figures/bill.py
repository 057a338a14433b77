"""One token's bill: what a decode step of DeepSeek-V3 reads, and how a batch shares it."""

from matplotlib.figure import Figure

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import bill
from dsv3_tutorial.cost.bill import Line
from dsv3_tutorial.learn.figures.style import (
    INK,
    MEMORY,
    SERIES,
    figure,
    finish,
    note,
    plain_log,
)

CONTEXT = 32768
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
MARKED = (1, 32, 256)
EXPERTS, OTHERS = SERIES[3], SERIES[4]  # as in every figure of lesson 5
GROUPS = {
    "routed experts": (("routed experts",), EXPERTS, "s"),
    "latent cache": (("latent cache",), MEMORY, "^"),
    "all other weights": (
        ("attention weights", "dense MLP", "gate", "shared experts", "norms", "output head"),
        OTHERS,
        "o",
    ),
}


def lines(batch: int = 1, context: int = CONTEXT, weights: str = "fp8") -> list[Line]:
    """The bill of V3's step, cache in BF16."""
    return bill.decode_bill(ModelConfig.named("deepseek-v3"), context, batch, weights=weights)


def receipt(batch: int = 1, context: int = CONTEXT, weights: str = "fp8") -> None:
    """Print the bill of V3's step as a till does."""
    of = "one conversation" if batch == 1 else f"{batch} conversations"
    title = f"DeepSeek-V3, one step of {of}, {context:,} tokens{'' if batch == 1 else ' each'}"
    print(bill.receipt(lines(batch, context, weights), title, tokens=batch))


def largest(batch: int = 1) -> str:
    """The part with the most bytes."""
    return bill.largest(lines(batch)).part


def expert_bytes_fall(batch: int = 32) -> float:
    """How many times fewer bytes of experts a token reads in a batch than alone."""
    alone, together = (_per_token(n)["routed experts"] for n in (1, batch))
    return alone / together


def per_token() -> Figure:
    """Bytes read for each token against the batch: the weights that all meet, experts, cache."""
    fig, ax = figure(8.5, 4.4)
    for name, (_, colour, marker) in GROUPS.items():
        sizes = [_per_token(batch)[name] / 1e9 for batch in BATCHES]
        ax.plot(BATCHES, sizes, color=colour, marker=marker, label=name)
    ax.set_xscale("log", base=2)
    ax.set_xticks(BATCHES, [f"{batch:,}" for batch in BATCHES])
    plain_log(ax.yaxis)
    for batch in MARKED:
        size = _per_token(batch)["routed experts"] / 1e9
        look = {"textcoords": "offset points", "ha": "center", "fontsize": 11, "color": INK}
        ax.annotate(f"{size:.3g}", (batch, size), (0, 9), **look)
    ax.set_ylim(0.01, 60)
    title = (
        f"From 1 to 32 conversations a token's expert bytes fall {expert_bytes_fall():.2f} times"
    )
    finish(fig, ax, title, "conversations in a step", "GB read for each token", legend=False)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center", frameon=False)
    note(
        fig, f"derived: DeepSeek-V3, {CONTEXT:,} tokens each, weights FP8, cache BF16, even routing"
    )
    return fig


def _per_token(batch: int) -> dict[str, float]:
    sizes = {line.part: line.bytes / batch for line in lines(batch)}
    return {name: sum(sizes[part] for part in parts) for name, (parts, *_) in GROUPS.items()}
