"""Lesson 3's figures: what they draw is what the package computes, and the titles say it."""

import re
from itertools import pairwise

import pytest
from matplotlib.figure import Figure

from dsv3_tutorial import hardware, paper
from dsv3_tutorial.cost import deepep, limits, schedule_table, step_time, tiers, topology
from dsv3_tutorial.cost.schedule import SCHEDULES, Op, Times
from dsv3_tutorial.cost.schedule_timeline import Slot
from dsv3_tutorial.cost.sharding import overlap_speedup
from dsv3_tutorial.cost.step_traffic import Split
from dsv3_tutorial.learn.figures import (
    cache_split,
    mesh_map,
    network_tables,
    overlap,
    ring_steps,
    timelines,
)
from dsv3_tutorial.learn.figures import tiers as tier_figure
from dsv3_tutorial.learn.widgets import explore

SIZES = [(name, stages) for name in SCHEDULES for stages in (4, 8, 16)]
CHIPS = ("h800", "h100-sxm", "gb200-nvl72")
DRAWN = {
    "registers deliver is 10,035 times what InfiniBand does": tier_figure.bandwidths,
    "A ring of 4: 6 steps, 1.5 times the vector": ring_steps.ring,
    "Split 8 ways the GQA models keep 65 and 41 KB a GPU": cache_split.cache_per_gpu,
    "with 20 of 132 SMs for communication: 1.70 times": overlap.dual_micro_batch,
    "slower, 0.67 times as fast": lambda: overlap.dual_micro_batch(64, 0.3),
    "Experts over 8 nodes: the links are busy for 6.7 s a step": mesh_map.placement,
    "Tensor parallelism inside a node: the links are busy for 9.4 s": (
        lambda: mesh_map.placement(dp=16, ep=16, tp=8)
    ),
    "1F1B: the worst device waits 9 of 33 (27%)": timelines.timeline,
    "DualPipe: the worst device waits 14 of 110 (13%)": (
        lambda: timelines.timeline("dualpipe", 16, 32)
    ),
    "a device waits 21, 7 and 6 forwards": timelines.three,
}


@pytest.mark.parametrize("finding", DRAWN)
def test_a_figure_states_its_finding_and_repeats(finding):
    made = DRAWN[finding]()
    assert isinstance(made, Figure) and finding in str(made)
    assert made.png() == DRAWN[finding]().png()


# Bandwidths


def test_squares_have_areas_to_one_scale_and_are_derived_from_the_chip():
    found = tier_figure.wires()
    squares = tier_figure.bandwidths().axes[0].patches
    areas = [square.get_width() * square.get_height() for square in squares]
    assert areas == pytest.approx([wire.bandwidth / found[0].bandwidth for wire in found])
    assert [w.bandwidth for w in found] == sorted((w.bandwidth for w in found), reverse=True)
    # 132 SMs x 128 lanes x 12 bytes of operands; 128 bytes of shared memory an SM and clock
    clock = hardware.chip("h800").rate("fp32") / 2 / (132 * 128)
    assert found[0].bandwidth == pytest.approx(132 * 128 * 12 * clock)
    assert found[1].bandwidth == pytest.approx(132 * 128 * clock)
    edges = [(square.get_x(), square.get_x() + square.get_width()) for square in squares]
    assert all(one[1] < other[0] for one, other in pairwise(edges))


def test_the_bandwidth_table_says_how_each_is_known_and_what_4096_tokens_take(capsys):
    tier_figure.bandwidths_table()
    first, _, *rows = capsys.readouterr().out.splitlines()
    assert "58.7 MB" in first and len(rows) == len(tier_figure.wires())
    assert "10,035" in rows[0] and "derived" in rows[0]
    assert "1,468.0 us" in rows[-2] and re.search(r" 1 ", rows[-2])
    assert all(len(row) <= 100 for row in rows)


# Rings and caches


@pytest.mark.parametrize("world", [2, 3, 4, 5, 6])
def test_a_ring_ends_with_every_sum_everywhere_after_the_least_steps(world):
    seen = ring_steps.steps(world)
    assert len(seen) == 2 * (world - 1) + 1 and len(ring_steps.ring(world).axes) == len(seen)
    assert seen[-1] == [[world] * world] * world
    halfway = seen[world - 1]
    assert sorted(row.count(world) for row in halfway) == [1] * world  # reduce-scatter is over
    for before, after in pairwise(seen):
        changed = [[a != b for a, b in zip(*rows)] for rows in zip(before, after)]
        assert [sum(row) for row in changed] == [1] * world  # one chunk arrives at each rank


