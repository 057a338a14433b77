"""The whole design against a dense baseline of equal training FLOPs, as `bench codesign` recorded.

Both ends of the ladder with several seeds, what lies between with one. What is compared is always a
pair of runs of one seed, that is, of the same text in the same order.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_tutorial import receipts
from dsv3_tutorial.bench.codesign import NAME, PEAK_LR, STEPS
from dsv3_tutorial.bench.codesign_ladder import (
    BASELINE,
    FULL,
    ladder,
    training_flops_per_token,
)
from dsv3_tutorial.bench.codesign_table import Row, compared, rows
from dsv3_tutorial.bench.precision_pairs import Pairs
from dsv3_tutorial.learn.figures.style import INK, figure, finish, note, series

MISSING = "not measured yet: python -m dsv3_tutorial bench codesign"
WHOLE = "MLA + MoE + FP8 + MTP"
NOBODY = "neither, as far as so few pairs can tell"
LAST = f"{FULL} (the whole design)"
CHOICES = [BASELINE, WHOLE, NOBODY]
Runs = list[receipts.Receipt]


def recorded(folder: Path | None = None, peak_lr: float | None = PEAK_LR) -> Runs:
    """The runs of full length at one learning rate (None: at all); none where nothing was run."""
    if NAME not in receipts.names(folder):
        return []
    found = receipts.latest(NAME, folder=folder, length=STEPS)
    return [r for r in found if peak_lr in (None, r.shapes["peak_lr"])]


def curves(found: Runs | None = None) -> Figure:
    """Held-out loss against training FLOPs, seeds as a band; and each seed's difference."""
    found = recorded() if found is None else found
    fig, (left, right) = figure(11, 4.4, columns=2)
    for index, name in enumerate((BASELINE, FULL)):
        _curve(left, index, [r for r in found if r.shapes["variant"] == name])
    finish(fig, left, "", "training FLOP spent, 10^12", "held-out bits per byte")
    _pairs(right, compared(found))
    finish(fig, right, "", "held-out loss above the baseline's, %", "", legend=False)
    title = {"x": 0.01, "ha": "left", "fontsize": 13, "color": INK, "weight": "bold"}
    fig.suptitle(_finding(found), **title)
    note(fig, f"the toy, {STEPS} steps; {receipts.caption(found)}")
    return fig


def better(found: Runs | None = None) -> str:
    """Who has the lower held-out loss: one of two names, or NOBODY where the interval holds 0."""
    each = compared(recorded() if found is None else found).get(FULL)
    if each is None or each.interval[0] <= 0 <= each.interval[1]:
        return NOBODY
    return BASELINE if each.mean > 0 else WHOLE


def ladder_table(found: Runs | None = None) -> None:
    """Print every rung on record, its loss, and its difference from the baseline by pairs."""
    found = recorded() if found is None else found
    if not found:
        print(MISSING)
        return
    pairs = compared(found)
    print(f"{'rung':26}{'seeds':>6}{'bits/byte':>11}{'over the baseline':>36}")
    for row in _in_order(found):
        gap = _gap(pairs[row.name]) if row.name in pairs else ""
        name = LAST if row.name == FULL else row.name
        print(f"{name:26}{len(row.seeds):>6}{row.loss:>11.3f}{gap:>36}")
    print(
        "each rung has all that stands above it, and is held against the baseline, not the last one"
    )
    print("between: where the difference lies in 95 % of cases, as far as so few pairs can say")
    if absent := [name for name in ladder() if name not in {row.name for row in _in_order(found)}]:
        print(f"{', '.join(absent)}: {MISSING}")


def costs_table(found: Runs | None = None) -> None:
    """Print what the baseline and the whole design cost: FLOPs, parameters, bytes and seconds."""
    found = recorded() if found is None else found
    ends = {row.name: row for row in rows(found) if row.name in (BASELINE, FULL)}
    if len(ends) < 2:
        print(MISSING)
        return
    base, full = ends[BASELINE], ends[FULL]
    print(f"{'':38}{'dense MHA, BF16':>17}{WHOLE:>24}{'ratio':>8}")
    for name, of, digits in _costs(found):
        before, after = of(base), of(full)
        ratio = f"{after / before:>7.2f}x" if before else ""
        numbers = f"{before:>17,.{digits}f}{after:>24,.{digits}f}{ratio}"
        print(f"{name:38}{numbers}")
    print("FP8 is emulated here: its seconds are the emulation's, and masters stay in float32")


