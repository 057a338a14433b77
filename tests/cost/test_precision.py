"""Eight bits on paper: their bytes are the report's, and quantisation costs what it moves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial import hardware, paper
from dsv3_tutorial.cost import precision, roofline
from dsv3_tutorial.cost.precision import STORAGE
from dsv3_tutorial.hardware import Chip, HardwareError

H800 = hardware.chip("h800")
PLAIN = Chip.measured("plain", {"bf16": 100.0, "fp8": 200.0}, 10.0)
SIZES = st.integers(1, 64).map(lambda blocks: 128 * blocks)


def test_the_scales_cost_what_the_report_s_sizes_give():
    assert STORAGE["e4m3"].overhead == 4 / 128
    assert STORAGE["e4m3, blocks"].overhead == 4 / 16384
    for kind, name in (("e4m3", "activation"), ("e4m3, blocks", "weight")):
        printed = paper.row(f"fp8.{name}_scale_overhead").value
        assert float(f"{100 * STORAGE[kind].overhead:.2g}") == printed


def test_formats_of_eight_bits_are_compared_at_equal_bits_a_value():
    equal = [STORAGE[name].bits_per_value for name in ("e4m3", "e5m2", "int8", "mxfp8")]
    assert equal == [8.25] * 4
    assert STORAGE["bf16"].bits_per_value == 16 and STORAGE["e5m6"].bits_per_value == 12.25


@given(SIZES, SIZES, SIZES)
def test_a_whole_gemm_moves_its_numbers_and_one_scale_for_each_tile_and_block(m, n, k):
    values = m * k + n * k
    assert precision.gemm_bytes(m, n, k) == 2 * values + 2 * m * n
    scales = m * k // 128 + n * k // 16384
    assert precision.gemm_bytes(m, n, k, "fp8") == values + 4 * scales + 2 * m * n


def test_a_ragged_matrix_has_a_scale_for_its_last_smaller_tile():
    assert precision.operand_bytes(3, 129, "fp8") == 3 * 129 + 3 * 2 * 4
    assert precision.operand_bytes(129, 129, "fp8", block=True) == 129 * 129 + 4 * 4
    assert precision.operand_bytes(3, 129, "fp16", block=True) == 2 * 3 * 129


@given(SIZES, SIZES, SIZES)
def test_eight_bits_alone_win_up_to_twice_and_quantisation_only_takes(m, n, k):
    for passes in ("forward", "training"):
        free = precision.speedup(m, n, k, PLAIN, quantize=False, passes=passes)
        assert precision.speedup(m, n, k, PLAIN, passes=passes) < free <= 2 * (1 + 1e-12)
        assert free >= 1


@given(st.integers(1, 64), st.integers(8, 64))
def test_where_arithmetic_binds_only_the_output_width_decides_whether_fp8_wins(rows, blocks):
    width = precision.breakeven_width(H800)
    m, k = 4096 * rows, 128 * blocks
    for n, wins in ((int(width * 0.98), False), (int(width * 1.02), True)):
        moved = precision.gemm_bytes(m, n, k)
        if roofline.bound(2 * m * n * k, moved, H800) == "compute":
            eight = precision.gemm_bytes(m, n, k, "fp8")
            if roofline.bound(2 * m * n * k, eight, H800, "fp8") == "compute":
                assert (precision.speedup(m, n, k, H800) > 1) is wins


def test_the_width_that_pays_is_895_on_an_h800_and_v3_has_a_narrower_product():
    assert round(precision.breakeven_width(H800)) == 895
    assert precision.speedup(4096, 576, 7168, H800) < 1 < precision.speedup(4096, 2048, 7168, H800)


def test_quantising_reads_two_bytes_and_writes_one_and_a_scale_for_each_layout():
    assert precision.quantization_bytes(1, 128) == 128 * 2 + 128 + 4
    assert precision.quantization_bytes(2, 128, layouts=2) == 2 * (128 * 2 + 2 * (128 + 4))
    step = precision.forward(256, 128, 128, PLAIN)
    assert step.quantization == 256 * (128 * 3 + 4) / 10.0
    assert step.total == step.products + step.quantization
    assert precision.forward(256, 128, 128, PLAIN, "bf16").quantization == 0


def test_training_counts_three_products_and_both_layouts_of_both_inputs():
    m, n, k = 128 * 8, 128 * 2, 128 * 3
    step = precision.training(m, n, k, PLAIN)
    assert step.quantization == pytest.approx((m * k + m * n) * (2 + 2 * (1 + 1 / 32)) / 10)
    arithmetic = 3 * 2 * m * n * k / 200.0
    assert step.products == pytest.approx(arithmetic)  # far above the ridge of 20 FLOP a byte


def test_a_chip_without_fp8_and_passes_that_do_not_exist_are_refused():
    with pytest.raises(HardwareError, match="no FP8 tensor cores before"):
        precision.speedup(128, 128, 128, hardware.chip("a100"))
    with pytest.raises(ValueError, match="Take forward or training"):
        precision.speedup(128, 128, 128, PLAIN, passes="backward")
