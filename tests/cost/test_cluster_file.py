"""A cluster of a file: a known chip, one with changed numbers, or a chip of one's own."""

import json

import pytest

from dsv3_tutorial import hardware
from dsv3_tutorial.cost import cluster_file
from dsv3_tutorial.files import data_path
from dsv3_tutorial.hardware import HardwareError


def test_a_name_and_a_count_are_the_cluster_itself(tmp_path):
    assert cluster_file.read("h800:2048") == hardware.cluster("h800:2048")
    path = tmp_path / "ours.json"
    path.write_text('{"chip": "h800", "gpus": 2048}')
    assert cluster_file.read(str(path)) == hardware.cluster("h800:2048")


def test_changes_replace_what_is_named_and_nothing_else():
    changes = {"memory_bytes": 141e9, "scale_up.domain": 72, "rates.fp8": None}
    made = cluster_file.from_dict({"chip": "h800", "gpus": 8, "changes": changes}).chip
    h800 = hardware.chip("h800")
    assert set(h800.differences(made)) == {"memory_bytes", "scale_up.domain", "rates.fp8"}
    assert made.memory_bytes == 141_000_000_000 and made.scale_up.domain == 72
    assert made.scale_up.effective == h800.scale_up.effective
    assert made.sources["memory_bytes"].cite == "the cluster file"
    with pytest.raises(HardwareError, match=r"no rates\.fp8"):
        made.rate("fp8")


def test_a_new_peak_of_a_link_forgets_what_was_reached_of_the_old_one():
    faster = {"scale_out.bandwidth": 1e11}
    made = cluster_file.from_dict({"chip": "h800", "gpus": 8, "changes": faster}).chip
    assert (made.scale_out.bandwidth, made.scale_out.effective) == (1e11, None)
    reached = {**faster, "scale_out.effective": 8e10}
    made = cluster_file.from_dict({"chip": "h800", "gpus": 8, "changes": reached}).chip
    assert made.scale_out.effective == 8e10


@pytest.mark.parametrize("name", ["h800", "h20", "gb200-nvl72"])
def test_a_whole_chip_of_hardware_json_is_that_chip(name):
    raw = json.loads(data_path("hardware.json").read_text())["chips"][name]
    made = cluster_file.from_dict({"chip": raw, "gpus": 16})
    known = hardware.chip(name)
    assert made.gpus == 16 and not known.differences(made.chip)
    assert made.chip.scale_out.effective == known.scale_out.effective
    assert made.chip.title == known.title and made.chip.scale_up.kind == known.scale_up.kind


def test_of_an_own_chip_only_what_is_given_is_known():
    own = {"title": "ours", "rates": {"bf16": 4e14}, "memory_bytes": 64e9}
    made = cluster_file.from_dict({"chip": own, "gpus": 4}).chip
    assert made.rate("bf16") == 4e14 and made.memory_bytes == 64_000_000_000
    with pytest.raises(HardwareError, match="not given in the cluster file"):
        made.bandwidth()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ([], "no object"),
        ({}, "gpus = None"),
        ({"chip": "h900", "gpus": 8}, "no chip 'h900'; there are"),
        ({"chip": "h800", "gpus": 0}, "gpus = 0"),
        ({"chip": "h800", "gpus": 2.5}, "gpus = 2.5"),
        ({"chip": "h800", "gpus": True}, "gpus = True"),
        ({"chip": "h800", "gpus": 8, "nodes": 1}, "unknown field 'nodes'"),
        ({"chip": "h800", "gpus": 8, "changes": 5}, "changes = 5"),
        ({"chip": "h800", "gpus": 8, "changes": {"ram": 5}}, "no number 'ram'"),
        ({"chip": "h800", "gpus": 8, "changes": {"power_w": -5}}, "power_w = -5"),
        ({"chip": "h800", "gpus": 8, "changes": {"power_w": "700"}}, "power_w = '700'"),
        ({"chip": "h800", "gpus": 8, "changes": {"scale_up.domain": 7.5}}, "no whole number"),
        ({"chip": {"rates": 5}, "gpus": 8}, "rates = 5"),
        ({"chip": {"rates": {"fp9": 5}}, "gpus": 8}, r"no number 'rates\.fp9'"),
        ({"chip": 5, "gpus": 8}, "chip = 5"),
    ],
    ids=lambda value: None if isinstance(value, dict | list) else value[:20],
)
def test_what_is_wrong_is_named(raw, said):
    with pytest.raises(HardwareError, match=said):
        cluster_file.from_dict(raw)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(HardwareError) as refused:
        cluster_file.from_dict({"chip": "h9", "gpus": -1, "x": 1, "changes": {"y": 1}})
    assert all(said in str(refused.value) for said in ("'h9'", "gpus = -1", "'x'", "'y'"))


@pytest.mark.parametrize(("content", "said"), [(None, "no cluster file"), ("{", "not JSON")])
def test_a_file_that_cannot_be_read_is_an_error_without_its_folder(tmp_path, content, said):
    path = tmp_path / "ours.json"
    if content:
        path.write_text(content)
    with pytest.raises(HardwareError, match=said) as refused:
        cluster_file.read(str(path))
    assert str(tmp_path) not in str(refused.value)
    with pytest.raises(HardwareError, match="cannot be read"):
        (tmp_path / "folder.json").mkdir()
        cluster_file.read(str(tmp_path / "folder.json"))


def test_no_link_reaches_more_than_its_peak():
    changes = {"scale_up.effective": 1e15}
    with pytest.raises(HardwareError, match=r"scale_up.effective = 1e\+15 is above .* = 2e\+11"):
        cluster_file.from_dict({"chip": "h800", "gpus": 8, "changes": changes})
