"""What a decode step costs: measured here, measured on record, and bounded by the roofline."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure

from dsv3_tutorial import hardware, receipts
from dsv3_tutorial.bench import attention_steps
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import attention as cost
from dsv3_tutorial.cost import memory, roofline
from dsv3_tutorial.learn.figures.style import (
    COMPUTE,
    MEMORY,
    figure,
    finish,
    note,
    plain_log,
    series,
)

FORMS = {
    "expanded": "expanded heads cached",
    "reexpanded": "latent cached, expanded again",
    "absorbed": "latent cached, absorbed",
}
V3 = "deepseek-v3"
LOOK = {
    form: series(index)
    for index, form in enumerate(("expanded", "reexpanded", "absorbed", "transformers sdpa"))
}


def bounded_time(cfg: ModelConfig, chip: hardware.Chip, form: str, **sizes: int) -> float:
    """Roofline seconds of one layer's attention step in one form, weights included."""
    step = cost.decode_step(cfg, form=form, **sizes)
    return roofline.time_s(step.flops, step.bytes, chip)


def decode_times(times: Mapping[str, Mapping[int, float]]) -> Figure:
    """Seconds a step against the context, for each form: {form: {context: seconds}}."""
    fig, ax = figure(8, 4.2)
    for form, by_context in times.items():
        contexts = sorted(by_context)
        values = [by_context[context] * 1e3 for context in contexts]
        ax.plot(contexts, values, label=FORMS.get(form, form), **LOOK[form])
    plain_log(ax.xaxis, 4)
    plain_log(ax.yaxis, subs=(1.0, 2.0, 5.0))
    last = {form: by_context[contexts[-1]] for form, by_context in times.items()}
    ratio = last["reexpanded"] / last["absorbed"]
    title = f"At {contexts[-1]:,} tokens absorbing is {ratio:.0f}x faster than expanding again"
    note(fig, "one layer, 8 heads, latent 128 + 32")
    return finish(fig, ax, title, "cached tokens", "ms a step, one layer")


def where_absorbing_pays(chip_name: str) -> Figure:
    """Two maps for one V3 layer, derived: against caching heads, and against expanding again."""
    cfg, chip = ModelConfig.named(V3), hardware.chip(chip_name)
    fig, (left, right) = figure(11.5, 4.8, columns=2)
    contexts, batches = 2 ** np.arange(6, 18), 2 ** np.arange(0, 9)
    decode = [
        [_gain(cfg, chip, "expanded", context=int(t), batch=int(b)) for t in contexts]
        for b in batches
    ]
    _map(
        fig, left, contexts, batches, np.array(decode), (1, 1.1, 1.25, 1.5, 2, 4, 8, 16, 32, 64, 72)
    )
    fits = _capacities(cfg, chip)
    for tokens, name, style in zip(fits, ("cached heads", "latents"), ("-", "--"), strict=True):
        label = f"{chip.memory_bytes / 1e9:.0f} GB of {name}, all layers"
        left.plot(tokens / batches, batches, color="black", linestyle=style, label=label)
    near, far = (_gain(cfg, chip, "expanded", context=int(t), batch=1) for t in fits)
    title = f"One new token: {near:.0f}x where cached heads fit,\n{far:.0f}x where only latents do"
    finish(fig, left, title, "cached tokens", "batch", legend=False)
    _many_queries(fig, right, cfg, chip)
    for ax in (left, right):
        ax.set_xlim(contexts[0], contexts[-1])
        ax.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=9, frameon=False
        )
    note(
        fig, f"derived: roofline of one V3 attention layer on {chip.title}, BF16, weights included"
    )
    return fig


def _many_queries(fig: Figure, ax: Axes, cfg: ModelConfig, chip: hardware.Chip) -> None:
    """Absorbing against expanding the latent again, at batch 1; more new than cached is no case."""
    contexts, queries = 2 ** np.arange(6, 18), 2 ** np.arange(0, 11)
    gains = np.array(
        [
            [_gain(cfg, chip, "reexpanded", context=int(t), queries=int(s)) for t in contexts]
            for s in queries
        ]
    )
    gains = np.ma.masked_where(queries[:, None] > contexts[None, :], gains)
    _map(fig, ax, contexts, queries, gains, (0.4, 0.5, 0.75, 0.9, 1, 1.1, 1.5, 2, 4, 8, 16, 32, 64))
    crossing = cost.crossover_queries(cfg)
    label = f"arithmetic alone: {crossing:.0f}"
    ax.axhline(crossing, color="black", linestyle=":", label=label)
    title = f"Many new tokens:\nabsorbing loses above about {crossing:.0f}"
    finish(fig, ax, title, "cached tokens", "new tokens at once", legend=False)


def _gain(cfg: ModelConfig, chip: hardware.Chip, form: str, **sizes: int) -> float:
    """How many times faster absorbing is than `form`, by the roofline."""
    return bounded_time(cfg, chip, form, **sizes) / bounded_time(cfg, chip, "absorbed", **sizes)


def _capacities(cfg: ModelConfig, chip: hardware.Chip) -> tuple[float, float]:
    """How many tokens fill a chip's whole memory: as cached heads, and as latents."""
    whole = memory.kv_cache_bytes_expanded(cfg), memory.kv_cache_bytes_per_token(cfg)
    return tuple(chip.memory_bytes / each for each in whole)


def _map(
    fig: Figure, ax: Axes, across: np.ndarray, up: np.ndarray, gains: np.ndarray, at: tuple
) -> None:
    """Filled contours of the gain, white at 1: orange where absorbing wins, violet where not."""
    levels = np.log2(at)
    colours = CenteredNorm(0, halfrange=np.abs(levels).max())
    drawn = ax.contourf(across, up, np.ma.log2(gains), levels=levels, cmap="PuOr_r", norm=colours)
    bar = fig.colorbar(drawn, ax=ax, ticks=levels)
    bar.ax.set_yticklabels([f"{gain:g}" for gain in at])
    bar.set_label("times faster, absorbed", fontsize=10)
    plain_log(ax.xaxis, 4)
    plain_log(ax.yaxis, 4)


