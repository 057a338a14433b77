"""Lesson 3's figures: what they draw is what the package computes, and the titles say it."""

import re
from itertools import pairwise

import pytest
from matplotlib.figure import Figure

from dsv3_tutorial import hardware
from dsv3_tutorial.cost.sharding import overlap_speedup
from dsv3_tutorial.cost.step_traffic import Split
from dsv3_tutorial.learn.figures import (
    mesh_map,
    overlap,
    ring_steps,
    timelines,
)
from dsv3_tutorial.learn.figures import tiers as tier_figure
from dsv3_tutorial.learn.widgets import explore

CHIPS = ("h800", "h100-sxm", "gb200-nvl72")
DRAWN = {
    "registers deliver is 10,035 times what InfiniBand does": tier_figure.bandwidths,
    "A ring of 4: 6 steps, 1.5 times the vector": ring_steps.ring,
    "with 20 of 132 SMs for communication: 1.70 times": overlap.dual_micro_batch,
    "slower, 0.67 times as fast": lambda: overlap.dual_micro_batch(64, 0.3),
    "links are busy for 6.7 s a step It fits: a GPU has 80 GB and would hold 57.9": (
        mesh_map.placement
    ),
    "Tensor parallelism inside a node: the links are busy for 3.3 s": (
        lambda: mesh_map.placement(dp=16, ep=16, tp=8)
    ),
    "It does not fit: a GPU has 80 GB and would hold 111.5": lambda: mesh_map.placement(ep=8),
    "Experts inside a rack: ": lambda: mesh_map.placement(chip="gb200-nvl72"),
    "1F1B: the worst device waits 9 of 33 (27%)": timelines.timeline,
    "DualPipe: the worst device waits 14 of 110 (13%)": (
        lambda: timelines.timeline("dualpipe", 16, 32)
    ),
    "waits 21, 7 and 6 forwards DualPipe does 45% to 55% of": timelines.three,
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


def test_the_squares_say_whose_they_are_and_how_each_is_known():
    said = tier_figure.bandwidths().get_supxlabel()
    assert said.startswith("H800") and "FP32 rate: registers" in said and "as reached" in said


# Rings


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


def test_what_a_step_of_the_ring_changes_is_framed():
    seen, panels = ring_steps.steps(4), ring_steps.ring(4).axes
    for index, ax in enumerate(panels):
        frames = {
            (round(box.get_y() + 0.42), round(box.get_x() + 0.42))
            for box in ax.patches
            if not box.get_fill()
        }
        before, after = seen[max(0, index - 1)], seen[index]
        changed = {(r, c) for r in range(4) for c in range(4) if before[r][c] != after[r][c]}
        assert frames == changed and len(frames) == (4 if index else 0)


def test_a_ring_that_cannot_be_drawn_is_refused():
    for world in (1, 7):
        with pytest.raises(ValueError, match="Give 2 to 6"):
            ring_steps.ring(world)


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
    one = mesh_map.held(Split(*layout))
    bars = [bar.get_width() for bar in made.axes[1].patches]
    assert bars == pytest.approx([getattr(one, name) / 1e9 for name in mesh_map.KEPT])
    room = hardware.chip(chip).memory_bytes
    assert made.axes[1].lines[0].get_xdata()[0] == room / 1e9
    for said in (words, str(made)):
        assert ("does not fit" in said) == (one.total > room) == (not mesh_map.fits(
            Split(*layout), chip
        ))  # fmt: skip
        assert f"would hold {one.total / 1e9:.1f}" in said


def test_all_chips_are_taken_at_the_share_of_their_rates_that_an_h800_reaches():
    rates = {chip: mesh_map.whole_nodes(chip) for chip in CHIPS}
    assert [round(n.across.bandwidth / 1e9) for n in rates.values()] == [40, 40, 40]
    assert [round(n.inside.bandwidth / 1e9) for n in rates.values()] == [160, 360, 720]
    for chip, said in zip(CHIPS, ("160 GB/s", "360 GB/s", "720 GB/s")):
        made = mesh_map.placement(chip=chip)
        legend = [text.get_text() for text in made.axes[0].get_legend().get_texts()]
        assert legend[0].endswith(said) and legend[1].endswith("40 GB/s")
        note = made.get_supxlabel()
        assert ("as on the H800" in note) == (chip != "h800") and "80% of line rate" in note
        node = "64 of a rack's 72" if chip == "gb200-nvl72" else "8 GPUs a node"
        assert node in note and node in mesh_map.placement_in_words(chip=chip)


def test_a_node_is_used_as_far_as_groups_of_powers_of_two_fill_it():
    assert [mesh_map.whole_nodes(chip).ranks_per_node for chip in CHIPS] == [8, 8, 64]
    assert "experts 64 ranks on 1 node " in mesh_map.placement_in_words(chip="gb200-nvl72")
    assert "tensor 8 ranks on 1 node " in mesh_map.placement_in_words(dp=16, ep=16, tp=8)


def test_the_experts_are_hungriest_and_the_table_prints_both_layouts(capsys):
    assert mesh_map.hungriest() == "experts"
    mesh_map.traffic_table()
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[2:5]] == ["experts", "stages", "gradients"]
    assert rows[2].split()[1:3] == ["64", "8"] and "269.9 GB" in rows[2] and "6.75 s" in rows[2]
    assert "7.3 GB" in rows[4] and "a GPU holds 57.9 GB: weights 6.8, gradients 13.7" in rows[5]
    assert rows[7].split()[0] == "experts" and rows[7].split()[3:] == rows[2].split()[3:]
    assert rows[8].split()[0] == "tensor" and "523.9 GB" in rows[8] and "3.27 s" in rows[8]
    assert "a GPU holds 16.2 GB" in rows[11]
    assert "the slower of both tiers, 160 and 40 GB/s" in rows[12] and "19.9 s" in rows[-1]


