"""Chips are what their sources say, every number has one, and a measured machine is a Chip too."""

import copy
import json

import pytest

from dsv3_tutorial import hardware
from dsv3_tutorial.files import data_path
from dsv3_tutorial.hardware import FORMATS, Chip, HardwareError

NAMES = (
    *("a100", "b200", "gb200-nvl72", "h100-sxm", "h20", "h200", "h800"),
    *("l4", "rtx-4090", "rtx-5090"),
)
LINK_NUMBERS = ("scale_up.bandwidth", "scale_up.domain", "scale_out.bandwidth")
NUMBERS = ("memory_bytes", "memory_bandwidth", "l2_bytes", "power_w", *LINK_NUMBERS)


def test_the_chips_are_those_the_course_names():
    assert hardware.chip_names() == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_source_and_every_gap_a_reason(name):
    chip = hardware.chip(name)
    fields = {f"rates.{fmt}" for fmt in FORMATS} | set(NUMBERS)
    links = {"scale_up": chip.scale_up, "scale_out": chip.scale_out}
    fields |= {f"{way}.effective" for way, link in links.items() if link.effective is not None}
    assert set(chip.sources) | set(chip.reasons) == fields
    assert not set(chip.sources) & set(chip.reasons)
    assert all(
        source.cite and source.confidence in hardware.CONFIDENCES
        for source in chip.sources.values()
    )
    for fmt in FORMATS:
        assert (chip.rates[fmt] is None) == (f"rates.{fmt}" in chip.reasons)


@pytest.mark.parametrize("name", NAMES)
def test_rates_are_dense_and_ordered_by_width(name):
    rates = hardware.chip(name).rates
    assert rates["fp32"] <= rates["tf32"] <= rates["bf16"] == rates["fp16"] <= rates["int8"]
    if rates["fp8"]:
        # twice to the rounding of data sheets: a sparse figure would make it four times
        assert rates["fp8"] / rates["bf16"] == pytest.approx(2, rel=0.01)
        assert rates["fp8_acc16"] in (rates["fp8"], rates["int8"])


def test_geforce_halves_its_rate_when_it_sums_in_float32():
    for name in ("rtx-4090", "rtx-5090"):
        chip = hardware.chip(name)
        assert chip.rate("fp8_acc16") / chip.rate("fp8") == pytest.approx(2, rel=0.01)
        assert chip.rate("fp16_acc16") / chip.rate("fp16") == pytest.approx(2, rel=0.01)
    for name in ("h800", "l4", "b200"):
        assert hardware.chip(name).rate("fp8") == hardware.chip(name).rate("fp8_acc16")


def test_links_are_counted_in_one_direction():
    ways = {"h800": 200, "h100-sxm": 450, "h200": 450, "a100": 300, "b200": 900}
    for name, gigabytes in ways.items():
        assert hardware.chip(name).scale_up.bandwidth == gigabytes * 1e9
    assert hardware.chip("h800").scale_out.bandwidth == 50e9
    # ISCA section 4.3 calls 200 : 50 about 4 : 1; the report's 160 : 50 is what is achieved
    assert hardware.chip("h800").scale_up.bandwidth / 50e9 == 4


def test_what_links_reach_is_published_of_the_h800_alone_and_less_than_the_peak():
    effective = {
        name: (chip.scale_up.effective, chip.scale_out.effective)
        for name, chip in ((name, hardware.chip(name)) for name in NAMES)
    }
    assert effective.pop("h800") == (160e9, 40e9)
    assert set(effective.values()) == {(None, None)}
    h800 = hardware.chip("h800")
    assert h800.sources["scale_up.effective"].confidence == "paper"
    for link in (h800.scale_up, h800.scale_out):
        assert link.effective / link.bandwidth == 0.8


