"""Real processes as a network: their alpha and beta, and two "nodes" on a slow cable, recorded.

What is recorded is of `bench network`. Predictions are cost.comm's, from fits to messages between
two processes; no collective is fitted to itself.
"""

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import network, network_table
from dsv3_tutorial.bench.exchanges import BY_NODE, FLAT, Case, predicted
from dsv3_tutorial.cost.tiers import Network
from dsv3_tutorial.learn.figures.style import INK, figure, note, plain_log, series
from dsv3_tutorial.receipts import Receipt

WORLD = 4
MESSAGES = tuple(4**k for k in (1, 4, 6, 8, 9, 10, 11))  # 4 B to 4 MiB
# Goes first in each round and is not used: after the longest message the next one is slow.
WARM = Case("p2p", "inside", 1000)
SUMMED = 2**22  # bytes of the all-reduce that is predicted
TITLES = {
    "all_reduce": "all-reduce",
    "all_to_all": "all-to-all",
    "dispatch": "dispatch, the same copy to all",
}
WHAT = (
    "all-to-all: every rank has other bytes for each; dispatch: it has the same for all,",
    "as of a token with experts everywhere, and by node one copy crosses",
)
FORMS = {FLAT: "flat", BY_NODE: "by node"}


def live(seconds: float = 45.0) -> None:
    """Measure messages between processes here, fit, predict an all-reduce of 4 MiB, and run it."""
    pings = [WARM, *(Case("p2p", "inside", n) for n in MESSAGES)]
    times = network.measure(pings, WORLD, 0.7 * seconds)
    found = {case.bytes: statistics.median(times[case]) for case in pings[1:]}
    tier = network.fit(found)
    print(f"{'bytes':>12}{'measured':>14}{'alpha + n / beta':>20}")
    for n, measured in found.items():
        print(f"{n:>12,}{measured * 1e6:>11,.0f} us{tier.time(n) * 1e6:>17,.0f} us")
    print(f"alpha {tier.alpha * 1e6:,.0f} us, beta {tier.bandwidth / 1e6:,.0f} MB/s")
    case = Case("all_reduce", FLAT, SUMMED)
    said = predicted(case, Network(tier, tier, WORLD), WORLD)
    print(f"all-reduce of {SUMMED:,} bytes among {WORLD}: {said * 1e3:.2f} ms predicted,", end=" ")
    took = statistics.median(network.measure([case], WORLD, 0.3 * seconds)[case])
    print(f"{took * 1e3:.2f} ms measured, {took / said:.1f} times as long")
    print(f"beta is of two processes alone; here {WORLD} share {os.cpu_count()} cores,", end=" ")
    print("and also add numbers")


def fit_table(folder: Path | None = None) -> None:
    """Print alpha and beta of the recorded machine's processes, or that nothing is recorded."""
    rows = [r for r in _recorded(folder) if r.shapes["nodes"] == 1]
    fits = {what: {_key(r): r for r in rows if r.what == what} for what in ("alpha", "bandwidth")}
    if not fits["alpha"]:
        print(_absent("exchange between processes"))
        return
    print(f"{'':14}{'processes':>10}{'alpha':>12}{'beta':>18}")
    for key, alpha in fits["alpha"].items():
        beta = fits["bandwidth"].get(key)
        said = f"{beta.value / 1e6:,.0f} MB/s" if beta else "no limit seen"
        name = TITLES.get(alpha.shapes["op"], "message")
        print(f"{name:14}{alpha.shapes['ranks']:>10}{alpha.value * 1e6:>9,.0f} us{said:>18}")
    print(f"measured: {receipts.caption(rows)}")


def throttled(folder: Path | None = None) -> Figure:
    """Exchanges between two "nodes" on slow cables, flat and by node, measured and predicted.

    Raises LookupError where none is recorded: it takes root on Linux.
    """
    rows = [r for r in _recorded(folder) if r.shapes["nodes"] > 1]
    made = {key[2]: one for key, one in network_table.networks(rows).items()}
    rows = [r for r in rows if r.what == "exchange" and r.shapes["op"] in TITLES]
    rows = [r for r in rows if r.shapes["mbit"] in made]
    if not rows:
        raise LookupError(_absent("throttled link"))
    rates = sorted({r.shapes["mbit"] for r in rows}, key=_slowness)
    ops = [op for op in TITLES if any(r.shapes["op"] == op for r in rows)]
    fig, axes = figure(11, 4.8, columns=3)
    for ax, op in zip(axes, ops):
        _panel(ax, [r for r in rows if r.shapes["op"] == op], rates, made)
        ax.set_title(TITLES[op], fontsize=11, color=INK)
    axes[0].set_ylabel("ms", fontsize=12, color=INK)
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower left", ncols=2, fontsize=10, frameon=False)
    fig.suptitle(_title(rows, rates[-1]), x=0.01, ha="left", fontsize=13, color=INK, weight="bold")
    said = [*WHAT, *_off(rows, made), f"measured: {receipts.caption(rows)}"]
    note(fig, "\n".join(said))
    return fig


