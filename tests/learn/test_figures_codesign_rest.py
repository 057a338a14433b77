"""Lesson 6's figures of stalls, the pair, the paper, the next hardware and designs."""

import re
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import codesign, paper_misprints
from dsv3_tutorial.bench import paper as bench_paper
from dsv3_tutorial.bench import stalls as bench_stalls
from dsv3_tutorial.bench.codesign_ladder import BASELINE, FULL
from dsv3_tutorial.cost import designs, future, future_world, successors
from dsv3_tutorial.cost.design_briefs import BRIEFS
from dsv3_tutorial.cost.layout import PlanError
from dsv3_tutorial.learn.figures import (
    design,
    next_hardware,
    pair,
    paper_whole,
    service_units,
    stalls,
)

FACTS = {"device": "some CPU", "device_kind": "cpu", "versions": {"torch": "2.13"}}
DAY = {"date": "2026-11-22", "repeats": 1, "threads": 1}
WIDE = 100


def receipt(what, shapes, value, unit):
    spread = {"min": value, "max": value}
    return receipts.Receipt(
        what, shapes=shapes, value=value, unit=unit, spread=spread, **FACTS, **DAY
    )


def run(variant, seed, loss, peak_lr=codesign.PEAK_LR, length=codesign.STEPS):
    """A run of the pair whose held-out loss falls to `loss`."""
    whole = variant == FULL
    shapes = {
        "variant": variant,
        "seed": seed,
        "length": length,
        "peak_lr": peak_lr,
        "tokens_per_step": 1000,
        "training_flops_per_token": 2e6,
        "parameters": 4e6 if whole else 2e6,
        "activated_parameters": 1e6,
        "cache_bytes_per_token": 1024 if whole else 4096,
        "held_out_steps": [100, length],
        "held_out": [loss + 1, loss],
        "mtp_held_out": loss + 0.5 if whole else None,
        "processor_seconds": 100.0,
        "weight_bytes": 1e7,
        "optimizer_bytes": 1e7,
        "activation_bytes_per_token": 4e4,
    }
    return receipt("held-out loss", shapes, loss, "bits per byte")


def step(case, seconds, waits=(), hides=(), busy=0.2):
    """A case of the stalls as its receipts: waits and hides are (cause, seconds)."""
    shapes = {"case": case, "cores": 2}
    found = [
        receipt("step", shapes, seconds, "s"),
        receipt("busy elsewhere", shapes, busy, "cores"),
    ]
    for what, each in (("waits", waits), ("hides", hides)):
        found += [receipt(what, shapes | {"cause": cause}, s, "s") for cause, s in each]
    return found


STALLED = [
    *step("waits for its text", 0.150, [("data", 0.050), ("no phase", 0.001)]),
    *step("waits for its text, prefetched", 0.102, [("data", 0.001)], [("data", 0.049)]),
    *step("stops to save", 0.200, [("checkpoint", 0.100)]),
    *step("saves in the background", 0.110, [("checkpoint", 0.004)], [("checkpoint", 0.060)]),
]
RUNS = [
    *(run(BASELINE, seed, 2.0 + 0.1 * seed) for seed in (0, 1)),
    *(run(FULL, seed, 1.03 * (2.0 + 0.1 * seed) + 0.002 * seed) for seed in (0, 1)),
    run("+ MLA", 0, 2.02),
]


def told(capsys):
    text = capsys.readouterr().out
    assert all(len(line) <= WIDE for line in text.splitlines())
    return text


def bars(ax):
    """The blocks of a lane chart: (lane, start, length, colour)."""
    return [(round(p.get_y() + p.get_height() / 2), p.get_x(), p.get_width(), p.get_facecolor())
            for p in ax.patches]  # fmt: skip


DRAWN = {
    "On average a step waits 50.0 ms for text; repaired, 1.0 ms": (
        lambda: stalls.timeline("input", STALLED)
    ),
    "On average a step waits 100.0 ms for its checkpoint; repaired, 4.0 ms": (
        lambda: stalls.timeline("checkpoint", STALLED)
    ),
    "the toy learns 3.0% worse, from 2.4% worse to 3.7% worse (2 pairs": (
        lambda: pair.curves(RUNS)
    ),
    "printed numbers computed again": paper_whole.differences,
    "Training gains most by": next_hardware.knobs,
    "(1.00x as fast), served": next_hardware.what_if,
}


