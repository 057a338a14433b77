"""Every efficiency is named, sourced, settable, and the calibrated ones follow from their rows."""

from dataclasses import asdict, fields

import pytest

from dsv3_tutorial import hardware, paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import assumptions, calibration, params
from dsv3_tutorial.cost.assumptions import SOURCES, Assumptions
from dsv3_tutorial.cost.layout import PlanError

CALIBRATED = [name for name, (kind, _) in SOURCES.items() if kind == "calibrated"]


def test_each_assumption_says_of_what_kind_it_is_and_where_it_is_from():
    assert list(SOURCES) == [field.name for field in fields(Assumptions)]
    for name, (kind, text) in SOURCES.items():
        assert kind in ("calibrated", "published", "assumed"), name
        assert len(text) > 20, name


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_calibrated_share_is_what_its_rows_give_to_three_digits(name):
    assert getattr(Assumptions(), name) == pytest.approx(getattr(calibration, name)(), abs=6e-4)


def test_no_calibration_reads_a_row_of_a_training_step():
    rows = {row.id for row in paper.rows("kernels")}
    assert all(row.startswith("kernels.") for row in rows)
    assert all("step" not in row and "hours" not in row for row in rows)


def test_published_assumptions_are_their_rows():
    share = paper.row("network.communication_sms").value / paper.row("network.total_sms").value
    assert Assumptions().communication_sms == share
    assert Assumptions().rent == paper.row("training_cost.rent").value


def test_experts_load_is_the_published_violation_over_the_root_of_four_experts():
    violation = paper.row("loss_free.1b.bias.max_violation").value
    assert Assumptions().expert_load == pytest.approx(1 + violation / 4**0.5)


def test_the_products_that_rates_are_weighted_by_are_all_of_a_moe_layers():
    cfg = ModelConfig.named("deepseek-v3")
    parts = params.layer_parts(cfg, True)
    met = parts["attention"] + parts["shared_experts"] + 8 * params.expert(cfg)
    assert sum(calibration.layer_flops(cfg).values()) == 2 * met


def test_v3s_own_kernels_were_slower_than_those_that_came_after_it():
    later, earlier = calibration.fp8_products(), calibration.fp8_products(earlier=True)
    assert later / 1.2 < earlier < later
    slowest, fastest = 590e12, 1358e12
    assert slowest < later * hardware.chip("h800").rate("fp8") < fastest


def test_assumptions_are_read_by_name():
    read = Assumptions.parse(["fp8_products=0.6", "rent = 3", "mtp=0"])
    assert (read.fp8_products, read.rent, read.mtp) == (0.6, 3.0, 0.0)
    assert asdict(Assumptions.parse([])) == asdict(Assumptions())


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (["speed=1"], r"'speed=1'.*\['attention_backward', 'attention_forward'"),
        (["rent"], "no NAME=VALUE"),
        (["rent=two"], "rent = 'two' is no number"),
        (["rent=nan"], "rent = nan"),
        (["fp8_products=0", "bf16_products=1.1"], r"fp8_products = 0.0.*; bf16_products = 1.1"),
        (["communication_sms=1"], "below 1"),
        (["expert_load=0.9"], "1 or more"),
        (["lost=1"], "below 1"),
        (["mtp=0.5"], "or 0 not to"),
        (["pue=0.5", "rent=-1"], "from 0 to a million dollars"),
        (["pue=1e308"], "from 1 to 100"),
    ],
)
def test_what_cannot_be_is_refused_by_name(pairs, said):
    with pytest.raises(PlanError, match=said):
        Assumptions.parse(pairs)


def test_every_assumption_has_a_limit():
    assert set(assumptions._LIMITS) | {"mtp"} == set(SOURCES)