def _off(rows: Sequence[Receipt], made: dict[int | None, Network]) -> list[str]:
    """How far predictions are off, where cables are slow and where nothing but processes is."""
    ratios = [
        (r.shapes["mbit"], r.value / network_table.prediction(r, made[r.shapes["mbit"]]))
        for r in rows
    ]
    slow = [abs(1 / ratio - 1) for mbit, ratio in ratios if mbit]
    free = [ratio for mbit, ratio in ratios if not mbit]
    said = []
    if slow:
        median = f"{statistics.median(slow):.0%} in the median"
        said.append(f"predictions on slow cables are off by {median}, {max(slow):.0%} at most;")
    if free:
        least, most = min(free), max(free)
        said.append(f"without a limit it took {least:.1f} to {most:.1f} times as long as predicted")
    return said


def _panel(
    ax: Axes, rows: Sequence[Receipt], rates: list[int | None], made: dict[int | None, Network]
) -> None:
    """One operation: filled marks with quartiles as measured, hollow ones as predicted."""
    for index, (form, title) in enumerate(FORMS.items()):
        own = {r.shapes["mbit"]: r for r in rows if r.shapes["form"] == form}
        places = [place + 0.16 * (2 * index - 1) for place, rate in enumerate(rates) if rate in own]
        found = [own[rate] for rate in rates if rate in own]
        ms = [r.value * 1e3 for r in found]
        spread = [(r.value - r.spread["q1"], r.spread["q3"] - r.value) for r in found]
        bars = [[1e3 * side for side in sides] for sides in zip(*spread)]
        look = {"linestyle": "none", "markersize": 8, **series(index)}
        ax.errorbar(places, ms, yerr=bars, label=f"{title}, measured", capsize=3, **look)
        said = [network_table.prediction(r, made[r.shapes["mbit"]]) * 1e3 for r in found]
        look |= {"markersize": 13, "fillstyle": "none", "markeredgewidth": 1.6}
        ax.plot(places, said, label=f"{title}, predicted", **look)
    plain_log(ax.yaxis, subs=(1.0, 2.0, 5.0))
    ax.set_xticks(range(len(rates)), ["no limit" if r is None else f"{r:,}" for r in rates])
    ax.set_xlim(-0.5, len(rates) - 0.5)
    ax.set_xlabel("cables, Mbit/s", fontsize=12, color=INK)


def _title(rows: Sequence[Receipt], rate: int | None) -> str:
    """What going by node buys on the slowest cable, for the exchange that gains most."""
    took = {(r.shapes["op"], r.shapes["form"]): r.value for r in rows if r.shapes["mbit"] == rate}
    gains = {op: took[op, FLAT] / took[op, BY_NODE] for op in TITLES if (op, FLAT) in took}
    best, worst = (pick(gains, key=gains.__getitem__) for pick in (max, min))
    where = "cables without a limit" if rate is None else f"cables of {rate:,} Mbit/s"
    title = f"On {where}, by node: {_article(best)} {gains[best]:.2f} times as fast as flat"
    if best == worst:
        return title
    share = " (nothing to share)" if worst == "all_to_all" else ""
    return f"{title},\n{_article(worst)}{share} {_times(gains[worst])}"


def _article(op: str) -> str:
    name = TITLES[op].split(",")[0]
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _times(gain: float) -> str:
    return f"{gain:.2f} times as fast" if gain >= 1 else f"takes {1 / gain:.2f} times as long"


def _slowness(rate: int | None) -> float:
    return -rate if rate else float("-inf")


def _key(receipt: Receipt) -> tuple[Any, ...]:
    return tuple(receipt.shapes[name] for name in ("op", "form", "ranks"))


def _recorded(folder: Path | None) -> list[Receipt]:
    """The newest receipts of the device that measured last; none where there is no file."""
    if network.NAME not in receipts.names(folder):
        return []
    rows = receipts.latest(network.NAME, folder=folder)
    newest = max(rows, key=lambda r: r.date).device
    return [r for r in rows if r.device == newest]


def _absent(what: str) -> str:
    return (
        f"No {what} is recorded, so there is nothing to show. Run: python -m dsv3_tutorial bench "
        f"{network.NAME} (the throttled link needs root on Linux)."
    )
