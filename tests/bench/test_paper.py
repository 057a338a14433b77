"""Every printed number is computed again within its tolerance, or quoted with a reason."""

import dataclasses
import re
from pathlib import Path

import pytest

from dsv3_tutorial import paper as printed
from dsv3_tutorial.bench import (
    paper,
    paper_fp8,
    paper_model,
    paper_network,
    paper_planner,
    paper_serving,
    paper_text,
    paper_training,
)
from dsv3_tutorial.bench.paper_verdict import KINDS, NEAR, Reproduced, check, half_digit
from dsv3_tutorial.cost import validation

PAGE = Path(__file__).parents[2] / "docs/paper.md"
MODULES = (paper_model, paper_training, paper_network, paper_serving, paper_fp8)
CHECKS = paper.reproduced()
BY_ID = {one.row.id: one for one in CHECKS}


def missed(checks):
    """What lies outside its tolerance, with both numbers."""
    return [
        f"{one.row.id}: printed {one.row.value:g}, ours {one.computed:g}, {100 * one.off:+.2f} % "
        f"where {100 * one.tolerance:g} % are allowed"
        for one in checks
        if not one.holds
    ]


def test_every_row_is_computed_or_quoted_and_none_is_both():
    computed, quoted = [one.row.id for one in CHECKS], [row.id for row in paper.quoted()]
    assert len(computed) == len(set(computed)) and not set(computed) & set(quoted)
    missing = {row.id for row in printed.all_rows()} - set(computed) - set(quoted)
    assert not missing, f"neither computed by bench.paper nor quoted with a reason: {missing}"


def test_at_least_120_numbers_are_equal_or_within_a_tenth():
    near = [one for one in CHECKS if not one.verdict.startswith("differs")]
    assert len(near) >= 120 and all(abs(one.off) <= NEAR for one in near)
    strong = [one for one in near if one.kind != "setting"]  # a setting only repeats the paper
    assert len(strong) >= 120


def test_each_lies_within_its_tolerance():
    assert not missed(CHECKS)


def test_a_number_outside_its_tolerance_is_named_with_both_values():
    wrong = dataclasses.replace(BY_ID["training_flops.deepseek-v3"], computed=281.16)
    assert missed([wrong]) == [
        "training_flops.deepseek-v3: printed 250, ours 281.16, +12.46 % where 0 % are allowed"
    ]


def test_the_planner_s_predictions_are_within_the_errors_that_it_states():
    assert len(paper.predicted()) >= 10 and not missed(paper.predicted())
    for one in paper.predicted():
        assert one.kind == "planner" and one.tolerance == validation.STATED[one.row.id]
        assert bool(one.why) == (abs(one.off) > NEAR)
        if one.why:  # "too fast", it says: a rate is above the printed one, a time below
            rate = one.row.unit in ("%", "billion tokens", "TFLOP/s/GPU")
            assert (one.off > 0) == rate, one.row.id


def test_what_follows_by_arithmetic_is_not_left_to_the_planner():
    kinds = {one.row.id: BY_ID[one.row.id].kind for one in paper_planner.checks()}
    assert kinds["step_time.mpft.step"] == kinds["training_cost.total_dollars"] == "arithmetic"
    assert kinds["llama3.tflops_8192"] == kinds["v2.hours_per_trillion"] == "planner"


def test_what_differs_has_a_reason_and_only_that_may_be_far_off():
    for one in CHECKS:
        assert one.kind in KINDS and one.how, one.row.id
        if one.why:
            assert not one.equal and one.verdict.startswith("differs by "), one.row.id
        else:
            assert one.tolerance <= NEAR or one.kind == "planner", one.row.id
            assert not one.verdict.startswith("differs"), one.row.id


def test_no_tolerance_is_far_wider_than_what_is_needed():
    for one in CHECKS:
        if one.tolerance and one.kind not in ("model", "planner"):  # families share one
            assert one.equal or one.tolerance < 12 * abs(one.off) + 4e-3, one.row.id


def producers():
    """The functions that make the checks, each with the ids that it answers for."""
    for module in MODULES:
        for name, make in vars(module).items():
            kind = getattr(make, "__annotations__", {}).get("return")
            if name.startswith("_") and kind == list[Reproduced]:
                yield make


def reading(monkeypatch, make, ids):
    """Of `ids`, those whose number changes once all their rows say half as much again."""
    real, before = printed.row, {one.row.id: one.computed for one in make()}

    def shifted(id):
        row = real(id)
        return dataclasses.replace(row, value=1.5 * row.value) if id in ids else row

    with monkeypatch.context() as patch:
        patch.setattr(printed, "row", shifted)
        after = {one.row.id: one for one in make()}
    assert all(after[id].row.value == 1.5 * real(id).value for id in ids)
    return {id for id in ids if after[id].computed != before[id]}


