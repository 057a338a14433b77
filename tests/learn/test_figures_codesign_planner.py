"""Lesson 6's planner, step and unbuilding: the figures draw what the planner computes."""

import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from dsv3_tutorial import hardware
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import params, search, step_time, validation
from dsv3_tutorial.cost.decisions import DECISIONS
from dsv3_tutorial.cost.plan import Job, Layout, plan
from dsv3_tutorial.cost.step_memory import state_bytes
from dsv3_tutorial.hardware import Cluster
from dsv3_tutorial.learn.figures import (
    plan_roofline,
    planner,
    step_anatomy,
    unbuild,
    unbuild_tables,
)

V3 = ModelConfig.named("deepseek-v3")
IMPOSSIBLE = [
    {"gpus": 64},
    {"model": "llama-3.1-405b", "without": "mla"},
    {"model": "qwen2.5-72b", "chip": "h20", "gpus": 64, "without": "dedup"},
]


def _lanes(axes):
    """Width of all bars that begin in each lane."""
    found: dict[float, float] = {}
    for bar in axes.patches:
        lane = round(bar.get_y(), 6)
        found[lane] = found.get(lane, 0.0) + bar.get_width()
    return [found[lane] for lane in sorted(found)]


def test_the_step_s_lanes_add_up_to_the_measured_and_to_the_predicted_step():
    of = step_anatomy.reported()
    made = step_anatomy.predicted_step()
    lanes = _lanes(made.axes[0])
    assert lanes == pytest.approx(
        [step_time.sum_of_parts(), of.step_time_s, of.step_time_s, sum(of.hidden.values())]
    )
    off = of.step_time_s / step_time.printed("step") - 1
    assert f"{of.step_time_s:.2f} s" in str(made) and f"{off:+.1%}" in str(made)


def test_what_is_sent_behind_a_step_has_room_in_it():
    of = step_anatomy.reported()
    shown = sum(of.times[part] for part in ("dispatch", "combine", "pipeline sends", "gradients"))
    assert 0 < sum(of.hidden.values()) <= of.step_time_s - shown


def test_table_4_s_rows_of_our_step_leave_no_more_over_than_uneven_stages_and_sends():
    of = step_anatomy.reported()
    rows = step_anatomy.operations(of)
    left = of.times["uneven stages"] + of.times["pipeline sends"] + of.times["tensor parallel"]
    assert rows["all else"] == pytest.approx(left, rel=1e-6)
    assert sum(rows.values()) == pytest.approx(of.step_time_s)


def test_a_schedule_without_overlap_has_no_such_rows_and_is_drawn_without_them():
    layout = replace(Layout.read("deepseek-v3"), schedule="zb1p", recompute="full")
    of = plan(V3, Cluster(hardware.chip("h800"), 2048), Job(), layout)
    with pytest.raises(ValueError, match="zb1p overlaps no forward"):
        step_anatomy.operations(of)
    assert _lanes(step_anatomy.predicted_step(of).axes[0])[1] == pytest.approx(of.step_time_s)


def test_the_table_prints_every_part_and_what_could_hide_it(capsys):
    step_anatomy.parts_table()
    printed = capsys.readouterr().out
    of = step_anatomy.reported()
    assert all(f"\n{part:<18}{seconds:>9.2f}" in printed for part, seconds in of.times.items())
    assert set(of.times) == set(step_anatomy.HIDES)
    assert max(map(len, printed.splitlines())) <= 100


@pytest.mark.parametrize("changed", [{}, {"without": "fp8"}, {"model": "moonlight-16b-a3b"}])
def test_the_planner_draws_its_plan_s_memory_step_and_roofline(changed):
    setting = {**planner.START, **changed}
    made, of = planner.planner(**setting), planner.answer(**setting).plan
    assert isinstance(made, Figure) and len(made.axes) == 3
    memory, times, roof = made.axes
    assert sum(bar.get_height() for bar in memory.patches) == pytest.approx(
        of.memory_per_gpu_bytes / 1e9
    )
    whole = of.step_time_s + sum(of.hidden.values())
    assert sum(bar.get_width() for bar in times.patches) == pytest.approx(whole)
    assert len(roof.lines) == 2 + 3
    for line in roof.lines:
        assert np.isfinite(line.get_ydata()).all()
    assert f"{of.step_time_s:.2f} s, {of.mfu:.1%}" in str(made)
    words = planner.planner_in_words(**setting)
    assert f"{of.bottleneck} binds" in words and f"{of.layout.dp} replicas" in words


@pytest.mark.parametrize("changed", IMPOSSIBLE)
def test_an_impossible_setting_is_drawn_as_words(changed):
    setting = {**planner.START, **changed}
    found = planner.answer(**setting)
    assert found.plan is None and found.why
    made = planner.planner(**setting)
    drawn = " ".join(" ".join(text.get_text().split()) for text in made.axes[0].texts)
    assert drawn == " ".join(found.why.split())
    assert "no plan" in str(made) and drawn in planner.planner_in_words(**setting)