def measured_crossovers() -> None:
    """Print from how many new tokens expanding again was faster on the recorded CPU."""
    for r in _recorded():
        if r.what == "crossover" and r.unit == "new tokens":
            cfg = {"small": attention_steps.SMALL, "v3-like": attention_steps.V3_LIKE}
            law = cost.crossover_queries(cfg[r.shapes["config"]])
            low, high = r.spread["min"], r.spread["max"]
            print(
                f"{r.shapes['config']:8} expanding wins beyond {r.value:.0f} new tokens "
                f"(measured between {low:.0f} and {high:.0f}); arithmetic alone says {law:.0f}"
            )


def absorption_cost(rank: int, head_dim: int, heads: int) -> Figure:
    """Arithmetic and bytes per cached token, three forms, at sizes that the learner chooses."""
    cfg = _sized(rank, head_dim, heads)
    forms = list(FORMS)
    flops = [cost.decode_step(cfg, 1, form=form).cache_flops for form in forms]
    moved = [2 * cost.cached_elements(cfg, form) for form in forms]
    fig, (left, right) = figure(10.5, 3.6, columns=2)
    for ax, values, colour in ((left, flops, COMPUTE), (right, moved, MEMORY)):
        bars = ax.bar(
            [FORMS[form].replace(", ", ",\n").replace(" heads ", "\nheads ") for form in forms],
            values,
            color=colour,
        )
        ax.bar_label(bars, fmt="{:,.0f}", fontsize=10)
        ax.set_yscale("log")
        ax.set_ylim(min(values) / 3, max(values) * 4)
    finish(fig, left, "Arithmetic", "", "FLOP per cached token and layer")
    finish(fig, right, "Memory", "", "bytes per cached token and layer")
    return fig


def absorption_cost_in_words(rank: int, head_dim: int, heads: int) -> str:
    """The same as ratios, with the number of new tokens from which absorbing loses."""
    cfg = _sized(rank, head_dim, heads)
    more = cost.score_width(cfg, "absorbed") / cost.score_width(cfg, "expanded")
    fewer = cost.cached_elements(cfg, "expanded") / cost.cached_elements(cfg, "absorbed")
    crossing = cost.crossover_queries(cfg)
    loses = "never" if crossing == float("inf") else f"from {crossing:,.0f} new tokens at once"
    return (
        f"Absorbed does {more:.1f}x the arithmetic of cached heads and reads {fewer:.0f} times "
        f"fewer bytes. Against expanding again it loses {loses}."
    )


def _sized(rank: int, head_dim: int, heads: int) -> ModelConfig:
    """V3 with another latent, another head width (its rotary part half of it), other heads."""
    return replace(
        ModelConfig.named(V3), kv_lora_rank=rank, qk_nope_head_dim=head_dim, v_head_dim=head_dim,
        qk_rope_head_dim=head_dim // 2, num_attention_heads=heads, num_key_value_heads=heads,
    )  # fmt: skip


def decode_ratios() -> None:
    """Print how many times absorbed's time per cached token the other recorded forms take."""
    slopes = [r for r in _recorded() if r.what == "time per cached token"]
    peers = ("expanded", "reexpanded", "transformers eager", "transformers sdpa")
    head = "".join(f"{peer:>20}" for peer in peers)
    print(f"{'x absorbed, per token':24}{head}{'expanded, bytes':>18}")
    for config, batch in dict.fromkeys((r.shapes["config"], r.shapes["batch"]) for r in slopes):
        here = {
            r.shapes["form"]: r.value
            for r in slopes
            if (r.shapes["config"], r.shapes["batch"]) == (config, batch)
        }
        ratios = "".join(f"{here[peer] / here['absorbed']:>19.1f}x" for peer in peers)
        held = {
            r.shapes["form"]: r.shapes["cache_bytes_per_token"]
            for r in slopes
            if r.shapes["config"] == config
        }
        print(
            f"{f'{config}, batch {batch}':24}{ratios}{held['expanded'] / held['absorbed']:>17.1f}x"
        )


def decode_recorded() -> Figure:
    """The recorded CPU decode steps at batch 1, at both sizes, with transformers beside ours."""
    steps = [r for r in _recorded() if r.what == "decode step" and r.shapes["batch"] == 1]
    fig, panels = figure(11.5, 4.4, columns=2)
    for ax, config in zip(panels, ("small", "v3-like"), strict=True):
        here = [r for r in steps if r.shapes["config"] == config and r.shapes["context"] >= 1024]
        for form in LOOK:
            mine = [r for r in here if r.shapes["form"] == form]
            line = sorted((r.shapes["context"], r.value * 1e3) for r in mine)
            ax.plot(*zip(*line, strict=True), label=FORMS.get(form, form), **LOOK[form])
        plain_log(ax.xaxis, 2)
        plain_log(ax.yaxis)
        at = {r.shapes["form"]: r.value for r in here if r.shapes["context"] == 8192}
        ratio = at["transformers sdpa"] / at["absorbed"]
        title = f"{config}: absorbed {ratio:.0f}x faster than transformers"
        finish(fig, ax, title, "cached tokens", "ms a step, one layer", legend=config == "small")
    how = "ratios at 8,192 tokens, whole step, batch 1; process CPU time, float32"
    note(fig, f"{how}; {receipts.caption(steps)}")
    return fig


def _recorded() -> list[receipts.Receipt]:
    return receipts.latest("attention", device_kind="cpu")