@pytest.mark.parametrize("finding", DRAWN)
def test_a_figure_states_its_finding_with_finite_data_and_repeats(finding):
    made = DRAWN[finding]()
    assert isinstance(made, Figure) and finding in str(made)
    assert made.png().startswith(b"\x89PNG") and str(DRAWN[finding]()) == str(made)
    for axes in made.axes:
        sizes = [p.get_width() for p in axes.patches]
        sizes += [y for line in axes.lines for y in np.asarray(line.get_ydata(), float)]
        assert sizes and np.isfinite(sizes).all()


def test_lanes_are_to_scale_and_what_is_hidden_lies_behind_work():
    before, after = stalls.timeline("input", STALLED).axes
    lengths = [b[2] for b in bars(before) if b[0] == 1]
    assert sum(lengths) == pytest.approx(6 * 150) and lengths[:2] == pytest.approx([50, 100])
    behind = [b for b in bars(after) if b[0] == 0]
    assert sum(b[2] for b in behind) == pytest.approx(6 * (1 + 49))
    before, after = stalls.timeline("checkpoint", STALLED).axes
    assert sum(b[2] for b in bars(before) if b[0] == 1) == pytest.approx(
        2 * bench_stalls.EVERY * 200
    )
    assert max(b[2] for b in bars(before)) == pytest.approx(bench_stalls.EVERY * 100)
    assert max(b[2] for b in bars(after) if b[0] == 0) == pytest.approx(bench_stalls.EVERY * 60)


def test_what_is_not_measured_is_said_and_never_fails(tmp_path, capsys):
    assert stalls.recorded(tmp_path) == [] and pair.recorded(tmp_path) == []
    for made in (stalls.timeline("unpacking", STALLED), pair.curves([])):
        assert "not measured yet" in str(made)
        made.png()
    for table in (stalls.table, stalls.experts_table, pair.costs_table, pair.ladder_table):
        table([])
    pair.learning_rates([])
    assert told(capsys).count("not measured yet") == 5
    one = [RUNS[0], RUNS[2]]
    assert "3.0% worse (one pair, no error)" in str(pair.curves(one))
    assert pair.better(one) == pair.NOBODY in pair.CHOICES
    with pytest.raises(KeyError, match="no pair 'coffee'"):
        stalls.timeline("coffee", STALLED)


def test_stalls_are_tabled_with_the_longest_wait_and_how_busy_it_was(capsys):
    stalls.table(STALLED)
    _, first, second, *_ = told(capsys).splitlines()
    assert first.startswith("waits for its text  ")
    assert re.split(r"\s{2,}", first)[1:] == ["50.0", "data", "-", "150", "0.2 of 2"]
    assert re.split(r"\s{2,}", second)[1:] == ["1.0", "data", "49", "102", "0.2 of 2"]
    of = {"skew": 1.0, "ranks": 8, "experts": 32, "tokens": 2048, "seeds": [0, 1]}
    loads = {"counted": [1.5, 2.5], "repaired": [1.0, 1.1], "max_violation": [4.0, 5.0]}
    stalls.experts_table([receipt(bench_stalls.BUSIEST, of | loads, 1.7, "x the mean")])
    assert told(capsys).splitlines()[1].split() == ["1.0", "4.50", "2.00x", "1.70x", "1.050x"]


@pytest.mark.parametrize("rows", [([], []), (STALLED, RUNS[:1]), (STALLED[:8], RUNS)])
def test_recorded_receipts_can_be_drawn_whatever_they_say(rows, tmp_path, monkeypatch, capsys):
    """From a folder of its own: what is recorded in data/measured changes with every run."""
    for name, some in zip((bench_stalls.NAME, codesign.NAME), rows):
        receipts.append(name, some, folder=tmp_path)
    monkeypatch.setattr(receipts, "data_path", lambda *_: tmp_path)
    assert len(stalls.recorded()) == len(rows[0]) and len(pair.recorded()) == len(rows[1])
    for which in stalls.PAIRS:
        assert "step waits" in str(stalls.timeline(which)) or "not measured" in str(
            stalls.timeline(which)
        )
    stalls.table()
    stalls.experts_table()
    pair.costs_table()
    pair.ladder_table()
    pair.learning_rates()
    pair.curves().png()
    assert told(capsys)


