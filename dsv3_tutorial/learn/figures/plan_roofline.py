"""A plan's computing on its chip's roofline: products, attention, and what memory holds back."""

from dataclasses import dataclass

from matplotlib.axes import Axes

from dsv3_tutorial.cost import roofline
from dsv3_tutorial.cost.plan import Plan
from dsv3_tutorial.cost.stage_time import Rates
from dsv3_tutorial.hardware import Chip
from dsv3_tutorial.learn.figures.step_parts import COLOURS, Colour
from dsv3_tutorial.learn.figures.style import COMPUTE, INK, MEMORY, finish, plain_log

_BF16, _FP8 = 2, 1
_LOW, _HIGH = 0.1, 1e5


@dataclass(frozen=True)
class Point:
    """One kind of work: FLOP a byte of memory, and the FLOP/s that the plan reckons with."""

    name: str
    intensity: float
    reached: float
    fmt: str
    colour: Colour | str
    marker: str

    def above(self, chip: Chip) -> bool:
        """Whether the plan reckons with more than the roof: memory would hold the work back."""
        return self.reached > roofline.attainable_flops(self.intensity, chip, self.fmt)


def points(of: Plan) -> list[Point]:
    """The largest product, attention's core, and norms, SwiGLU, casts and permutations."""
    rates, name = Rates.of(of.cluster.chip, of.layout.precision, of.assume), _product(of)
    memory = 1 / _BF16  # one operation on each number read or written: a round figure
    return [
        Point(
            f"{name}' products",
            product_intensity(of),
            *(rates.linear, of.layout.precision, COMPUTE, "o"),
        ),
        Point(
            "attention", attention_intensity(of), rates.attention, "bf16", COLOURS["attention"], "s"
        ),
        Point("norms, SwiGLU, casts", memory, memory * rates.memory, "bf16", MEMORY, "^"),
    ]


def rows(of: Plan) -> float:
    """Rows of the largest product: tokens that meet at one expert, or at a dense FFN."""
    cfg, layout = of.cfg, of.layout
    tokens = of.job.seq_len * layout.micro_batch
    if not cfg.n_routed_experts:
        return float(tokens)
    copies = tokens / layout.tp * cfg.num_experts_per_tok
    return copies * layout.ep / cfg.n_routed_experts


def product_intensity(of: Plan) -> float:
    """FLOP a byte of an expert's (or a dense FFN's) up-projection, its output in BF16."""
    cfg, m = of.cfg, rows(of)
    size = _FP8 if of.layout.precision == "fp8" else _BF16
    k = cfg.hidden_size
    n = cfg.moe_intermediate_size if cfg.n_routed_experts else cfg.intermediate_size / of.layout.tp
    return roofline.intensity(2 * m * n * k, size * (m * k + k * n) + _BF16 * m * n)


def attention_intensity(of: Plan) -> float:
    """FLOP a byte of causal attention that reads queries, keys, values once and writes outputs."""
    cfg, length = of.cfg, of.job.seq_len
    qk, v, heads = cfg.qk_head_dim, cfg.value_dim, cfg.num_attention_heads
    kv = heads if cfg.is_mla else cfg.kv_heads
    flops = 2 * (length / 2) * heads * (qk + v)
    return roofline.intensity(flops, _BF16 * (heads * (qk + v) + kv * (qk + v)))


def draw(ax: Axes, of: Plan) -> None:
    """The chip's roofs, and a point for each kind of work."""
    chip, found = of.cluster.chip, points(of)
    for fmt, style in (("fp8", "-"), ("bf16", "--")):
        if chip.rates.get(fmt) is None:
            continue
        ridge = roofline.ridge(chip, fmt)
        xs = [_LOW, ridge, _HIGH]
        ys = [roofline.attainable_flops(x, chip, fmt) / 1e12 for x in xs]
        ax.plot(xs, ys, style, color=INK, linewidth=1.5)
        peak = f"{fmt.upper()} peak {chip.rate(fmt) / 1e12:,.0f}"
        above = fmt == "fp8"
        look = {"ha": "right", "va": "bottom" if above else "top", "fontsize": 9, "color": INK}
        ax.annotate(
            peak, (_HIGH, ys[-1]), (0, 2 if above else -3), textcoords="offset points", **look
        )
    for point in found:
        look = {"color": point.colour, "marker": point.marker, "markersize": 10, "linestyle": ""}
        ax.plot([point.intensity], [point.reached / 1e12], **look, label=point.name)
    plain_log(ax.xaxis, 100)
    plain_log(ax.yaxis)
    ax.set_xlim(_LOW, _HIGH)
    ax.set_ylim(top=3 * max(point.reached for point in found) / 1e12 * 1.6)
    finish(ax.figure, ax, "", "FLOP a byte of memory", "TFLOP/s of a GPU")
    ax.legend(loc="lower right", fontsize=10, frameon=False)


def above_roof(of: Plan) -> list[str]:
    """Kinds of work that the plan reckons with at more than memory can feed."""
    return [point.name for point in points(of) if point.above(of.cluster.chip)]


def _product(of: Plan) -> str:
    return "experts" if of.cfg.n_routed_experts else "layers"
