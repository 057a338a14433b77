"""Lesson 2: the roofline with the number format as the knob, and what "twice FP16" is made of."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_tutorial import hardware, paper
from dsv3_tutorial.cost import precision, roofline
from dsv3_tutorial.hardware import Chip
from dsv3_tutorial.learn.figures.style import (
    COMPUTE,
    INK,
    MEMORY,
    figure,
    finish,
    note,
    plain_log,
    series,
)

FORMATS = ("bf16", "fp16", "int8", "fp8")
CHIPS = ("h800", "h100-sxm", "l4", "rtx-4090")
M, N, K = 4096, 2048, 7168  # one expert's gate projection for 4,096 tokens


def by_format(chip: str = "h800", fmt: str = "fp8", m: int = M, n: int = N, k: int = K) -> Figure:
    """A GEMM under the roof of a format, BF16's roof beside it, and the time of both bounds."""
    made = hardware.chip(chip)
    made.rate(fmt)  # says why, where there is none
    fig, (left, right) = figure(11, 4.5, columns=2)
    intensities = [_intensity(m, n, k, each) for each in ("bf16", fmt)]
    across = np.geomspace(min(8, *intensities) / 2, max(8192, *intensities) * 2, 400)
    for each in dict.fromkeys(("bf16", fmt)):
        _roof(left, made, each, across, _intensity(m, n, k, each))
    plain_log(left.xaxis)
    plain_log(left.yaxis)
    finish(fig, left, "", "FLOP per byte moved, scales included", "TFLOP/s")
    left.legend(fontsize=11, frameon=False, loc="lower right")
    _two_bounds(right, made, fmt, m, n, k)
    finish(fig, right, "", "µs a product", "")
    title = _finding(made, fmt, m, n, k)
    fig.suptitle(title, x=0.01, ha="left", fontsize=13, color=INK, weight="bold")
    note(fig, f"derived: peak rate or bandwidth of {made.title}, whichever is slower")
    return fig


def _intensity(m: int, n: int, k: int, fmt: str) -> float:
    return roofline.intensity(2 * m * n * k, precision.gemm_bytes(m, n, k, fmt))


def _roof(ax: Axes, chip: Chip, fmt: str, across: np.ndarray, at: float) -> None:
    """One format's roof and the product on it."""
    reach = [roofline.attainable_flops(x, chip, fmt) / 1e12 for x in across]
    colour = series(FORMATS.index(fmt))["color"] if fmt != "bf16" else "#777777"
    width = 2.5 if fmt != "bf16" else 5.5  # it lies under the other's and stays to be seen
    marker = series(FORMATS.index(fmt))["marker"]
    name = fmt.upper()
    ax.plot(across, reach, color=colour, linewidth=width, label=f"{name} roof")
    reached = roofline.attainable_flops(at, chip, fmt) / 1e12
    label = f"{name}: {at:,.0f} FLOP a byte"
    look = {"color": colour, "markersize": 13, "markeredgecolor": "white", "linestyle": "none"}
    ax.plot([at], [reached], marker, label=label, zorder=3, **look)


def _two_bounds(ax: Axes, chip: Chip, chosen: str, m: int, n: int, k: int) -> None:
    """Arithmetic and memory of the product in each format the chip has, the chosen one named."""
    known = [fmt for fmt in FORMATS if chip.rates.get(fmt)]
    for row, fmt in enumerate(known):
        compute = 2 * m * n * k / chip.rate(fmt) * 1e6
        moved = precision.gemm_bytes(m, n, k, fmt) / chip.bandwidth() * 1e6
        for offset, value, colour, what in (
            (-0.2, compute, COMPUTE, "arithmetic"),
            (0.2, moved, MEMORY, "memory, scales included"),
        ):
            alpha = 1.0 if fmt == chosen else 0.45
            label = what if fmt == chosen else None
            bar = ax.barh(row + offset, value, 0.38, color=colour, alpha=alpha, label=label)
            ax.bar_label(bar, [f"{value:,.1f}"], fontsize=10, padding=3)
    ax.set_yticks(range(len(known)), [fmt.upper() for fmt in known])
    ax.get_yticklabels()[known.index(chosen)].set_fontweight("bold")
    ax.set_xlim(0, ax.get_xlim()[1] * 1.15)
    ax.set_ylim(len(known) + 0.35, -0.6)
    ax.grid(False, axis="y")


