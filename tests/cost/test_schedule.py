"""Pipeline schedules: every gradient once, in a possible order, bubbles exactly as on paper."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsv3_tutorial.cost import schedule_orders
from dsv3_tutorial.cost.schedule import (
    SCHEDULES,
    Op,
    Schedule,
    Times,
    dual_pipe,
    dual_pipe_v,
    gpipe,
    one_f_one_b,
    zb1p,
)
from dsv3_tutorial.cost.schedule_table import compare, order_bubble, table_bubble, table_memory

TABLE_2 = Times(1, 2, 1, 3)
times_without_gain = st.builds(
    lambda f, i, w: Times(f, i + w, w), *(st.integers(0, 9) for _ in range(3))
)


@st.composite
def schedules(draw, names=tuple(SCHEDULES)):
    name = draw(st.sampled_from(names))
    if name.startswith("dualpipe"):
        stages = 2 * draw(st.integers(1, 4))
        extra = draw(st.integers(0, 4))
        return SCHEDULES[name](stages, 2 * stages + 2 * extra)
    return SCHEDULES[name](draw(st.integers(1, 7)), draw(st.integers(1, 15)))


def parts(schedule):
    return [(d, p) for d, order in enumerate(schedule.orders) for op in order for p in op.parts]


@settings(deadline=None)
@given(schedules())
def test_every_micro_batch_passes_every_stage_once_forwards_and_once_backwards(schedule):
    counted = Counter((p.kind, p.micro_batch, p.stage) for _, p in parts(schedule))
    for i in range(schedule.micro_batches):
        for stage in range(schedule.stages):
            f, b, first, second = (counted[kind, i, stage] for kind in "FBIW")
            assert f == 1 and b + first == 1 and first == second
    assert {i for _, i, _ in counted} == set(range(schedule.micro_batches))
    assert {stage for _, _, stage in counted} == set(range(schedule.stages))
    assert all(p.stage in schedule.placement[d] for d, p in parts(schedule))


@settings(deadline=None)
@given(schedules(), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 20))
def test_nothing_starts_before_its_input_is_there_and_a_device_does_one_thing(s, f, i, w, pair):
    times, send = Times(f, i + w, w, pair), lambda a, b: 1 + abs(a - b)
    slots = s.timeline(times, send)
    assert [slot.op for slot in slots] == [op for order in s.orders for op in order]
    ends = {(p.kind, p.micro_batch, p.stage): slot for slot in slots for p in slot.op.parts}
    for before, after in pairwise(slots):
        assert after.device != before.device or after.start >= before.end
    for slot in slots:
        assert slot.end == slot.start + times.of(slot.op)
        for p in slot.op.parts:
            for source in sources(p, s.stages, ends):
                delay = 0 if source.device == slot.device else send(source.device, slot.device)
                assert slot.start >= source.end + delay


def sources(p, stages, ends):
    """The slots whose results an operation needs, written down a second time."""
    i, stage = p.micro_batch, p.stage
    if p.kind == "F":
        return [ends["F", i, stage - 1]] if stage else []
    if p.kind == "W":
        return [ends["I", i, stage]]
    behind = ends.get(("B", i, stage + 1)) or ends.get(("I", i, stage + 1))
    assert (behind is None) == (stage == stages - 1)
    return [ends["F", i, stage]] + ([behind] if behind else [])


@settings(deadline=None)
@given(schedules(), times_without_gain)
def test_every_operation_starts_at_the_first_moment_it_can(schedule, times):
    """The only idle time is waiting: each start is a moment at which something ended, or 0."""
    slots = schedule.timeline(times)
    ends = {0, *(slot.end for slot in slots)}
    assert all(slot.start in ends for slot in slots)


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 16), times_without_gain)
def test_gpipe_and_1f1b_wait_as_long_as_the_table_says_on_every_device(p, m, times):
    expected = (p - 1) * (times.t_f + times.t_b)
    for make in (gpipe, one_f_one_b):
        assert make(p, m).idle(times) == (expected,) * p
        assert table_bubble(make(p, m).name, p, times) == expected


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 9), times_without_gain)
def test_zb1p_waits_as_its_closed_form_says_and_as_the_table_where_w_is_shortest(p, more, times):
    idle = zb1p(p, p + more).idle(times)
    assert idle == (order_bubble("zb1p", p, times),) * p
    if times.t_w <= min(times.t_f, times.t_b - times.t_w):
        assert idle[0] == table_bubble("zb1p", p, times)
        assert idle[0] == (p - 1) * (times.t_f + times.t_b - 2 * times.t_w)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(0, 4), times_without_gain)
def test_dualpipe_waits_as_its_closed_form_says_on_every_device(half, more, times):
    p, m = 2 * half, 4 * half + 2 * more
    expected = order_bubble("dualpipe", p, times)
    assert dual_pipe(p, m).idle(times) == (expected,) * p
    assert dual_pipe_v(p, m).idle(times) == (expected,) * half
    assert order_bubble("dualpipev", p, times) == expected


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(0, 4), st.integers(1, 9), st.integers(0, 9))
def test_dualpipe_waits_as_the_report_says_where_f_i_and_w_are_equal(half, more, t, gain):
    """For pairs that save time on the middle devices only: the others run fewer pairs."""
    p, m = 2 * half, 4 * half + 2 * more
    times = Times(t, 2 * t, t, 3 * t - min(gain, t))
    expected = (half - 1) * (times.pair + times.t_b - 3 * times.t_w)
    assert table_bubble("dualpipe", p, times) == expected
    idle = dual_pipe(p, m).idle(times)
    assert idle[half - 1] == idle[half] == max(idle) == expected
    if times.pair == 3 * t:
        assert set(idle) == {expected}
    elif half > 2 and gain:
        assert idle[0] < expected


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(0, 4), times_without_gain)
def test_the_table_counts_the_middle_pair_that_the_published_order_runs_apart(half, more, times):
    t_i = times.t_b - times.t_w
    assume(times.t_w <= t_i >= times.t_f)
    p, m = 2 * half, 4 * half + 2 * more
    expected = table_bubble("dualpipe", p, times)
    assert dual_pipe(p, m, overlap_middle=True).idle(times) == (expected,) * p
    saved = expected - dual_pipe(p, m).bubble(times)
    assert saved == min(times.t_f, (half - 1) * (t_i - times.t_f))


def test_at_16_stages_the_report_s_example_is_45_15_and_14():
    names = ("1f1b", "zb1p", "dualpipe")
    assert [table_bubble(name, 16, TABLE_2) for name in names] == [45, 15, 14]
    assert [SCHEDULES[name](16, 120).bubble(TABLE_2) for name in names] == [45, 15, 14]


def test_with_a_short_weight_part_table_and_simulation_differ_by_one_forward():
    times = Times(1, 2, 0.5, 3)
    assert table_bubble("dualpipe", 16, times) == 24.5
    assert dual_pipe(16, 120).idle(times) == (23.5,) * 16
    assert dual_pipe(16, 120, overlap_middle=True).idle(times) == (24.5,) * 16
    row = {row.name: row for row in compare(16, 120, times)}["dualpipe"]
    assert (row.table_bubble, row.bubble, row.mean_bubble) == (24.5, 23.5, 23.5)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(0, 9))
def test_memory_is_the_table_s(p, more):
    m = p + more
    assert gpipe(p, m).memory() == (m,) * p
    assert one_f_one_b(p, m).memory() == tuple(p - stage for stage in range(p))
    assert zb1p(p, m).memory() == (p,) * p
    assert dual_pipe(2 * p, 4 * p + 2 * more).memory() == (2 * p + 1,) * 2 * p
    assert dual_pipe_v(2 * p, 2 * p + 1 + more).memory() == (2 * p + 1,) * p
    for row in compare(2 * p, 4 * p + 2 * more, TABLE_2):
        assert row.memory == row.table_memory == table_memory(row.name, 2 * p, 4 * p + 2 * more)
        assert row.parameters == (2 if row.name.startswith("dualpipe") else 1)
    assert [row.devices for row in compare(2 * p, 4 * p, TABLE_2)] == [2 * p] * 4 + [p]


@settings(deadline=None)
@given(schedules(("dualpipe", "dualpipev")))
def test_dualpipe_holds_every_stage_twice_and_dualpipev_once(schedule):
    copies = 2 if schedule.name == "dualpipe" else 1
    for stage in range(schedule.stages):
        holders = schedule.holders(stage)
        assert len(holders) == copies and holders[0] == min(stage, schedule.stages - 1 - stage)
    used = {schedule.device_of(i, 0) for i in range(schedule.micro_batches)}
    assert used == set(schedule.holders(0))


def test_the_streams_of_dualpipe_enter_at_the_two_ends_and_mirror_each_other():
    schedule = dual_pipe(8, 20)
    assert [schedule.device_of(i, 0) for i in (0, 9, 10, 19)] == [0, 0, 7, 7]
    for device in range(8):
        for mine, other in zip(schedule.orders[device], schedule.orders[7 - device], strict=True):
            for a, b in zip(mine.parts, other.parts, strict=True):
                assert a.kind == b.kind and a.stage == b.stage
                assert abs(a.micro_batch - b.micro_batch) == 10


def test_the_published_phases_of_8_devices_and_20_micro_batches():
    """Counted in the figure of the report: how many F, whole B, I, W and pairs each device runs."""
    kinds = [Counter(op.kind for op in order) for order in dual_pipe(8, 20).orders[:4]]
    assert [k["FB"] for k in kinds] == [9, 10, 11, 11]
    assert [k["F"] + k["FB"] for k in kinds] == [20] * 4
    assert [k["I"] for k in kinds] == [k["W"] for k in kinds] == [7, 6, 5, 4]
    names = [str(op) for op in one_f_one_b(4, 6).orders[2]]
    assert names == ["F0", "F1", "B0", "F2", "B1", "F3", "B2", "F4", "B3", "F5", "B4", "B5"]


def written(order):
    """As in the figures, with the stage behind the micro-batch."""
    return " ".join("&".join(f"{p}@{p.stage}" for p in op.parts) for op in order)


def test_dualpipe_s_order_for_4_devices_and_8_micro_batches_by_hand():
    """The eight phases, one a line; a phase that a device does not have is not there."""
    outer, middle, *_ = dual_pipe(4, 8).orders
    phases = (
        "F0@0 F1@0",
        "F2@0 F4@3",
        "I4@3 W4@3 F5@3",
        "F3@0&B5@3 F6@3&B0@0",
        "B6@3 F7@3&B1@0",
        "B7@3 I2@0",
        "W2@0 I3@0",
        "W3@0",
    )
    assert written(outer) == " ".join(phases)
    phases = (
        "F0@1 F4@2 F1@1 F5@2",
        "F2@1 B4@2 F6@2&B0@1 F3@1&B5@2 F7@2&B1@1",
        "B6@2 B2@1 I7@2 I3@1",
        "W7@2 W3@1",
    )
    assert written(middle) == " ".join(phases)
    merged = dual_pipe(4, 8, overlap_middle=True).orders[1]
    assert written(merged) == written(middle).replace("F2@1 B4@2", "F2@1&B4@2")


def test_the_zb1p_order_by_hand():
    assert [" ".join(map(str, order)) for order in zb1p(3, 4).orders] == [
        "F0 F1 F2 I0 W0 F3 I1 W1 I2 W2 I3 W3",
        "F0 F1 I0 F2 I1 W0 F3 I2 W1 I3 W2 W3",
        "F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3",
    ]


def test_the_1f1b_order_by_hand():
    order = schedule_orders.one_f_one_b_order(stage=1, stages=3, micro_batches=3)
    assert order == ["F0", "F1", "B0", "F2", "B1", "B2"]
    assert schedule_orders.one_f_one_b_order(0, 3, 1) == ["F0", "B0"]


@settings(deadline=None)
@given(schedules(), st.integers(0, 5), st.integers(0, 5))
def test_slower_messages_never_make_a_step_shorter(schedule, send, more):
    times = Times(2, 4, 2)
    assert schedule.length(times, send) <= schedule.length(times, send + more)


def test_a_message_s_time_is_paid_once_a_hop_there_and_back():
    one = one_f_one_b(4, 1)
    assert one.length(Times(1, 2), send=Fraction(1, 3)) == 4 * 3 + 6 * Fraction(1, 3)
    assert dual_pipe_v(2, 2).length(Times(1, 2), send=9) == dual_pipe_v(2, 2).length(Times(1, 2))


def test_bubble_is_of_the_worst_device_the_mean_or_one():
    schedule, times = dual_pipe(6, 12), Times(1, 2, 1, 2.5)
    idle = schedule.idle(times)
    assert schedule.bubble(times) == max(idle) != min(idle)
    assert schedule.bubble(times, of="mean") == sum(idle) / 6
    assert [schedule.bubble(times, of=d) for d in range(6)] == list(idle)


def broken(change):
    schedule = one_f_one_b(2, 2)
    orders = [list(order) for order in schedule.orders]
    change(orders)
    return replace(schedule, orders=tuple(map(tuple, orders)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda o: o[0].pop(0), "F0 of stage 0 stands 0 times"),
        (lambda o: o[1].append(o[1][0]), "F0 of stage 1 stands 2 times"),
        (lambda o: o[1].pop(), "backward 1 of stage 1: 0 times whole"),
        (lambda o: o[1].append(Op("W", 0, 1)), "1 times whole, 0 times I, 1 W"),
        (lambda o: o[1].append(o[0].pop()), "on device 1, which does not hold it"),
        (lambda o: o[0].append(Op("F", 2, 0)), "F2 of stage 0 is not of this step"),
        (lambda o: o.pop(), "1 orders for 2 devices"),
    ],
)
def test_a_schedule_that_is_no_step_is_refused_with_what_is_wrong(change, said):
    with pytest.raises(ValueError, match=said):
        broken(change)


def test_a_micro_batch_split_over_two_copies_of_a_stage_is_refused():
    ops = Op("F", 0, 0), Op("B", 0, 0)
    with pytest.raises(ValueError, match="spread over devices"):
        Schedule("x", 1, 1, ((ops[0],), (ops[1],)), ((0,), (0,)))


def test_orders_that_wait_for_each_other_are_named():
    def backward_first(orders):
        orders[0].sort(key=lambda op: op.kind)

    with pytest.raises(ValueError, match=r"device 0 at B0 of stage 0, device 1 at F0 of stage 1"):
        broken(backward_first).timeline(Times())


@pytest.mark.parametrize(
    ("make", "stages", "micro_batches", "said"),
    [
        (gpipe, 0, 4, "multiple of 1 stages"),
        (one_f_one_b, 4, 0, "at least 1 micro-batches"),
        (dual_pipe, 3, 12, "multiple of 2 stages"),
        (dual_pipe, 4, 6, "at least 8 micro-batches"),
        (dual_pipe, 4, 9, "even number"),
        (dual_pipe_v, 4, 3, "at least 4 micro-batches"),
    ],
)
def test_sizes_that_a_schedule_cannot_have_are_refused(make, stages, micro_batches, said):
    with pytest.raises(ValueError, match=said):
        make(stages, micro_batches)


@pytest.mark.parametrize("given_times", [(-1, 2), (1, 2, 3), (1, 2, -1), (1, 2, 1, -1)])
def test_impossible_times_are_refused(given_times):
    with pytest.raises(ValueError, match="t_w is a part of the whole"):
        Times(*given_times)


def test_times_have_the_defaults_of_no_gain():
    assert Times(1, 3) == Times(1, 3, 1.5, 4)


def test_a_closed_form_is_refused_where_none_is_known():
    with pytest.raises(ValueError, match="Simulate"):
        order_bubble("dualpipe", 4, Times(1, 2, 1, 2.5))
    for ask in (lambda: order_bubble("zb2", 4, Times()), lambda: table_bubble("zb2", 4, Times())):
        with pytest.raises(ValueError, match="no schedule 'zb2'"):
            ask()


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4))
def test_the_schedules_of_the_report_s_size_are_simulated_exactly(half):
    """120 micro-batches as in the published example, in fractions: no rounding anywhere."""
    times = Times(Fraction(1, 3), Fraction(2, 3), Fraction(1, 7))
    p = 4 * half
    assert dual_pipe(p, 120).idle(times) == (order_bubble("dualpipe", p, times),) * p