def test_a_ring_that_cannot_be_drawn_is_refused():
    for world in (1, 7):
        with pytest.raises(ValueError, match="Give 2 to 6"):
            ring_steps.ring(world)


def test_gqa_caches_shrink_until_heads_run_out_and_a_latent_never_does():
    assert {cache_split.kilobytes("deepseek-v3", tp) for tp in cache_split.DEGREES} == {70.272}
    llama = [cache_split.kilobytes("llama-3.1-405b", tp) for tp in cache_split.DEGREES]
    assert llama == pytest.approx([516.096 / part for part in (1, 2, 4, 8, 8)])
    assert [cache_split.crossing(name) for name in cache_split.MODELS] == [8, 8, None]


# Where groups lie


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("layout", [(16, 128, 64, 1), (16, 16, 16, 8), (8, 64, 32, 2)])
def test_bars_are_bytes_over_bandwidth_and_the_title_names_what_takes_longest(chip, layout):
    kinds, network = mesh_map.found(Split(*layout), chip), mesh_map.whole_nodes(chip)
    made = mesh_map.placement(*layout, chip)
    widths = [bar.get_width() for bar in made.axes[0].patches][:8]
    assert widths == pytest.approx(
        [n for k in kinds for n in (k.inside / network.inside.bandwidth,
                                    k.across / network.across.bandwidth)]
    )  # fmt: skip
    worst = max(kinds, key=lambda kind: kind.seconds)
    assert worst.name in str(made).lower() and f"{worst.seconds:.1f} s" in str(made)
    words = mesh_map.placement_in_words(*layout, chip)
    assert hardware.chip(chip).title in words
    for kind in kinds:
        assert (f"{kind.name} {kind.ranks} ranks" in words) == (kind.ranks > 1)
        assert kind.ranks == 1 or f"{kind.seconds:.2f} s" in words


def test_a_node_is_used_as_far_as_groups_of_powers_of_two_fill_it():
    assert [mesh_map.whole_nodes(chip).ranks_per_node for chip in CHIPS] == [8, 8, 64]
    assert "experts 64 ranks on 1 node " in mesh_map.placement_in_words(chip="gb200-nvl72")
    assert "tensor 8 ranks on 1 node " in mesh_map.placement_in_words(dp=16, ep=16, tp=8)


def test_the_experts_are_hungriest_and_the_table_prints_both_layouts(capsys):
    assert mesh_map.hungriest() == "experts"
    mesh_map.traffic_table()
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[2:6]] == list(mesh_map.TITLES)
    assert rows[3].split()[1:3] == ["64", "8"] and "269.9 GB" in rows[3] and "6.75 s" in rows[3]
    assert "1,504.4 GB" in rows[7] and "19.9 s" in rows[-1]


def test_a_layout_that_does_not_divide_is_said_in_words():
    shown = explore(
        mesh_map.placement, say=mesh_map.placement_in_words, ep=[64, 48], chip=list(CHIPS)
    )
    assert shown.picture and "experts 64 ranks on 8 nodes" in shown.caption
    shown._controls["ep"].value = 48
    assert shown.picture == b"" and "ep = 48 does not divide dp = 128" in shown.caption


# Schedules


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


def test_the_bubble_table_prints_the_reports_formula_beside_the_simulation(capsys):
    timelines.bubble_table(16, 120, Times(1, 2, 0.5, 3))
    rows = {row.split()[0]: row.split()[1:] for row in capsys.readouterr().out.splitlines()[3:]}
    assert rows["1F1B"][:2] == ["45", "45"] and rows["DualPipe"][:2] == ["24.5", "23.5"]
    assert [rows[name][-1] for name in rows] == ["1x", "1x", "2x"]
    assert rows["DualPipe"][-2] == "17"
    timelines.bubble_table()
    assert "DualPipe         14         14" in capsys.readouterr().out


