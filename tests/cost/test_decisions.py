"""Decisions taken back: what each changes, that nothing else changes, and both orders."""

import math
from dataclasses import replace
from itertools import chain

import pytest

from dsv3_tutorial import hardware
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import params, search, serving_plan
from dsv3_tutorial.cost.assumptions import Assumptions
from dsv3_tutorial.cost.choices import Choices
from dsv3_tutorial.cost.decisions import DECISIONS, both_orders, made, tornado, unbuild, without
from dsv3_tutorial.cost.layout import Job, Layout, PlanError
from dsv3_tutorial.cost.plan import plan
from dsv3_tutorial.cost.serving_target import USUAL, Target
from dsv3_tutorial.hardware import Cluster

V3, H800 = ModelConfig.named("deepseek-v3"), hardware.cluster("h800:2048")
SMALL, FEW = ModelConfig.named("small"), Cluster(H800.chip, 16)
JOB = Job(tokens=1e12, seq_len=1024, sequences=64)
THEIRS = Layout.read("deepseek-v3")


def test_with_nothing_removed_the_plan_is_the_plan():
    whole = unbuild(V3, H800, Job(), layout=THEIRS)
    assert whole.training == plan(V3, H800, Job(), THEIRS)
    assert whole.serving == serving_plan.best(V3, H800)
    assert (whole.notes, whole.error, whole.removed) == ((), "", ())
    found = unbuild(SMALL, FEW, JOB, target=None)
    assert found.training == search.best(SMALL, FEW, JOB).plan
    assert found.serving is None and found.serving_tokens_per_second_per_gpu == 0


def test_plain_attention_by_hand():
    """Four matrices of 7,168 x 16,384 a layer; MHA caches 2 x 16,384 numbers a token and layer."""
    plain = without(V3, ["mla"]).cfg
    assert params.count(plain).by_part["attention"] == 61 * 4 * 7168 * 128 * 128
    for part in ("routed_experts", "shared_experts", "dense_ffn", "gate", "head"):
        assert params.count(plain).by_part[part] == params.count(V3).by_part[part]
    assert (plain.num_attention_heads, plain.kv_heads, plain.value_dim) == (128, 128, 128)
    grouped = without(V3, ["mla"], kv_heads=8).cfg
    assert params.count(grouped).by_part["attention"] == 61 * 2 * 7168 * 128 * (128 + 8)
    assert "GQA of 8" in without(V3, ["mla"], kv_heads=8).notes[0]


def test_what_the_others_change_and_nothing_else():
    changed = {name: without(V3, [name]) for name in DECISIONS}
    assert changed["fp8"].choices == Choices(precisions=("bf16",))
    served = changed["fp8"].target
    assert (served.weights, served.cache, served.exchange.dispatch) == ("bf16", "bf16", 2)
    assert changed["node-limit"].cfg == replace(V3, topk_group=8)
    assert changed["dedup"].choices == Choices(dispatches=("flat",))
    assert changed["dualpipe"].choices == Choices(schedules=("1f1b", "zb1p"))
    assert changed["mtp"].assume == Assumptions(mtp=0.0)
    assert changed["mtp"].target == replace(USUAL, drafts=0)
    assert changed["bias"].violation == pytest.approx(0.72 - 0.04)
    for name, variant in changed.items():
        assert [note.split(":")[0] for note in variant.notes] == [name]
        bare = replace(variant, notes=(), violation=0.0)
        same = {field: getattr(without(V3, []), field) for field in vars(bare)}
        assert sum(value != same[field] for field, value in vars(bare).items()) <= 2


def test_notes_do_not_depend_on_the_order_of_names():
    assert without(V3, ["bias", "mla"]) == without(V3, ("mla", "bias"))


@pytest.mark.parametrize("name", DECISIONS)
def test_in_the_reports_layout_each_removal_costs_time_but_a_module_that_is_not_trained(name):
    whole = plan(V3, H800, Job(), THEIRS)
    try:
        left = unbuild(V3, H800, Job(), [name], target=None, layout=THEIRS)
    finally:
        assert whole == plan(V3, H800, Job(), THEIRS)
    if left.training is None:
        assert name in ("fp8", "mla") and "GB on a GPU" in left.error
        assert left.gpu_hours == left.cost_usd == left.energy_kwh == math.inf
        return
    # the report's dispatch crosses the same two links, so a free choice of nodes does cost
    slower = left.training.step_time_s - whole.step_time_s
    assert slower < 0 if name == "mtp" else slower >= 0


