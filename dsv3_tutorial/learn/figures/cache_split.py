"""What tensor parallelism does to a KV cache: GQA's is shared out, a latent is copied."""

from matplotlib.figure import Figure

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost.sharding import sharded_cache_bytes
from dsv3_tutorial.learn.figures.style import figure, finish, note, plain_log, series

MODELS = {
    "llama-3.1-405b": "LLaMA-3.1 405B, GQA",
    "qwen2.5-72b": "Qwen2.5 72B, GQA",
    "deepseek-v3": "DeepSeek-V3, MLA",
}
DEGREES = (1, 2, 4, 8, 16)


def kilobytes(name: str, tp: int) -> float:
    """KB of cache that one token costs each of `tp` GPUs, in BF16."""
    return sharded_cache_bytes(ModelConfig.named(name), tokens=1, tp=tp, dp=1) / 1e3


def crossing(name: str) -> int | None:
    """The first degree at which a model's share is smaller than V3's whole latent; None: never."""
    ours = kilobytes("deepseek-v3", 1)
    return next((tp for tp in DEGREES if kilobytes(name, tp) < ours), None)


def cache_per_gpu() -> Figure:
    """KB per token and GPU against the degree of tensor parallelism, for three models."""
    fig, ax = figure(8, 4.2)
    for index, (name, title) in enumerate(MODELS.items()):
        values = [kilobytes(name, tp) for tp in DEGREES]
        ax.plot(DEGREES, values, linewidth=2, label=title, **series(index))
        for tp, value, rise in (
            (1, values[0], 7),
            (DEGREES[-1], values[-1], -16 + 24 * (index > 1)),
        ):
            at = {"textcoords": "offset points", "ha": "center", "fontsize": 10}
            ax.annotate(f"{value:.0f}", (tp, value), (0, rise), **at)
    plain_log(ax.xaxis, base=2)
    plain_log(ax.yaxis, subs=(1.0, 2.0, 5.0))
    ax.set_ylim(25, 800)
    ax.set_xticks(DEGREES)
    degree = max(crossing(name) for name in list(MODELS)[:2])
    least, most = sorted(kilobytes(name, degree) for name in list(MODELS)[:2])
    note(fig, "derived: BF16, key-value heads shared out, at least one each")
    title = (
        f"Split {degree} ways the GQA models keep {most:.0f} and {least:.0f} KB a GPU,\n"
        f"V3 {kilobytes('deepseek-v3', degree):.0f}: its latent never splits"
    )
    return finish(fig, ax, title, "tensor parallel degree, GPUs", "cache per token and GPU, KB")
