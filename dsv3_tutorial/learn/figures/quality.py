"""What narrow weights and caches cost the trained model, and what they buy: bits, bytes, time."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_tutorial import receipts
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import storage
from dsv3_tutorial.learn.figures.inference_records import (
    LOOK,
    NAMES,
    found,
    missing,
    missing_in_words,
    relative_times,
)
from dsv3_tutorial.learn.figures.rows import int8_by_rows as int8_by_rows
from dsv3_tutorial.learn.figures.style import INK, figure, finish, note, plain_log
from dsv3_tutorial.receipts import Receipt

TEXT = "library"
CACHES = {"bf16": "BF16", "fp8": "FP8, RoPE key BF16", "fp8-rope": "FP8, all of it"}
HOLLOW = {"bf16": "p", "fp8": "h", "fp8-rope": "X"}  # a cache's marker: none that weights have
QUARTILE = 0.6745  # normal deviations from the mean to a quartile, as the receipts have them
LARGEST = 500  # square points of the largest marker
MODELS = {  # whose time a panel has: its title, its axis
    "trained": ("Time of the small trained model:\n{}", "the small model"),
    "wide": ("Time of a large random model:\n{}", "the large model"),
}
WIDE_INT8 = (  # what `weights.cpu` takes for small and for large matrices
    "INT8 is timed here with inputs in INT8 (W8A8),\nbut its quality is of inputs in BF16 (W8A16)"
)
WHAT = "bits per byte of the trained model in each format"


def error(row: Receipt) -> float:
    """The standard error of a difference, from the quartiles that its receipt holds."""
    return (row.spread["q3"] - row.spread["q1"]) / 2 / QUARTILE


def lost(part: str, text: str = TEXT, folder: Path | None = None) -> dict[str, Receipt]:
    """Bits per byte more than float32, by format of the "weights" or the "cache"."""
    rows = found("quality", "bits per byte more", folder, part=part, text=text)
    return {row.shapes["form"]: row for row in rows if row.shapes["form"] != "float32"}


def changed(part: str, text: str = TEXT, folder: Path | None = None) -> dict[str, float]:
    """Share of positions whose likeliest token is another than float32's."""
    rows = found("quality", "top token kept", folder, part=part, text=text)
    return {row.shapes["form"]: 1 - row.value for row in rows if row.shapes["form"] != "float32"}


def beyond_errors(folder: Path | None = None, part: str = "weights") -> list[str]:
    """The formats of a part that lose more than two standard errors."""
    return [form for form, row in lost(part, TEXT, folder).items() if row.value > 2 * error(row)]


def quality_speed_size(folder: Path | None = None) -> Figure:
    """Bits lost against the time of a token, on two sizes of model; a marker's size is bytes.

    Bits are the small trained model's in both panels. Where no time was measured, one panel over
    bytes.
    """
    bits = {part: lost(part, TEXT, folder) for part in ("weights", "cache")}
    if not bits["weights"]:
        return missing("quality", WHAT)
    times = {model: relative_times(folder, model) for model in MODELS}
    shown = {model: found for model, found in times.items() if found[0]} or {None: ({}, [])}
    fig, _axes = figure(8.6 + 3.2 * (len(shown) - 1), 5.2, columns=len(shown))
    for ax, (model, (ratios, rows)) in zip(fig.axes, shown.items(), strict=True):
        for part, group in bits.items():
            _marks(ax, part, group, ratios, changed(part, TEXT, folder))
        _axis(ax, model, ratios, rows)
    _share(fig.axes)
    said = title(_told(bits, [ratios for ratios, _ in shown.values()]))
    fig.suptitle(said, x=0.01, ha="left", fontsize=13, color=INK, fontweight="bold")
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside right center",
               frameon=False, fontsize=9, markerscale=0.6, title="(likeliest token changed)",
               title_fontsize=9)  # fmt: skip
    rows = [row for _, timed in shown.values() for row in timed]
    note(fig, _source(list(bits["weights"].values()), rows))
    return fig


def _told(bits: dict[str, dict[str, Receipt]], times: list[dict]) -> dict:
    """All formats of weights, and the caches that have a place in one panel at least."""
    caches = {
        form: row
        for form, row in bits["cache"].items()
        if any(_place("cache", form, ratios) is not None for ratios in times)
    }
    return {**bits, "cache": caches}


def _marks(
    ax: Axes, part: str, group: dict[str, Receipt], ratios: dict[str, float], guesses: dict
) -> None:
    """One mark a format that has a place on the axis, its bar two standard errors."""
    for form, row in group.items():
        at = _place(part, form, ratios)
        if at is not None:
            look = _look(part, form)
            label = f"{look.pop('label')} ({guesses[form]:.1%})"
            colour = LOOK[_colour(form)]["color"]
            ax.errorbar(at, 1e3 * row.value, 2e3 * error(row), color=colour, zorder=2)
            above = 4 - look["s"] / LARGEST  # the smaller mark lies on top
            ax.scatter(at, 1e3 * row.value, **look, label=label, zorder=above)


def _axis(ax: Axes, model: str | None, ratios: dict[str, float], rows: list[Receipt]) -> None:
    """float32 stands where nothing is lost and time is 1."""
    ax.axhline(0, color=INK, linewidth=1)
    if model is None:
        finish(ax.figure, ax, "", "bytes, float32 = 1 (no time measured)", legend=False)
        return
    ax.axvline(1, color=INK, linewidth=1, linestyle=":")
    if model == "wide" and "int8" in ratios:
        look = {"va": "top", "ha": "right", "fontsize": 9, "backgroundcolor": "white"}
        ax.text(0.99, 0.97, WIDE_INT8, transform=ax.transAxes, **look)
    plain_log(ax.xaxis, 2)
    held = next(row.shapes["weight_bytes"] for row in rows if row.shapes["form"] == "float32")
    head, whose = MODELS[model]
    finding = f"INT8 takes {ratios['int8']:.2f} of float32's" if "int8" in ratios else "by format"
    across = f"time of a token, float32 = 1,\nin {whose} ({held / 4e6:,.1f} M weights)"
    finish(ax.figure, ax, head.format(finding), across, legend=False)


