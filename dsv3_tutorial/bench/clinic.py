"""The loss-curve clinic: short recorded runs, one bug of the field in each, to be told by curves.

`python -m dsv3_tutorial bench clinic` trains them and keeps data/measured/clinic/CASE.jsonl, a line
a run. `load` reads them, `separates` judges a learner's statistic on runs that `load` keeps back.
What each case was is in `clinic_cases`: a lesson can show the curves and hide that.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsv3_tutorial.bench import clinic_train, machine
from dsv3_tutorial.bench.clinic_cases import CASES, Case, named
from dsv3_tutorial.files import data_path, write_whole
from dsv3_tutorial.train import corpus

SHOWN, HELD = (0, 1), (2,)  # seeds that a learner sees, and those that a statistic is tried on


class ClinicError(ValueError):
    """Records of the clinic that are missing or damaged."""


@dataclass(frozen=True)
class Run:
    """One recorded run. Every column is a read-only float array, one value a step.

    loss in bits per byte of the step's batch, before its update; grad_norm before clipping;
    max_violation, MaxVio's mean over the layers; zero_fraction, the share of the gradient that is
    exactly 0, the embedding left out; held_out in bits per byte, after each of `held_out_at` steps.
    """

    case: str
    seed: int
    loss: np.ndarray
    grad_norm: np.ndarray
    max_violation: np.ndarray
    zero_fraction: np.ndarray
    held_out: np.ndarray
    held_out_at: np.ndarray


@dataclass(frozen=True)
class Separation:
    """What became of a statistic: status "passed", "not_yet" or "raised", and why in one line.

    sick and healthy are its values on the shown runs, threshold what lies between them, if it does.
    """

    status: str
    message: str
    sick: tuple[float, ...] = ()
    healthy: tuple[float, ...] = ()
    threshold: float | None = None

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def load(
    case: str | None = None, seeds: Iterable[int] = SHOWN, folder: Path | None = None
) -> list[Run]:
    """The recorded runs of one case, or of all, in the order of cases and seeds.

    The held-back seed is left out unless `seeds` names it. Raises ClinicError for a record that is
    missing or damaged.
    """
    cases = CASES if case is None else [named(case)]
    return [_run(c.name, seed, folder) for c in cases for seed in seeds]


def charts() -> dict[str, str]:
    """A letter for each case, in an order that tells nothing: {"A": name of a case, ...}."""
    names = sorted((c.name for c in CASES), key=lambda n: hashlib.sha256(n.encode()).digest())
    return {chr(ord("A") + i): name for i, name in enumerate(names)}


def separates(
    statistic: Callable[[Run], float] | None, case: str, folder: Path | None = None
) -> Separation:
    """Whether `statistic` tells the runs of `case` from every healthy one, unseen seeds included.

    The shown runs set the threshold, halfway between sick and healthy; the held-back seed has to
    fall on its side of it. None stands for "these curves do not tell": right for some cases.
    A statistic that raises is reported, never raised.
    """
    sick = named(case)
    if statistic is None:
        return _untold(sick)
    try:
        shown = _values(statistic, sick, SHOWN, folder)
        held = _values(statistic, sick, HELD, folder)
    except ClinicError:
        raise
    except Exception as error:
        return Separation("raised", f"{type(error).__name__}: {error}")
    return _judge(shown, held)


def _untold(case: Case) -> Separation:
    if case.told:
        return Separation(
            "not_yet", "these curves do tell: look at every column, and at its course"
        )
    return Separation("passed", f"nothing here tells it from a healthy run. {case.symptom}")


def _values(
    statistic: Callable[[Run], float], sick: Case, seeds: tuple[int, ...], folder: Path | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The statistic of the sick runs and of the healthy ones. It sees neither name nor seed."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for case in [sick, *(c for c in CASES if not c.sick)]:
        for run in load(case.name, seeds, folder):
            value = float(statistic(replace(run, case="", seed=-1)))
            if not math.isfinite(value):
                raise ValueError(f"the statistic of one run is {value}, not a finite number")
            found[case is sick].append(value)
    return tuple(found[True]), tuple(found[False])


def _judge(shown: tuple, held: tuple) -> Separation:
    sick, healthy = shown
    ranges = (
        f"sick {min(sick):.4g} to {max(sick):.4g}, healthy {min(healthy):.4g} to {max(healthy):.4g}"
    )
    above = min(sick) > max(healthy)
    if not above and max(sick) >= min(healthy):
        return Separation("not_yet", f"the values overlap: {ranges}", sick, healthy)
    border = (min(sick) + max(healthy)) / 2 if above else (max(sick) + min(healthy)) / 2
    right = [(v > border) == above for v in held[0]] + [(v < border) == above for v in held[1]]
    if not all(right):
        message = f"it parts the runs that you see ({ranges}), and not those of a seed held back"
        return Separation("not_yet", message, sick, healthy, border)
    return Separation("passed", f"{ranges}; unseen runs as well", sick, healthy, border)


def memorises(loss: Tensor, held_out: Tensor) -> bool:
    """Whether a run has learnt its text by heart: it does well on it, and badly on any other.

    loss (steps,) of the batches, held_out (measurements,), both in bits per byte. A run's own noise
    is 0.2; more than half a bit between the ends of the two is another text.
    """
    return bool(held_out[-1] - loss[-20:].mean() > 0.5)


def main(argv: list[str] | None = None) -> int:
    """Train what has no record yet, seed by seed, so that an interrupted run can be taken up."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_tutorial bench clinic")
    parser.add_argument("--cases", nargs="+", default=[c.name for c in CASES], help="default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[*SHOWN, *HELD])
    parser.add_argument("--again", action="store_true", help="also what has a record already")
    parser.add_argument("--out", type=Path, help="folder of the records (default data/measured)")
    options = parser.parse_args(argv)
    cases, text = [named(name) for name in options.cases], corpus.load()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the numbers depend on how many
    try:
        for seed in options.seeds:
            for case in cases:
                if options.again or seed not in _records(case.name, options.out):
                    _keep(case, clinic_train.train(case, seed, text), options.out)
                    print(f"{case.name}, seed {seed}", flush=True)
    finally:
        torch.set_num_threads(threads)
    return 0


def _keep(case: Case, record: dict[str, Any], folder: Path | None) -> None:
    """Write one run beside the case's others, with what it takes to repeat it."""
    recipe = {**clinic_train.RECIPE.to_dict(), **case.recipe, "seed": record["seed"]}
    made = {"case": case.name, **record, **machine.here(), "recipe": recipe}
    kept = {**_records(case.name, folder), record["seed"]: made}
    lines = [
        json.dumps(kept[seed], allow_nan=False, separators=(",", ":")) for seed in sorted(kept)
    ]
    write_whole(_path(case.name, folder), "".join(f"{line}\n" for line in lines))


def _path(case: str, folder: Path | None) -> Path:
    return (folder or data_path("measured")) / "clinic" / f"{case}.jsonl"


def _records(case: str, folder: Path | None) -> dict[int, dict[str, Any]]:
    """The recorded runs of a case by seed; none where there is no file."""
    path = _path(case, folder)
    if not path.exists():
        return {}
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {record["seed"]: record for record in records}
    except (ValueError, KeyError, TypeError) as error:
        raise ClinicError(
            f"{path.name} is damaged: {error}. A curve read from it could not be trusted. "
            "Take the file back from the repository, or delete it and run `bench clinic`."
        ) from error


def _run(case: str, seed: int, folder: Path | None) -> Run:
    records = _records(case, folder)
    if seed not in records:
        raise ClinicError(
            f"There is no record of {case} with seed {seed}. A lesson would compare with nothing. "
            f"Run python -m dsv3_tutorial bench clinic --cases {case} --seeds {seed}."
        )
    record = records[seed]
    every = record["recipe"]["evaluate_every"]
    columns = {name: np.array(record[name], dtype=float) for name in clinic_train.COLUMNS}
    columns["held_out_at"] = np.arange(1, len(record["held_out"]) + 1, dtype=float) * every
    for column in columns.values():
        column.setflags(write=False)
    return Run(case, seed, **columns)
