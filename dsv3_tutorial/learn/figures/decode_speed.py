"""What a decode step costs: measured here, measured on record, and bounded by the roofline."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from dsv3_tutorial import hardware, receipts
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import attention as cost
from dsv3_tutorial.cost import roofline
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


def bounded_time(cfg: ModelConfig, chip: hardware.Chip, form: str, **sizes: int) -> float:
    """Roofline seconds of one layer's attention step in one form, weights included."""
    step = cost.decode_step(cfg, form=form, **sizes)
    return roofline.time_s(step.flops, step.bytes, chip)


def decode_times(times: Mapping[str, Mapping[int, float]]) -> Figure:
    """Seconds a step against the context, for each form: {form: {context: seconds}}."""
    fig, ax = figure(8, 4.2)
    for index, (form, by_context) in enumerate(times.items()):
        contexts = sorted(by_context)
        values = [by_context[context] * 1e3 for context in contexts]
        ax.plot(contexts, values, label=FORMS.get(form, form), **series(index))
    plain_log(ax.xaxis, 4)
    plain_log(ax.yaxis)
    last = {form: by_context[contexts[-1]] for form, by_context in times.items()}
    ratio = last["reexpanded"] / last["absorbed"]
    title = f"At {contexts[-1]:,} tokens absorbing is {ratio:.0f}x faster than expanding again"
    return finish(fig, ax, title, "cached tokens", "ms a step, one layer")


def where_absorbing_pays(chip_name: str) -> Figure:
    """Two maps for one V3 layer, derived: against caching heads, and against expanding again."""
    cfg, chip = ModelConfig.named(V3), hardware.chip(chip_name)
    contexts, batches = 2 ** np.arange(6, 18), 2 ** np.arange(0, 9)
    queries = 2 ** np.arange(0, 11)
    fig, (left, right) = figure(11.5, 4.6, columns=2)

    def gain(form: str, **sizes: int) -> float:
        absorbed = bounded_time(cfg, chip, "absorbed", **sizes)
        return bounded_time(cfg, chip, form, **sizes) / absorbed

    decode = [[gain("expanded", context=int(t), batch=int(b)) for t in contexts] for b in batches]
    many = [[gain("reexpanded", context=int(t), queries=int(s)) for t in contexts] for s in queries]
    _map(fig, left, contexts, batches, np.array(decode))
    _map(fig, right, contexts, queries, np.array(many))
    per_token = cost.cached_elements(cfg, "absorbed")
    line = cost.decode_step(cfg, context=1).weight_bytes / (2 * per_token) / batches
    left.plot(line, batches, color="black", linestyle="--", label="cache = weights, in bytes")
    crossing = cost.crossover_queries(cfg)
    right.axhline(
        crossing, color="black", linestyle="--", label=f"arithmetic alone: {crossing:.0f}"
    )
    for ax in (left, right):
        ax.set_xlim(contexts[0], contexts[-1])
        ax.legend(loc="upper left", fontsize=10)
    best = np.max(decode)
    finish(
        fig,
        left,
        f"One new token: up to {best:.0f}x over cached heads",
        "cached tokens",
        "batch",
        legend=False,
    )
    finish(
        fig,
        right,
        f"Many new tokens: absorbing loses from {crossing:.0f}",
        "cached tokens",
        "new tokens at once",
        legend=False,
    )
    note(fig, f"derived: roofline of one V3 attention layer on {chip.title}, BF16")
    return fig


def _map(fig: Figure, ax, across: np.ndarray, up: np.ndarray, gains: np.ndarray) -> None:
    """Filled contours of log2 gain, white at 1: orange where absorbing wins, violet where not."""
    limit = np.abs(np.log2(gains)).max()
    levels = np.linspace(-limit, limit, 15)
    drawn = ax.contourf(across, up, np.log2(gains), levels=levels, cmap="PuOr_r")
    bar = fig.colorbar(drawn, ax=ax, ticks=[-2, -1, 0, 1, 2, 3, 4, 5, 6])
    bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4", "8", "16", "32", "64"])
    bar.set_label("times faster, absorbed", fontsize=10)
    bar.ax.set_ylim(np.log2(gains).min(), np.log2(gains).max())
    plain_log(ax.xaxis, 4)
    plain_log(ax.yaxis, 4)


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
    print(f"{'x absorbed, per token':24}" + "".join(f"{peer:>20}" for peer in peers))
    for config, batch in dict.fromkeys((r.shapes["config"], r.shapes["batch"]) for r in slopes):
        here = {
            r.shapes["form"]: r.value
            for r in slopes
            if (r.shapes["config"], r.shapes["batch"]) == (config, batch)
        }
        ratios = "".join(f"{here[peer] / here['absorbed']:>19.1f}x" for peer in peers)
        print(f"{f'{config}, batch {batch}':24}{ratios}")


def decode_recorded() -> Figure:
    """The recorded CPU decode steps at batch 1, at both sizes, with transformers beside ours."""
    steps = [r for r in _recorded() if r.what == "decode step" and r.shapes["batch"] == 1]
    forms = ("transformers sdpa", *FORMS)
    fig, panels = figure(11.5, 4.4, columns=2)
    for ax, config in zip(panels, ("small", "v3-like"), strict=True):
        here = [r for r in steps if r.shapes["config"] == config and r.shapes["context"] >= 1024]
        for index, form in enumerate(forms):
            line = sorted(
                (r.shapes["context"], r.value * 1e3) for r in here if r.shapes["form"] == form
            )
            ax.plot(*zip(*line, strict=True), label=FORMS.get(form, form), **series(index))
        plain_log(ax.xaxis, 2)
        plain_log(ax.yaxis)
        at = {r.shapes["form"]: r.value for r in here if r.shapes["context"] == 8192}
        ratio = at["transformers sdpa"] / at["absorbed"]
        title = f"{config}: {ratio:.0f}x faster at 8,192 tokens"
        finish(fig, ax, title, "cached tokens", "ms a step, one layer", legend=config == "small")
    note(fig, f"process CPU time, float32; {receipts.caption(steps)}")
    return fig


def _recorded() -> list[receipts.Receipt]:
    return receipts.latest("attention", device_kind="cpu")
