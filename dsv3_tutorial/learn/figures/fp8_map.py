"""Where FP8 is faster than BF16 and where quantising eats the gain: derived, and on record.

The derived speeds are `cost.precision`'s: peaks and full bandwidth. Where `bench fp8` has left
receipts of a GPU, its measured ratios stand beside them.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure

from dsv3_tutorial import hardware, receipts
from dsv3_tutorial.bench.fp8_table import BF16, OURS, QUANTISED
from dsv3_tutorial.cost import precision
from dsv3_tutorial.learn.figures.style import (
    COMPUTE,
    IDLE,
    INK,
    MEMORY,
    figure,
    finish,
    note,
    plain_log,
    series,
)

NAME = "fp8"
LAYERS = {  # V3's products: name -> (n, k)
    "kv_a": (576, 7168),
    "q_a": (1536, 7168),
    "expert up": (2048, 7168),
    "expert down": (7168, 2048),
    "dense up": (18432, 7168),
    "q_b": (24576, 1536),
    "kv_b": (32768, 512),
    "o": (7168, 16384),
}
MEANING = {
    "kv_a": "to the KV latent",
    "q_a": "to the query latent",
    "q_b": "to queries",
    "kv_b": "to keys and values",
    "o": "behind attention",
}
_OUTPUT = (
    "kv_b gains least of the wide layers: with many tokens "
    "most of its bytes are its output, in BF16 both times"
)
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
WIDTHS = 2 ** np.arange(7, 15.01, 1 / 16)
Measured = dict[tuple[int, int, int, bool], float]


def layer_names() -> list[str]:
    """V3's products as rows are named: "kv_a, to the KV latent, 7,168 to 576"."""
    meant = {name: f", {MEANING[name]}" if name in MEANING else "" for name in LAYERS}
    return [f"{name}{meant[name]}, {k:,} to {n:,}" for name, (n, k) in LAYERS.items()]


def products(folder: Path | None = None) -> list[receipts.Receipt]:
    """The products timed on a GPU, in seconds: of the GPU whose receipt is the last in the file."""
    known = NAME in receipts.names(folder)
    found = receipts.latest(NAME, folder=folder, device_kind="gpu") if known else []
    found = [r for r in found if r.what == "product" and r.unit == "s"]
    return [r for r in found if r.device == found[-1].device]


def measured(
    form: str = OURS, folder: Path | None = None
) -> tuple[Measured, list[receipts.Receipt]]:
    """How many times faster than BF16 a form was on the recorded GPU, and the receipts behind it.

    (m, n, k, quantisation included) -> ratio. Empty where nothing is recorded.
    """
    found = products(folder)
    base = {_size(r): r for r in found if r.shapes["form"] == BF16}
    forms = {form: False, form + QUANTISED: True}
    mine = [r for r in found if r.shapes["form"] in forms and _size(r) in base]
    ratios = {(*_size(r), forms[r.shapes["form"]]): base[_size(r)].value / r.value for r in mine}
    return ratios, [*mine, *(base[_size(r)] for r in mine)]


def _size(receipt: receipts.Receipt) -> tuple[int, int, int]:
    return receipt.shapes["m"], receipt.shapes["n"], receipt.shapes["k"]