def test_the_explorer_s_few_layouts_miss_little_of_what_a_full_search_finds():
    """On a small cluster, where a full search takes a moment."""
    cluster = Cluster(hardware.chip("h200"), 128)
    full = search.best(V3, cluster, Job(), explain=False).plan
    few = planner.answer(chip="h200", gpus=128).plan
    assert full.step_time_s <= few.step_time_s < 1.05 * full.step_time_s


def test_a_decision_s_price_is_the_quotient_of_two_plans_and_named_as_such():
    found = planner.answer(without="fp8")
    hours = [planner.answer(without=each).plan.gpu_hours for each in ("fp8", planner.NOTHING)]
    assert found.more == pytest.approx(hours[0] / hours[1] - 1) and found.more > 0
    assert f"{found.more:.1%} more than with fp8" in str(planner.planner(without="fp8"))
    assert "Instead of fp8: products" in planner.planner_in_words(without="fp8")
    mtp = planner.planner_in_words(without="mtp")
    assert "fewer than with mtp" in mtp


def test_what_a_chip_lacks_is_said():
    assert "has no FP8" in planner.planner_in_words(chip="a100", without="fp8")
    assert "as many as with fp8" in planner.planner_in_words(chip="a100", without="fp8")
    assert "Nobody publishes" in planner.planner_in_words(chip="h20")
    assert "Nobody publishes" not in planner.planner_in_words()


def test_rare_words_of_a_layout_are_explained_where_they_occur_and_nowhere_else():
    for changed in ({}, {"without": "dualpipe"}, {"model": "llama-3.1-405b"}):
        layout = planner.answer(**changed).plan.layout
        words = planner.planner_in_words(**changed)
        for name, meaning in planner.MEANS.items():
            used = name in (layout.schedule, f"ZeRO-{layout.zero}")
            used = used or name == f"recomputation {layout.recompute}"
            assert (f"{name} ({meaning})" in words) == used
        assert "at $2 an hour, whatever the chip" in words


@pytest.mark.parametrize("without", [planner.NOTHING, "fp8"])
def test_what_fills_the_memory_is_said_where_the_state_alone_is_too_much(without):
    found = planner.answer(gpus=64, without=without)
    counted = params.count(V3)
    numbers = counted.total + counted.mtp
    assert f"Each of {numbers / 1e9:.0f} billion parameters takes 14 bytes" in found.why
    assert f"{14 * numbers / 64 / 1e9:.1f} GB on each GPU" in found.why
    assert state_bytes(1000, 0, 1, 1, 1) == planner.STATE * 1000
    assert "14 bytes" not in planner.answer(model="llama-3.1-405b", without="mla").why


def test_a_model_is_planned_with_what_its_authors_may_never_have_used():
    why = planner.answer(model="llama-3.1-405b", without="mla").why
    assert "no mla to take back" in why and "is planned with fp8, dualpipe" in why


def smallest_cluster(model="deepseek-v3", chip="h800", without=planner.NOTHING):
    """The fewest GPUs of the grid on which the model can be trained; None: not on any."""
    fitting = (n for n in planner.GRID["gpus"] if planner.answer(model, chip, n, without).plan)
    return next(fitting, None)


def network_binds(gpus, without):
    """(GPUs, what is taken back) where more bandwidth of a link would buy most, for V3 on H800."""
    found = {
        (many, left): planner.answer("deepseek-v3", "h800", many, left).plan
        for many in gpus
        for left in without
    }
    return [at for at, of in found.items() if of and of.bottleneck in ("scale up", "scale out")]


def fp8_saves(chips):
    """By chip: the share of V3's GPU hours that are spent more in BF16, least first."""
    found = {chip: planner.answer("deepseek-v3", chip, 2048, "fp8") for chip in chips}
    known = {chip: each.more for chip, each in found.items() if each.plan and each.whole}
    return dict(sorted(known.items(), key=lambda pair: pair[1]))


def test_the_tasks_have_answers_on_the_grid():
    least = smallest_cluster(without="fp8")
    at = planner.GRID["gpus"].index(least)
    assert planner.answer(gpus=planner.GRID["gpus"][at - 1], without="fp8").plan is None
    assert planner.answer(gpus=least, without="fp8").plan.layout.precision == "bf16"
    assert smallest_cluster("llama-3.1-405b", "h800", "mla") is None
    saved = fp8_saves(chips=("h20", "a100", "h800"))
    assert next(iter(saved)) == "a100" and saved["a100"] == 0 < saved["h800"] < saved["h20"]
    bound = network_binds(gpus=(512, 2048), without=(planner.NOTHING, "dedup"))
    assert (512, "dedup") in bound and (2048, planner.NOTHING) not in bound


def test_products_of_few_rows_lie_beneath_the_roof_and_are_told_apart():
    wide = planner.answer().plan
    assert plan_roofline.above_roof(wide) == []
    layout = Layout(pp=4, dp=1, ep=8, tp=8, schedule="zb1p", zero=1)
    narrow = plan(V3, Cluster(hardware.chip("h800"), 32), Job(), layout)
    assert plan_roofline.rows(narrow) == 4096 / 8 * 8 * 8 / 256
    assert plan_roofline.above_roof(narrow) == ["experts' products"]
    point = plan_roofline.points(wide)[1]
    assert point.intensity == pytest.approx(4096 / 4)  # both ways, per head: S / 4


