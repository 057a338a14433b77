"""A plan's numbers follow from each other, and what a plan cannot be is said."""

import json
from dataclasses import replace

import pytest

from dsv3_tutorial import hardware
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import flops, memory, params, sensitivity, stage_memory, stage_step
from dsv3_tutorial.cost.assumptions import Assumptions
from dsv3_tutorial.cost.plan import Job, Layout, Plan, PlanError, plan, run_cost
from dsv3_tutorial.cost.stage_work import parts
from dsv3_tutorial.cost.step_memory import held, state_bytes
from dsv3_tutorial.cost.step_time import printed, tokens_per_step
from dsv3_tutorial.cost.step_traffic import Split

V3 = ModelConfig.named("deepseek-v3")
H800 = hardware.cluster("h800:2048")
REPORT = Layout.read("deepseek-v3")
FOUND = plan(V3, H800, Job(), REPORT)
KEYS = (
    *("gpu_hours", "step_time_s", "tokens_per_day", "mfu", "cost_usd", "energy_kwh"),
    *("bottleneck", "memory_per_gpu_bytes"),
)


def v3(job=None, assume=None, cluster=H800, **changes) -> Plan:
    return plan(V3, cluster, job or Job(), replace(REPORT, **changes), assume or Assumptions())


def test_the_published_step_gives_the_published_hours_dollars_and_energy_by_arithmetic():
    hours, dollars, kwh = run_cost(14.8e12, tokens_per_step(), printed("step"), 2048, 2, 700)
    assert hours == pytest.approx(2_667e3, rel=1e-3)
    assert dollars == 2 * hours and kwh == pytest.approx(0.7 * hours)
    assert run_cost(10, 5, 3600, 7, 0, 0) == (14, 0, 0)


def test_a_plans_totals_follow_from_its_step():
    assert FOUND.step_time_s == sum(FOUND.times.values())
    assert FOUND.tokens_per_step == 15360 * 4096
    assert FOUND.gpu_hours == pytest.approx(FOUND.days * 24 * 2048)
    assert FOUND.cost_usd == pytest.approx(2 * FOUND.gpu_hours)
    assert FOUND.energy_kwh == pytest.approx(0.7 * FOUND.gpu_hours)
    assert FOUND.tokens_per_day * FOUND.days == pytest.approx(14.8e12)
    assert FOUND.parameters.total == 671_026_419_200
    assert FOUND.flops_per_token == flops.training_flops_per_token(V3)
    useful = FOUND.mfu * 2048 * 989.4e12 * FOUND.step_time_s
    assert useful == pytest.approx(FOUND.flops_per_token * FOUND.tokens_per_step)
    assert FOUND.mfu_non_causal / FOUND.mfu == pytest.approx(
        printed("mfu_non_causal") / 38.94, rel=1e-3
    )


def test_prices_and_lost_time_scale_what_they_should():
    half = v3(assume=Assumptions(lost=0.5, rent=3, pue=1.5, power_share=0.5))
    assert half.step_time_s == FOUND.step_time_s and half.mfu == FOUND.mfu
    assert half.gpu_hours == pytest.approx(2 * FOUND.gpu_hours)
    assert half.cost_usd == pytest.approx(3 * FOUND.cost_usd)
    assert half.energy_kwh == pytest.approx(1.5 * FOUND.energy_kwh)


def test_the_json_has_the_names_that_others_rely_on_and_only_plain_values():
    found = json.loads(json.dumps(FOUND.as_json(), allow_nan=False))
    assert set(KEYS) <= set(found)
    assert found["step_time_s"] == FOUND.step_time_s
    assert Layout.read(found["layout"]) == REPORT
    assert Assumptions(**found["assumptions"]) == FOUND.assume
    assert sum(found["memory"].values()) == pytest.approx(found["memory_per_gpu_bytes"])


