"""Latency and bandwidth between this machine's processes, and a link slow enough to be felt.

gloo over the loopback device: point to point, all-reduce and all-to-all by size, and a fit of
alpha + bytes / bandwidth. With root on Linux also two "nodes" joined by throttled cables, where an
exchange by node beats a flat one. Both stand beside what the cost model says.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import exchanges, machine, network_table, throttle, timing
from dsv3_tutorial.bench.exchanges import BY_NODE, FLAT, Case
from dsv3_tutorial.cost.tiers import Tier
from dsv3_tutorial.parallel.launch import ParallelError, launch
from dsv3_tutorial.receipts import Receipt

NAME = "network"
PARTS = ("processes", "link")
NODES = 2  # of the throttled part
_TIMEOUT = 900.0


@dataclass(frozen=True)
class Plan:
    """What is measured, and how long: `seconds` for all sizes of one operation together."""

    worlds: tuple[int, ...] = (2, 4)
    sizes: tuple[int, ...] = tuple(4 ** (i + 1) for i in range(12))  # 4 B to 16 MiB
    rates: tuple[int | None, ...] = (None, 1000, 200)  # Mbit/s of a cable
    pings: tuple[int, ...] = (4, 2**20, 2**22)
    bytes: int = 2**23  # of a rank, in the exchanges between nodes
    rounds: int = 31
    slow_rounds: int = 9
    seconds: float = 15.0


QUICK = Plan((2,), (4, 4096, 2**18), (None, 100), (4, 2**18), 2**16, 3, 2, 0.3)


def measure(
    cases: Sequence[Case], world: int, seconds: float = 2.0, rounds: int = 31
) -> dict[Case, list[float]]:
    """Seconds of each exchange between `world` processes of this machine, one value a round.

    One round at least; of each, the time of its slowest rank.
    """
    return _slowest(launch(_on_a_rank, world, cases, rounds, seconds, timeout=_TIMEOUT))


def fit(times: Mapping[int, float], name: str = "measured") -> Tier:
    """The alpha and the bandwidth nearest to {bytes: seconds}, by least squares of relative errors.

    A negative alpha is taken as 0, and no growth as infinite bandwidth. Two sizes at least.
    """
    if len(times) < 2:
        raise ValueError(
            f"{len(times)} size(s) cannot tell a latency from a bandwidth. Measure two or more."
        )
    n = torch.tensor(list(times), dtype=torch.float64)
    seconds = torch.tensor(list(times.values()), dtype=torch.float64)
    rows = torch.stack([torch.ones_like(n), n], 1) / seconds[:, None]  # (sizes, 2)
    alpha, per_byte = torch.linalg.lstsq(rows, torch.ones_like(n)[:, None]).solution[:, 0].tolist()
    if alpha < 0:  # then the best line through the origin
        alpha, per_byte = 0.0, float((n / seconds).sum() / (n / seconds).square().sum())
    return Tier(name, alpha, 1 / per_byte if per_byte > 0 else float("inf"))


def process_receipts(plan: Plan) -> Iterator[Receipt]:
    """Every operation by size among equal processes, and its fit."""
    for world in plan.worlds:
        ops = (("p2p", "inside"), ("all_reduce", FLAT), ("all_to_all", FLAT))
        for op, form in ops:
            cases = [Case(op, form, n) for n in plan.sizes if n % world == 0]
            found = measure(cases, world, plan.seconds, plan.rounds)
            yield from _receipts(found, {"ranks": world, "nodes": 1, "mbit": None})
            yield from _fits(found, {"ranks": world, "nodes": 1, "mbit": None})


def link_receipts(plan: Plan) -> Iterator[Receipt]:
    """The exchanges between two nodes, flat and by node, for each rate of their cables."""
    world = throttle.WORLD
    asked = (plan.rates, _pings(plan), _exchanges(plan), plan.slow_rounds, plan.seconds)
    ranks = launch(_between_nodes, world, *asked, timeout=_TIMEOUT)
    for rate in plan.rates:
        shapes = {"ranks": world, "nodes": NODES, "mbit": rate}
        found = _slowest([rank[rate] for rank in ranks])
        yield from _receipts(found, shapes)
        yield from _fits({case: times for case, times in found.items() if case.op == "p2p"}, shapes)


def main(argv: list[str] | None = None) -> int:
    """`bench network`: measure, keep receipts, print them beside the cost model's times."""
    parser = argparse.ArgumentParser(prog="dsv3_tutorial bench network", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the receipts (default: data/measured)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the benchmark")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args(argv)
    plan, rows = QUICK if options.quick else Plan(), []
    if "processes" in options.parts:
        rows += _kept(process_receipts(plan), options.out)
    if "link" in options.parts:
        why = throttle.problem()
        try:
            rows += _kept(link_receipts(plan), options.out) if why is None else []
        except ParallelError as error:
            why = str(error)
        if why is not None:
            print(f"The throttled link is left out: {why}.")
    print("\n".join(network_table.lines(rows)))
    return 0


def _kept(found: Iterator[Receipt], folder: Path | None) -> list[Receipt]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what a rank has, and a receipt is to say
    try:
        rows = list(found)
    finally:
        torch.set_num_threads(threads)
    print(f"{len(rows)} receipts: {receipts.append(NAME, rows, folder=folder)}", flush=True)
    return rows


def _on_a_rank(cases: Sequence[Case], rounds: int, seconds: float) -> dict[Case, list[float]]:
    here = exchanges.place(torch.distributed.get_world_size())
    return exchanges.sampled(cases, here, rounds, seconds)


def _between_nodes(
    rates: Sequence[int | None],
    pings: Sequence[Case],
    cases: Sequence[Case],
    rounds: int,
    seconds: float,
) -> dict[int | None, dict[Case, list[float]]]:
    """On a rank: everything, for each rate of the cables."""
    throttle.enter()
    here = exchanges.place(throttle.PER_NODE)
    exchanges.check(cases, here)
    found = {}
    for rate in rates:
        throttle.limit(rate)
        found[rate] = exchanges.sampled([*pings, *cases], here, rounds, seconds)
    return found


def _pings(plan: Plan) -> list[Case]:
    return [Case("p2p", form, n) for form in ("inside", "across") for n in plan.pings]


def _exchanges(plan: Plan) -> list[Case]:
    sizes = {"all_reduce": plan.bytes, "all_to_all": plan.bytes, "dispatch": plan.bytes // 4}
    return [Case(op, form, n) for op, n in sizes.items() for form in (FLAT, BY_NODE)]


def _slowest(ranks: Sequence[dict[Case, list[float]]]) -> dict[Case, list[float]]:
    """Of every round the slowest rank's time; half of a ping-pong's, which goes there and back."""
    found = {case: [max(times) for times in zip(*(r[case] for r in ranks))] for case in ranks[0]}
    return {c: [t / 2 for t in times] if c.op == "p2p" else times for c, times in found.items()}


def _receipts(found: Mapping[Case, list[float]], shapes: dict) -> Iterator[Receipt]:
    for case, times in found.items():
        exchanged = {"op": case.op, "form": case.form, "bytes": case.bytes}
        yield _receipt("exchange", {**exchanged, **shapes}, timing.summary(times), "s")


def _fits(found: Mapping[Case, list[float]], shapes: dict) -> Iterator[Receipt]:
    """Each operation's alpha and bandwidth, of the medians; their spread is that of the rounds."""
    for op, form in dict.fromkeys((case.op, case.form) for case in found):
        by_size = {c.bytes: times for c, times in found.items() if (c.op, c.form) == (op, form)}
        whole = fit({n: statistics.median(times) for n, times in by_size.items()})
        rounds = [fit(dict(zip(by_size, times))) for times in zip(*by_size.values())]
        for what, unit in (("alpha", "s"), ("bandwidth", "B/s")):
            value = getattr(whole, what)
            if value < float("inf"):
                stats = _around(value, [getattr(tier, what) for tier in rounds])
                yield _receipt(what, {"op": op, "form": form, **shapes}, stats, unit)


def _around(value: float, rounds: list[float]) -> dict[str, float]:
    """The summary of the rounds with `value` in the middle, and a spread that encloses it."""
    stats = timing.summary([it for it in rounds if it < float("inf")] or [value])
    low, high = min(stats["q1"], value), max(stats["q3"], value)
    return {"median": value, "q1": low, "q3": high, "repeats": len(rounds)}


def _receipt(what: str, shapes: dict, stats: dict[str, float], unit: str) -> Receipt:
    return Receipt(
        what=what,
        shapes=shapes,
        value=stats["median"],
        unit=unit,
        spread={"q1": stats["q1"], "q3": stats["q3"]},
        repeats=int(stats["repeats"]),
        **machine.here(),
    )
