"""What does not fit in the papers: each with the number that its calculation gives."""

import math

import pytest

from dsv3_tutorial.bench.paper_miscounts import with_mtp
from dsv3_tutorial.bench.paper_misprints import inconsistencies
from dsv3_tutorial.bench.paper_training import long_hours
from dsv3_tutorial.cost import limits, validation

FOUND = {one.what: one for one in inconsistencies()}


def test_there_are_twenty_and_more_and_each_says_all():
    assert len(FOUND) == len(inconsistencies()) >= 20
    for one in FOUND.values():
        assert all((one.what, one.where, one.printed, one.calculation, one.ours)), one
        assert one.printed != one.ours


@pytest.mark.parametrize(
    ("what", "ours"),
    [
        ("Llama's cache over V3's", f"{516.096 / 70.272:.2f}x"),
        ("the cache that MLA saves", f"{100 * (1 - 34560 / 194560):.1f} %"),
        ("MLA's cache in share of MHA's, large model", f"{100 * 576 / 32768:.2f} %"),
        ("activated parameters, embedding and head included", "37.55 billion"),
        ("training FLOPs of the dense models", "445 and 2,473 GFLOP"),
        (
            "V3 needs an order of magnitude less",
            f"{444.869 / 250.46:.2f}x and {2473.25 / 250.46:.2f}x",
        ),
        ("the unit of table 2", f"{2048 * 385e12 / (272.8e9 / 86400) / 1e9:.1f} GFLOP/token"),
        ("utilisation of GPUs that multiply in FP8", f"{100 * 385 / 1978.9:.1f} %"),
        ("tokens a second of that bound", f"{1e6 / (120.96 * 2 * 61):.1f} tokens/s"),
        ("rates above the line rate", "43.5 GB/s"),
        ("a Slim Fly of q = 28", f"{2 * 27**2 * 21:,} endpoints"),
        ("SMs that communicate", f"{100 * 112 / 132:.1f} and {100 * 108 / 132:.1f} %"),
        ("a step and its parts", f"{1.13 + 2.06 + 1.99 + 0.48 + 13.95 + 0.29:.2f} s"),
        ("how V3 is served", f"{320 // 320} and {288 // 144}"),
        ("bits of Hopper's FP8 sums", "13 + 1 = 14 bits"),
    ],
)
def test_a_calculation_gives_what_is_written_beside_it(what, ours):
    assert FOUND[what].ours == ours


def test_seven_thousand_and_forty_gigabytes_a_second_change_the_bound_of_decoding():
    tokens = 1 / (61 * 2 * 32 * 9 * 7168 * (1 + 4 / 128 * 0 + 2) / 50e9)
    assert FOUND["hidden size in the bound of decoding"].ours.endswith(f"{tokens:.1f} tokens/s")
    assert FOUND["the network's rate in that bound"].ours == f"{tokens * 40 / 50:.1f} tokens/s"


def test_in_a_rack_of_72_only_busier_experts_make_the_bound_longer():
    assert limits.nvl72().per_token == pytest.approx(0.82e-3, rel=5e-3)
    seconds = 61 * 2 * 32 * 9 * 7000 * 3 / 900e9 * 257 / 72
    found = FOUND["one expert a device, in a rack of 72"]
    assert found.ours == f"{1e3 * seconds:.1f} ms, {1 / seconds:.0f} tokens/s"
    assert "32 tokens a device still give 0.82 ms" in found.calculation
    assert "3.6 times the tokens" in found.calculation


def test_the_formula_and_uneven_stages_leave_less_of_the_bubble_unexplained():
    found = FOUND["the bubble of a step"]
    assert found.ours == "0.81 s" and found.calculation.endswith("add 0.93")
    assert validation.deepseek_v3().times["uneven stages"] == pytest.approx(0.93, abs=0.005)


def test_multi_token_prediction_adds_a_layer_a_matrix_and_the_head():
    expert, d = 3 * 7168 * 2048, 7168
    attention = 187_107_328  # V3's five projections
    layer = attention + 9 * expert + 256 * d
    met = layer + 2 * d * d + 129_280 * d
    scores = 6 * 2048 * 128 * 320
    assert with_mtp() - 250.459e9 == pytest.approx(6 * met + scores, rel=2e-3)
    assert with_mtp() / 1e9 == pytest.approx(260.6, abs=0.05)


def test_the_context_s_extension_is_two_phases_of_63_billion_tokens():
    a_token = [219.75e9 + 3 * 61 * s * 128 * 320 for s in (32_768, 131_072)]
    seconds = 62_914_560 * 1000 * sum(a_token) / 385e12
    assert long_hours() == pytest.approx(seconds / 3600 / 1e3, rel=1e-3)
    assert math.isclose(long_hours(), 75.7, abs_tol=0.05)
