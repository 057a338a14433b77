"""A scaled chip differs in exactly what was scaled, by exactly the factor, and says so."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial.cost.scaled import RESOURCES, scaled
from dsv3_tutorial.hardware import FORMATS, HardwareError, chip, chip_names

FIELDS = {
    "arithmetic": {f"rates.{fmt}" for fmt in FORMATS},
    "memory_bandwidth": {"memory_bandwidth"},
    "memory": {"memory_bytes"},
    "scale_up": {"scale_up.bandwidth"},
    "scale_out": {"scale_out.bandwidth"},
}


def test_a_chip_that_nothing_is_changed_of_is_the_chip_itself():
    for name in chip_names():
        assert scaled(chip(name)) is chip(name)
        assert scaled(chip(name), domain=chip(name).scale_up.domain) is chip(name)


@given(
    st.sampled_from(chip_names()),
    st.sampled_from(RESOURCES),
    st.floats(0.1, 10).filter(lambda by: abs(by - 1) > 1e-3),
)
def test_one_factor_changes_its_own_numbers_by_itself_and_no_other(name, resource, by):
    before = chip(name)
    after = scaled(before, **{resource: by})
    differ = before.differences(after)
    known = {field for field in FIELDS[resource] if field in before.sources}
    assert set(differ) == known
    for old, new in differ.values():
        assert new / old == pytest.approx(by, rel=1e-9)
    for field, source in after.sources.items():
        scaled_too = field in known or field == f"{resource}.effective"
        assert source.cite.startswith("supposed") == scaled_too, field
    assert resource.replace("_", " ") in after.name and after.name != name


@given(st.sampled_from(chip_names()), st.floats(0.5, 2), st.floats(0.5, 2))
def test_two_factors_one_after_the_other_are_their_product(name, first, second):
    once = scaled(chip(name), arithmetic=first * second)
    twice = scaled(scaled(chip(name), arithmetic=first), arithmetic=second)
    for fmt in FORMATS:
        if once.rates[fmt] is None:
            assert twice.rates[fmt] is None
        else:
            assert twice.rates[fmt] == pytest.approx(once.rates[fmt], rel=1e-12)


def test_the_rates_that_are_reached_scale_with_their_links():
    before, after = chip("h800"), scaled(chip("h800"), scale_up=2, scale_out=3)
    assert after.scale_up.effective == 2 * before.scale_up.effective
    assert after.scale_out.effective == 3 * before.scale_out.effective


def test_a_domain_is_changed_alone():
    after = scaled(chip("h800"), domain=72)
    assert chip("h800").differences(after) == {"scale_up.domain": (8, 72)}
    assert "72 GPUs" in after.name and after.sources["scale_up.domain"].cite.startswith("supposed")


def test_what_nobody_publishes_stays_unknown_and_keeps_its_reason():
    after = scaled(chip("h20"), scale_out=2)
    assert after.scale_out.bandwidth is None
    assert after.reasons["scale_out.bandwidth"] == chip("h20").reasons["scale_out.bandwidth"]


def test_memory_stays_a_whole_number_of_bytes():
    assert scaled(chip("h100-sxm"), memory=1.1).memory_bytes == 88_000_000_000


@pytest.mark.parametrize("by", [0, -1, float("nan"), float("inf"), True, "2"])
def test_factors_that_leave_nothing_are_refused_by_name(by):
    with pytest.raises(HardwareError, match=r"memory_bandwidth = .*domain = 0"):
        scaled(chip("h800"), memory_bandwidth=by, domain=0)
