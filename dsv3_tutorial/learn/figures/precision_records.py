"""The recorded runs in BF16 and FP8, and their pairs: what the figures of `precision_runs` draw.

A run is one receipt of `bench precision`. What is compared is always a pair with the same seed,
that is, the same weights at the start and the same text: loss over BF16's loss, less 1.
"""

from pathlib import Path

import numpy as np

from dsv3_tutorial import receipts
from dsv3_tutorial.bench.precision import MORE, NAME, VARIANTS
from dsv3_tutorial.bench.precision_pairs import BASE, Pairs, paired
from dsv3_tutorial.learn.figures.style import series

Runs = dict[str, dict[int, receipts.Receipt]]
ORDER = [*VARIANTS, *MORE]


def runs(folder: Path | None = None) -> Runs:
    """The longest recorded runs, in the benchmark's order: variant -> seed -> its receipt.

    Raises LookupError where nothing is recorded yet.
    """
    recorded = receipts.latest(NAME, folder=folder) if NAME in receipts.names(folder) else []
    for length in sorted({r.shapes["length"] for r in recorded}, reverse=True):
        found: Runs = {variant: {} for variant in ORDER}
        for receipt in (r for r in recorded if r.shapes["length"] == length):
            found.setdefault(receipt.shapes["variant"], {})[receipt.shapes["seed"]] = receipt
        found = {variant: seeds for variant, seeds in found.items() if seeds}
        if BASE in found and len(found) > 1:
            return found
    raise LookupError(
        f"no pairs with {BASE} are recorded, so there is nothing to compare. "
        f"Run: python -m dsv3_tutorial bench {NAME}"
    )


def pairs(found: Runs | None = None) -> dict[str, Pairs]:
    """Each variant's held-out loss against BF16's, seed by seed, in the benchmark's order."""
    found = found or runs()
    made = paired([r for seeds in found.values() for r in seeds.values()])
    return {variant: made[variant] for variant in found if variant in made}


def differences(found: Runs, variant: str) -> tuple[list[int], dict[int, np.ndarray]]:
    """A variant's batches against BF16's on the same text: steps, and seed -> relative difference.

    Each number is a mean over EVERY steps; only seeds that both have.
    """
    base, seeds = found[BASE], found[variant]
    shared = sorted(seed for seed in seeds if seed in base)
    steps = seeds[shared[0]].shapes["steps"]
    return steps, {
        seed: np.array(seeds[seed].shapes["loss"]) / np.array(base[seed].shapes["loss"]) - 1
        for seed in shared
    }


def look(variant: str) -> dict[str, str]:
    """A variant's colour and marker, the same in every figure."""
    return series(ORDER.index(variant) if variant in ORDER else len(ORDER))


def nested(index: int, count: int, steps: int) -> dict:
    """Lines and hollow marks that get smaller, each inside the one before, and set at other steps.

    So four curves that lie on each other are seen to be four.
    """
    inner, every = count - 1 - index, max(1, steps // 10)
    size = {"markersize": 5 + 3.5 * inner, "linewidth": 1.2 + 1.3 * inner}
    place = {"markevery": (index * every // count, every)}
    return {"fillstyle": "none", "markeredgewidth": 1.6, **size, **place}
