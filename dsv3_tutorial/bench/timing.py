"""Timing that can be believed: contestants interleaved, medians with their spread, the right clock.

A machine drifts (clocks, neighbours, heat). Runs taken in turn share the drift; runs taken one
contestant after the other do not, and the last one looks slow.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Run = Callable[[], Any]
Timer = Callable[[Run], float]


def compare(
    runs: Mapping[str, Run],
    *,
    timer: Timer | None = None,
    repeats: int = 11,
    warmup: int = 2,
    seconds: float = 10.0,
) -> dict[str, dict[str, float]]:
    """Time several callables fairly: one run of each in turn, first place rotating each round.

    Gives {name: stats}, stats as in `summary`, in seconds. Stops early, after a whole round, once
    `seconds` of wall clock are spent: every name has equally many repeats, and at least one.
    """
    if not runs or repeats < 1:
        raise ValueError(
            f"compare was given {len(runs)} runs and repeats={repeats}. Nothing would be timed. "
            "Give at least one of each."
        )
    timer = cpu_timer() if timer is None else timer
    deadline = time.perf_counter() + seconds
    for _ in range(warmup):
        for run in runs.values():
            if time.perf_counter() < deadline:
                timer(run)
    order, samples = list(runs), {name: [] for name in runs}
    for _ in range(repeats):
        for name in order:
            samples[name].append(timer(runs[name]))
        order = order[1:] + order[:1]
        if time.perf_counter() >= deadline:
            break
    return {name: summary(times) for name, times in samples.items()}


def summary(samples: list[float]) -> dict[str, float]:
    """Median, quartiles and range of a list of samples, in the samples' unit, and their number.

    One sample is its own quartiles: a spread of nothing, which `repeats` = 1 gives away.
    """
    ordered = sorted(samples)
    median = q1 = q3 = statistics.median(ordered)
    if len(ordered) > 1:
        q1, _, q3 = statistics.quantiles(ordered, n=4, method="inclusive")
    return {
        "median": median,
        "q1": max(min(q1, median), ordered[0]),  # interpolation may round past its neighbours
        "q3": min(max(q3, median), ordered[-1]),
        "min": ordered[0],
        "max": ordered[-1],
        "repeats": len(ordered),
    }


def cpu_timer(clock: Callable[[], float] | None = None) -> Timer:
    """Seconds of one run on the CPU: process CPU time with one thread, the wall clock with more.

    CPU time leaves out what a busy neighbour took. With several threads it would add them up.
    """
    if clock is None:
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def measure(run: Run) -> float:
        start = clock()
        run()
        return clock() - start

    return measure


def gpu_timer(device: torch.device | str = "cuda") -> Timer:
    """Seconds of one run on the GPU, between CUDA events, its L2 cache emptied before.

    A decode step finds its cache in HBM, not in L2; without the flush a loop over one tensor would.
    The flush also keeps the queue busy while the launch is prepared, so launches are not timed.
    """
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    scratch = torch.empty(max(2 * l2_bytes, 2**26), dtype=torch.uint8, device=device)

    def measure(run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        scratch.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return measure


def timer_for(device: torch.device | str) -> Timer:
    """The timer that is right for a device: events on CUDA, `cpu_timer` elsewhere."""
    return gpu_timer(device) if torch.device(device).type == "cuda" else cpu_timer()
