"""What a narrow accumulator costs: error against k, against the promotion interval, by inputs.

Errors are of the emulation in `fp8.accumulate`, norm of the error over norm of the result, on
random E4M3 values: the rounding to E4M3 itself is not in them.
"""

from functools import cache

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from dsv3_tutorial import paper
from dsv3_tutorial.bench import probe as bench
from dsv3_tutorial.fp8.accumulate import HOPPER, TensorCore, matmul_emulated
from dsv3_tutorial.fp8.formats import FORMATS
from dsv3_tutorial.fp8.probe import BIG, answer
from dsv3_tutorial.learn.figures.style import INK, figure, finish, note, plain_log, series

K, ROWS, GROUP = 4096, 16, 32
WIDTHS = (10, 10, 9, 13, 10)  # of the table's columns
SIZES = tuple(2**power for power in range(7, 15))  # 128 to 16384 products
INTERVALS = tuple(2**power for power in range(5, 13))  # 32 to 4096 = all of K
KINDS = tuple(bench.INPUTS)
HEAVY = "heavy-tailed"  # a further row of the table, and in no figure
LOOKS = {kind: series(index) for index, kind in enumerate(KINDS)}
NAMES = {
    "positive": "positive: uniform in [0, 1)",
    "half zero": "half zero: normal, negatives cut",
    "zero-mean": "zero-mean: normal",
    HEAVY: "heavy-tailed: exp(2 normal)",
}
SUMMED = "products summed, k"


@cache
def _inputs(kind: str, k: int) -> tuple[Tensor, Tensor]:
    """E4M3 values in float32, (ROWS, k) twice: the probe's kinds, and HEAVY, scaled by tensor."""
    if kind != HEAVY:
        return bench.inputs(kind, k, ROWS)
    draw = torch.Generator().manual_seed(0)
    wide = [torch.exp(2 * torch.randn(ROWS, k, generator=draw)) for _ in range(2)]
    a, b = ((x * (FORMATS["e4m3"].max / x.max())).to(torch.float8_e4m3fn).float() for x in wide)
    return a, b


@cache
def error(
    kind: str, k: int, bits: int | None = 13, promote: int | None = None, joint: bool = True
) -> float:
    """The error of sums of k products, in %: norm of the error over norm of the result."""
    a, b = _inputs(kind, k)
    core = TensorCore(bits=bits, group=GROUP, promote=promote, joint=joint)
    exact = a.double() @ b.double().T
    return 100 * float((matmul_emulated(a, b, core).double() - exact).norm() / exact.norm())


@cache
def rounding_error(kind: str) -> float:
    """What rounding the inputs to E4M3 does to 4096-term sums, in %, summed exactly."""
    exact, rounded = (
        a.double() @ b.double().T
        for a, b in (bench.unrounded(kind, K, ROWS), bench.inputs(kind, K, ROWS))
    )
    return 100 * float((rounded - exact).norm() / exact.norm())


@cache
def largest_error(kind: str, promote: int | None = None) -> float:
    """The largest relative error of any one result of K products on Hopper, in %."""
    a, b = _inputs(kind, K)
    core = TensorCore(bits=HOPPER.bits, group=GROUP, promote=promote)
    exact = a.double() @ b.double().T
    return 100 * float(((matmul_emulated(a, b, core).double() - exact) / exact).abs().max())


def error_against_k() -> Figure:
    """The error grows with k, by how much depends on the inputs; promotion stops it."""
    fig, ax = figure(8.5, 5.0)
    for kind in KINDS:
        _draw_sizes(ax, kind, 13, None, label=NAMES[kind])
    for kind in KINDS:
        _draw_sizes(ax, kind, 13, 128, label=f"{kind}, promoted every 128")
    _papers_number(ax)
    _percent(ax)
    ax.set_ylim(0.005, 900)
    low, high = error("zero-mean", K), error("positive", K)
    title = (
        f"13 fraction bits, {K:,} products: {high:.1f}% or {low:.2f}%, as the inputs are;\n"
        f"promoted every 128, {error('positive', K, 13, 128):.2f}% or less on these inputs"
    )
    finish(fig, ax, title, SUMMED, "error of the sums, %")
    ax.legend(fontsize=10, frameon=False, ncols=2, loc="upper left")
    note(fig, "emulated: 32 products at once, aligned with the running sum, truncated")
    return fig


