"""The roofline: the slower of arithmetic and memory, and the point where they meet."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial import hardware
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import attention, roofline
from dsv3_tutorial.hardware import Chip, HardwareError

H100 = hardware.chip("h100-sxm")
PLAIN = Chip.measured("plain", {"fp32": 100.0, "bf16": 400.0}, 10.0)


def test_time_is_the_slower_of_the_two():
    assert roofline.time_s(1000, 50, PLAIN, "fp32") == 10  # arithmetic: 10 s, memory: 5 s
    assert roofline.time_s(100, 50, PLAIN, "fp32") == 5
    assert roofline.time_s(100, 50, PLAIN) == 5


def test_the_ridge_is_where_both_take_equally_long():
    assert roofline.ridge(PLAIN, "fp32") == 10
    assert round(roofline.ridge(H100)) == 295
    assert round(roofline.ridge(H100, "fp8")) == 591


@given(st.floats(1, 1e15), st.floats(1, 1e15), st.sampled_from(["fp32", "bf16"]))
def test_what_bounds_agrees_with_the_times(flops, moved, fmt):
    compute, memory = flops / PLAIN.rate(fmt), moved / PLAIN.bandwidth()
    bound = roofline.bound(flops, moved, PLAIN, fmt)
    if compute != pytest.approx(memory, rel=1e-9):
        assert bound == ("compute" if compute > memory else "memory")
    reached = flops / roofline.time_s(flops, moved, PLAIN, fmt)
    roof = roofline.attainable_flops(roofline.intensity(flops, moved), PLAIN, fmt)
    assert reached == pytest.approx(roof)


def test_a_naive_decode_step_is_memory_bound_and_v3s_absorbed_one_is_near_the_ridge():
    cfg = ModelConfig.named("deepseek-v3")
    for form, bound in (("expanded", "memory"), ("absorbed", "memory")):
        step = attention.decode_step(cfg, 65_536, batch=64, form=form)
        assert roofline.bound(step.flops, step.bytes, H100) == bound
    step = attention.decode_step(cfg, 65_536, batch=64, queries=2)  # MTP's second token
    assert roofline.bound(step.flops, step.bytes, H100) == "compute"


def test_a_format_without_a_rate_is_refused():
    with pytest.raises(HardwareError, match="not measured on this machine"):
        roofline.time_s(1, 1, PLAIN, "fp8")