def test_a_real_run_is_drawn_as_recorded():
    lanes = [
        [Slot(0, 0.0, 1.0, Op("F", 0, 0)), Slot(0, 3.0, 5.0, Op("B", 0, 0))],
        [Slot(1, 1.0, 2.0, Op("F", 0, 1)), Slot(1, 2.0, 3.0, Op("B", 0, 1))],
    ]
    made = timelines.real(lanes, "1f1b")
    assert "1F1B as it ran: the least busy rank waits 60% of the time" in str(made)
    assert boxes(made) == [("B", 0, 3, 5), ("B", 1, 2, 3), ("F", 0, 0, 1), ("F", 1, 1, 2)]


# Overlap


@pytest.mark.parametrize(("sms", "communication"), [(20, 1.0), (64, 0.3), (0, 2.0), (20, 0.1)])
def test_the_overlap_drawn_is_the_speed_up_said(sms, communication):
    made = overlap.dual_micro_batch(sms, communication)
    ax = made.axes[0]
    ends = {0: 0.0}
    for bar in ax.patches:
        row = round(bar.get_y() + bar.get_height() / 2, 1)
        ends[row] = max(ends.get(row, 0.0), bar.get_x() + bar.get_width())
    gain = overlap_speedup(1.0, communication, 132, sms)
    assert ends[0] / ends[1.2] == pytest.approx(gain) and ends[1.2] == pytest.approx(ends[1.8])
    assert ax.get_xlim()[1] > max(ends.values())
    assert f"{gain:.2f} times as fast" in str(made) and ("slower" in str(made)) == (gain < 1)
    words = overlap.dual_micro_batch_in_words(sms, communication)
    assert f"{gain:.2f} times as fast" in words
    least = float(re.search(r"Below ([\d.]+) times", words)[1])
    assert (communication < least) == (gain < 1)


# Tables of the papers


def test_the_table_of_latencies_prints_where_bytes_weigh_as_much(capsys):
    assert network_tables.lower_latency() == "InfiniBand"
    network_tables.latencies()
    rows = capsys.readouterr().out.splitlines()[2:]
    link = tiers.network("h800").inside
    assert f"{link.alpha * link.bandwidth / 1e3:.0f} KB" in rows[0] and "3.33" in rows[0]
    assert [float(row[28:36]) for row in rows] == [3.33, 2.8, 3.7, 3.6, 5.6]


def test_the_table_of_topologies_counts_as_printed_and_says_what_nobody_can_wire(capsys):
    network_tables.topologies()
    _, *rows = capsys.readouterr().out.splitlines()
    for row, (name, made) in zip(rows, topology.PRINTED.items()):
        counts = [f"{n:,}" for n in (made().endpoints, made().switches, made().links)]
        assert row[24:54].split() == counts
        assert made().endpoints == paper.row(f"topology.{name}.endpoints").value
    assert "28 is no power of a prime; 27: 30,618 endpoints" in rows[5]
    assert "all counts as printed: True" in rows[6]
    network_tables.topologies(["ft2"])
    assert "prime" not in capsys.readouterr().out


def test_the_tables_of_steps_limits_and_deepep_stand_beside_ours(capsys):
    network_tables.step()
    rows = capsys.readouterr().out.splitlines()[1:]
    assert len(rows) == len(step_time.checks()) and all("%" in row for row in rows)
    network_tables.decode_limits()
    rows = capsys.readouterr().out.splitlines()[1:]
    assert "14.76" in rows[0] and f"{limits.infiniband().tokens_per_second:.1f}" in rows[0]
    assert "241.92" in rows[0] and "1219.8" in rows[3]
    network_tables.deep_ep()
    rows = capsys.readouterr().out.splitlines()[2:]
    checks = {check.row.id: check for check in deepep.checks()}
    for row in rows:
        ranks, quoted, ours, _, back, *_ = row.split()
        one = checks[f"deepep.latency.dispatch.{ranks}"]
        assert float(quoted) == one.quoted and float(ours) == round(one.computed)
        assert float(back) == checks[f"deepep.latency.combine.{ranks}"].quoted
    assert [row.split()[0] for row in rows] == ["8", "16", "32", "64", "128", "256"]


def test_every_table_fits_a_hundred_columns(capsys):
    tables = (
        *(network_tables.latencies, network_tables.topologies, network_tables.step),
        *(network_tables.decode_limits, network_tables.deep_ep, mesh_map.traffic_table),
        *(timelines.bubble_table, tier_figure.bandwidths_table),
    )
    for table in tables:
        table()
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
