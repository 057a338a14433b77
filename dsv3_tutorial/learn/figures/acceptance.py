"""Which tokens a draft guesses: the share kept by kind of token, in two texts."""

from pathlib import Path

from matplotlib.figure import Figure

from dsv3_tutorial import receipts
from dsv3_tutorial.learn.figures.inference_records import found, missing
from dsv3_tutorial.learn.figures.style import INK, SERIES, figure, finish, note
from dsv3_tutorial.receipts import Receipt

RULES = {
    ("generated", "greedy"): ("the model's own text,\ngreedy", {"color": SERIES[0]}),
    ("held-out", "greedy"): (
        "held-out files,\nthe same best guess",
        {"color": SERIES[5], "hatch": "//"},
    ),
    ("held-out", "sampled"): ("held-out files,\nsampled", {"color": SERIES[1], "hatch": ".."}),
}
ALL = "all"
PLURAL = {
    "space": "spaces",
    "keyword": "keywords",
    "name": "names",
    "operator": "operators",
    "number": "numbers",
    "string or comment": "strings and comments",
}
QUARTILE = 0.6745  # normal deviations from the mean to a quartile
SURE = 0.05  # a share with a larger standard error decides no title
WHAT = "acceptance of drafts by kind of token"

Shares = dict[tuple[str, str], dict[str, Receipt]]


def shares(folder: Path | None = None) -> Shares:
    """{(text, rule): {kind: receipt}}, the value being the share of drafts that is kept."""
    by: Shares = {}
    for row in found("inference", "acceptance by kind", folder):
        by.setdefault((row.shapes["text"], row.shapes["rule"]), {})[row.shapes["kind"]] = row
    return {key: by[key] for key in RULES if key in by}


def error(row: Receipt) -> float:
    """The standard error of a share, from its quartiles: tokens as independent draws."""
    return (row.spread["q3"] - row.spread["q1"]) / 2 / QUARTILE


def by_kind(folder: Path | None = None) -> Figure:
    """Bars: share of first drafts kept, by kind of the token that was to be guessed."""
    by = shares(folder)
    if not by:
        return missing("inference", WHAT)
    first = next(iter(by.values()))
    kinds = sorted(set(first) - {ALL}, key=lambda kind: first[kind].value)
    fig, ax = figure(10, 1.8 + 0.6 * len(kinds))
    for index, (key, rows) in enumerate(by.items()):
        label, look = RULES[key]
        here = [(n, rows[kind]) for n, kind in enumerate([ALL, *kinds]) if kind in rows]
        at = [n + ((len(by) - 1) / 2 - index) * 0.8 / len(by) for n, _ in here]
        values = [100 * row.value for _, row in here]
        bars = [200 * error(row) for _, row in here]
        ax.barh(at, values, 0.76 / len(by), xerr=bars, ecolor=INK, label=label, **look)
        for place, (_, row) in zip(at, here, strict=True):
            ax.text(101, place, f"{row.shapes['tokens']:,}", va="center", fontsize=8, color=INK)
    ax.set_yticks(range(len(kinds) + 1), ["all tokens", *kinds])
    ax.set_xlim(0, 109)
    finish(fig, ax, _title(by, kinds), "drafts kept, %", "", legend=False)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center", frameon=False)
    rows = [row for group in by.values() for row in group.values()]
    note(
        fig,
        f"right: tokens; bars: two errors, if tokens were independent; {receipts.caption(rows)}",
    )
    return fig


def _title(by: Shares, kinds: list[str]) -> str:
    (text, _), rows = next(iter(by.items()))
    sure = [kind for kind in kinds if error(rows[kind]) < SURE] or kinds
    ends = [f"{rows[k].value:.0%} of {PLURAL.get(k, k)}" for k in (sure[0], sure[-1])]
    whose = "the model's own text" if text == "generated" else "held-out files"
    title = f"In {whose} {rows[ALL].value:.0%} of drafts are kept"
    files = by.get(("held-out", "greedy"))
    if text == "generated" and files:
        title += f", in held-out files {files[ALL].value:.0%}"
    return f"{title}.\nIn {whose}: {', '.join(ends)}"
