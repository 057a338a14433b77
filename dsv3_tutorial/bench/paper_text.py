"""The long table of printed numbers as text and as a page of Markdown."""

import math
from collections import Counter
from collections.abc import Iterator
from textwrap import wrap

from dsv3_tutorial import paper
from dsv3_tutorial.bench.paper_misprints import inconsistencies
from dsv3_tutorial.bench.paper_verdict import KINDS, NEAR, Reproduced, half_digit

INDENT = " " * 6
PLANNER = "What the planner predicts"
# In the order of the page; tables that are not named here follow by name.
TITLES = {
    "kv_cache": "Cache of a token (ISCA table 1)",
    "training_compute": "FLOPs of a trained token (ISCA table 2)",
    "topology": "Networks of switches (ISCA table 3)",
    "step_time": "A training step on 2,048 GPUs (ISCA table 4)",
    "network": "Links (ISCA section 4 and table 5; V3 report, section 3.2)",
    "limits": "The bound of decoding (ISCA section 2.3.2)",
    "deepep": "DeepEP on H800s (its README; ISCA figure 7)",
    "fp8": "FP8",
    "training_cost": "What training cost (V3 report, table 1)",
    "schedule": "Pipeline schedules (V3 report, table 2)",
    "recipe": "The recipe (V3 report, section 4)",
    "sizes": "Sizes of models",
    "mla_ratios": "DeepSeek-V2, and what MLA saves",
    "serving": "The service (its overview; V3 report, section 3.4)",
    "remarks": "Single numbers in the text",
    "published_runs": "Training runs that others publish",
    "kernels": "Kernels: what the planner's efficiencies are calibrated on",
    "future": "Models and machines after V3",
    "memory_wall": "The memory wall (ISCA section 2.1)",
    "balance": "Balance without a loss",
    "ablations": "What a second token and the balance bias gave (V3 report, tables 4 and 5)",
}


def text(
    checks: list[Reproduced],
    quoted: list[paper.Row],
    predicted: list[Reproduced],
    only: str | None = None,
) -> str:
    """For a terminal, at most 100 columns: a line a number, what does not fit, and the count."""
    lines = []
    if only is None:
        lines += [PLANNER, *(f"    {line}" for line in map(_line, predicted)), ""]
    for table, rows in _by_table(checks, quoted, only):
        lines += [TITLES.get(table, table), *(f"  {line}" for line in map(_line, rows)), ""]
    if only in (None, "wrong"):
        lines += ["What does not fit in the papers"]
        for one in inconsistencies():
            lines += [f"  {one.what} ({one.where})"]
            found = f"printed {one.printed}; ours {one.ours}: {one.calculation}"
            lines += wrap(found, 94, initial_indent=INDENT, subsequent_indent=INDENT)
        lines += [""]
    return "\n".join([*lines, summary(checks, quoted), ""])


def _line(row: Reproduced | paper.Row) -> str:
    if isinstance(row, Reproduced):
        ours, verdict = number(row.computed, row.row.value), row.verdict
        reason = row.why
        row = row.row
    else:
        ours, verdict, reason = "", "quoted", row.quoted
    line = f"{row.id:<48}{number(row.value):>14}{ours:>14}  {verdict}"
    return "\n".join([line, *wrap(reason, 94, initial_indent=INDENT, subsequent_indent=INDENT)])


def markdown(
    checks: list[Reproduced],
    quoted: list[paper.Row],
    predicted: list[Reproduced],
    only: str | None = None,
) -> str:
    """The page docs/paper.md."""
    lines = [
        "# The papers, number by number",
        "",
        "Written by `python -m dsv3_tutorial paper --markdown`, and checked against it by a test.",
        "",
        summary(checks, quoted),
        "",
        "*equal*: the same when rounded as printed. *within x %*: as far apart. *differs*: by more "
        f"than {100 * NEAR:.0f} %, or the printed number is at odds with its own source; the "
        "reason stands beside it. *quoted*: nothing here can compute it. Where ours is from:",
        "",
        *(f"- {kind}: {about}" for kind, about in KINDS.items()),
        "",
    ]
    if only in (None, "wrong"):
        lines += list(_misprints())
    if only is None:
        lines += [f"## {PLANNER}", "", *_page_table(predicted), ""]
    for table, rows in _by_table(checks, quoted, only):
        lines += [f"## {TITLES.get(table, table)}", "", *_page_table(rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def _misprints() -> Iterator[str]:
    yield from ("## What does not fit", "", "| what | where | printed | ours | calculation |")
    yield "|---|---|---:|---:|---|"
    for one in inconsistencies():
        cells = one.what, one.where, one.printed, one.ours, one.calculation
        yield f"| {' | '.join(map(_cell, cells))} |"
    yield ""


def _page_table(rows: list[Reproduced | paper.Row]) -> Iterator[str]:
    yield "| number | printed | unit | where | ours | verdict | how, or why not |"
    yield "|---|---:|---|---|---:|---|---|"
    for one in rows:
        if isinstance(one, Reproduced):
            row, ours, verdict = one.row, number(one.computed, one.row.value), one.verdict
            how = f"{one.kind}: {one.how}" + (f". **{_sentence(one.why)}**" if one.why else "")
        else:
            row, ours, verdict, how = one, "", "quoted", one.quoted
        where = f"{row.paper.split(',')[0]}, {row.where}"
        cells = f"`{row.id}`", number(row.value), row.unit, where, ours, verdict, how
        yield f"| {' | '.join(map(_cell, cells))} |"


def summary(checks: list[Reproduced], quoted: list[paper.Row]) -> str:
    """How many numbers of each verdict there are, in one sentence."""
    count = Counter(check.verdict.split()[0] for check in checks)
    return (
        f"{len(checks) + len(quoted)} printed numbers: {len(checks)} computed again "
        f"({count['equal']} equal, {count['within']} within {100 * NEAR:.0f} %, "
        f"{count['differs']} differ), {len(quoted)} quoted."
    )


def number(value: float, like: float | None = None) -> str:
    """A number as it is printed; ours, with one digit more than the printed `like` has."""
    if float(value).is_integer():
        return f"{value:,.0f}"
    if like is None:
        return f"{value:g}" if value < 1000 else f"{value:,}"
    if like < 1e-3:
        return f"{value:.3g}"
    digits = 1 - round(math.log10(2 * half_digit(like)))
    return f"{value:,.{digits}f}"


def _by_table(
    checks: list[Reproduced], quoted: list[paper.Row], only: str | None
) -> Iterator[tuple[str, list[Reproduced | paper.Row]]]:
    """The chosen rows by their file, in its order."""
    known = {check.row.id: check for check in checks} | {row.id: row for row in quoted}
    order = list(TITLES)
    for table in sorted(paper.tables(), key=lambda t: order.index(t) if t in order else len(order)):
        rows = [known[row.id] for row in paper.rows(table) if row.id in known]
        if chosen := [row for row in rows if _chosen(row, only)]:
            yield table, chosen


def _chosen(row: Reproduced | paper.Row, only: str | None) -> bool:
    if only is None:
        return True
    if isinstance(row, paper.Row):
        return only == "quoted"
    return only == "reproduced" or (only == "wrong" and row.why != "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