def test_the_unbuilding_s_bars_are_the_tornado_s_and_each_is_two_plans():
    found = unbuild.unbuilt()
    left, right = unbuild.tornado(found).axes
    count = len(found.rows)
    for order in (0, 1):
        bars = left.containers[order]
        assert [bar.get_width() for bar in bars] == pytest.approx(
            [row.hours[order] / 1e6 for row in found.rows]
        )
        bars = right.containers[order]
        assert [bar.get_width() for bar in bars] == pytest.approx(
            [-row.serving[order] for row in found.rows]
        )
    assert count == 7 and len(left.patches) == 2 * count
    first = found.rows[0]
    without = found.outcomes[frozenset({first.decision})].gpu_hours
    assert first.hours[0] == pytest.approx(without - found.whole.gpu_hours)
    assert f"{first.decision} saves most" in unbuild.finding(found)


def test_the_unbuilding_s_table_is_narrow_and_has_a_line_for_each_decision(capsys):
    unbuild.table()
    unbuild.notes()
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    for row in unbuild.unbuilt().rows:
        assert f"\n{row.decision:<12}" in printed and f"- {row.decision}:" in printed
    assert "all made: " in printed and "none made: " in printed


def test_what_does_not_fit_is_said_in_words_and_drawn_as_nothing():
    found = unbuild.unbuilt()
    rows = (replace(found.rows[0], hours=(math.inf, math.nan), factors=(math.inf, math.nan)),)
    broken = replace(found, rows=(*rows, *found.rows[1:]))
    made = unbuild.tornado(broken)
    texts = [text.get_text() for text in made.axes[0].texts]
    assert texts.count("does not fit") == 2
    assert made.axes[0].containers[0][0].get_width() == 0
    assert f"{rows[0].decision} saves most;" in unbuild.finding(broken)


def _printed(capsys):
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    return lines


def test_groups_hold_every_decision_but_the_one_that_is_named(capsys):
    unbuild_tables.groups()
    memory, compute, parallelism, left, _ = _printed(capsys)
    named = ", ".join(line.partition(": ")[2] for line in (memory, compute, parallelism, left))
    assert sorted(named.split(", ")) == sorted(DECISIONS)
    assert left == "left out of all three: mtp"


@pytest.mark.parametrize("kv_heads", [None, 8])
def test_all_orders_begin_and_end_alike(kv_heads, capsys):
    unbuild_tables.orders(kv_heads)
    _, _, _, *rows = _printed(capsys)
    cells = [row.split()[-8:] for row in rows]
    assert len(rows) == 6 and len({tuple(row[:2] + row[-2:]) for row in cells}) == 1
    hours = [[float(cell.replace(",", "")) for cell in row[::2]] for row in cells]
    assert all(each[0] > each[1] for each in hours)  # whichever is made first saves
    made = unbuild_tables.price(set(DECISIONS) - {"mtp"})
    assert cells[0][-2] == f"{made:,.0f}"


def test_latents_are_held_against_both_kinds_of_plain_heads(capsys):
    unbuild_tables.against_gqa()
    _, mla, mha, gqa, _ = [line.split() for line in _printed(capsys)]
    assert float(mla[-4]) < float(gqa[-4]) < float(mha[-4])  # activated, with its B behind
    assert mha[-2] == f"{unbuild_tables.price(set(DECISIONS) - {'mla'}):,.0f}"
    rates = [float(row[-1].replace(",", "")) for row in (mla, gqa, mha)]
    assert rates == sorted(rates, reverse=True)


def test_the_first_line_of_what_the_bars_rest_on_is_the_picture(capsys):
    unbuild_tables.rests_on(("fp8",))
    _, first, *_ = _printed(capsys)
    row = next(row for row in unbuild.unbuilt().rows if row.decision == "fp8")
    assert float(first.split()[-2]) == round(row.hours[0] / 1e3)


def test_the_validation_has_each_published_run_and_says_which_way_is_too_fast(capsys):
    step_anatomy.validation_table()
    _, *rows, _, _ = _printed(capsys)
    checks = {one.row.id: one for one in validation.checks()}
    named = [row for row in rows if not row.startswith(" ")]
    for row, of in zip(named, step_anatomy.VALIDATED.values(), strict=True):
        assert row.endswith(f"{checks[of].off:>+9.1%}")
        slower_is_more = checks[of].row.unit in ("s", "thousand H800 GPU hours")
        assert (checks[of].off < 0) == slower_is_more  # all of them are too fast
    (earlier,) = (row for row in rows if row.startswith(" "))
    off = validation.as_trained().step_time_s / step_time.printed("step") - 1
    assert earlier.endswith(f"{off:+.1%}") and checks["step_time.mpft.step"].off < off < 0