def test_a_busier_gpu_trains_and_serves_slower():
    layout = replace(THEIRS, ep=64)
    left = unbuild(V3, H800, Job(), ["bias"], layout=layout, target=Target(devices=256))
    load = Assumptions().expert_load + (0.72 - 0.04) / math.sqrt(256 / 64)
    assert left.training.assume.expert_load == pytest.approx(load)
    assert left.serving.target.exchange.load == pytest.approx(1 + 0.68)  # one expert a device
    kept = serving_plan.best(V3, H800, Target(devices=256))
    assert left.serving_tokens_per_second_per_gpu <= kept.tokens_per_second_per_gpu


def test_serving_without_a_decision_never_gets_faster():
    kept = serving_plan.best(V3, H800).tokens_per_second_per_gpu
    for name in DECISIONS:
        variant = unbuild(V3, H800, Job(), [name], layout=THEIRS)
        assert variant.serving_tokens_per_second_per_gpu <= kept


def test_decisions_that_a_model_or_a_chip_does_not_make():
    assert made(V3, H800) == DECISIONS
    assert "fp8" not in made(V3, hardware.cluster("a100:8"))
    assert made(ModelConfig.named("qwen2.5-72b")) == ("fp8", "dualpipe")
    with pytest.raises(PlanError, match=r"no mla, bias to.*is planned with fp8, dualpipe"):
        without(ModelConfig.named("qwen2.5-72b"), ["bias", "fp8", "mla"])
    with pytest.raises(PlanError, match="No decision 'zero'"):
        without(V3, ["zero"])


def test_both_orders_by_hand():
    """Alone a saves 1 and b 2; b saves 5 more where a is there."""

    def price(kept):
        return 10 - ("a" in kept) - 2 * ("b" in kept) - 5 * ({"a", "b"} <= kept)

    assert both_orders(price, ("a", "b")) == {"a": (6, 1), "b": (7, 2)}
    assert both_orders(lambda kept: 8 - 3 * len(kept), "xyz") == dict.fromkeys("xyz", (3, 3))


def test_both_orders_ask_for_all_none_each_alone_and_each_left_out():
    asked = []
    both_orders(lambda kept: asked.append(kept) or 0.0, DECISIONS)
    every = frozenset(DECISIONS)
    expected = [every, frozenset()]
    expected += chain.from_iterable((every - {d}, frozenset({d})) for d in DECISIONS)
    assert sorted(map(sorted, asked)) == sorted(map(sorted, expected))
    assert all(isinstance(kept, frozenset) for kept in asked)


def test_each_bar_of_a_tornado_is_two_calls_of_the_planner():
    allowed = Choices(tps=(1,), zeros=(1,), micro_batches=(1, 2))
    target = Target(context=512, devices=1)
    found = tornado(SMALL, FEW, JOB, target=target, choices=allowed)
    assert sorted(row.decision for row in found.rows) == sorted(DECISIONS)
    assert len(found.outcomes) == 2 * len(DECISIONS) + 2

    def outcome(*removed):
        return unbuild(SMALL, FEW, JOB, removed, target=target, choices=allowed)

    whole, bare = outcome(), outcome(*DECISIONS)
    assert (found.whole, found.bare) == (whole, bare)
    for row in found.rows:
        less = outcome(row.decision)
        alone = outcome(*(name for name in DECISIONS if name != row.decision))
        hours = (less.gpu_hours - whole.gpu_hours, bare.gpu_hours - alone.gpu_hours)
        assert row.hours == hours
        factors = (less.gpu_hours / whole.gpu_hours, bare.gpu_hours / alone.gpu_hours)
        assert row.factors == pytest.approx(factors)
        served = [o.serving_tokens_per_second_per_gpu for o in (less, whole, bare, alone)]
        assert row.serving == (served[0] - served[1], served[2] - served[3])
    removals = [row.hours[0] for row in found.rows]
    assert removals == sorted(removals, reverse=True)


def test_where_nothing_fits_the_bar_says_so_and_goes_last():
    """On 4 GPUs V3 does not fit, with or without any decision."""
    few = Cluster(H800.chip, 4)
    allowed = Choices(tps=(1,), zeros=(1,), micro_batches=(1,), schedules=("1f1b",), eps=(1,))
    found = tornado(V3, few, Job(), target=None, decisions=("mtp",), choices=allowed)
    assert math.isnan(found.rows[0].hours[0]) and math.isnan(found.rows[0].factors[1])
    assert found.whole.training is None and "No layout of this model fits" in found.whole.error
    assert found.whole.gpu_hours == math.inf
