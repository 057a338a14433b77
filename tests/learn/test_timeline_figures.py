"""Pipelines drawn: every operation where the simulation has it, and real runs as recorded."""

import re
from dataclasses import replace

import pytest

from dsv3_tutorial.cost import schedule_table
from dsv3_tutorial.cost.schedule import SCHEDULES, Op, Times
from dsv3_tutorial.cost.schedule_timeline import Slot
from dsv3_tutorial.learn.figures import timelines
from dsv3_tutorial.learn.widgets import explore

SIZES = [(name, stages) for name in SCHEDULES for stages in (4, 8, 16)]


def boxes(made):
    """(kind, device, start, end) of every operation drawn."""
    found = []
    for kind, drawn in zip(timelines.LOOKS, made.axes[0].collections, strict=True):
        for path in drawn.get_paths():
            (start, low), (end, high) = path.get_extents().get_points()
            found.append((kind, round((low + high) / 2), start, end))
    return sorted(found)


@pytest.mark.parametrize(("name", "stages"), SIZES)
def test_a_timeline_draws_every_operation_where_the_simulation_has_it(name, stages):
    chosen, times = SCHEDULES[name](stages, 2 * stages), Times(1, 2, 1, 3)
    slots = chosen.timeline(times)
    made = timelines.timeline(name, stages, 2 * stages)
    expected = [(slot.op.kind, slot.device, slot.start, slot.end) for slot in slots]
    assert boxes(made) == sorted(expected)
    assert made.axes[0].get_xlim() == (0, chosen.length(times))
    assert f"waits {chosen.bubble(times):g} of {chosen.length(times):g}" in str(made)
    words = timelines.timeline_in_words(name, stages, 2 * stages)
    assert f"the closed form says {schedule_table.table_bubble(name, stages, times):g}" in words
    assert f"keeps {max(chosen.memory())} micro-batches" in words
    assert ("2 stages of weights" in words) == name.startswith("dual")


def test_what_a_schedule_cannot_do_is_said_in_words():
    shown = explore(
        timelines.timeline,
        say=timelines.timeline_in_words,
        schedule=list(SCHEDULES),
        stages=range(4, 17, 2),
        micro_batches=range(8, 41, 2),
    )
    assert shown.picture
    shown._controls["schedule"].value = "dualpipe"
    assert shown.picture and "DualPipe, 4 stages" in shown.caption
    shown._controls["stages"].value = 6
    assert shown.picture == b"" and "at least 12 micro-batches" in shown.caption
    shown._controls["micro_batches"].value = 12
    assert shown.picture
    with pytest.raises(ValueError, match="multiple of 2 stages"):
        timelines.timeline("dualpipev", 5, 10)
    with pytest.raises(ValueError, match="part of the whole backward"):
        timelines.timeline(t_b=1.0, t_w=2.0)


def test_any_schedule_is_drawn_and_named():
    chosen, times = replace(SCHEDULES["gpipe"](4, 8), name="mine"), Times(1, 2, 1, 3)
    made = timelines.drawn(chosen, times)
    assert f"Figure: Mine: the worst device waits {chosen.bubble(times):g} of" in str(made)
    assert len(boxes(made)) == 4 * 8 * 2
    slow = timelines.timeline("dualpipe", 8, 20, pair=4.0)
    assert "waits 11 of 80" in str(slow)


@pytest.mark.parametrize(
    ("stages", "micro_batches", "said"), [(8, 20, "45-55"), (16, 120, "81-86")]
)
def test_the_share_of_work_in_pairs_is_counted_from_the_orders(stages, micro_batches, said, capsys):
    times, chosen = Times(1, 2, 1, 3), SCHEDULES["dualpipe"](stages, micro_batches)
    shares = timelines.in_pairs(chosen, times)
    # a device does every micro-batch's 3 forwards once, whichever stream it is in
    pairs = [sum(op.kind == "FB" for op in order) for order in chosen.orders]
    assert shares == (min(pairs) / micro_batches, max(pairs) / micro_batches)
    timelines.bubble_table(stages, micro_batches, times)
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"2x{said + ' %':>10}")
    assert timelines.in_pairs(SCHEDULES["zb1p"](4, 8), times) == (0, 0)


def test_the_bubble_table_prints_the_reports_formula_beside_the_simulation(capsys):
    timelines.bubble_table(16, 120, Times(1, 2, 0.5, 3))
    first, head, _, *printed = capsys.readouterr().out.splitlines()
    assert first.startswith("p = 16 stages") and "bubble, in forwards" in head
    rows = {row.split()[0]: row[33:].split() for row in printed}
    assert rows["1F1B"][:2] == ["45", "45"] and rows["DualPipe"][:2] == ["24.5", "23.5"]
    assert [rows[name][4] for name in rows] == ["1x", "1x", "2x"]
    assert rows["DualPipe"][3] == "17"
    forms = [row[10:33].strip() for row in printed]
    assert forms == ["(p - 1)(F + B)", "(p - 1)(F + B - 2W)", "(p/2 - 1)(FB + B - 3W)"]
    for form, name in zip(forms, rows):  # the formula beside the name gives the number beside it
        worked = re.sub(r"(\d)W", r"\1*W", form.replace(")(", ")*("))
        values = {"p": 16, "F": 1, "B": 2, "W": 0.5, "FB": 3}
        assert eval(worked, {}, values) == float(rows[name][0])
    timelines.bubble_table(4, 8, Times(0.5, 1, 0.5, 1.5))
    assert "bubble, in the unit of F" in capsys.readouterr().out


def test_a_real_run_is_drawn_as_recorded():
    lanes = [
        [Slot(0, 0.0, 1.0, Op("F", 0, 0)), Slot(0, 3.0, 5.0, Op("B", 0, 0))],
        [Slot(1, 1.0, 2.0, Op("F", 0, 1)), Slot(1, 2.0, 3.0, Op("B", 0, 1))],
    ]
    made = timelines.real(lanes, "1f1b")
    assert "1F1B as it ran: the least busy rank waits 60% of the time" in str(made)
    assert boxes(made) == [("B", 0, 3, 5), ("B", 1, 2, 3), ("F", 0, 0, 1), ("F", 1, 1, 2)]
    assert made.axes[0].get_xlabel() == "time, seconds"
    quick = [[replace(s, start=s.start / 1e3, end=s.end / 1e3) for s in lane] for lane in lanes]
    made = timelines.real(quick, "1f1b")
    assert made.axes[0].get_xlabel() == "time, milliseconds"
    assert boxes(made)[0][2:] == pytest.approx((3, 5)) and "waits 60%" in str(made)
    assert len(made.axes[0].texts) == 4
    virtual = timelines.real(lanes, "1f1b", virtual=True)
    assert "1F1B on the virtual clock: " in str(virtual)
    lanes[1].append(Slot(1, 4.0, 4.01, Op("F", 1, 1)))  # too narrow for its number
    assert len(timelines.real(lanes, "1f1b").axes[0].texts) == 4
