"""What serving was measured to cost: receipts, or none where nobody has measured yet.

One look a format, wherever it is drawn: weights are filled marks, caches hollow ones.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dsv3_tutorial import receipts
from dsv3_tutorial.learn.figures.style import INK, SERIES, figure
from dsv3_tutorial.receipts import Receipt

LOOK = {  # a colour for each kind of number, a marker for each way to share scales
    "float32": {"color": SERIES[6], "marker": "X"},
    "bf16": {"color": SERIES[0], "marker": "o"},
    "int8": {"color": SERIES[1], "marker": "s"},
    "int8-tensor": {"color": SERIES[1], "marker": "^"},
    "int8-tile": {"color": SERIES[1], "marker": "D"},
    "fp8": {"color": SERIES[2], "marker": "v"},
    "int4": {"color": SERIES[3], "marker": "P"},
}
NAMES = {
    "float32": "float32",
    "bf16": "BF16",
    "int8": "INT8, by row",
    "int8-tensor": "INT8, one scale",
    "int8-tile": "INT8, 1 x 128",
    "fp8": "FP8, 128 x 128",
    "int4": "INT4, 1 x 128",
}


def found(name: str, what: str, folder: Path | None = None, **shapes: Any) -> list[Receipt]:
    """The newest receipts of one benchmark that say `what`, with these shapes; [] if it never ran.

    Of several devices the one measured last. Raises ReceiptError for a damaged file.
    """
    if name not in receipts.names(folder):
        return []
    rows = [
        row
        for row in receipts.latest(name, folder=folder)
        if row.what == what and shapes.items() <= dict(row.shapes).items()
    ]
    rows.sort(key=lambda row: row.date)
    return [row for row in rows if row.device == rows[-1].device]


def missing(name: str, what: str) -> Figure:
    """A picture that says in words what is not there, and how to get it."""
    fig, ax = figure(8, 1.4)
    ax.axis("off")
    title = f"Not measured yet: {what}"
    ax.set_title(title, loc="left", fontsize=13, color=INK, fontweight="bold")
    said = (
        f"python -m dsv3_tutorial bench {name} measures it, and writes data/measured/{name}.jsonl"
    )
    ax.text(0, 0.5, said, fontsize=11, color=INK, transform=ax.transAxes)
    return fig


def missing_in_words(name: str, what: str) -> str:
    """The same for a table."""
    return f"Not measured yet: {what}. python -m dsv3_tutorial bench {name} measures it."


def decode_steps(folder: Path | None = None, **shapes: Any) -> list[Receipt]:
    """Seconds of one decode step: shapes model, form, batch, context."""
    return found("inference", "decode step", folder, **shapes)


def relative_times(
    folder: Path | None = None, model: str = "trained"
) -> tuple[dict[str, float], list[Receipt]]:
    """Time of a token over float32's by form, and the receipts of it.

    At batch 1 and the shortest context that was timed.
    """
    rows = decode_steps(folder, model=model, batch=1)
    shortest = min((row.shapes["context"] for row in rows), default=0)
    rows = [row for row in rows if row.shapes["context"] == shortest]
    by = {row.shapes["form"]: row.value for row in rows}
    if "float32" not in by:
        return {}, []
    return {form: value / by["float32"] for form, value in by.items()}, rows


@dataclass(frozen=True)
class Speculated:
    """One batch size with so many drafts a pass: tokens a second of all texts together."""

    rate: float
    acceptance: float  # of all drafts, 0 without any
    tokens_per_pass: float
    row: Receipt


def speculated(folder: Path | None = None) -> dict[tuple[int, int], Speculated]:
    """{(batch, drafts): what was measured}, by batch."""
    rows = found("inference", "speculation", folder)
    made = {}
    for row in sorted(rows, key=lambda row: (row.shapes["batch"], row.shapes["drafts"])):
        of = row.shapes
        facts = row.value, of["acceptance"], of["tokens_per_pass"], row
        made[of["batch"], of["drafts"]] = Speculated(*facts)
    return made


def products(folder: Path | None = None) -> dict[int, dict[str, dict[int, Receipt]]]:
    """{side: {form: {rows: receipt}}} of products with side x side weights, float32 too."""
    by: dict[int, dict[str, dict[int, Receipt]]] = {}
    for row in found("inference", "product by rows", folder):
        of = row.shapes
        by.setdefault(of["side"], {}).setdefault(of["form"], {})[of["rows"]] = row
    return by