def by_rows(layer: str = "expert up", folder: Path | None = None) -> Figure:
    """TFLOP/s of each form on the recorded GPU over the number of tokens, for one of V3's products.

    Raises LookupError where nothing is recorded.
    """
    n, k = LAYERS[layer]
    found = [r for r in products(folder) if _size(r)[1:] == (n, k)]
    if not found:
        raise LookupError(
            f"no GPU's products of {k:,} to {n:,} are recorded, so there is nothing to draw. "
            "Run on a GPU: python -m dsv3_tutorial bench fp8"
        )
    fig, ax = figure(9, 4.6)
    ends = {}
    for index, form in enumerate(dict.fromkeys(r.shapes["form"] for r in found)):
        mine = sorted((r.shapes["m"], r.value) for r in found if r.shapes["form"] == form)
        at, seconds = zip(*mine, strict=True)
        rates = [2 * m * n * k / each / 1e12 for m, each in zip(at, seconds, strict=True)]
        ends[form] = rates[-1]
        ax.plot(at, rates, label=form, **series(index))
    plain_log(ax.xaxis, 2)
    ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
    best = max((form for form in ends if form != BF16), key=ends.__getitem__, default=BF16)
    over = f", {ends[best] / ends[BF16]:.2f}x {BF16}" if BF16 in ends else ""
    title = f"{k:,} to {n:,}: {best} reaches {ends[best]:,.0f} TFLOP/s{over}"
    note(fig, receipts.caption(found))
    finish(fig, ax, title, "tokens", "TFLOP/s", legend=False)
    ax.legend(fontsize=10, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return fig


def gains(chip: hardware.Chip, quantize: bool, passes: str = "forward") -> np.ndarray:
    """FP8 over BF16 by the model: (layers of V3, tokens)."""
    return np.array(
        [
            [precision.speedup(m, n, k, chip, quantize, passes) for m in TOKENS]
            for n, k in LAYERS.values()
        ]
    )


def speed_map(
    chip: str = "h800", passes: str = "forward", form: str = OURS, folder: Path | None = None
) -> Figure:
    """V3's products over the number of tokens, without and with the quantisation's cost."""
    made = hardware.chip(chip)
    ratios, behind = measured(form, folder)
    fig, panels = figure(12, 4.8, columns=2)
    for ax, quantize in zip(panels, (False, True), strict=True):
        found = gains(made, quantize, passes)
        _grid(ax, found, {key[:3]: r for key, r in ratios.items() if key[3] is quantize})
        what = "products and quantisation" if quantize else "products alone"
        finish(fig, ax, "", "tokens", "", legend=False)
        ax.set_title(f"{what}: {found.min():.2f}x to {found.max():.2f}x", loc="left", fontsize=11)
    names = ["\n".join(name.rsplit(", ", 1)) for name in layer_names()]
    panels[0].set_yticks(range(len(LAYERS)), names)
    panels[1].set_yticks(range(len(LAYERS)), [""] * len(LAYERS))
    title = _finding(made, gains(made, True, passes), passes)
    fig.suptitle(title, x=0.01, ha="left", fontsize=13, color=INK, weight="bold")
    how = f"derived: peaks and bandwidth of {made.title}, {passes}, no launch times"
    how += f"\n{_OUTPUT}" if passes == "forward" else ""
    note(fig, f"{how}\nin brackets: {receipts.caption(behind)}" if behind else how)
    return fig


def _finding(chip: hardware.Chip, quantized: np.ndarray, passes: str) -> str:
    losing = (quantized < 1).sum()
    title = f"With quantisation FP8 is slower in {losing} of {quantized.size} cases"
    if passes != "forward":
        return title
    return f"{title}; on paper it pays from {precision.breakeven_width(chip):,.0f} outputs"


def _grid(ax: Axes, found: np.ndarray, recorded: dict[tuple[int, int, int], float]) -> None:
    """A cell a product, white at 1: orange where FP8 wins, violet where it loses."""
    ax.imshow(np.log2(found), cmap="PuOr_r", norm=CenteredNorm(0, halfrange=1.6), aspect="auto")
    for row, (n, k) in enumerate(LAYERS.values()):
        for column, m in enumerate(TOKENS):
            text = f"{found[row, column]:.2f}"
            if (m, n, k) in recorded:
                text += f"\n({recorded[m, n, k]:.2f})"
            ax.text(column, row, text, ha="center", va="center", fontsize=9, color=INK)
    ax.set_xticks(range(len(TOKENS)), [f"{m:,}" for m in TOKENS])
    ax.tick_params(labelsize=10, length=0)
    ax.grid(False)


def by_width(m: int = 4096, k: int = 7168, chip: str = "h800", passes: str = "forward") -> Figure:
    """FP8 over BF16 against the number of outputs, with and without the quantisation's cost."""
    made = hardware.chip(chip)
    fig, ax = figure(9, 4.4)
    lines = {q: _over_widths(m, k, made, q, passes) for q in (False, True)}
    ax.axhspan(0, 1, color=IDLE, alpha=0.25)
    ax.plot(WIDTHS, lines[False], color=COMPUTE, marker="o", markevery=16, label="products alone")
    label = "with quantisation"
    ax.plot(WIDTHS, lines[True], color=MEMORY, marker="s", markevery=16, label=label)
    if passes == "forward":
        width = precision.breakeven_width(made)
        label = f"pays where arithmetic binds: {width:,.0f}"
        ax.axvline(width, color=INK, linestyle=":", label=label)
    plain_log(ax.xaxis, 2)
    ax.set_ylim(0, max(2.2, lines[False].max() * 1.05))
    ax.text(WIDTHS[-1], 0.9, "FP8 slower", ha="right", va="top", fontsize=11, color=INK)
    title = _width_title(m, k, lines[True])
    note(fig, f"derived: peaks and bandwidth of {made.title}, {passes}, no launch times")
    finish(fig, ax, title, "outputs n", "times faster than BF16", legend=False)
    ax.legend(fontsize=11, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.08))
    return fig


def _over_widths(m: int, k: int, chip: hardware.Chip, quantize: bool, passes: str) -> np.ndarray:
    return np.array([precision.speedup(m, int(n), k, chip, quantize, passes) for n in WIDTHS])


def _width_title(m: int, k: int, quantized: np.ndarray) -> str:
    winning = WIDTHS[quantized > 1]
    start = f"from about {round(winning[0], -1):,.0f} outputs" if len(winning) else "nowhere"
    return f"{m:,} tokens of {k:,}: FP8 pays {start}, at most {quantized.max():.2f}x"


def by_width_in_words(
    m: int = 4096, k: int = 7168, chip: str = "h800", passes: str = "forward"
) -> str:
    """The gains at three widths, with and without quantisation, and the width that pays."""
    made = hardware.chip(chip)
    cases = [
        f"{n:,} outputs {precision.speedup(m, n, k, made, False, passes):.2f}x alone and "
        f"{precision.speedup(m, n, k, made, True, passes):.2f}x with quantisation"
        for n in (576, 2048, 18432)
    ]
    width = precision.breakeven_width(made)
    return (
        f"{made.title}, {m:,} tokens of {k:,} channels, {passes}, derived: {'; '.join(cases)}. "
        f"Where arithmetic binds, a forward product pays from {width:,.0f} outputs."
    )


def gains_table(chip: str = "h800", tokens: int = 4096) -> None:
    """Print each of V3's products' derived gain over BF16: alone, quantised, and in training."""
    made = hardware.chip(chip)
    heads = f"{'alone':>8}{'quantised':>11}{'training':>10}{'quantised':>11}"
    print(f"{f'{tokens:,} tokens, derived':42}{heads}")
    for name, (n, k) in zip(layer_names(), LAYERS.values(), strict=True):
        cells = [
            precision.speedup(tokens, n, k, made, quantize, passes)
            for passes in ("forward", "training")
            for quantize in (False, True)
        ]
        widths = (7, 10, 9, 10)
        print(f"{name:42}" + "".join(f"{c:>{w}.2f}x" for c, w in zip(cells, widths, strict=True)))
