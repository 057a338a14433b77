"""What sparse activation buys: parameters held against parameters met, and FLOP against size."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_tutorial import paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import flops, params
from dsv3_tutorial.learn.figures.style import (
    IDLE,
    INK,
    SERIES,
    figure,
    finish,
    note,
    plain_log,
    series,
)

V3 = "deepseek-v3"
TABLE_2 = ("deepseek-v2", "deepseek-v3", "qwen2.5-72b", "llama-3.1-405b")
BILLION = 1e9
GROUPS = {
    "attention": ("attention",),
    "shared experts": ("shared_experts",),
    "dense FFN": ("dense_ffn",),
    "embedding, head, gate, norms": ("embedding", "head", "gate", "norms"),
    "routed experts": ("routed_experts",),
}
COLOURS = dict(zip(GROUPS, (SERIES[1], SERIES[2], SERIES[4], IDLE, SERIES[0]), strict=True))
PRESETS = {
    "Llama 3.1 405B": "llama-3.1-405b",
    "Qwen2.5 72B": "qwen2.5-72b",
    "DeepSeek-V3": "deepseek-v3",
    "DeepSeek-V2": "deepseek-v2",
    "Moonlight 16B": "moonlight-16b-a3b",
    "DeepSeek-V2-Lite": "deepseek-v2-lite",
}
BESIDE = {  # where a name stands from its point, in points: the two 16B models lie on each other
    "moonlight-16b-a3b": (10, 8, "left"),
    "deepseek-v2-lite": (10, -16, "left"),
    "deepseek-v2": (0, 10, "center"),
    "deepseek-v3": (0, -22, "center"),
    "qwen2.5-72b": (-10, 6, "right"),
    "llama-3.1-405b": (-10, 6, "right"),
}


def isca_table_2() -> None:
    """Print ISCA's table 2 beside our count, the generic dense one, and the ratios to V3.

    Within 1 % is the same count. Both dense rows miss ours and are what `dense_estimate` gives.
    """
    ours = {name: _training_gflop(name) for name in TABLE_2}
    printed = {name: paper.row(f"training_flops.{name}").value for name in TABLE_2}
    heads = f"{'printed':>9}{'ours':>9}{'72LD2+6VD':>12}   {'over V3, printed, ours':>22}"
    print(f"{'GFLOP a token':16}{heads}")
    for name in TABLE_2:
        cfg = ModelConfig.named(name)
        dense = "" if cfg.n_routed_experts else f"{flops.dense_estimate(cfg) / BILLION:.1f}"
        numbers = f"{printed[name]:>9.0f}{ours[name]:>9.1f}{dense:>12}"
        ratios = f"{printed[name] / printed[V3]:>14.2f}x{ours[name] / ours[V3]:>6.2f}x"
        agrees = abs(ours[name] / printed[name] - 1) < 0.01
        verdict = "same count" if agrees else "does not follow the same count"
        print(f"{name:16}{numbers}   {ratios}  {verdict}")


def parts_table(cfg_name: str = V3) -> None:
    """Print a model's parameters by part, all of them and those that one token meets."""
    cfg = ModelConfig.named(cfg_name)
    counted, met = params.count(cfg), _met(cfg)
    print(f"{cfg_name:18}{'held':>18}{'met by a token':>18}")
    for part, number in counted.by_part.items():
        print(f"{part.replace('_', ' '):18}{number:>18,}{met[part]:>18,}")
    print(f"{'in all':18}{counted.total:>18,}{counted.activated:>18,}")


def total_and_activated() -> Figure:
    """DeepSeek-V3's parameters by part beside those that one token meets, and these enlarged."""
    cfg = ModelConfig.named(V3)
    held, met = _grouped(params.count(cfg).by_part), _grouped(_met(cfg))
    total, few = sum(held.values()), sum(met.values())
    fig, (whole, enlarged) = figure(9, 4.4, rows=2)
    _stack(whole, 0, held)
    _stack(whole, 1, met)
    whole.set_yticks((0, 1), ("held", "met by\na token"))
    experts = held["routed experts"]
    whole.text(total / 2, 0, f"routed experts {experts:.1f}", **_LABEL, color="white")
    text = f"{few:.1f}, of which routed experts {met['routed experts']:.1f}"
    whole.text(few + 8, 1, text, va="center", fontsize=11, color=INK)
    title = (
        f"V3 holds {total:.0f} billion parameters and a token meets {few:.1f}: {few / total:.1%}"
    )
    finish(fig, whole, title, "billion parameters", legend=False)
    _stack(enlarged, 0, met, numbers=True)
    enlarged.set_yticks((0,), ("met,\nenlarged",))
    finish(fig, enlarged, "", "billion parameters", legend=False)
    for ax in (whole, enlarged):
        ax.invert_yaxis()
        ax.grid(False, axis="y")
    handles = enlarged.get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower center", ncols=3, fontsize=10, frameon=False)
    return fig