def _finding(chip: Chip, fmt: str, m: int, n: int, k: int) -> str:
    time, base = (precision.gemm_time(m, n, k, chip, each) for each in (fmt, "bf16"))
    bound = roofline.bound(2 * m * n * k, precision.gemm_bytes(m, n, k, fmt), chip, fmt)
    what = {"compute": "arithmetic", "memory": "memory"}[bound]
    return (
        f"{m:,} x {k:,} to {n:,} in {fmt.upper()}: {time * 1e6:,.1f} µs at best, "
        f"{base / time:.2f}x BF16, bound by {what}"
    )


def by_format_in_words(
    chip: str = "h800", fmt: str = "fp8", m: int = M, n: int = N, k: int = K
) -> str:
    """The product's time, bytes and bound in the chosen format, and the same in BF16."""
    made = hardware.chip(chip)
    moved, base = (precision.gemm_bytes(m, n, k, each) / 1e6 for each in (fmt, "bf16"))
    return (
        f"{made.title}. {_finding(made, fmt, m, n, k)}. It moves {moved:,.1f} MB where BF16 moves "
        f"{base:,.1f}, and the ridge, where arithmetic takes over, lies at "
        f"{roofline.ridge(made, fmt):,.0f} FLOP a byte, for BF16 at {roofline.ridge(made):,.0f}."
    )


def chips_table() -> None:
    """Print four chips' peaks by format (float32 sums), bandwidth, and the ridge in two formats."""
    heads = f"{'BF16':>8}{'FP16':>8}{'FP8':>8}{'INT8':>8}{'GB/s':>8}{'FP8/FP16':>10}{'ridge':>13}"
    print(f"{'dense TFLOP/s':26}{heads}")
    for name in CHIPS:
        chip = hardware.chip(name)
        rates = "".join(f"{chip.rate(f) / 1e12:>8,.0f}" for f in ("bf16", "fp16", "fp8", "int8"))
        ratio = chip.rate("fp8") / chip.rate("fp16")
        ridge = f"{roofline.ridge(chip):.0f} and {roofline.ridge(chip, 'fp8'):.0f}"
        bandwidth = f"{chip.bandwidth() / 1e9:>8,.0f}"
        print(f"{chip.title.removeprefix('NVIDIA '):26}{rates}{bandwidth}{ratio:>9.1f}x{ridge:>13}")
    print("ridge: FLOP per byte from which arithmetic decides, in BF16 and in FP8")
    geforce = hardware.chip("rtx-4090")
    halved = geforce.rate("fp8_acc16") / geforce.rate("fp8")
    print(f"sums in float16 instead of float32: {halved:.1f}x on the RTX 4090, 1.0x on the others")


def twice_fp16() -> None:
    """Print what is published of "dedicated FP8 units, twice FP16": the peak, and what is left."""
    chip = hardware.chip("h800")
    fp8, bf16 = chip.rate("fp8") / 1e12, chip.rate("bf16") / 1e12
    first, later = (paper.row(f"fp8.deepgemm_{when}").value for when in ("first", "later"))
    whole = paper.row("training_rate.tflops_causal").value
    rows = [
        (
            "peak, FP8 over FP16",
            f"{fp8:,.1f} / {chip.rate('fp16') / 1e12:,.1f}",
            f"{fp8 / bf16:.2f}x",
        ),
        ("FP8 products, first release", f"{first:,.0f} / {fp8:,.1f}", f"{first / fp8:.1%} of FP8"),
        ("... later", f"{later:,.0f} / {fp8:,.1f}", f"{later / fp8:.1%} of FP8"),
        ("the whole training", f"{whole:,.0f} / {fp8:,.1f}", f"{whole / fp8:.1%} of FP8"),
        ("", f"{whole:,.0f} / {bf16:,.1f}", f"{whole / bf16:.1%} of BF16"),
    ]
    print(f"{'H800, TFLOP/s':30}{'published':>18}{'ratio':>16}")
    for what, numbers, ratio in rows:
        print(f"{what:30}{numbers:>18}{ratio:>16}")
    bits = paper.row("fp8.accumulator_bits").value
    print(f"the units are the ordinary tensor cores; their FP8 sums keep about {bits:.0f} bits")