def test_only_runs_of_full_length_are_compared_and_other_rates_stand_apart(tmp_path, capsys):
    more = [run(BASELINE, 0, 9.0, length=10), run(BASELINE, 0, 1.9, peak_lr=6e-3)]
    receipts.append(codesign.NAME, [*RUNS, *more], folder=tmp_path)
    found = pair.recorded(tmp_path)
    assert [r.value for r in found] == [r.value for r in RUNS]
    pair.learning_rates(pair.recorded(tmp_path, peak_lr=None))
    lines = told(capsys).splitlines()
    assert len(lines) == 3 and lines[1].endswith("as in the pairs")
    assert lines[2].split() == ["0.006", "1.900"]


def test_the_pair_is_drawn_on_flops_and_by_seed(capsys):
    curves, gaps = pair.curves(RUNS).axes
    assert curves.lines[0].get_xdata()[-1] == pytest.approx(codesign.STEPS * 1000 * 2e6 / 1e12)
    marks = [line.get_xdata() for line in gaps.lines if len(line.get_xdata()) == 2]
    assert any(np.allclose(x, [3.0, 3 + 0.2 / 2.1]) for x in marks)
    pair.costs_table(RUNS)
    rows = told(capsys).splitlines()
    assert next(r for r in rows if r.startswith("cache")).split()[-3:] == [
        "4,096",
        "1,024",
        "0.25x",
    ]
    pair.ladder_table(RUNS)
    lines = told(capsys).splitlines()
    assert [line[:26].strip() for line in lines[1:4]] == [BASELINE, "+ MLA", pair.LAST]
    assert lines[2].endswith("+1.00%, no error") and lines[-1].startswith("+ MoE, + FP8: not")
    assert lines[3].startswith("+ MTP (the whole design)")
    assert lines[3].endswith("+3.05%, between +2.4% and +3.7%")


def test_the_bar_and_the_reveal_are_of_the_interval_that_so_few_pairs_allow():
    each = codesign.compared(RUNS)[FULL]
    (bar,) = pair.curves(RUNS).axes[1].containers
    ends = bar.lines[2][0].get_segments()[0][:, 0]
    assert ends == pytest.approx([100 * end for end in each.interval])
    assert each.interval[0] > 0 and pair.better(RUNS) == BASELINE
    apart = [*RUNS[:3], run(FULL, 1, 2.1)]  # 3 % worse and as good: two pairs exclude nothing
    assert pair.better(apart) == pair.NOBODY and "better to" in str(pair.curves(apart))


def test_busy_cores_are_said_to_leave_the_waits_alone_to_be_trusted():
    names = stalls.PAIRS["input"]
    crowded = [*step(names[0], 0.3, [("data", 0.05)], busy=1.6), *step(names[1], 0.4, busy=1.5)]
    note = stalls.timeline("input", crowded).get_supxlabel()
    assert note.startswith("others kept 1.6 and 1.5 of 2 cores busy: compare the waits")
    assert "compare" not in stalls.timeline("input", STALLED).get_supxlabel()


def test_every_reproduced_number_is_a_mark_and_no_two_lie_on_each_other():
    (ax,) = paper_whole.differences().axes
    data = [line for line in ax.lines if line.get_linestyle() == "None"]
    marks = [xy for line in data for xy in zip(line.get_xdata(), line.get_ydata())]
    found = bench_paper.reproduced()
    assert len(marks) == len(found) == len(set(marks))
    far = sum(x >= paper_whole.EXACT for x, _ in marks)
    assert far == sum(100 * abs(one.off) >= paper_whole.EXACT for one in found)
    verdicts = {one.verdict.split()[0] for one in found}
    assert verdicts <= set(paper_whole.VERDICTS)
    low, high = ax.get_xlim()
    assert all(low < x < high for x, _ in marks)


