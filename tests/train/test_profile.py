"""Where the time went: phases that add up, and a trace that a viewer opens."""

import json
import time

import torch

from dsv3_tutorial.train.profile import TRACED, Phases, Trace


def test_phases_add_up_what_was_spent_in_them():
    phases = Phases()
    for _ in range(2):
        with phases("forward"):
            time.sleep(0.02)
    assert 0.04 <= phases.seconds["forward"] < 1.0
    assert sum(phases.seconds.values()) == phases.seconds["forward"]


def test_the_table_splits_the_whole_time_the_rest_included():
    phases = Phases()
    phases.seconds |= {"data": 1.0, "forward": 2.0, "backward": 4.0, "checkpoint": 0.5}
    lines = phases.table(wall=10.0, steps=5).splitlines()[1:]
    table = {line[:12].strip(): line[12:].split() for line in lines}
    assert table["backward"] == ["800.00", "40.0%"]
    assert table["the rest"] == ["500.00", "25.0%"]
    shares = sum(float(share.rstrip("%")) for _, share in table.values())
    assert abs(shares - 100) < 0.5


def test_a_trace_holds_the_phases_of_the_traced_steps_as_chrome_events(tmp_path):
    trace, phases = Trace(tmp_path / "profile/trace.json"), Phases()
    for step in range(TRACED.stop + 1):
        trace.at(step)
        with phases("forward"):
            torch.ones(4) @ torch.ones(4)
    events = json.loads((tmp_path / "profile/trace.json").read_text())["traceEvents"]
    assert sum(e.get("name") == "forward" and e.get("ph") == "X" for e in events) == len(TRACED)
    assert any(e.get("name") == "aten::dot" for e in events)


def test_a_run_that_ends_within_the_traced_steps_still_leaves_its_trace(tmp_path):
    trace = Trace(tmp_path / "trace.json")
    trace.at(TRACED.start)
    trace.end()
    trace.end()
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_without_a_path_nothing_is_traced():
    trace = Trace(None)
    for step in range(TRACED.stop + 1):
        trace.at(step)
    assert trace.recorder is None