def test_no_number_is_computed_from_the_row_that_it_is_held_against(monkeypatch):
    tried, wanted = set(), ("arithmetic", "model")
    for make in producers():
        ids = {one.row.id for one in make() if one.kind in wanted}
        for id in reading(monkeypatch, make, ids):  # it reads one of them: its own?
            assert not reading(monkeypatch, make, {id}), id
        tried |= ids
    assert tried == {one.row.id for one in CHECKS if one.kind in wanted} and len(tried) > 120


# Two counts start from a choice that is printed: 6 bits a number, and the peak learning rate.
GIVEN = {"v2.kv_cache_reduction", "recipe.final_lr", "recipe.lowest_lr"}


def test_what_is_counted_configured_or_set_asks_no_printed_number(monkeypatch):
    free = {one.row.id for one in CHECKS if one.kind in ("counted", "config", "setting")} - GIVEN
    real, keep = printed.row, ("deepep.", "network.", "step_time.", "training_cost.", "serving.")

    def shifted(id):  # but for the inputs of the models that stand beside them
        row = real(id)
        return row if id.startswith(keep) else dataclasses.replace(row, value=1.01 * row.value)

    monkeypatch.setattr(printed, "row", shifted)
    again = {one.row.id: one.computed for module in MODULES for one in module.checks()}
    assert len(free) > 120
    assert {id: again[id] for id in free} == {id: BY_ID[id].computed for id in free}


@pytest.mark.parametrize(
    ("value", "half"), [(4.66, 0.005), (250, 0.5), (1.0, 0.5), (2.2e-5, 5e-7), (32928, 0.5)]
)
def test_a_printed_number_is_known_to_half_of_its_last_digit(value, half):
    assert half_digit(value) == pytest.approx(half)


def test_equal_is_what_rounds_to_the_printed_number_and_no_more():
    def verdict(id, computed):
        return check(id, computed, "", "counted", 0.1).verdict

    assert verdict("training_flops.deepseek-v3", 250.46) == "equal"
    assert verdict("training_flops.deepseek-v3", 250.51) == "within 0.2 %"
    assert verdict("step_time.mpft.mfu_causal", 38.9449) == "equal"
    assert verdict("size.v3_over_v2", 2.846) == "within 5.1 %"  # rounds to 3, but is no 3


def test_what_follows_by_counting_alone_is_equal():
    ids = [*(f"kv_cache.{name}" for name in paper_model.CACHED), "training_flops.deepseek-v3"]
    ids += [f"topology.{n}.{p}" for n in ("ft2", "mpft", "ft3") for p in ("switches", "links")]
    ids += ["size.deepseek-v3.total", "size.deepseek-v3.activated", "v3.mha_over_mla"]
    ids += ["limits.comm_infiniband", "limits.token_nvl72", "serving.cost", "serving.margin"]
    ids += ["training_cost.total_dollars", "training_cost.hours_per_trillion"]
    assert [BY_ID[id].verdict for id in ids] == ["equal"] * len(ids)


def test_the_page_in_docs_is_what_the_command_prints(capsys):
    assert paper.main(["--markdown"]) == 0
    now = capsys.readouterr().out
    how = "write it again: python -m dsv3_tutorial paper --markdown > docs/paper.md"
    assert PAGE.read_text(encoding="utf-8") == now, how


def test_the_table_has_every_number_once_and_fits_100_columns(capsys):
    assert paper.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    ids = [line.split()[0] for line in lines if re.match(r"  \S+\.\S+ +\S+ ", line)]
    assert sorted(ids) == sorted(row.id for row in printed.all_rows())
    assert max(map(len, lines)) <= 100
    assert lines[-1] == paper_text.summary(CHECKS, paper.quoted())
    assert lines[-1].startswith(f"{len(ids)} printed numbers: {len(CHECKS)} computed again")


@pytest.mark.parametrize("only", ["wrong", "quoted", "reproduced"])
def test_only_shows_what_was_asked_for(only, capsys):
    paper.main(["--only", only])
    text = capsys.readouterr().out
    assert ("What does not fit in the papers" in text) == (only == "wrong")
    assert ("  differs by " in text) == (only != "quoted")
    assert ("  quoted\n" in text) == (only == "quoted")
    assert ("  equal\n" in text) == (only == "reproduced")


def test_an_unknown_choice_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as end:
        paper.main(["--only", "right"])
    assert end.value.code == 2 and "wrong" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "like", "shown"),
    [
        (32928, None, "32,928"),
        (4426165368, None, "4,426,165,368"),
        (0.0001, None, "0.0001"),
        (19.926, None, "19.926"),
        (7.3442, 7.28, "7.344"),
        (250.46, 250, "250.5"),
        (2.2e-5, 2.2e-5, "2.2e-05"),
        (3, 3, "3"),
    ],
)
def test_numbers_are_shown_as_they_are_printed_and_ours_with_a_digit_more(value, like, shown):
    assert paper_text.number(value, like) == shown
