"""What hardware should come next: no knob makes anything worse, and each price has its bounds."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial import paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import future, future_world
from dsv3_tutorial.cost.comm_moe import BF16, FP8
from dsv3_tutorial.cost.future_world import UNIT, busy, today
from dsv3_tutorial.cost.layout import Layout
from dsv3_tutorial.cost.plan import Job, plan
from dsv3_tutorial.hardware import cluster

NAMES = [knob.name for knob in future.KNOBS]
SECTIONS = (  # every section of the ISCA paper that recommends hardware
    *("3.1.2", "3.2.2", "4.4.2", "4.5.2", "5.1", "5.2.2", "5.2.3"),
    *("6.1", "6.2", "6.3", "6.4", "6.5", "6.6"),
)
FULL_NVLINK = "scale-up as on an H100"
widths = st.floats(0.5, 4)


def test_without_a_knob_a_step_is_exactly_what_the_planner_says():
    cfg, layout = ModelConfig.named("deepseek-v3"), Layout.read("deepseek-v3")
    planned = plan(cfg, cluster("h800:2048"), Job(), layout)
    assert future_world.step_s(today()) == planned.step_time_s
    assert future_world.gpu_hours(today()) == planned.gpu_hours


@pytest.mark.parametrize("name", [*NAMES, future.EVERYTHING.name])
def test_no_knob_makes_anything_worse_and_each_improves_something(name):
    rows = future.what_if(name)
    assert all(row.gain >= 1 - 1e-9 for row in rows), rows
    assert any(row.gain > 1.001 for row in rows) or name == FULL_NVLINK, rows
    assert future.knob(name).before == today() or name in (
        "low-latency Ethernet",
        "nothing lost",
    )


def test_everything_together_is_at_least_as_good_as_any_part_of_it():
    together = {row.measure: row.after for row in future.what_if(future.EVERYTHING)}
    for name in future.TOGETHER:
        for row in future.what_if(name):
            sign = 1 if row.less_is_better else -1
            assert sign * together[row.measure] <= sign * row.after * (1 + sign * 1e-9), name


def test_every_section_that_recommends_is_priced_or_says_why_not():
    said = [knob.where for knob in future.KNOBS] + [where for _, where, _ in future.UNPRICED]
    named = {word.strip(",") for where in said for word in where.split()}
    assert set(SECTIONS) <= named
    assert all(why for _, _, why in future.UNPRICED)
    assert len(set(NAMES)) == len(NAMES)


@given(widths, widths, st.floats(1, 16))
def test_switches_that_copy_never_spare_the_receivers(dispatch, combine, copies):
    plain = replace(today(), dispatch=dispatch, combine=combine)
    switched = replace(plain, in_network=True)
    assert busy(switched, copies) <= busy(plain, copies) * (1 + 1e-12)
    assert busy(switched, copies) >= max(dispatch, combine)  # what every receiver or sender keeps
    assert busy(switched, copies) >= busy(plain, copies) / 2  # two directions, at the very best
    assert busy(plain, copies) == dispatch + combine


@pytest.mark.parametrize("copies", [1, 2, 5, 8])
def test_the_busier_direction_is_what_a_ring_of_devices_counts(copies):
    devices = 16  # device i asks i + 1 ... i + copies, as every other does
    pairs = [(i, (i + j) % devices) for i in range(devices) for j in range(1, copies + 1)]
    out, into = [0.0] * devices, [0.0] * devices
    for sender, receiver in pairs:
        out[sender] += FP8 / copies  # dispatch: one copy leaves, however many arrive
        into[receiver] += FP8
        out[receiver] += BF16  # combine: every partial sum leaves, one sum arrives
        into[sender] += BF16 / copies
    world = replace(today(), in_network=True)
    assert max(out + into) / copies == pytest.approx(busy(world, copies), rel=1e-12)


def test_nvlink_waits_for_infiniband():
    ratio = future_world.balanced_ratio(today())
    reached = today().chip.scale_up.effective / today().chip.scale_out.effective
    assert 1 < ratio < 2 < reached == 4


def test_the_nvlink_that_the_h800_lost_would_buy_next_to_nothing():
    assert all(row.gain < 1.01 for row in future.what_if(FULL_NVLINK))


def test_with_one_copy_a_switch_has_nothing_to_save():
    assert busy(replace(today(), in_network=True), 1) == FP8 + BF16


def test_a_users_token_follows_from_its_bytes_by_hand():
    cfg = ModelConfig.named("deepseek-v3")
    silent = replace(today(), latency=0.0)
    copies = 8 * (UNIT - 8) / UNIT  # eight experts, of which those outside the own node count
    sent = 2 * 32 * copies * 7168 * (FP8 + BF16) / 40e9
    assert future_world.token_s(silent) == pytest.approx(58 * sent, rel=1e-12)
    late = future_world.token_s(today()) - future_world.token_s(silent)
    assert late == pytest.approx(58 * 4 * 3 * 2.8e-6, rel=1e-9)  # there, and a fence's round trip
    assert cfg.num_hidden_layers - cfg.first_k_dense_replace == 58


def test_the_papers_own_bound_is_near_ours_at_its_rate():
    ideal = today().with_chip(scale_out=50 / 40)
    found = future_world.token_s(replace(ideal, latency=0.0)) * 1e3
    # 9 copies over 61 layers in the paper, 7.75 over 58 here, and 7,000 channels for 7,168
    printed = paper.row("limits.token_infiniband").value
    assert found / printed == pytest.approx(
        7.75 * 58 * 7168 * 3.03125 / (9 * 61 * 7000 * 3), rel=1e-3
    )
    assert 0.8 < found / printed < 0.9


def test_a_conversation_comes_back_at_the_links_rate():
    assert future_world.return_s(today()) == 4989 * 70_272 / 64e9


def test_quantisations_share_of_the_traffic_bounds_what_fusing_it_can_buy():
    share = future_world.casts_share()
    assert 0.1 < share < 0.7
    plain = future_world.training(today()).times
    (row,) = future.what_if("fused quantisation")
    slowed = plain["bubble"] + plain["recomputation"] + plain["uneven stages"]
    spare = plain["memory traffic"] + slowed
    assert 0 < row.before - row.after < spare


def test_fewer_bytes_to_experts_leave_gradients_alone():
    world = replace(today(), combine=FP8)
    faster = future_world.step_s(world)
    everything = future_world.training(
        today().with_chip(scale_up=3.03125 / 2.0625, scale_out=3.03125 / 2.0625)
    )
    assert everything.step_time_s <= faster <= future_world.step_s(today())


def test_several_knobs_at_once_are_what_each_does_when_alone_and_gain_less_than_the_product():
    assert all(row.gain == 1 for row in future.together([]))
    alone = {row.measure: row for row in future.what_if("one network")}
    for row in future.together(["one network"]):
        if row.measure in alone:
            assert row.after == alone[row.measure].after
    _, _, serving, *_ = future.together(["one network", "logfmt-8 combine"])
    product = alone[serving.measure].gain * future.what_if("logfmt-8 combine")[1].gain
    assert 1 < serving.gain < product
    assert future.together(future.TOGETHER)[0].after == future.what_if(future.EVERYTHING)[0].after


def test_a_ranking_begins_with_the_largest_gain():
    gains = [row.gain for row in future.ranking("token")]
    assert gains == sorted(gains, reverse=True) and gains[0] > 2


def test_the_report_names_every_knob_and_fits_a_page():
    text = future.report()
    assert all(name in text for name in NAMES)
    assert all(what in text for what, _, _ in future.UNPRICED)
    table, _, _ = text.partition("\n\n")
    assert max(map(len, table.splitlines())) <= 90


def test_an_unknown_knob_is_refused_with_the_known_ones():
    with pytest.raises(KeyError, match=r"no knob 'warp drive'.*accumulator"):
        future.what_if("warp drive")


def test_what_a_knob_assumes_of_kernels_is_what_their_rows_say():
    faster = {
        name: future.knob(name).after.assume.fp8_products / today().assume.fp8_products
        for name in ("accumulator", "accumulator, at most")
    }
    up, down = (
        paper.row(f"future.unscaled.{way}").value / paper.row(f"future.tile_scaled.{way}").value
        for way in ("up", "down")
    )
    assert up < faster["accumulator"] < down  # a mean of both shapes
    assert round(faster["accumulator"], 2) == 1.10 and "1.10" in future.knob("accumulator").assumes
    assert round(faster["accumulator, at most"], 2) == 1.29
