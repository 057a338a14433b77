"""A step taken apart: waits that add up to the wall, background that counts only where covered."""

import json
from concurrent.futures import Future

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial.train import trace
from dsv3_tutorial.train.trace import REST, Span, Timeline, stall_report, table, write_trace

STEP = [
    Span("data", 0.0, 2.0),
    Span("forward", 2.0, 5.0),
    Span("backward", 5.0, 9.0),
    Span("optimizer", 9.0, 10.0),
    Span("checkpoint", 11.0, 14.0),
    Span("checkpoint", 14.0, 22.0, "behind"),
    Span("data", 16.0, 18.0),
    Span("forward", 18.0, 20.0),
]


def test_a_step_by_hand_is_work_and_the_waits_around_it():
    found = stall_report(STEP)
    assert (found.wall, found.work, found.share) == (20.0, 10.0, 0.5)
    assert found.waited == {"data": 4.0, "checkpoint": 3.0, REST: 3.0}
    assert found.behind == {"checkpoint": 2.0}  # of eight seconds, those that a forward covered
    said = str(found)
    assert said.startswith("waiting 50% of the time: data 20%, checkpoint 15%, no phase 15%; ")
    assert said.endswith("hidden behind work: checkpoint 2000 ms")


@st.composite
def spans(draw):
    name = st.sampled_from(["data", "forward", "backward", "checkpoint", "other"])
    start, length = draw(st.integers(0, 30)), draw(st.integers(0, 9))
    return Span(draw(name), start, start + length, draw(st.sampled_from(trace.LANES)))


@given(st.lists(spans(), max_size=8))
def test_work_and_waits_are_the_wall_however_spans_lie(found):
    report = stall_report(found)
    own = [span for span in found if span.lane == "step"]
    wall = max(s.end for s in own) - min(s.start for s in own) if own else 0
    assert report.wall == wall == report.work + sum(report.waited.values())
    assert all(spent >= 0 for spent in (*report.waited.values(), *report.behind.values()))
    assert all(spent <= report.work for spent in report.behind.values())
    assert str(report) and table(found, 1)


def test_the_table_gives_each_phase_its_ms_a_step_and_its_kind():
    rows = {line[:12].strip(): line[12:].split() for line in table(STEP, steps=2).splitlines()[1:6]}
    assert rows["forward"] == ["2500.00", "25.0%", "work"]
    assert rows["data"] == ["2000.00", "20.0%", "wait"]
    assert table(STEP, steps=2).splitlines()[-1].split() == [
        "checkpoint",
        "1000.00",
        "10.0%",
        "hidden",
    ]


def test_a_timeline_keeps_phases_in_order_and_one_that_raises_too():
    timeline = Timeline()
    with timeline("forward"):
        pass
    with pytest.raises(KeyError), timeline("data"):
        raise KeyError
    with timeline.behind("data"):
        pass
    assert [(s.name, s.lane) for s in timeline.spans] == [
        ("forward", "step"),
        ("data", "step"),
        ("data", "behind"),
    ]
    times = [t for span in timeline.spans for t in (span.start, span.end)]
    assert times == sorted(times) and times[0] >= 0
    assert timeline.seconds["forward"] <= timeline.spans[0].end - timeline.spans[0].start
    timeline.restart()
    assert timeline.spans == [] and sum(timeline.seconds.values()) == 0


def test_what_a_future_stands_for_is_a_span_until_it_is_done():
    timeline, future = Timeline(), Future()
    timeline.follow("checkpoint", future)
    assert timeline.spans == []
    future.set_exception(OSError())
    (span,) = timeline.spans
    assert (span.name, span.lane) == ("checkpoint", "behind") and span.end >= span.start


def test_a_trace_file_has_every_span_once_on_its_lane_in_microseconds(tmp_path):
    path = write_trace(STEP, tmp_path / "new/trace.json")
    events = json.loads(path.read_text())["traceEvents"]
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    drawn = [
        Span(e["name"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6, lanes[e["tid"]])
        for e in events
        if e["ph"] == "X"
    ]
    assert drawn == STEP


def test_operators_are_those_that_ran_and_the_rest_is_all_others():
    x = torch.randn(128, 128, requires_grad=True)

    def run():
        for _ in range(3):
            torch.relu(x @ x).sum().backward()

    whole = {op.name: op for op in trace.operators(run, top=50)}
    calls = {name: whole[name].calls for name in ("mm", "relu", "threshold_backward", "the rest")}
    assert calls == {"mm": 9, "relu": 3, "threshold_backward": 3, "the rest": 0}
    assert all(op.seconds > 0 for op in whole.values() if op.calls)
    first, rest = trace.operators(run, top=1)
    assert rest.name == "the rest" and first.calls + rest.calls == sum(
        o.calls for o in whole.values()
    )
    assert str(first).startswith(first.name) and str(first).endswith("ms")


def test_clocked_operators_compute_what_they_compute_otherwise():
    def gradient():
        x = torch.linspace(-1, 1, 64).view(8, 8).requires_grad_()
        torch.softmax(x @ x, dim=-1).square().sum().backward()
        found.append(x.grad)

    found = []
    gradient()
    trace.operators(gradient)
    assert torch.equal(*found)