def test_the_counts_add_up_to_all_numbers(capsys):
    paper_whole.counts()
    first, *kinds, differ, _ = told(capsys).splitlines()
    numbers = [int(n) for n in re.findall(r"\d+", first.replace("10%", ""))]
    assert numbers[0] == sum(numbers[2:]) == sum(int(line.split()[0]) for line in kinds)
    assert numbers[1] == numbers[0] + len(bench_paper.quoted())
    listed = [paper_whole.differing(), len(paper_misprints.inconsistencies())]
    assert [int(n) for n in re.findall(r"\d+", differ)] == listed and listed[0] == numbers[-1]


def test_marks_that_share_a_line_lie_inside_it_and_a_full_line_is_taller():
    found = bench_paper.reproduced()
    rows = paper_whole._rows(found, sorted({paper_whole._group(one) for one in found}))
    for one in found:
        middle, high = rows[paper_whole._group(one)]
        assert abs(paper_whole._place(one, found, rows)[1] - middle) < high / 2
    assert max(rows, key=lambda name: rows[name][1]) == "DeepEP's kernels"
    ends = [(middle - high / 2, middle + high / 2) for middle, high in rows.values()]
    assert [end for _, end in ends[:-1]] == pytest.approx([start for start, _ in ends[1:]])


def test_what_has_to_be_believed_is_printed_with_its_reason(capsys):
    paper_whole.believed(5)
    text = " ".join(told(capsys).split())
    every = {row.id: row for row in bench_paper.quoted()}
    assert len({every[name].quoted for name in paper_whole.BELIEVED}) == 5
    assert text.startswith(f"{len(every)} numbers have to be believed; 5 of them:")
    for name, about in paper_whole.BELIEVED.items():
        row = every[name]
        assert f"{about}: {row.value:g} {row.unit} ({row.paper}, {row.where})" in text
        assert f"not computed: {row.quoted}" in text
    paper_whole.believed()
    assert told(capsys).count("not computed") == 3


def test_eight_contradictions_are_shown_in_like_units_and_are_still_found(capsys):
    everything = {one.what: one for one in paper_misprints.inconsistencies()}
    assert len(paper_whole.chosen()) == len(set(paper_whole.SURPRISES.values())) == 8
    for what, one in zip(paper_whole.SURPRISES, paper_whole.chosen()):
        assert (one.ours, one.where) == (everything[what].ours, everything[what].where)
        units = [re.sub(r"[\d.,]+", "#", number) for number in (one.printed, one.ours)]
        assert units[0] == units[1]
    paper_whole.surprises()
    text = told(capsys)
    assert all(one.ours in text and one.printed in text for one in paper_whole.chosen())
    assert text.splitlines()[-1].startswith(f"{len(everything) - 8} more")
    paper_whole.furthest()
    offs = [float(x) for x in re.findall(r"([+-]\d+)%$", told(capsys), re.M)]
    assert len(offs) == 8 and offs == sorted(offs, key=lambda off: -abs(off))


def test_knobs_are_the_cost_models_own_and_none_is_left_out(capsys):
    left, right = next_hardware.knobs().axes
    steps = [row.knob for row in future.ranking("step")]
    assert [label.get_text() for label in left.get_yticklabels()] == steps
    gains = [1 + p.get_width() / 100 for p in left.patches]
    drawn = [row.gain if row.gain >= 1.005 else 1 for row in future.ranking("step")]
    assert gains == pytest.approx(drawn) and 1 in drawn
    shown = {label.get_text() for ax in (left, right) for label in ax.get_yticklabels()}
    next_hardware.knobs_table()
    text = told(capsys)
    assert shown <= {knob.name for knob in future.KNOBS}
    assert all(knob.name in text for knob in (*future.KNOBS, future.EVERYTHING))
    flat = " ".join(text.split())
    assert all(f"{what} ({where}): {why}" in flat for what, where, why in future.UNPRICED)