def error_against_promotion() -> Figure:
    """The shorter the interval the smaller the error, and what E4M3 itself costs beside it."""
    fig, ax = figure(8.5, 5.0)
    for kind in ("positive", "zero-mean"):
        _draw_intervals(ax, kind, 13, label=NAMES[kind])
        ax.axhline(rounding_error(kind), color=LOOKS[kind]["color"], linestyle=":", linewidth=1.6)
        text = f"{kind}: rounding the\ninputs to E4M3 costs {rounding_error(kind):.2g}%"
        ax.text(29, rounding_error(kind) * 1.12, text, fontsize=10, color=LOOKS[kind]["color"])
    chosen = int(paper.row("fp8.promotion_interval").value)
    ax.axvline(chosen, color=INK, linestyle="--", linewidth=1.2)
    ax.text(chosen * 1.05, 0.0025, f"the report's {chosen}", fontsize=11, color=INK)
    _percent(ax)
    ax.set_ylim(0.0015, 60)
    gains = [error(kind, K) / error(kind, K, 13, chosen) for kind in ("positive", "zero-mean")]
    title = (
        f"Promotion every {chosen} makes the sums {gains[0]:.0f} times as exact\n"
        f"on positive inputs and {gains[1]:.0f} times on zero-mean ones"
    )
    finish(fig, ax, title, f"promotion interval, products (of {K:,}: never)", "error of sums, %")
    note(fig, "emulated: 13 fraction bits, 32 products at once, truncated")
    return fig


def accumulator_lab(bits: int = 13, promote: int | None = 128, inputs: str = "positive") -> Figure:
    """Error against k and against the interval for an accumulator of one's own choice.

    bits 1 to 23, promote a multiple of 32 or None, inputs one of KINDS.
    """
    fig, (left, right) = figure(10, 4.4, columns=2)
    _draw_sizes(left, inputs, bits, None, label="never promoted")
    if promote:
        _draw_sizes(left, inputs, bits, promote, label=f"promoted every {promote}")
    _draw_intervals(right, inputs, bits, label=f"{bits} bits")
    if promote and promote <= K:
        mark = {"marker": "o", "markersize": 16, "fillstyle": "none", "color": INK}
        right.plot([promote], [error(inputs, K, bits, promote)], **mark)
    for ax in (left, right):
        _percent(ax, base=4)
        ax.set_ylim(1e-4, 200)
    finish(fig, left, "", SUMMED, f"error of the sums, %, {inputs} inputs")
    finish(fig, right, "", f"promotion interval (of {K:,}: never)", "", legend=False)
    fig.suptitle(_lab_finding(bits, promote, inputs), x=0.01, ha="left", weight="bold", color=INK)
    return fig


def accumulator_lab_in_words(
    bits: int = 13, promote: int | None = 128, inputs: str = "positive"
) -> str:
    """The same errors in words, beside Hopper's and the rounding to E4M3."""
    hopper, rounding = error(inputs, K), rounding_error(inputs)
    return (
        f"{_lab_finding(bits, promote, inputs)}. Over 128 products it is "
        f"{error(inputs, 128, bits):.2g}%. Hopper's 13 bits, never promoted, err by {hopper:.2g}% "
        f"over {K:,}; rounding these inputs to E4M3 costs {rounding:.2g}%."
    )