def test_the_groups_for_placing_carry_what_the_cost_model_sends_in_all():
    sizes, traffic = mesh_map.groups()
    assert sizes == {"tp": 8, "ep": 16, "pp": 16} and list(traffic) == list(sizes)
    by_name = {kind.name: kind for kind in mesh_map.found(Split(16, 16, 16, 8))}
    assert traffic["tp"] == by_name["tensor"].inside and traffic["pp"] == by_name["stages"].across
    # at most a copy for each of 8 experts, and more than the nodes' shared ones
    each = 2 * 58 / 16 * 15360 * 4096 / 128 * 7168 * (1 + 4 / 128 + 2)
    assert by_name["experts"].across < 4 * each < traffic["ep"] < 8 * each
    sizes, traffic = mesh_map.groups(tp=1, dp=128, ep=64)
    assert sizes == {"ep": 64, "pp": 16} and set(traffic) == set(sizes)


def test_a_layout_that_does_not_divide_is_said_in_words():
    shown = explore(
        mesh_map.placement, say=mesh_map.placement_in_words, ep=[64, 48], chip=list(CHIPS)
    )
    assert shown.picture and "experts 64 ranks on 8 nodes" in shown.caption
    shown._controls["ep"].value = 48
    assert shown.picture == b"" and "ep = 48 does not divide dp = 128" in shown.caption


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


def test_both_ratios_of_communication_are_printed_with_what_overlapping_buys(capsys):
    overlap.ratios_table()
    head, quoted, counted, *rest = capsys.readouterr().out.splitlines()
    assert "with 20 of 132 SMs" in head and "1.00 : 1" in quoted and "1.70 times" in quoted
    ratio = 6.75 / 17.55
    gain = overlap_speedup(1.0, ratio, 132, 20)
    assert f"{ratio:.2f} : 1" in counted and f"{gain:.2f} times" in counted
    assert "6.75 s over table 4's 17.55 s" in counted
    assert "1.14 to 1.44 times" in rest[0]