def test_hardware_as_today_changes_nothing_and_roles_add_up_to_the_step():
    today = next_hardware.changed(**next_hardware.START)
    assert today == future.today()
    assert next_hardware.served(today).tokens_per_second_per_gpu == future_world.serving(today)
    plan = future_world.training(today)
    assert {p for _, parts in next_hardware.ROLES.values() for p in parts} == set(plan.times)
    assert sum(s for _, s in next_hardware._parts(today)) == pytest.approx(plan.step_time_s)
    words = next_hardware.what_if_in_words()
    assert f"{plan.step_time_s:.2f} s (1.00x as fast)" in words and plan.bottleneck in words


@pytest.mark.parametrize("change", [{"arithmetic": 4}, {"scale_out": 0.5, "memory_size": 2}])
def test_changed_hardware_gives_the_planners_numbers(change):
    world = next_hardware.changed(**next_hardware.START | change)
    seconds, rate = future_world.step_s(world), future_world.serving(world)
    words = next_hardware.what_if_in_words(**change)
    assert f"{seconds:.2f} s" in words and f"{rate:,.0f} tokens/s a GPU" in words
    made = next_hardware.what_if(**change)
    assert f"{seconds:.2f} s" in str(made)
    assert sum(p.get_width() for p in made.axes[0].patches[1::2]) > 0


def test_a_slower_network_is_told_from_the_memory_that_ends_its_batch():
    world = next_hardware.changed(**next_hardware.START | {"scale_out": 0.5})
    now, today = map(next_hardware.served, (world, future.today()))
    words = next_hardware.what_if_in_words(scale_out=0.5)
    assert now.devices < today.devices and now.limit == today.limit == "memory"
    assert "memory size ends the batch" in words and "wait most for the network" in words
    same = service_units.served_by(world, today.devices).tokens_per_second_per_gpu
    assert same <= now.tokens_per_second_per_gpu and f"{same:,.0f} tokens/s a GPU" in words
    assert f"{now.batch / now.devices:.0f} caches" in words
    assert "share the experts" not in next_hardware.what_if_in_words()


def test_a_layout_that_does_not_fit_is_drawn_as_words(monkeypatch):
    def refuse(world):
        if world != future.today():
            raise PlanError("no room")
        return 17.0

    monkeypatch.setattr(future_world, "step_s", refuse)
    made = next_hardware.what_if(memory_size=4)
    assert "V3's layout does not fit" in str(made)
    assert "does not fit" in next_hardware.what_if_in_words(memory_size=4)
    assert any("does not fit" in text.get_text() for text in made.axes[0].texts)


def test_the_bridge_names_every_successor_and_its_effects(capsys):
    next_hardware.models_after()
    text = told(capsys)
    for model in successors.SUCCESSORS:
        assert f"{model.name}, {model.when}" in text
        assert all(effect.what in text for effect in successors.effects(model.name))


WORKED = {"lab": designs.lab_design(), "h20": designs.cluster_design()}
LAB = WORKED["lab"]
HANDED = {
    "the worked one": ("lab", LAB),
    "the worked one of the H20": ("h20", WORKED["h20"]),
    "too many tokens": ("lab", LAB | {"tokens": 15e11}),
    "too few tokens": ("lab", LAB | {"tokens": 3e10}),
    "MHA": ("lab", LAB | {"kv_lora_rank": None}),
    "experts that do not divide": ("h20", WORKED["h20"] | {"n_routed_experts": 130}),
    "V3's heads": ("h20", WORKED["h20"] | {"num_attention_heads": 128}),
    "no model": ("lab", {"hidden_size": 2048}),
    "no tokens": ("lab", {k: v for k, v in LAB.items() if k != "tokens"}),
}


@pytest.mark.parametrize("name", HANDED)
def test_the_table_of_demands_and_the_judge_agree(name, capsys):
    brief, handed = HANDED[name]
    found, unmet = design.demands(handed, brief), designs.judge(handed, BRIEFS[brief])
    assert all(one.met for one in found) == (not unmet)
    design.judged(handed, brief)
    text = told(capsys)
    whose = "the course's own design" if name.startswith("the worked") else "your design"
    assert text.startswith(f"{BRIEFS[brief].title}: {whose}\n")
    flat = " ".join(text.replace("  - ", "").split())
    assert all(" ".join(said.split()) in flat for said in unmet)
    if unmet:
        assert text.splitlines()[-1] == f"{len(unmet)} unmet" and len(set(unmet)) == len(unmet)
    else:
        assert "FLOP, 100 % of the worked answer's" in text
    assert all(one.spare is None or (one.spare >= 0) == one.met for one in found)


