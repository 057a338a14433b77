"""Drafting as it was measured on a CPU, by batch, beside what the bytes alone would bring."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_tutorial import receipts
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import speculation
from dsv3_tutorial.learn.figures.inference_records import Speculated, missing, speculated
from dsv3_tutorial.learn.figures.style import INK, figure, finish, note, plain_log, series

CONTEXT = 128  # cached tokens of each text, about: half of what was written
DRAFTED = {0: ("no draft", series(6)), 1: ("1 draft", series(2)), 2: ("2 drafts", series(4))}


def measured(folder: Path | None = None) -> Figure:
    """Our receipts: tokens a second against the batch with and without drafts, and the gain.

    Beside the gain, dashed, what the bytes of `small` alone would bring at the measured acceptance.
    """
    found = speculated(folder)
    if not {(1, 0), (1, 1)} <= set(found):
        return missing("inference", "decoding with and without drafts, by batch")
    fig, (left, right) = figure(12, 4.5, columns=2)
    for drafts, (label, look) in DRAFTED.items():
        here = {batch: one for (batch, k), one in found.items() if k == drafts}
        left.plot(list(here), [one.rate for one in here.values()], label=label, **look)
        if drafts:
            _gains(right, drafts, found, look)
    for ax in (left, right):
        plain_log(ax.xaxis, 2)
    plain_log(left.yaxis, subs=(1.0, 2.0, 5.0))
    right.axhline(1, color=INK, linewidth=1)
    right.set_ylim(bottom=0)
    right.plot([], [], color=INK, label="measured")
    right.plot([], [], color=INK, linestyle="--", label="if bytes alone took time, even routing")
    last = max(batch for batch, drafts in found if drafts == 1)
    one, many = (found[batch, 1].rate / found[batch, 0].rate for batch in (1, last))
    title = f"One draft makes one text {one:.2f} times as fast,\n{last} texts {many:.2f} times"
    finish(fig, left, title, "texts in a step", "tokens a second, all texts")
    few, full = (bytes_bound(batch, 1, found[batch, 1].tokens_per_pass) for batch in (1, last))
    title = "If bytes alone took the time, one draft would\n"
    title += f"bring {few:.2f}x at one text, {full:.2f}x at {last} (dashed)"
    finish(fig, right, title, "texts in a step", "times as fast as without drafts")
    kept = found[1, 1].acceptance
    rows = [one.row for one in found.values()]
    said = f"`small`, float32, {kept:.0%} of single drafts kept at batch 1; bars: quartiles"
    note(fig, f"{said}; {receipts.caption(rows)}{_above(found)}")
    return fig


def _above(found: dict[tuple[int, int], Speculated]) -> str:
    """What a measured gain above its dashed line means, where there is one."""
    over = any(
        one.rate / found[batch, 0].rate > bytes_bound(batch, drafts, one.tokens_per_pass)
        for (batch, drafts), one in found.items()
        if drafts in (1, 2) and (batch, 0) in found
    )
    said = "\na gain above its dashed line is no error: there time goes to other things than "
    return f"{said}bytes, or neighbours share experts" if over else ""


def bytes_bound(batch: int, drafts: int, tokens_per_pass: float) -> float:
    """The gain by the bytes of `small`: even routing, each draft reads its module and the head.

    That of drafts that are all kept, scaled to the tokens that a pass really gave. No true bound:
    tokens that share more experts than strangers gain more.
    """
    how = {"context": CONTEXT, "drafted": True, "weights": "float32", "cache": "float32"}
    every = speculation.expert_bytes_bound(ModelConfig.named("small"), batch, 1.0, drafts, **how)
    return every * tokens_per_pass / (drafts + 1)


def _gains(ax: Axes, drafts: int, found: dict[tuple[int, int], Speculated], look: dict) -> None:
    """Measured gain, and dashed that of the bytes."""
    pairs = {b: one for (b, k), one in found.items() if k == drafts and (b, 0) in found}
    for batch, one in pairs.items():
        plain, own = found[batch, 0].row.spread, one.row.spread
        ends = own["q1"] / plain["q3"], own["q3"] / plain["q1"]
        ax.plot([batch, batch], ends, color=look["color"], linewidth=1)
    ax.plot(list(pairs), [one.rate / found[b, 0].rate for b, one in pairs.items()], **look)
    allowed = [bytes_bound(b, drafts, one.tokens_per_pass) for b, one in pairs.items()]
    ax.plot(list(pairs), allowed, color=look["color"], linestyle="--")