def _share(axes: Sequence[Axes]) -> None:
    """One scale for all panels, a tick at each doubling; bits are the small model's in each."""
    limits = [ax.get_xlim() for ax in axes]
    low, high = min(low for low, _ in limits), max(high for _, high in limits)
    if axes[0].get_xscale() == "log":
        low, high = min(low, 0.23), max(high, 9.0)
    ticks = [2.0**n for n in range(-4, 8) if low <= 2.0**n <= high]
    for ax in axes:
        ax.set_xlim(low, high)
        if ax.get_xscale() == "log":
            ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            ax.minorticks_off()
        said = "bits per byte more, thousandths,\nof the small trained model"
        ax.set_ylabel(said, fontsize=12, color=INK)


def title(bits: dict[str, dict[str, Receipt]]) -> str:
    """Which formats lose more than two errors, and how much the worst of them."""
    rows = {_called(part, form): row for part, group in bits.items() for form, row in group.items()}
    sure = {name: row.value for name, row in rows.items() if row.value > 2 * error(row)}
    if not sure:
        most = max(row.value for row in rows.values())
        return f"No format loses measurably: the worst {_bits(most)}, within two errors"
    worst = max(sure, key=sure.__getitem__)
    if len(sure) == 1:
        return f"Only {worst} loses measurably: {_bits(sure[worst])}"
    rest = len(sure) - 1
    others = f"{rest} of the other {len(rows) - 1} {'loses' if rest == 1 else 'lose'}"
    return f"{worst} loses most, {_bits(sure[worst])}; {others} measurably too"


def _called(part: str, form: str) -> str:
    if part == "cache":
        return f"a cache in {CACHES[form]}"
    kinds = [name.split(",")[0] for name in NAMES.values()]
    short = NAMES[form].split(",")[0]
    return short if kinds.count(short) == 1 else NAMES[form]


def _bits(value: float) -> str:
    return f"{value:.3f} bits a byte" if value >= 0.001 else f"{value:.4f} bits a byte"


def _colour(form: str) -> str:
    return "fp8" if form.startswith("fp8") else form


def _place(part: str, form: str, times: dict[str, float]) -> float | None:
    """Time over float32's, None if it was not timed; where nothing was, bytes over float32's."""
    key = form if part == "weights" else f"{form} cache"
    if key in times:
        return times[key]
    if times:
        return None
    cfg = ModelConfig.named("small")
    if part == "cache":
        return storage.cache_row(cfg, form) / storage.cache_row(cfg, "float32")
    whole = (sum(storage.held_bytes(cfg, weights).values()) for weights in (form, "float32"))
    return next(whole) / next(whole)


def _look(part: str, form: str) -> dict:
    """A filled mark for weights, a hollow one for a cache, as large as what is held."""
    look, cfg = LOOK[_colour(form)], ModelConfig.named("small")
    if part == "weights":
        whole = sum(storage.held_bytes(cfg, "float32").values())
        size, name = LARGEST * sum(storage.held_bytes(cfg, form).values()) / whole, NAMES[form]
        return {"c": look["color"], "marker": look["marker"], "s": size, "label": name}
    size = LARGEST * storage.cache_row(cfg, form) / storage.cache_row(cfg, "float32")
    return {"facecolors": "white", "edgecolors": look["color"], "marker": HOLLOW[form],
            "s": size, "linewidths": 1.8, "label": f"cache: {CACHES[form]}"}  # fmt: skip


def _source(bits: list[Receipt], rows: list[Receipt]) -> str:
    at = next((row.shapes for row in rows if row.shapes["form"] == "float32"), None)
    across = f"time, batch {at['batch']}, {at['context']:,} cached tokens" if at else "bytes"
    return (
        f"height: quality of the small trained model, in every panel; across: {across};\n"
        "size of a marker: bytes; bars: two standard errors, and measurably is beyond them; "
        "in brackets: positions\nwhose likeliest token changed; "
        f"{receipts.caption([*bits, *rows])}"
    )


def cache_table(folder: Path | None = None) -> None:
    """Print each cache format's bytes a token and layer, and what it costs the trained model."""
    if not lost("cache", TEXT, folder):
        print(missing_in_words("quality", "bits per byte of the trained model in each cache"))
        return
    texts = ("library", "module")
    names = "".join(f"{f'{text}: bits more':>21}{'changed':>9}" for text in texts)
    print(f"{'cache':20}{'small':>8}{'V3':>8}{names}")
    rows = {text: lost("cache", text, folder) for text in texts}
    shares = {text: changed("cache", text, folder) for text in texts}
    for form in ("float32", *CACHES):
        held = (
            storage.cache_row(ModelConfig.named(name), form) for name in ("small", "deepseek-v3")
        )
        small, large = held
        line = f"{CACHES.get(form, form):20}{small:>8,}{large:>8,}"
        for text in texts:
            row = rows[text].get(form)
            more = f"{round(row.value, 4) + 0.0:+.4f} +- {error(row):.4f}" if row else "-"
            share = f"{shares[text][form]:.2%}" if row else "-"
            line += f"{more:>21}{share:>9}"
        print(line)
    print("small, V3: bytes of a token in a layer; +- one standard error; changed: the best guess")
    print(receipts.caption([row for group in rows.values() for row in group.values()]))
