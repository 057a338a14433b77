"""One stage's seconds: its FLOPs are the model's, its cuts the best, its schedule the simulated."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial import hardware
from dsv3_tutorial.config import ModelConfig, preset_names
from dsv3_tutorial.cost import (
    flops,
    params,
    schedule,
    stage_links,
    stage_step,
    step_traffic,
    validation,
)
from dsv3_tutorial.cost.assumptions import Assumptions
from dsv3_tutorial.cost.layout import Job, Layout, PlanError
from dsv3_tutorial.cost.schedule import Times
from dsv3_tutorial.cost.stage_split import cut
from dsv3_tutorial.cost.stage_step import PARTS, step
from dsv3_tutorial.cost.stage_time import Chunk, bubble, pair, slowest_stage, unpaired
from dsv3_tutorial.cost.stage_work import parts
from dsv3_tutorial.cost.step_traffic import Split

V3 = ModelConfig.named("deepseek-v3")
H800 = hardware.cluster("h800:2048")
REPORT = Layout.read("deepseek-v3")
COSTS = st.lists(st.floats(0.1, 5), min_size=1, max_size=9)


def by_trying_all(costs, stages):
    """The least largest sum over all ways to place the cuts."""
    n = len(costs)
    ways = combinations(range(1, n), min(stages, n) - 1)
    sums = ([0, *way, n] for way in ways)
    return min(max(sum(costs[a:b]) for a, b in pairwise(way)) for way in sums)


@given(COSTS, st.integers(1, 6))
def test_the_slowest_stage_is_the_least_of_all_cuts(costs, stages):
    assert slowest_stage(costs, stages) == pytest.approx(by_trying_all(costs, stages))


@given(COSTS, st.integers(1, 6))
def test_a_pipeline_is_cut_as_well_as_that(costs, stages):
    stages = min(stages, len(costs))
    cuts = cut(tuple(costs), stages)
    assert (cuts[0], cuts[-1], len(cuts)) == (0, len(costs), stages + 1)
    sizes = [sum(costs[a:b]) for a, b in pairwise(cuts)]
    assert all(a < b for a, b in pairwise(cuts))
    assert max(sizes) == pytest.approx(slowest_stage(costs, stages), rel=1e-5)


@given(COSTS, st.sampled_from([2, 4]))
@settings(max_examples=60)
def test_a_folded_pipeline_is_cut_within_one_unit_of_the_best(costs, stages):
    costs = costs if len(costs) >= stages else costs * stages
    cuts = cut(tuple(costs), stages, True)
    assert (cuts[0], cuts[-1]) == (0, len(costs)) and list(cuts) == sorted(cuts)
    sizes = [sum(costs[a:b]) for a, b in pairwise(cuts)]
    devices = [sizes[d] + sizes[-1 - d] for d in range(stages // 2)]
    least = max(sum(costs) / (stages / 2), max(costs))
    assert max(devices) <= least + max(costs) + 1e-6


@pytest.mark.parametrize("name", preset_names())
def test_the_parts_have_the_models_flops_and_numbers_to_the_last_one(name):
    cfg, counted = ModelConfig.named(name), params.count(ModelConfig.named(name))
    units = stage_step.total(parts(cfg, 4096, False))
    forward = units.linear + units.routed + units.high + units.attention
    expected = flops.forward_flops_per_token(cfg, 4096) - 2 * counted.by_part["norms"]
    assert forward == pytest.approx(expected, rel=1e-12)
    assert units.dense + units.experts == counted.total
    assert units.experts == counted.by_part["routed_experts"]
    more = stage_step.total(parts(cfg, 4096, True))
    assert more.dense + more.experts == counted.total + counted.mtp
    assert more.extra_dense + more.extra_experts == counted.mtp


def test_dispatch_and_combine_are_the_bytes_that_step_traffic_counts():
    links = stage_links.network(H800, 0.8)
    a, b = stage_links.exchange_seconds(V3, REPORT, links, 4096)
    split = Split(16, 128, 64, 1, 15360, 4096)
    sent = step_traffic.experts(V3, links, split)
    step_s = max(sent["inside"] / 160e9, sent["across"] / 40e9)
    latencies = 2 * (2.8e-6 + 3.33e-6)
    assert 2 * 120 * 58 / 16 * (a + b - latencies) == pytest.approx(step_s)
    assert 4 * (a + b) == pytest.approx(31.1e-3, rel=0.01)  # of a forward of four layers
    bf16 = stage_links.exchange_seconds(V3, replace(REPORT, precision="bf16"), links, 4096)
    assert bf16[0] == bf16[1] == b


@pytest.mark.parametrize("pp", [2, 4, 6, 8, 16])
def test_dualpipe_runs_so_many_forwards_alone_whatever_the_micro_batches(pp):
    for batches in (2 * pp, 3 * pp):
        orders = schedule.dual_pipe(pp, batches).orders
        alone = sum(op.kind == "F" for order in orders for op in order)
        assert alone / pp == unpaired(pp)


def chunk(forward, backward, weight, sending=0.0) -> Chunk:
    ahead, back = {"products": forward}, {"products": backward}
    return Chunk(ahead, back, sending, 0.0, weight)


@pytest.mark.parametrize("pp", [2, 4, 8])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb1p"])
def test_a_step_without_pairs_is_the_simulated_one(pp, name):
    one, batches = chunk(1.0, 2.0, 1.0), 3 * pp
    length = schedule.SCHEDULES[name](pp, batches).length(Times(1.0, 2.0, 1.0))
    assert 3 * batches + bubble(Layout(pp=pp, schedule=name), one, 0) == length


@pytest.mark.parametrize("pp", [4, 8, 16])
@pytest.mark.parametrize("sending", [0.0, 0.5])
def test_a_step_of_dualpipe_is_the_simulated_one_within_six_percent(pp, sending):
    one, batches, sms = chunk(1.0, 2.0, 1.0, sending), 5 * pp, 0.15
    layout = Layout(pp=pp, schedule="dualpipe")
    alone = unpaired(pp)
    f, b = 1 + sending, 2 + sending
    found = (batches - alone) * pair(one, sms) + alone * (f + b) + bubble(layout, one, sms)
    times = Times(f, b, 1.0, pair(one, sms))
    assert found == pytest.approx(schedule.dual_pipe(pp, batches).length(times), rel=0.06)


def test_a_pair_takes_its_computing_on_the_sms_left_or_its_sending():
    assert pair(chunk(1.0, 2.0, 1.0, 1.0), 0.25) == 4.0
    assert pair(chunk(1.0, 2.0, 1.0, 3.0), 0.25) == 6.0
    assert pair(chunk(1.0, 2.0, 1.0, 0.25), 0.25) == 3.5  # too little to send to give SMs up for
    assert pair(chunk(1.0, 2.0, 1.0, 0.0), 0.25) == 3.0


def v3(assume: Assumptions | None = None, cluster=H800, **changes):
    layout = replace(REPORT, **changes)
    assert not layout.problems(V3, cluster, Job())
    return step(V3, cluster, Job(), layout, assume or Assumptions())


def test_overlap_hides_what_one_forward_one_backward_shows():
    dual, plain = v3(), v3(schedule="1f1b")
    assert set(dual.times) == set(plain.times) == set(PARTS)
    for part in ("dispatch", "combine"):
        both = dual.times[part] + dual.hidden[part]
        assert both == pytest.approx(plain.times[part])
        assert dual.hidden[part] > 0.8 * both and plain.hidden[part] == 0
    assert dual.times["products"] > plain.times["products"]  # on the SMs that are left


def test_each_assumption_moves_its_part():
    base = v3().times
    for part, changes in {
        "products": {"fp8_products": 0.283},
        "attention": {"attention_forward": 0.3, "attention_backward": 0.3},
        "memory traffic": {"memory_bandwidth": 0.45},
        "dispatch": {"expert_load": 1.5},
    }.items():
        moved = v3(Assumptions(**changes)).times
        assert moved[part] > 1.2 * base[part], part
    assert v3(Assumptions(communication_sms=0.0)).times["products"] < base["products"]


def test_recomputation_and_zero_cost_what_they_say():
    none, full = v3(recompute="none"), v3(recompute="full")
    assert none.times["recomputation"] == 0
    assert full.times["recomputation"] > 0.3 * full.times["products"]
    gradients = [v3(zero=zero).times["gradients"] for zero in (0, 1)]
    assert gradients[0] == pytest.approx(gradients[1] * 8 / 6)
    step_once = gradients[1] / 6  # of 2 bytes gathered and 4 summed
    batches = Job().sequences // REPORT.dp // REPORT.copies  # half of them at each holder
    for zero, number in ((2, 4 * batches + 2), (3, 4 * batches + 4 * batches)):
        found = v3(zero=zero)
        sent = found.times["gradients"] + found.hidden["gradients"]
        assert sent == pytest.approx(number * step_once, rel=0.02) and found.hidden["gradients"] > 0


def test_no_link_carries_more_than_a_step_even_where_there_is_little_to_compute():
    tiny, job = ModelConfig.named("tiny"), Job(1e9, 8, 1024)
    layout = Layout(pp=4, dp=32, tp=4, schedule="dualpipe", precision="bf16")
    found = step(tiny, hardware.cluster("h100-sxm:512"), job, layout, Assumptions())
    names = ("tensor parallel", "pipeline sends", "gradients", "dispatch", "combine")
    sent = sum(found.times[name] for name in names) + sum(found.hidden.values())
    assert 0 < found.hidden["pipeline sends"] < found.times["pipeline sends"]
    assert sent <= sum(found.times.values()) * (1 + 1e-9)


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_a_step_of_single_tokens_reads_the_weights_at_the_memorys_rate(precision):
    """Twice a micro-batch, and float32 gradients read and written once."""
    dense, chip = ModelConfig.named("qwen2.5-72b"), hardware.cluster("h100-sxm:8")
    layout, job = Layout(pp=8, precision=precision, recompute="none"), Job(1e9, 1, 64)
    found = step(dense, chip, job, layout, Assumptions(memory_bandwidth=1.0))
    read = params.count(dense).total - 2 * dense.vocab_size * dense.hidden_size
    least = 64 * read / 8 * (2 * (1 if precision == "fp8" else 2) + 8) / chip.chip.bandwidth()
    assert least < sum(found.times.values()) < 1.5 * least


def test_a_link_that_nobody_publishes_is_asked_for_only_where_it_is_needed():
    h20 = hardware.cluster("h20:64")
    with pytest.raises(PlanError, match=r"H20.*scale_out.bandwidth is not known"):
        stage_links.network(h20, 0.8)
    one_node = stage_links.network(hardware.cluster("h20:8"), 0.8)
    assert one_node.inside.bandwidth == 0.8 * 450e9
    assert stage_links.network(H800, 0.1).inside.bandwidth == 160e9  # what is reached is known


def test_a_layer_of_a_pair_computes_as_long_as_its_share_of_the_overlapped_pairs():
    """Of V3's stage nearly all is MoE layers: 3.8 of them and a share of the heads."""
    found = validation.deepseek_v3()
    what = (found.cfg, found.cluster, found.job, found.layout, found.assume)
    one, sms = stage_step.mean_chunk(*what), found.assume.communication_sms
    whole = (one.forward + one.backward) / (1 - sms)
    assert 0.2 < stage_step.layer_of_a_pair(*what) / whole < 0.27