def learning_rates(found: Runs | None = None) -> None:
    """Print the baseline's loss by peak learning rate, one seed: what tuning it would buy."""
    found = recorded(peak_lr=None) if found is None else found
    first = [r for r in found if r.shapes["variant"] == BASELINE and r.shapes["seed"] == 0]
    if not first:
        print(MISSING)
        return
    print(f"{'peak learning rate':>20}{'bits/byte':>11}   {BASELINE}, seed 0")
    for r in sorted(first, key=lambda r: r.shapes["peak_lr"]):
        rate = r.shapes["peak_lr"]
        print(f"{rate:>20g}{r.value:>11.3f}{'   as in the pairs' if rate == PEAK_LR else ''}")


def _curve(ax: Axes, index: int, runs: Runs) -> None:
    """One end's held-out losses: the mean of its seeds and the band from least to most."""
    if not runs:
        return
    of = runs[0].shapes
    spent = of["tokens_per_step"] * of["training_flops_per_token"] / 1e12
    at = np.array(of["held_out_steps"]) * spent
    values = np.array([r.shapes["held_out"] for r in runs])
    name = WHOLE if of["variant"] == FULL else of["variant"]
    seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
    look = series(index)
    ax.plot(at, values.mean(0), label=f"{name} ({seeds})", markersize=4, **look)
    ax.fill_between(at, values.min(0), values.max(0), color=look["color"], alpha=0.2)


def _pairs(ax: Axes, pairs: dict[str, Pairs]) -> None:
    """A line for each rung: its pairs as marks, their mean with the interval that they allow."""
    known = [name for name in ladder() if name in pairs]
    for y, name in enumerate(known):
        each, look = pairs[name], series(1 if name == FULL else 2)
        values = [100 * d for d in each.differences]
        ax.plot(values, [y] * len(values), linestyle="", alpha=0.6, markersize=6, **look)
        if len(values) > 1:
            reach = 100 * (each.interval[1] - each.mean)
            bar = {"xerr": reach, "color": INK, "capsize": 5, "marker": "|"}
            ax.errorbar(100 * each.mean, y + 0.2, markersize=12, **bar)
    ax.axvline(0, color=INK, linewidth=1.2)
    ax.set_yticks(range(len(known)), ["the whole\ndesign" if n == FULL else n for n in known])
    ax.set_ylim(len(known) - 0.4, -0.6)
    ax.grid(False, axis="y")


def _finding(found: Runs) -> str:
    each = compared(found).get(FULL)
    if each is None:
        return f"The trained pair: {MISSING}"
    gap = _worse(each.mean)
    if len(each.seeds) > 1:
        low, high = map(_worse, each.interval)
        gap += f", from {low} to {high} ({len(each.seeds)} pairs, 95 %)"
    else:
        gap += " (one pair, no error)"
    cached = {row.name: row.cache_bytes_per_token for row in rows(found)}
    less = cached[BASELINE] / cached[FULL]
    return f"With {less:.0f}x less cache, at equal FLOPs, the toy learns\n{gap}"


def _worse(share: float) -> str:
    return f"{abs(share):.1%} {'worse' if share > 0 else 'better'}"


def _gap(each: Pairs) -> str:
    if len(each.seeds) < 2:
        return f"{each.mean:+.2%}, no error"
    low, high = each.interval
    return f"{each.mean:+.2%}, between {low:+.1%} and {high:+.1%}"


def _in_order(found: Runs) -> list[Row]:
    order = [*ladder()]
    return sorted(rows(found), key=lambda row: order.index(row.name))


def _for_drafts(row: Row) -> float:
    """The modules' share of a token's training FLOPs, in percent."""
    whole = ladder()[row.name].cfg
    main = replace(whole, num_nextn_predict_layers=0)
    return 100 * (1 - training_flops_per_token(main) / training_flops_per_token(whole))


def _costs(found: Runs) -> list[tuple]:
    activated = {r.shapes["variant"]: r.shapes["activated_parameters"] for r in found}
    return [
        ("training MFLOP a token", lambda r: r.training_flops_per_token / 1e6, 2),
        ("of them for multi-token prediction, %", _for_drafts, 1),
        ("parameters, million", lambda r: r.parameters / 1e6, 2),
        ("activated by a token, million", lambda r: activated[r.name] / 1e6, 2),
        ("weights with masters, MB", lambda r: r.weight_bytes / 1e6, 1),
        ("optimizer, MB", lambda r: r.optimizer_bytes / 1e6, 1),
        ("activations kept, KB a token", lambda r: r.activation_bytes_per_token / 1e3, 1),
        ("cache, bytes a token", lambda r: r.cache_bytes_per_token, 0),
        ("processor seconds a step", lambda r: r.seconds, 2),
    ]
