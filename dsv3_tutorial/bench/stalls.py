"""What a step waits for, and what the repair is worth: receipts of `stalls_runs`, in turn.

The rounds take every case once, so that a busy machine is busy for all. A wait is hidden by any
repair that goes on meanwhile; work is hidden only where a core is free, so each receipt says how
many cores other processes kept busy.
"""

import argparse
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import machine, stalls_experts, stalls_runs, timing
from dsv3_tutorial.receipts import Receipt

NAME = "stalls"
ROUNDS, STEPS, EVERY = 5, 12, 6
LARGE = 2**20  # bytes of a shard so large that unpacking takes longer than a step
CASES: dict[str, dict[str, Any]] = {
    "nothing in the way": {},
    "waits for its text": {"source": "remote"},
    "waits for its text, prefetched": {"source": "remote", "prefetch": 2},
    "unpacks its text": {"source": "packed"},
    "unpacks its text, prefetched": {"source": "packed", "prefetch": 2},
    "unpacks longer than a step": {"source": "packed", "shard": LARGE},
    "unpacks longer than a step, prefetched": {"source": "packed", "shard": LARGE, "prefetch": 2},
    "stops to save": {"save_every": EVERY, "background": False},
    "saves in the background": {"save_every": EVERY},
}
BUSY, BUSIEST = "busy elsewhere", "busiest rank"
SKEWS, SEEDS = (0.0, 0.5, 1.0), (0, 1, 2)


def step_receipts(rounds: int = ROUNDS, steps: int = STEPS) -> Iterator[Receipt]:
    """For every case, of a step: seconds, waits by cause, what was hidden; and how busy it was."""
    found: dict[str, list[dict[tuple, float]]] = {name: [] for name in CASES}
    for _ in range(rounds):
        for name, how in CASES.items():
            found[name].append(_watched(how, steps))
    sizes = {"steps": steps, "batch": stalls_runs.BATCH, "seq_len": stalls_runs.SEQ_LEN}
    for name, runs in found.items():
        for what, cause in dict.fromkeys(key for run in runs for key in run):
            values = [run.get((what, cause), 0.0) for run in runs]
            shapes = {"case": name, **CASES[name], **sizes, "cores": os.cpu_count()}
            shapes |= {"cause": cause} if cause else {}
            yield _receipt(what, shapes, values, "cores" if what == BUSY else "s")


def expert_receipts(skews: Iterable[float] = SKEWS) -> Iterator[Receipt]:
    """The busiest rank's time over the mean for each skew, over SEEDS; what was counted beside."""
    sizes = {"tokens": stalls_experts.TOKENS, "experts": stalls_experts.EXPERTS}
    sizes |= {"top_k": stalls_experts.TOP_K, "ranks": stalls_experts.RANKS}
    for skew in skews:
        loads = [stalls_experts.load(skew, seed=seed) for seed in SEEDS]
        shapes = {"skew": skew, **sizes, "seeds": list(SEEDS)}
        shapes |= {"counted": [round(load.counted, 4) for load in loads]}
        shapes |= {"max_violation": [round(load.max_violation, 4) for load in loads]}
        shapes |= {"repaired": [round(load.repaired, 4) for load in loads]}
        yield _receipt(BUSIEST, shapes, [load.measured for load in loads], "x the mean")


def main(argv: list[str] | None = None) -> int:
    """`bench stalls`: measure with one thread, keep receipts, print them."""
    parser = argparse.ArgumentParser(prog="dsv3_tutorial bench stalls", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the receipts (default: data/measured)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of all cases ({ROUNDS})")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run ({STEPS})")
    options = parser.parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one would take the core that a repair needs
    try:
        rows = [*step_receipts(options.rounds, options.steps), *expert_receipts()]
    finally:
        torch.set_num_threads(threads)
    print(receipts.append(NAME, rows, folder=options.out))
    print("\n".join(lines(rows)))
    return 0


@dataclass(frozen=True)
class Case:
    """A recorded case: seconds of a step, of its waits and of what it hid, by cause.

    busy: cores that other processes used meanwhile, of `cores`; None where the system tells nobody.
    """

    seconds: float
    waits: dict[str, float]
    hides: dict[str, float]
    busy: float | None
    cores: int

    @property
    def quiet(self) -> bool:
        """Whether a core was free beside the one that trains: only then can work hide work."""
        return self.busy is not None and self.cores - self.busy >= 1.5


def recorded(folder: Path | None = None) -> dict[str, Case]:
    """The cases on record, by name, in the order of CASES."""
    return cases(receipts.latest(NAME, folder=folder))


def cases(rows: Iterable[Receipt]) -> dict[str, Case]:
    """Receipts of steps, put together by their case."""
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        if "case" in row.shapes:
            of = found.setdefault(row.shapes["case"], {"cores": {None: row.shapes["cores"]}})
            of.setdefault(row.what, {})[row.shapes.get("cause")] = row.value
    return {
        name: Case(
            of["step"][None],
            of.get("waits", {}),
            of.get("hides", {}),
            of.get(BUSY, {}).get(None),
            of["cores"][None],
        )
        for name, of in found.items()
    }


def lines(rows: Iterable[Receipt]) -> list[str]:
    """The receipts in words, one a line."""
    rows, said = list(rows), []
    for name, case in cases(rows).items():
        waits = ", ".join(f"{k} {1e3 * v:.0f}" for k, v in case.waits.items() if v >= 5e-4)
        busy = "" if case.busy is None else f"; others kept {case.busy:.1f} cores busy"
        said.append(f"{name:<40} {1e3 * case.seconds:>6.1f} ms a step; waits: {waits or 0}{busy}")
    for row in rows:
        if row.what == BUSIEST:
            said.append(
                f"experts, skew {row.shapes['skew']:.1f}: the busiest rank takes {row.value:.2f} "
                f"times the mean, {mean(row.shapes['counted']):.2f} counted"
            )
    return said


def _watched(how: dict[str, Any], steps: int) -> dict[tuple[str, str | None], float]:
    """One run in numbers, by what and cause, a step each; and the cores that others kept busy."""
    began, busy, own = time.perf_counter(), _busy_seconds(), time.process_time()
    run = stalls_runs.run(**how, steps=steps)
    wall, found = time.perf_counter() - began, run.stalls
    numbers: dict[tuple[str, str | None], float] = {("step", None): mean(run.seconds)}
    numbers |= {("waits", name): spent / steps for name, spent in found.waited.items()}
    numbers |= {("hides", name): spent / steps for name, spent in found.behind.items()}
    if busy is not None:
        others = _busy_seconds() - busy - (time.process_time() - own)
        numbers[BUSY, None] = max(0.0, others / wall)
    return numbers


def _receipt(what: str, shapes: dict[str, Any], values: list[float], unit: str) -> Receipt:
    stats = timing.summary(values)
    return Receipt(
        what=what,
        shapes=shapes,
        value=stats["median"],
        unit=unit,
        spread={"q1": stats["q1"], "q3": stats["q3"]},
        repeats=int(stats["repeats"]),
        **machine.here(),
    )


def _busy_seconds() -> float | None:
    """Seconds that all cores have worked since the machine started; None where nobody says."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    ticks = [int(field) for field in fields[:8]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # less idle and iowait