def test_a_design_is_judged_from_a_function_and_its_absence_is_told(capsys):
    design.judged(designs.cluster_design, "h20")
    own = told(capsys)
    design.judged(designs.cluster_design(), BRIEFS["h20"])
    assert own == told(capsys) and "the course's own design" in own
    for nothing in (None, [3], lambda: None):
        design.judged(nothing, "lab")
        assert told(capsys) == f"no design to judge\n{BRIEFS['lab']}\n"


def test_the_score_rises_with_what_is_trained_within_the_brief(capsys):
    design.judged(LAB | {"tokens": 1.05 * LAB["tokens"]}, "lab")
    assert "105 % of the worked answer's" in told(capsys)
    design.judged(LAB, replace(BRIEFS["lab"], days=15))
    assert "worked answer" not in told(capsys)


def test_designs_stand_side_by_side_with_what_each_is_served(capsys):
    design.compare()
    text = told(capsys)
    for brief, worked in WORKED.items():
        served = design.planned(worked, brief).served
        assert f"{served.batch:,} of {BRIEFS[brief].users:,}" in text
    design.compare({"nothing": ({"hidden_size": 2048}, "lab")})
    rows = [line.split()[-1] for line in told(capsys).splitlines()[2:]]
    assert set(rows) == {"-"}


def test_more_heads_on_a_latent_cost_an_h20_its_users_and_an_h800_few(capsys):
    design.heads_table()
    _, heads, asked, *served = told(capsys).splitlines()
    assert heads.split()[-4:] == ["16", "32", "64", "128"]
    assert [int(n) for n in asked.split()[-4:]] == [
        round(2 * n * (2 * 512 + 64) / (2 * 576)) for n in (16, 32, 64, 128)
    ]
    cells = [re.split(r"\s{2,}", line) for line in served]
    assert [row[:2] for row in cells] == [
        ["8 H20", "37 FLOP per byte"],
        ["8 H800", "295 FLOP per byte"],
    ]
    assert cells[0][2:] == ["272 memory", "272 memory", "160 compute", "80 compute"]
    assert cells[1][2:] == ["208 memory", "208 memory", "192 memory", "168 memory"]
    again = [design.planned(WORKED["h20"] | {"num_attention_heads": n}, "h20") for n in (16, 128)]
    ends = [f"{one.served.batch} {one.served.limit}" for one in again]
    assert [cells[0][2], cells[0][5]] == ends


def test_the_explorers_tasks_have_their_answers_on_its_grid():
    today = next_hardware.changed(**next_hardware.START)

    def gains(**change):
        assert all(value in next_hardware.GRID[name] for name, value in change.items())
        world = next_hardware.changed(**next_hardware.START | change)
        steps, rates = ([of(w) for w in (today, world)] for of in _FIGURES)
        return steps[0] / steps[1], rates[1] / rates[0], future_world.training(world).bottleneck

    step, rate, binds = gains(arithmetic=4)  # training alone, and then the network binds
    assert step > 1.5 and rate == pytest.approx(1) and binds == "scale out"
    step, rate, _ = gains(memory_size=2)  # serving alone
    assert step == pytest.approx(1) and rate > 1.3
    assert gains(arithmetic=8, scale_out=0.5)[0] < 1  # eight times the arithmetic, and slower
    assert gains(arithmetic=4, scale_out=2)[0] > 2  # two changes that halve a step
    alone = gains(arithmetic=2)[1], gains(domain=64)[1]
    assert alone[0] * alone[1] < 1.7 and gains(arithmetic=2, domain=64)[1] > 2


_FIGURES = (future_world.step_s, future_world.serving)


def test_the_group_that_differs_most_is_counted_and_one_of_those_drawn():
    name = paper_whole.most_different()
    told = [one for one in bench_paper.reproduced() if one.verdict.startswith("differs")]
    mine = [one for one in told if paper_whole.GROUPS[one.row.id.split(".")[0]] == name]
    assert 2 * len(mine) > len(told)  # more than half, so no other has as many
