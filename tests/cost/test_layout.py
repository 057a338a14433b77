"""A layout says at once all that is wrong with it, by name and number."""

import json
import re
from dataclasses import replace

import pytest

from dsv3_tutorial import hardware
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import layout as layouts
from dsv3_tutorial.cost.layout import Job, Layout, PlanError

V3 = ModelConfig.named("deepseek-v3")
H800 = hardware.cluster("h800:2048")
REPORT = Layout.read("deepseek-v3")


def wrong(cfg=V3, cluster=H800, job=None, **changes) -> list[str]:
    return replace(REPORT, **changes).problems(cfg, cluster, job or Job())


def test_the_reports_layout_is_possible_and_is_what_the_report_says():
    assert wrong() == []
    assert (REPORT.pp, REPORT.dp, REPORT.ep, REPORT.tp) == (16, 128, 64, 1)
    assert (REPORT.schedule, REPORT.zero, REPORT.precision) == ("dualpipe", 1, "fp8")
    assert (REPORT.gpus, REPORT.stages, REPORT.copies) == (2048, 16, 2)
    assert REPORT.micro_batches(Job()) == 120
    assert REPORT.holders == (256, 4)


@pytest.mark.parametrize("name", layouts.names())
def test_each_named_layout_says_where_it_is_from_and_how_surely(name):
    raw = json.loads(layouts.data_path("layouts", f"{name}.json").read_text(encoding="utf-8"))
    assert raw["about"] and raw["source"] and raw["confidence"]
    assert Layout.read(name) == Layout.read(raw)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dp": 64}, "= 1024 GPUs and the cluster has 2048"),
        ({"ep": 48}, "ep = 48 does not divide dp x tp = 128"),
        ({"ep": 96, "dp": 96}, "ep = 96 does not divide the model's 256 routed experts"),
        ({"dp": 256, "pp": 8, "micro_batch": 7}, "does not divide the step's 15360 sequences"),
        ({"pp": 128, "dp": 16, "ep": 16}, "pp = 128 makes 128 stages of 61 layers"),
        ({"schedule": "dualpipev", "pp": 64, "dp": 32, "ep": 32}, "makes 128 stages of 61"),
        ({"micro_batch": 8}, "15 micro-batches a replica is odd"),
        ({"micro_batch": 5}, "24 micro-batches a replica do not fill dualpipe, which needs 32"),
        ({"tp": 3, "dp": 128}, "tp = 3 does not divide the 128 attention heads"),
        ({"tp": 16, "dp": 8}, "tp = 16 exceeds the scale-up domain of 8 GPUs"),
        ({"pp": 5, "schedule": "dualpipe"}, "pp = 5 is odd"),
        ({"pp": 16, "dp": 128, "ep": 1, "precision": "fp8"}, None),
    ],
)
def test_a_layout_that_cannot_be_names_the_number_to_change(changes, said):
    found = wrong(**changes)
    assert any(said in each for each in found) if said else found == []


def test_chips_and_models_set_limits_too():
    a100 = hardware.cluster("a100:2048")
    assert any("no rate for it" in each for each in wrong(cluster=a100))
    dense = ModelConfig.named("llama-3.1-405b")
    assert any("the model has no experts: set ep to 1" in each for each in wrong(cfg=dense))
    assert any("key-value heads" in each for each in wrong(cfg=dense, ep=1, tp=16, dp=8))
    assert any("no whole scale-up domains" in each for each in wrong(ep=12, dp=12))
    bare = hardware.Chip.measured("mine", {"fp8": 1e12}, 1e12)
    told = " ".join(wrong(cluster=hardware.Cluster(bare, 2048)))
    assert "no rates.bf16" in told and "no memory_bytes" in told
    assert any("would straddle two" in each for each in wrong(cluster=nvl72(), ep=32, dp=128))


def nvl72():
    return hardware.cluster("gb200-nvl72:2048")


def test_all_that_is_wrong_is_said_together():
    found = wrong(pp=15, ep=7, tp=3, micro_batch=11, cluster=hardware.cluster("a100:7"))
    assert len(found) >= 7
    assert all(re.search(r"\d", each) or "rate" in each for each in found)


def test_a_layout_that_makes_no_sense_is_refused_when_made():
    with pytest.raises(PlanError, match=r"pp = 0.*.gpipe2.*zero = 4 is none of 0, 1, 2, 3"):
        Layout(pp=0, zero=4, schedule="gpipe2")
    for bad in ({"zero": True}, {"pp": 2.0}, {"precision": "fp4"}, {"recompute": "all"}):
        with pytest.raises(PlanError, match="This layout cannot be"):
            Layout(**bad)


def test_a_layout_is_read_by_name_from_a_file_and_from_a_mapping(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"pp": 2, "schedule": "zb1p"}), encoding="utf-8")
    assert Layout.read(path) == Layout.read(str(path)) == Layout.read({"pp": 2, "schedule": "zb1p"})
    with pytest.raises(PlanError, match=r"unknown fields ranks.*There are pp, dp"):
        Layout.read({"ranks": 2})
    with pytest.raises(PlanError, match=r"no layout 'nope'.*deepseek-v3"):
        Layout.read("nope")
    path.write_text("{", encoding="utf-8")
    with pytest.raises(PlanError, match="is not JSON"):
        Layout.read(path)
    path.write_text("3", encoding="utf-8")
    with pytest.raises(PlanError, match="no field can be read"):
        Layout.read(path)
    with pytest.raises(PlanError, match="cannot be read"):
        Layout.read(tmp_path)


def test_a_job_needs_something_to_train():
    for bad in ({"tokens": 0}, {"tokens": float("nan")}, {"seq_len": 0}, {"sequences": 1.5}):
        with pytest.raises(PlanError, match="This job cannot be"):
            Job(**bad)