def test_an_h800_is_an_h100_but_for_its_nvlink_and_its_fp64():
    h800 = hardware.chip("h800")
    assert h800.variant_of == "h100-sxm"
    assert h800.differences(hardware.chip(h800.variant_of)) == {
        "rates.fp64": (1e12, 66.9e12),
        "scale_up.bandwidth": (200e9, 450e9),
    }
    assert h800.sources["scale_up.bandwidth"].confidence == "paper"
    assert h800.sources["rates.fp64"].confidence == "third-party"


def test_the_papers_utilisation_follows_from_the_bf16_peak():
    peak = hardware.chip("h800").rate("bf16")
    assert 100 * 385e12 / peak == pytest.approx(38.94, abs=0.05)
    assert 100 * 432e12 / peak == pytest.approx(43.73, abs=0.1)


def test_a_cluster_counts_its_scale_up_domains():
    assert hardware.cluster("h800:2048").nodes == 256
    assert hardware.cluster("gb200-nvl72:144").nodes == 2
    assert hardware.cluster("gb200-nvl72").nodes == 1
    assert hardware.cluster("rtx-4090:3").nodes == 3
    assert hardware.cluster("h100-sxm:12").nodes == 2


@pytest.mark.parametrize("spec", ["h800:0", "h800:", "h800:-8", "h800:many", "h800:1.5", "h800:²"])
def test_a_cluster_without_a_number_of_gpus_is_refused(spec):
    with pytest.raises(HardwareError, match="names no number of GPUs"):
        hardware.cluster(spec)


def test_an_unknown_chip_is_answered_with_the_names_there_are():
    for ask in (hardware.chip, hardware.cluster):
        with pytest.raises(HardwareError, match=r"no chip 'h900'.*a100, b200, .*rtx-5090"):
            ask("h900")


def test_a_rate_that_does_not_exist_says_why():
    with pytest.raises(HardwareError, match="no FP8 tensor cores before Ada and Hopper"):
        hardware.chip("a100").rate("fp8")
    with pytest.raises(HardwareError, match="no format 'fp5'"):
        hardware.chip("h100-sxm").rate("fp5")


def test_the_machine_at_hand_becomes_a_chip():
    chip = Chip.measured("laptop", {"fp32": 1.5e11, "bf16": 4e11}, 20e9, memory_bytes=2**34)
    assert chip.rate("bf16") == 4e11 and chip.bandwidth() == 20e9
    assert chip.sources["rates.fp32"].confidence == "measured"
    assert hash(chip) == hash(Chip.measured("laptop", {"fp32": 1.0}, 20e9, memory_bytes=2**34))
    with pytest.raises(HardwareError, match="not measured on this machine"):
        chip.rate("fp8")


def test_a_measured_chip_refuses_all_that_is_wrong_at_once():
    with pytest.raises(HardwareError) as caught:
        Chip.measured("x", {"fp5": 1e9, "fp32": float("nan")}, 0)
    for word in ("fp5", "fp32 must be positive", "memory_bandwidth must be positive"):
        assert word in str(caught.value)


BROKEN = {
    "a source that is not listed": (("memory_bytes", "source"), "hearsay", "needs a source"),
    "a negative number": (("memory_bytes", "value"), -1, "must be a positive number"),
    "text for a number": (("rates", "bf16", "value"), "989", "must be a positive number"),
    "a bool for a number": (("rates", "bf16", "value"), True, "must be a positive number"),
    "a gap without a reason": (("l2_bytes", "value"), None, "needs a reason"),
    "a number with a reason": (("l2_bytes", "reason"), "why", "needs a source"),
    "an unknown format": (("rates", "fp2"), {"value": 1, "source": "h100-wp"}, "unknown: fp2"),
    "an unknown field": (("price",), 1, "unknown: price"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_data_that_breaks_the_schema_is_not_loaded(what):
    path, value, told = BROKEN[what]
    data = copy.deepcopy(json.loads(data_path("hardware.json").read_text(encoding="utf-8")))
    place = data["chips"]["h200"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(HardwareError, match=f"(?s)h200: .*{told}"):
        hardware.load(data)