def flops_against_size() -> Figure:
    """Training FLOP a token against parameters held: six published models and the dense line."""
    fig, ax = figure(8, 4.4)
    sizes = {name: params.count(ModelConfig.named(name)).total for name in PRESETS.values()}
    ends = [0.7 * min(sizes.values()), 1.4 * max(sizes.values())]
    line = [6 * size / BILLION for size in ends]
    held = [size / BILLION for size in ends]
    ax.plot(held, line, color=INK, linestyle="--", label="dense, no attention: 6 FLOP a parameter")
    for kind, label in ((False, "dense"), (True, "mixture of experts")):
        names = [n for n in sizes if bool(ModelConfig.named(n).n_routed_experts) is kind]
        points = [(sizes[n] / BILLION, _training_gflop(n)) for n in names]
        look = {**series(int(kind)), "linestyle": "none", "markersize": 9}
        ax.plot(*zip(*points, strict=True), label=label, **look)
    for title, name in PRESETS.items():
        *offset, side = BESIDE[name]
        at = (sizes[name] / BILLION, _training_gflop(name))
        text = {"textcoords": "offset points", "ha": side, "fontsize": 10, "color": INK}
        ax.annotate(title, at, offset, **text)
    v3, dense = sizes[V3] / BILLION, 6 * sizes[V3] / BILLION
    ax.annotate("", (v3, _training_gflop(V3) * 1.2), (v3, dense * 0.95), arrowprops=_ARROW)
    ax.text(v3 * 0.92, 1000, f"{dense / _training_gflop(V3):.0f}x", fontsize=12, ha="right")
    plain_log(ax.xaxis)
    plain_log(ax.yaxis)
    ax.set_ylim(7, 9000)
    larger = sizes[V3] / sizes["llama-3.1-405b"]
    share = _training_gflop(V3) / _training_gflop("llama-3.1-405b")
    title = (
        f"V3 holds {larger:.1f}x the parameters of Llama 405B\nand costs {share:.0%} of its FLOP"
    )
    note(fig, "derived: 3 forward passes, sequences of 4,096 tokens, causal, without MTP")
    return finish(fig, ax, title, "billion parameters held", "GFLOP per trained token")


_LABEL = {"ha": "center", "va": "center", "fontsize": 11, "fontweight": "bold"}
_ARROW = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.2}


def _training_gflop(name: str) -> float:
    return flops.training_flops_per_token(ModelConfig.named(name)) / BILLION


def _met(cfg: ModelConfig) -> dict[str, int]:
    """by_part of what one token is multiplied with: the embedding out, resting experts out."""
    met = dict(params.count(cfg).by_part)
    moe_layers = sum(cfg.is_moe_layer(layer) for layer in range(cfg.num_hidden_layers))
    met["routed_experts"] -= params.routed_resting(cfg) * moe_layers
    return {**met, "embedding": met["embedding"] if cfg.tie_word_embeddings else 0}


def _grouped(by_part: dict[str, int]) -> dict[str, float]:
    """Parts to draw, in billions."""
    return {
        title: sum(by_part[part] for part in parts) / BILLION for title, parts in GROUPS.items()
    }


def _stack(ax: Axes, row: float, parts: dict[str, float], numbers: bool = False) -> None:
    """One horizontal bar of parts, each with its number where asked."""
    left = 0.0
    for title, size in parts.items():
        ax.barh(row, size, left=left, height=0.62, color=COLOURS[title], label=title)
        if numbers:
            colour = INK if COLOURS[title] == IDLE else "white"
            turned = 90 if size < 1.5 else 0  # too narrow for a number that lies
            ax.text(left + size / 2, row, f"{size:.1f}", **_LABEL, color=colour, rotation=turned)
        left += size
