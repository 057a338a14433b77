"""What the runs of the ladder say: a row a rung, and its difference from the baseline by seed."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean, stdev

from dsv3_tutorial.bench.codesign_ladder import BASELINE, ladder
from dsv3_tutorial.bench.precision_pairs import INTERVAL, Pairs, factor, paired
from dsv3_tutorial.receipts import Receipt


@dataclass(frozen=True)
class Row:
    """One rung's runs together. Loss in bits per byte with its standard error; bytes as held.

    error is infinite for one seed, which has none. `draft` is the MTP head's loss after the last
    step, on the same windows less their first symbol; None without a module. `seconds` are of the
    processor, for one step.
    """

    name: str
    seeds: list[int]
    loss: float
    error: float
    draft: float | None
    seconds: float
    parameters: int
    training_flops_per_token: float
    weight_bytes: float
    optimizer_bytes: float
    activation_bytes_per_token: float
    cache_bytes_per_token: float


def rows(found: Iterable[Receipt]) -> list[Row]:
    """A row for each rung and device that has receipts, as the ladder goes up.

    Takes receipts of one length and one learning rate: `receipts.latest("codesign", length=500,
    peak_lr=0.003)`.
    """
    by_name: dict[tuple[str, str], list[Receipt]] = {}
    for receipt in found:
        by_name.setdefault((receipt.shapes["variant"], receipt.device), []).append(receipt)
    order = [*ladder()]
    parted = sorted(by_name.items(), key=lambda item: order.index(item[0][0]))
    return [_row(name, each) for (name, _), each in parted]


def table(found: Iterable[Receipt]) -> str:
    """The rows in words, one a line under a head: losses with errors, seconds, megabytes."""
    head = "rung", "bits/byte", "+-", "draft", *_HEAD
    lines = [_LINE.format(*head)]
    lines += [
        _LINE.format(
            row.name,
            f"{row.loss:.4f}",
            f"{row.error:.4f}" if len(row.seeds) > 1 else "1 run",
            "-" if row.draft is None else f"{row.draft:.4f}",
            f"{row.seconds:.2f}",
            f"{row.parameters / 1e6:.2f}M",
            f"{row.training_flops_per_token / 1e6:.2f}",
            *(f"{held / 1e6:.1f}M" for held in (row.weight_bytes, row.optimizer_bytes)),
            f"{row.activation_bytes_per_token / 1e3:.1f}K",
            f"{row.cache_bytes_per_token / 1e3:.1f}K",
        )
        for row in rows(found)
    ]
    return "\n".join(lines)


_HEAD = "s/step", "params", "MFLOP", "weights", "optim.", "act.", "KV"
_LINE = "{:<15} {:>9} {:>6} {:>6} {:>6} {:>6} {:>6} {:>7} {:>6} {:>6} {:>6}"


def compared(found: Iterable[Receipt]) -> dict[str, Pairs]:
    """Each rung's held-out loss over the baseline's, less 1, paired by seed: as `rows` takes it."""
    return paired(found, base=BASELINE)


def sentence(pairs: Pairs) -> str:
    """A difference in words, with what so few pairs cannot exclude."""
    count = len(pairs.seeds)
    if count < 2:
        return f"{pairs.variant}: {pairs.mean:+.2%} for one seed, and no error without a second"
    reach = factor(count, INTERVAL) * pairs.error
    return (
        f"{pairs.variant}: {pairs.mean:+.2%} +- {pairs.error:.2%} over {count} seeds; "
        f"between {pairs.mean - reach:+.2%} and {pairs.mean + reach:+.2%}"
    )


def _row(name: str, found: list[Receipt]) -> Row:
    values, first = [receipt.value for receipt in found], found[0].shapes
    spent = mean(r.shapes["processor_seconds"] / r.shapes["length"] for r in found)
    drafts = [r.shapes["mtp_held_out"] for r in found]
    same = "parameters", "training_flops_per_token", "cache_bytes_per_token"
    held = "weight_bytes", "optimizer_bytes", "activation_bytes_per_token"
    return Row(
        name=name,
        seeds=[receipt.shapes["seed"] for receipt in found],
        loss=mean(values),
        error=stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf,
        draft=None if None in drafts else mean(drafts),
        seconds=spent,
        **{key: first[key] for key in same},
        **{key: mean(r.shapes[key] for r in found) for key in held},
    )