def fading_term() -> Figure:
    """How the probe reads width and rounding: what a large term leaves of a small one."""
    fig, (left, right) = figure(10, 4.4, columns=2)
    exponents, eighths = list(range(9, 20)), range(9)
    cores = {"truncates": HOPPER, "rounds to nearest": TensorCore(rounding="nearest")}
    for index, (name, core) in enumerate(cores.items()):
        look = series(index) | {"markersize": 9 - 3 * index}
        left.plot(exponents, [_comes_back(core, 2.0**-j) for j in exponents], label=name, **look)
        parts = [_comes_back(core, part / 8 * 2.0**-13) * part / 8 for part in eighths]
        right.plot([part / 8 for part in eighths], parts, label=name, **look)
    left.set_xticks(exponents)
    left.set_ylim(-0.08, 1.3)
    right.set_ylim(-0.08, 1.3)
    kept = max(j for j in exponents if _comes_back(HOPPER, 2.0**-j))
    finish(fig, left, "", "j: the small term is 2^-j", "what is left of it beside 1")
    finish(fig, right, "", f"small term, in units of 2^-{kept}", f"what is left, 2^-{kept}")
    text = f"2^-{kept} survives beside 1 and 2^-{kept + 1} does not: {kept} fraction bits"
    fig.suptitle(text, x=0.01, ha="left", weight="bold", color=INK)
    note(fig, "1 + x - 1, answered by the emulation with 13 fraction bits")
    return fig


def inputs_table() -> None:
    """Print Hopper's two errors over 4,096 products by kind of input, unpromoted and promoted."""
    heads = ("norm", "largest", "norm", "norm", "largest")
    print(f"{f'{K:,} products':34}{'never promoted':>20}{'apart':>9}{'promoted every 128':>23}")
    print(f"{'inputs':34}" + "".join(f"{head:>{w}}" for head, w in zip(heads, WIDTHS, strict=True)))
    for kind, name in NAMES.items():
        numbers = (
            *(error(kind, K), largest_error(kind), error(kind, K, joint=False)),
            *(error(kind, K, 13, 128), largest_error(kind, 128)),
        )
        cells = (f"{number:.2g}%" for number in numbers)
        print(f"{name:34}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, WIDTHS, strict=True)))
    print("norm: error of the sum, norm of the errors over norm of the results")
    print("largest: largest relative error of one result; around zero some results are tiny")
    print("apart: never promoted, the running sum not aligned along with the products")


def _comes_back(core: TensorCore, part: float) -> float:
    """1 + part - 1 over part; 0 for no part."""
    return answer(core, [BIG, BIG * part, -BIG]) / (BIG * part) if part else 0.0


def _draw_sizes(ax: Axes, kind: str, bits: int, promote: int | None, label: str) -> None:
    look = LOOKS[kind] | ({"linestyle": "--", "fillstyle": "none"} if promote else {})
    ax.plot(SIZES, [error(kind, k, bits, promote) for k in SIZES], label=label, **look)


def _draw_intervals(ax: Axes, kind: str, bits: int, label: str) -> None:
    errors = [error(kind, K, bits, interval) for interval in INTERVALS]
    ax.plot(INTERVALS, errors, label=label, **LOOKS[kind])


def _papers_number(ax: Axes) -> None:
    said = paper.row("fp8.accumulation_error")
    ax.plot([K], [said.value], color=INK, marker="*", markersize=15, linestyle="none")
    text = f'the report: "nearly {said.value:g}%"\nat most, inputs not stated'
    place = {"textcoords": "offset points", "xytext": (0, -14), "ha": "left", "va": "top"}
    ax.annotate(text, (K, said.value), fontsize=11, color=INK, **place)


def _percent(ax: Axes, base: int = 2) -> None:
    plain_log(ax.xaxis, base=base)
    plain_log(ax.yaxis)


def _lab_finding(bits: int, promote: int | None, inputs: str) -> str:
    never, now = error(inputs, K, bits), error(inputs, K, bits, promote)
    how = f", {now:.2g}% promoted every {promote}" if promote else ""
    return f"{bits} fraction bits, {K:,} {inputs} products: error {never:.2g}% unpromoted{how}"
