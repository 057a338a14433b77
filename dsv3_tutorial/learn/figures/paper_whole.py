"""Every number that our code computes again, beside what is printed; and what does not fit."""

import textwrap
from collections import Counter
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from dsv3_tutorial.bench import paper, paper_misprints
from dsv3_tutorial.bench.paper_verdict import KINDS, NEAR, Inconsistency, Reproduced
from dsv3_tutorial.learn.figures.style import (
    COMPUTE,
    IDLE,
    INK,
    MEMORY,
    figure,
    finish,
    note,
    plain_log,
)

VERDICTS = {"equal": (IDLE, "o"), "within": (COMPUTE, "s"), "differs": (MEMORY, "D")}
EXACT, LEAST = 0.001, 0.00001  # per cent: what differs by less is spread out between these two
# The beginning of a row's id -> what it is about.
GROUPS = {
    "deepep": "DeepEP's kernels",
    "config": "V3's config.json",
    "recipe": "V3's recipe",
    "size": "sizes of models",
    "kv_cache": "caches (ISCA table 1)",
    "kv_cache_ratio": "caches, ratios",
    "v2": "DeepSeek-V2's report",
    "training_flops": "FLOPs (ISCA table 2)",
    "training_rate": "rates of training",
    "topology": "networks (ISCA table 3)",
    "step_time": "the step (ISCA table 4)",
    "network": "links and latencies",
    "limits": "bound of decoding",
    "serving": "serving",
    "schedule": "bubbles (V3 table 2)",
    "training_cost": "cost (V3 table 1)",
    "fp8": "FP8",
    "remark": "remarks in the text",
    "llama3": "Llama 3's training",
    "v3": "V3's text",
}
# Those that change how a number is used, each with what both its numbers are of.
SURPRISES = {
    "the cache that MLA saves": "cache saved by MLA, without its 6 bits",
    "V3 needs an order of magnitude less": "FLOP a token of 72B and 405B over V3's",
    "FLOPs of a token with multi-token prediction": "training FLOP a token, MTP module counted",
    "utilisation of GPUs that multiply in FP8": "share of the FP8 peak that a step reaches",
    "the bubble of a step": "idle seconds of a step, by its own formula",
    "the extension of the context": "GPU hours of two phases of longer contexts",
    "the network's rate in that bound": "bound of decoding, at the 40 GB/s reached",
    "one expert a device, in a rack of 72": "a token in a rack of 72, experts kept as busy",
}
# What is printed of the same thing in the same unit stands in another contradiction.
_PRINTED = {"the network's rate in that bound": "tokens a second of that bound"}
# Quoted numbers of different kinds: a training too large, a service, a choice, too little told.
BELIEVED = {
    "fp8.loss_against_bf16": "how far FP8's loss is off BF16's, at most",
    "serving.output_per_node": "tokens that a node of eight H800 decodes",
    "training_cost.rent": "the rent behind V3's dollars",
    "llama3.hours_405b": "the training of Llama 3.1 405B",
    "training_cost.post_training_hours": "V3's post-training",
}
WIDTH = 100
_IN_A_ROW = 15  # marks that a line of the picture holds apart
_GOLDEN = (5**0.5 - 1) / 2


def differences() -> Figure:
    """A mark for every reproduced number: how far ours is from the printed one, by its subject."""
    found = paper.reproduced()
    names = [*GROUPS.values(), *sorted({_group(one) for one in found} - set(GROUPS.values()))]
    sized = Counter(_group(one) for one in found)
    names = [name for name in names if sized[name]]
    rows = _rows(found, names)
    fig, ax = figure(10, 0.8 + 0.31 * sum(high for _, high in rows.values()))
    for verdict, (colour, marker) in VERDICTS.items():
        told, setting = _told(found, verdict), "setting"
        for hollow in (False, True):
            some = [one for one in told if (one.kind == setting) == hollow]
            face = {"markerfacecolor": "none"} if hollow else {}
            x, y = zip(*(_place(one, found, rows) for one in some)) if some else ((), ())
            label = None if hollow else f"{_WORDS[verdict]} ({len(told)})"
            look = {"color": colour, "marker": marker, "markersize": 4.5, **face}
            ax.plot(x, y, linestyle="", label=label, markeredgewidth=1.1, **look)
    plain_log(ax.xaxis)
    ax.set_xlim(LEAST / 2, 500)
    ax.set_xticks(ticks := [EXACT, 0.01, 0.1, 1, 10, 100], [f"{tick:g}" for tick in ticks])
    ax.axvspan(LEAST / 2, EXACT, color=INK, alpha=0.06, linewidth=0)
    ax.axvline(100 * NEAR, color=INK, linewidth=1, linestyle="--")
    ax.set_yticks([y for y, _ in rows.values()], [f"{name} ({sized[name]})" for name in names])
    ax.set_ylim(sum(high for _, high in rows.values()) - 0.4, -0.6)
    finish(fig, ax, "", f"% between ours and the printed number (shaded: less than {EXACT})", "")
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, 1.065), ncols=3, fontsize=10, frameon=False)
    title = {"x": 0.01, "ha": "left", "fontsize": 13, "color": INK, "weight": "bold"}
    fig.suptitle(_sentence(), **title)
    note(fig, _NOTE)
    return fig