@pytest.mark.parametrize("changes", [{}, {"schedule": "1f1b"}, {"pp": 8, "schedule": "dualpipev"}])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_all_gpus_together_hold_each_number_as_often_as_it_has_holders(changes, zero):
    layout = replace(REPORT, zero=zero, **changes)
    layout = replace(layout, dp=2048 // layout.pp)
    one = plan(V3, H800, Job(), layout)
    parts = [  # of each kind of device: in DualPipe two have the same stages
        stage_memory.parts(V3, Job(), layout, own, device)
        for device, own in enumerate(one.step.held)
    ]
    state = [
        sum(part[name] for part in parts) * layout.copies * layout.dp
        for name in ("weights", "gradients", "optimizer")
    ]
    extra = sum(part["mtp"] for part in parts)
    counted = params.count(V3)
    routed, (dense_holders, few) = counted.by_part["routed_experts"], layout.holders
    whole = dense_holders * (counted.total - routed) + few * routed
    expected = [
        2 * (counted.total if zero == 3 else whole),
        4 * (counted.total if zero >= 2 else whole),
        8 * (counted.total if zero >= 1 else whole),
    ]
    assert state == pytest.approx(expected)
    assert extra > 0 and one.memory_per_gpu_bytes == max(sum(part.values()) for part in parts)


def test_state_bytes_is_what_a_gpu_of_equal_stages_holds():
    counted = params.count(V3)
    routed = counted.by_part["routed_experts"]
    for pp, dp, ep, copies in ((16, 128, 64, 2), (8, 16, 4, 1), (1, 8, 8, 1)):
        split = Split(pp, dp, ep, copies=copies, sequences=dp)
        ours = state_bytes(counted.total - routed, routed, pp, ep, dp, copies)
        assert ours == pytest.approx(held(V3, split).state)
    assert state_bytes(16, 0, 1, 1, 1) == 16 * 14
    assert state_bytes(16, 0, 1, 1, 4) == 16 * 6 + 16 * 2
    assert state_bytes(0, 64, 2, 4, 8, 2) == 2 * 8 * 6 + 2 * 8 * 8 / 4


def test_what_a_layout_keeps_shrinks_with_recomputation_and_grows_with_the_micro_batch():
    kept = [v3(recompute=way).memory["activations"] for way in ("none", "selective", "full")]
    assert kept[0] > 1.5 * kept[1] > 3 * kept[2] > 0
    twice = v3(job=Job(sequences=2 * 15360), micro_batch=2)
    assert twice.memory["activations"] == pytest.approx(2 * FOUND.memory["activations"])
    assert v3(precision="bf16").memory["activations"] == 2 * FOUND.memory["activations"]


def test_1f1b_keeps_most_on_the_first_device_and_gpipe_everything():
    layout = replace(REPORT, schedule="1f1b")
    flying = [stage_memory.in_flight(layout, Job(), device) for device in range(16)]
    assert flying == list(range(16, 0, -1))
    assert stage_memory.in_flight(replace(layout, schedule="gpipe"), Job(), 3) == 120
    assert stage_memory.in_flight(REPORT, Job(), 0) == 17
    assert stage_memory.in_flight(Layout(), Job(), 0) == 1


def test_v3_fits_and_without_expert_parallelism_it_does_not():
    assert FOUND.fits and FOUND.spare > 0
    near = v3(ep=8)
    assert not near.fits and near.bottleneck == "memory"
    assert v3(assume=Assumptions(usable_memory=0.5)).fits is False


def test_the_stages_are_cut_as_v3s_own_head_and_mtp_on_one_device_with_few_layers():
    layers = [tuple(work.inputs for work in own) for own in FOUND.step.held]
    assert sum(sum(own) for own in layers) == 62  # the module is a layer too
    assert layers[1:] == [(4, 4)] * 7  # four layers a chunk, as in the published profile
    assert [own[1].heads for own in FOUND.step.held] == [2, *[0] * 7]


def test_the_bottleneck_is_what_a_tenth_more_of_saves_most():
    for found in (FOUND, v3(schedule="1f1b"), v3(precision="bf16")):
        assert found.bottleneck == sensitivity.bottleneck(found)


def test_a_plan_that_cannot_be_says_everything_at_once():
    with pytest.raises(PlanError, match=r"(?s)1024 GPUs.*\n  - ep = 48 does not divide"):
        v3(dp=64, ep=48)
    with pytest.raises(PlanError, match=r"scale_out.bandwidth is not known"):
        plan(V3, hardware.cluster("h20:2048"), Job(), REPORT)
    for word in ("h800:2047", "a100:2048"):
        with pytest.raises(PlanError, match="Change what is named"):
            plan(V3, hardware.cluster(word), Job(), REPORT)


def test_one_gpu_sends_nothing_and_waits_for_nothing():
    tiny = ModelConfig.named("tiny")
    alone = plan(tiny, hardware.cluster("rtx-4090:1"), Job(1e9, 512, 8), Layout())
    quiet = {"dispatch", "combine", "tensor parallel", "pipeline sends", "bubble", "gradients"}
    assert {part for part, seconds in alone.times.items() if not seconds} == {
        *quiet,
        "recomputation",
        "uneven stages",
    }
    assert sum(alone.hidden.values()) == 0 and alone.fits


def test_a_plan_looks_at_each_models_stages_once():
    before = stage_step.devices.cache_info().misses
    for micro_batch in (1, 2):
        v3(job=Job(sequences=15360 * micro_batch), micro_batch=micro_batch, zero=0)
    assert stage_step.devices.cache_info().misses == before


def test_zero_2_and_3_hold_the_layer_that_is_at_work_whole():
    """V3 with all experts of a layer on one GPU: dealt out it is small, and one layer is not."""
    alone = {"pp": 1, "dp": 2048, "ep": 1, "schedule": "1f1b"}
    experts = 256 * 3 * 7168 * 2048
    for zero, each in ((0, 0), (1, 0), (2, 4), (3, 6)):
        found = v3(job=Job(sequences=16384), zero=zero, **alone)
        assert found.memory["gathered"] == pytest.approx(each * experts, rel=0.03)
        assert not found.fits
    assert v3(zero=2).memory["gathered"] < FOUND.memory["gradients"]


def test_full_recomputation_still_holds_what_one_layer_keeps():
    kept, one = memory.layer_activations(V3, True, recompute=False), v3(recompute="full")
    units, tokens = parts(V3, 4096, True), 2 * 4096
    alone = plan(V3, H800, Job(sequences=16384), Layout(dp=2048, micro_batch=2, recompute="full"))
    inputs = sum(unit.inputs for unit in units) * 7168
    assert alone.memory["activations"] == pytest.approx(tokens * (inputs * 2 * 1 + kept), rel=1e-9)
    assert 4096 * kept < one.memory["activations"] < v3().memory["activations"]


def test_a_run_that_never_ends_has_no_cost():
    with pytest.raises(PlanError, match=r"A step would take .* most of them products.*rates"):
        v3(assume=Assumptions(fp8_products=1e-300))
    with pytest.raises(PlanError, match=r"tokens = 1e\+300 is no number above 0 and below"):
        Job(tokens=1e300)
