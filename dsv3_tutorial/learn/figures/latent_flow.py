"""MLA as a drawing: what is computed for the new token, what is kept, what each head rebuilds."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.learn.figures.style import COMPUTE, INK, MEMORY, figure

BOX_WIDTH, BOX_HEIGHT = 1.9, 0.66


def _box(ax: Axes, x: float, y: float, text: str, kept: bool = False) -> None:
    look = {"facecolor": "#FFF3E8", "edgecolor": MEMORY, "linewidth": 3.2}
    if not kept:
        look = {"facecolor": "white", "edgecolor": COMPUTE, "linewidth": 1.2}
    patch = FancyBboxPatch((x, y), BOX_WIDTH, BOX_HEIGHT, boxstyle="round,pad=0.03", **look)
    ax.add_patch(patch)
    middle = (x + BOX_WIDTH / 2, y + BOX_HEIGHT / 2)
    ax.text(*middle, text, ha="center", va="center", fontsize=10, color=INK)


def _arrow(ax: Axes, start: tuple, end: tuple) -> None:
    style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops=style)


COLUMNS = (0.0, 2.9, 5.8, 8.7)
RIGHT, HALF = BOX_WIDTH + 0.05, BOX_HEIGHT / 2


def _across(ax: Axes, column: int, y: float, to_column: int, to_y: float, text: str = "") -> None:
    """An arrow from the right edge of one box to the left edge of another, named on its way."""
    start, end = (COLUMNS[column] + RIGHT, y + HALF), (COLUMNS[to_column] - 0.06, to_y + HALF)
    _arrow(ax, start, end)
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    if text:
        ax.text(*middle, text, ha="center", va="center", fontsize=9, color=INK, bbox=paper)


def data_flow() -> Figure:
    """The boxes and widths of DeepSeek-V3's attention; the heavy boxes are the cache."""
    cfg = ModelConfig.named("deepseek-v3")
    heads, rope = cfg.num_attention_heads, cfg.qk_rope_head_dim
    fig, ax = figure(10, 4.2)
    _box(ax, COLUMNS[0], 1.5, f"layer input\n{cfg.hidden_size:,}")
    _box(ax, COLUMNS[1], 3, f"query latent\n{cfg.q_lora_rank:,}, normed")
    _box(ax, COLUMNS[1], 2, f"rotary key k_rope\n{rope}, rotated", kept=True)
    _box(ax, COLUMNS[1], 0.5, f"latent c_kv\n{cfg.kv_lora_rank}, normed", kept=True)
    _box(ax, COLUMNS[2], 3, f"queries\n{heads} x ({cfg.qk_nope_head_dim} + {rope})")
    _box(ax, COLUMNS[2], 1, f"keys\n{heads} x {cfg.qk_nope_head_dim}")
    _box(ax, COLUMNS[2], 0, f"values\n{heads} x {cfg.v_head_dim}")
    _box(ax, COLUMNS[3], 2, "scores\nper head")
    _box(ax, COLUMNS[3], 0, f"outputs, then W_O\n{heads} x {cfg.v_head_dim}")
    for y, text in ((3, "W_DQ"), (2, "W_KR"), (0.5, "W_DKV")):
        _across(ax, 0, 1.5, 1, y, text)
    _across(ax, 1, 3, 2, 3, "W_UQ")
    _across(ax, 1, 0.5, 2, 1, "W_UK")
    _across(ax, 1, 0.5, 2, 0, "W_UV")
    for column, y, text in ((2, 3, ""), (1, 2, "one for all heads"), (2, 1, "")):
        _across(ax, column, y, 3, 2, text)
    _across(ax, 2, 0, 3, 0)
    middle = COLUMNS[3] + BOX_WIDTH / 2
    _arrow(ax, (middle, 1.95), (middle, BOX_HEIGHT + 0.06))
    ax.text(middle + 0.08, 1.25, "softmax", fontsize=9, color=INK)
    ax.set_xlim(-0.15, COLUMNS[3] + BOX_WIDTH + 0.3)
    ax.set_ylim(-0.2, 3 + BOX_HEIGHT + 0.15)
    ax.axis("off")
    kept, whole = cfg.kv_lora_rank + rope, heads * (cfg.qk_head_dim + cfg.v_head_dim)
    title = f"MLA keeps {kept} numbers a token and layer; its heads would be {whole:,}"
    ax.set_title(title, loc="left", fontsize=13, color=INK, fontweight="bold")
    return fig
