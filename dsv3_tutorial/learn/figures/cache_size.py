"""How large a KV cache is: against the context, and against what a GPU holds."""

from matplotlib.figure import Figure

from dsv3_tutorial import hardware
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import memory
from dsv3_tutorial.learn.figures.style import IDLE, INK, MEMORY, figure, finish, plain_log, series

PRESETS = {
    "Llama 3.1 405B (GQA)": "llama-3.1-405b",
    "Qwen2.5 72B (GQA)": "qwen2.5-72b",
    "DeepSeek-V3 (MLA)": "deepseek-v3",
    "DeepSeek-V2 (MLA)": "deepseek-v2",
    "Moonlight 16B (MLA)": "moonlight-16b-a3b",
    "DeepSeek-V2-Lite (MLA)": "deepseek-v2-lite",
}
CONTEXTS = (4096, 16384, 65536, 131072)
GPUS = ("rtx-4090", "h800", "h200", "b200")
GB = 1e9
AROUND = ("deepseek-v3", "moonlight-16b-a3b")


def cache_against_context() -> Figure:
    """One conversation's cache against its length, and two GPUs' whole memory."""
    fig, ax = figure(8.5, 4.6)
    for index, (title, name) in enumerate(PRESETS.items()):
        cfg = ModelConfig.named(name)
        sizes = [memory.kv_cache_bytes(cfg, context) / GB for context in CONTEXTS]
        # V3 and V2, Moonlight and V2-Lite lie on each other: the first is hollow, around the second
        hollow = {"markersize": 12, "markerfacecolor": "none"} if name in AROUND else {}
        ax.plot(CONTEXTS, sizes, label=title, **series(index), **hollow)
    for gpu in ("rtx-4090", "h800"):
        chip = hardware.chip(gpu)
        ax.axhline(chip.memory_bytes / GB, color=INK, linestyle=":", linewidth=1.2)
        text = f"{chip.title}: {chip.memory_bytes / GB:.0f} GB in all"
        ax.text(4300, chip.memory_bytes / GB * 1.12, text, fontsize=10, color=INK)
    ax.set_xscale("log", base=2)
    plain_log(ax.yaxis)
    ax.set_ylim(0.1, 400)
    ax.set_xticks(CONTEXTS, [f"{context:,}" for context in CONTEXTS])
    ours, theirs = (ModelConfig.named(n) for n in ("deepseek-v3", "llama-3.1-405b"))
    tokens = CONTEXTS[-1]
    small, large = (memory.kv_cache_bytes(cfg, tokens) / GB for cfg in (ours, theirs))
    title = f"At {tokens:,} tokens V3 caches {small:.1f} GB, Llama 3.1 405B {large:.1f} GB"
    finish(fig, ax, title, "tokens in one conversation", "KV cache, GB (BF16)", legend=False)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return fig


def _needed(model: str, context: int, batch: int, bytes_per_number: float) -> float:
    cfg = ModelConfig.named(PRESETS[model])
    return memory.kv_cache_bytes(cfg, context, batch, bytes_per_number)


def cache_on_gpus(model: str, context: int, batch: int, bytes_per_number: float) -> Figure:
    """One setting's cache, as a bar, against what four GPUs hold in all."""
    needed = _needed(model, context, batch, bytes_per_number)
    chips = [hardware.chip(name) for name in GPUS]
    fig, ax = figure(8, 3.2)
    rows = [f"cache of {batch} x {context:,}"] + [chip.title for chip in chips]
    sizes = [needed / GB] + [chip.memory_bytes / GB for chip in chips]
    bars = ax.barh(rows, sizes, color=[MEMORY] + [IDLE] * len(chips))
    for bar, chip in zip(bars[1:], chips, strict=True):
        bar.set_hatch("" if chip.memory_bytes > needed else "//")
    ax.bar_label(bars, fmt="%.3g GB", padding=4, fontsize=10)
    ax.axvline(needed / GB, color=MEMORY, linestyle=":")
    ax.set_xlim(0, max(sizes) * 1.2)
    ax.invert_yaxis()
    fits = sum(chip.memory_bytes > needed for chip in chips)
    unit = "GB" if fits == len(chips) else "GB (hatched: too small)"
    return finish(fig, ax, f"{model}: {fits} of {len(chips)} GPUs could hold it", unit)


def cache_on_gpus_in_words(model: str, context: int, batch: int, bytes_per_number: float) -> str:
    """The same in a sentence, with how many H800s the cache alone would fill."""
    needed = _needed(model, context, batch, bytes_per_number)
    fill = needed / hardware.chip("h800").memory_bytes
    return (
        f"{batch} conversation{'s' if batch > 1 else ''} of {context:,} tokens with {model} take "
        f"{needed / GB:,.1f} GB: {fill:.2g} times an H800's memory, before any weight."
    )