def counts() -> None:
    """Print how many printed numbers are computed again, how they come out, and how."""
    print(f"{_sentence()}.")
    kinds = Counter(one.kind for one in paper.reproduced())
    for kind, about in KINDS.items():
        print(f"{kinds[kind]:>5} {kind:12}{about}")
    others = len(paper_misprints.inconsistencies())
    print(
        f"the {differing()} that differ and the {others} contradictions are two lists: a "
        "contradiction is between\nprinted numbers, or between one of them and a count"
    )


def believed(count: int = 3) -> None:
    """Print some numbers that nothing here can compute, of different kinds, and why each cannot."""
    every = paper.quoted()
    named = {row.id: row for row in every}
    shown = [named[name] for name in BELIEVED] + [row for row in every if row.id not in BELIEVED]
    print(f"{len(every)} numbers have to be believed; {min(count, len(every))} of them:")
    for row in shown[:count]:
        about = BELIEVED.get(row.id, row.id)
        said = f"{about}: {row.value:g} {row.unit} ({row.paper}, {row.where})"
        print(textwrap.fill(said, WIDTH, subsequent_indent="    "))
        print(textwrap.fill(f"not computed: {row.quoted}", WIDTH, **_INDENT))


def differing() -> int:
    """How many of the numbers that are computed again come out differently."""
    return len(_told(paper.reproduced(), "differs"))


def most_different() -> str:
    """The group in which most of the numbers that are computed again come out differently."""
    return Counter(map(_group, _told(paper.reproduced(), "differs"))).most_common(1)[0][0]


def surprises() -> None:
    """Print the contradictions that teach most: what is printed, what is right, and why."""
    print(f"{'':46}{'printed':>25}{'ours':>27}")
    for one in chosen():
        print(f"{one.what:46}{one.printed:>25}{one.ours:>27}")
        print(textwrap.fill(f"{one.where}: {one.calculation}", WIDTH, **_INDENT))
    more = len(paper_misprints.inconsistencies()) - len(SURPRISES)
    print(f"{more} more in docs/paper.md, with every number")


def chosen() -> list[Inconsistency]:
    """SURPRISES, computed, in their order and by their names, printed in the unit of ours.

    Raises KeyError for one that is no longer found.
    """
    found = {one.what: one for one in paper_misprints.inconsistencies()}
    return [
        replace(found[what], what=name, printed=found[_PRINTED.get(what, what)].printed)
        for what, name in SURPRISES.items()
    ]


def furthest(count: int = 8) -> None:
    """Print the numbers that our models miss by most, with the reason that stands beside each."""
    found = sorted(_told(paper.reproduced(), "differs"), key=lambda one: -abs(one.off))
    print(f"{'number':44}{'printed':>10}{'ours':>10}{'off':>8}")
    for one in found[:count]:
        numbers = f"{one.row.value:>10,.4g}{one.computed:>10,.4g}{one.off:>+8.0%}"
        print(f"{one.row.id:44}{numbers}")
        print(textwrap.fill(one.why, WIDTH, **_INDENT))


_NOTE = (
    "hollow: a setting, which our code was told; dashed: 10 %, where a number differs\n"
    "grey as far as 3 %: ours, rounded, is what is printed (0.93 as 0.9); "
    "orange below 10 %: a count or quotient, which must be exact"
)
_INDENT = {"initial_indent": "    ", "subsequent_indent": "    "}
_WORDS = {"equal": "equal as printed", "within": f"within {NEAR:.0%}", "differs": "differs"}


def _sentence() -> str:
    found = paper.reproduced()
    equal, within, differs = (len(_told(found, verdict)) for verdict in VERDICTS)
    total = len(found) + len(paper.quoted())
    return (
        f"{len(found)} of {total} printed numbers computed again: {equal} equal, {within} within "
        f"{NEAR:.0%}, {differs} differ"
    )


def _told(found: list[Reproduced], verdict: str) -> list[Reproduced]:
    return [one for one in found if one.verdict.split()[0] == verdict]


def _group(one: Reproduced) -> str:
    start = one.row.id.split(".")[0]
    return GROUPS.get(start, start)


def _exact(one: Reproduced) -> bool:
    return 100 * abs(one.off) < EXACT


def _rows(found: list[Reproduced], names: list[str]) -> dict[str, tuple[float, float]]:
    """Each group's middle and height on the axis: the more marks lie apart, the taller."""
    apart, rows, top = Counter(_group(one) for one in found if not _exact(one)), {}, -0.5
    for name in names:
        high = max(1.0, apart[name] / _IN_A_ROW)
        rows[name], top = (top + high / 2, high), top + high
    return rows


def _place(
    one: Reproduced, found: list[Reproduced], rows: dict[str, tuple[float, float]]
) -> tuple[float, float]:
    """Per cent and line of a mark; moved a little, so that equal ones do not hide each other."""
    exact, (middle, high) = _exact(one), rows[_group(one)]
    same = [o.row.id for o in found if _group(o) == _group(one) and exact in (False, _exact(o))]
    at = same.index(one.row.id)
    aside = (high - 0.5) * (at * _GOLDEN % 1 - 0.5)  # neighbours far from each other
    x = float(np.geomspace(LEAST, EXACT / 1.5, 32)[at % 32]) if exact else 100 * abs(one.off)
    return x, middle + (0.0 if exact else aside)
