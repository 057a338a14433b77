"""What was lost of a run's gradients in eight bits, step by step and by who shares a scale."""

from pathlib import Path

from dsv3_tutorial import receipts
from dsv3_tutorial.bench.gradients import FEW, NAME, WAYS

Looks = dict[int, dict[str, receipts.Receipt]]
HEADS = {
    "constant 2^-10": "2^-10",
    "constant 2^-16": "2^-16",
    "tensor": "a tensor",
    "block": "128 x 128",
    "tile": "1 x 128",
}


def looks(folder: Path | None = None) -> Looks:
    """The longest recorded run, the latest of several: step -> way of storing -> its receipt.

    Raises LookupError where nothing is recorded yet.
    """
    recorded = receipts.latest(NAME, folder=folder) if NAME in receipts.names(folder) else []
    runs: dict[tuple, Looks] = {}
    for r in recorded:
        of_run = runs.setdefault((r.device, r.threads, r.shapes["seed"]), {})
        of_run.setdefault(r.shapes["step"], {})[r.shapes["way"]] = r
    if not runs:
        raise LookupError(
            "no run's gradients are recorded, so there is nothing to tell of them. "
            f"Run: python -m dsv3_tutorial bench {NAME}"
        )
    longest = max(reversed(runs.values()), key=max)
    return dict(sorted(longest.items()))


def zeroed_table(found: Looks | None = None) -> None:
    """Print, step by step, the share of gradient values that each way stores as zero."""
    found = found or looks()
    print("share of the gradients' values that become zero in E4M3, by who shares a scale\n")
    print(_heads(f"{'median size':>13}"))
    for step, ways in found.items():
        print(f"{step:>5}{_any(ways).shapes['median']:>13.1e}{_cells(ways, 'value')}")
    print("\n2^-10, 2^-16: one constant for all, as a loss times 1,024 or 65,536 has it")
    print("every value counts alike; those that were zero before do not count")
    print(_caption(found))


def spread_table(found: Looks | None = None) -> None:
    """Print how far the tokens' sizes lie apart, and the share of tokens that each way loses."""
    found = found or looks()
    print("spread of the tokens' sizes in decades, and share of tokens lost (over 50 % error)\n")
    print(_heads(f"{'mean':>7}{'largest':>9}{'middle 68 %':>13}"))
    for step, ways in found.items():
        mean, largest = _any(ways).shapes["decades"]
        spread = f"{mean:>7.2f}{largest:>9.2f}{_any(ways).shapes['middle'][0]:>13.2f}"
        print(f"{step:>5}{spread}{_cells(ways, 'lost_tokens')}")
    print(f"\n{'largest token lost':>34}{_largest(found)}")
    print(
        "\nspread: standard deviation of log10 of a gradient's rows' norms, mean and largest over"
    )
    print(f"  products of {FEW} rows or more; beside the mean, half of what their middle 68 % span")
    print("lost: of all rows of all products; the largest, at any step, over its product's median")
    print(_caption(found))


def _largest(found: Looks) -> str:
    """For each way the largest token that it lost at any step, over its product's median."""
    cells = []
    for way in WAYS:
        sizes = [ways[way].shapes["largest_lost"] for ways in found.values() if way in ways]
        largest = max(sizes, default=0.0)
        cells.append(f"{largest:.1e}" if largest else "-")
    return "".join(f"{cell:>12}" for cell in cells)


def _heads(first: str) -> str:
    return f"{'step':>5}{first}" + "".join(f"{HEADS[way]:>12}" for way in WAYS)


def _cells(ways: dict[str, receipts.Receipt], what: str) -> str:
    """Each way's share; a dash where it was not recorded."""
    cells = []
    for way in WAYS:
        r = ways.get(way)
        cells.append("-" if r is None else _share(r.value if what == "value" else r.shapes[what]))
    return "".join(f"{cell:>12}" for cell in cells)


def _share(share: float) -> str:
    """0 only where there is none."""
    return "0" if share == 0 else "< 0.01%" if share < 5e-5 else f"{share:.2%}"


def _any(ways: dict[str, receipts.Receipt]) -> receipts.Receipt:
    """What does not depend on the way of storing is in each."""
    return next(iter(ways.values()))


def _caption(found: Looks) -> str:
    every = [r for ways in found.values() for r in ways.values()]
    return f"seed {every[0].shapes['seed']}; {receipts.caption(every)}"
