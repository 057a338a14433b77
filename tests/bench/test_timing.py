import statistics
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.bench import timing


class FakeClock:
    """Time that passes only when a run says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def run(self, *seconds):
        """A run that takes these times in turn, and the last one from then on."""
        left = list(seconds)

        def advance():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return advance


def test_the_statistics_are_those_of_the_times_that_passed():
    clock = FakeClock()
    run = clock.run(50.0, 1.0, 2.0, 3.0, 4.0, 5.0)  # the first is the warm-up
    timer = timing.cpu_timer(clock)
    found = timing.compare({"a": run}, timer=timer, repeats=5, warmup=1)
    expected = {"median": 3.0, "q1": 2.0, "q3": 4.0, "min": 1.0, "max": 5.0, "repeats": 5}
    assert found == {"a": expected}


def test_contestants_take_turns_and_nobody_always_goes_first():
    ran = []
    runs = {name: (lambda name=name: ran.append(name)) for name in "abc"}
    timing.compare(runs, timer=timing.cpu_timer(FakeClock()), repeats=3, warmup=0)
    assert "".join(ran) == "abcbcacab"


def test_a_machine_that_slows_down_slows_every_contestant_alike():
    clock = FakeClock()
    drift = iter(range(1, 1000))

    def run():
        clock.now += next(drift)

    found = timing.compare(
        {"a": run, "b": run}, timer=timing.cpu_timer(clock), repeats=100, warmup=0
    )
    assert abs(found["a"]["median"] - found["b"]["median"]) <= 1  # one after the other: 100


def test_it_stops_after_a_whole_round_when_the_seconds_are_spent():
    runs = {"slow": lambda: time.sleep(0.03), "quick": lambda: None}
    timer = timing.cpu_timer(time.perf_counter)
    found = timing.compare(runs, timer=timer, repeats=1000, seconds=0.1)
    assert 1 <= found["slow"]["repeats"] == found["quick"]["repeats"] < 5


@settings(deadline=None)  # a busy machine is no failure
@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=30))
def test_a_summary_is_ordered_and_lies_within_its_samples(samples):
    found = timing.summary(samples)
    order = [found[name] for name in ("min", "q1", "median", "q3", "max")]
    assert order == sorted(order)
    assert (order[0], order[-1]) == (min(samples), max(samples))
    assert found["median"] == statistics.median(samples)
    assert found["repeats"] == len(samples)


def test_with_one_thread_waiting_is_not_counted_and_with_two_it_is():
    def wait():
        time.sleep(0.05)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert timing.cpu_timer()(wait) < 0.04
        torch.set_num_threads(2)
        assert timing.cpu_timer()(wait) >= 0.05
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("arguments", [{"runs": {}}, {"runs": {"a": print}, "repeats": 0}], ids=str)
def test_nothing_to_time_is_an_error(arguments):
    with pytest.raises(ValueError, match="Nothing would be timed"):
        timing.compare(**arguments)


@pytest.mark.gpu
def test_on_a_gpu_more_work_takes_more_time():
    small = torch.zeros(2**18, device="cuda")  # 1 MiB, at home in any L2
    large = torch.zeros(2**28, device="cuda")
    runs = {"small": lambda: small.add_(1), "large": lambda: large.add_(1)}
    found = timing.compare(runs, timer=timing.gpu_timer())
    assert 0 < found["small"]["median"] < found["large"]["median"]
