"""The emulated accumulator against a model in exact fractions, and against known errors."""

import math
import time
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.fp8.accumulate import (
    HOPPER,
    HOPPER_PROMOTED,
    AccumulationError,
    TensorCore,
    aligned_sum,
    matmul_emulated,
)

CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
VALUES = st.sampled_from([x for x in CODES.float().tolist() if x == x])
CORES = st.builds(
    lambda bits, group, intervals, rounding, joint: TensorCore(
        bits, group, intervals and intervals * group, rounding, joint
    ),
    bits=st.integers(1, 23),
    group=st.integers(1, 9),
    intervals=st.none() | st.integers(1, 3),
    rounding=st.sampled_from(["truncate", "nearest"]),
    joint=st.booleans(),
)


def slow_cut(x, unit, rounding):
    """A fraction in whole units: toward zero, or to nearest with ties to even."""
    units = x / unit
    return unit * (math.trunc(units) if rounding == "truncate" else round(units))


def slow_unit(largest, bits):
    """2^(e - bits) with 2^e <= largest < 2^(e + 1), found by doubling and halving."""
    power = Fraction(1)
    while power * 2 <= largest:
        power *= 2
    while power > largest:
        power /= 2
    return power / 2**bits


def slow_aligned(terms, bits, rounding):
    if not any(terms):
        return Fraction(0)
    unit = slow_unit(max(map(abs, terms)), bits)
    total = sum(slow_cut(term, unit, rounding) for term in terms)
    return slow_cut(total, slow_unit(abs(total), bits), rounding) if total else Fraction(0)


def slow_dot(a, b, core):
    """One dot product in Python fractions, group after group, term after term."""
    products = [Fraction(x) * Fraction(y) for x, y in zip(a, b, strict=True)]
    interval = core.promote or max(len(products), 1)
    total = torch.zeros(())
    for first in range(0, len(products), interval):
        part, carried = products[first : first + interval], Fraction(0)
        for start in range(0, len(part), core.group):
            group = part[start : start + core.group]
            if not core.joint:
                group = [slow_aligned(group, core.bits, core.rounding)]
            carried = slow_aligned([carried, *group], core.bits, core.rounding)
        total = total + torch.tensor(float(carried))  # float32 addition
    return float(total)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=40), CORES)
def test_a_sum_equals_the_slow_model_in_exact_fractions(pairs, core):
    a, b = (torch.tensor([x]) for x in zip(*pairs, strict=True))
    assert float(matmul_emulated(a, b, core)) == slow_dot(a[0].tolist(), b[0].tolist(), core)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), CORES, st.integers(1, 5), st.integers(1, 5), st.integers(1, 50))
def test_each_element_of_a_matrix_product_is_its_own_dot_product(seed, core, m, n, k):
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(x, k, generator=draw).to(torch.float8_e4m3fn).float() for x in (m, n))
    whole = matmul_emulated(a, b, core)
    expected = [[slow_dot(x.tolist(), y.tolist(), core) for y in b] for x in a]
    assert whole.dtype == torch.float32 and whole.tolist() == expected


def test_rows_cut_into_parts_give_what_they_give_alone():
    draw = torch.Generator().manual_seed(1)
    a, b = (torch.randn(x, 96, generator=draw) for x in (150, 70))  # more than is held at once
    whole = matmul_emulated(a, b, HOPPER)
    assert torch.equal(whole[117:119], matmul_emulated(a[117:119], b, HOPPER))


def test_hopper_keeps_13_fraction_bits_beside_one_and_cuts_the_fourteenth():
    for exponent, kept in ((13, 2.0**-13), (14, 0.0)):
        a = torch.tensor([[1.0, 2.0**-7, -1.0]])
        b = torch.tensor([[1.0, 2.0 ** (7 - exponent), 1.0]])
        assert float(matmul_emulated(a, b, HOPPER)) == kept
    terms = torch.tensor([1.0, 0.75 * 2.0**-13, -1.0], dtype=torch.float64)
    assert float(aligned_sum(terms, 13)) == 0.0
    assert float(aligned_sum(terms, 13, "nearest")) == 2.0**-13


def test_a_running_sum_swallows_small_products_and_promotion_saves_them():
    a = torch.ones(1, 4096 * 8)
    stuck = matmul_emulated(a, a, TensorCore(bits=8))  # 512 + 32 times 1: each 1 is half a unit
    assert float(stuck) == 512.0
    assert float(matmul_emulated(a, a, TensorCore(bits=8, promote=128))) == 4096 * 8


@pytest.mark.parametrize(
    ("make", "core", "low", "high"),
    [
        (torch.rand, HOPPER, 0.06, 0.07),
        (torch.rand, TensorCore(bits=14), 0.028, 0.034),
        (torch.rand, TensorCore(bits=15), 0.012, 0.016),
        (torch.rand, HOPPER_PROMOTED, 0.0004, 0.0006),
        (torch.rand, TensorCore(joint=False), 0.002, 0.0035),  # no bias from the products
        (torch.randn, HOPPER, 0.001, 0.003),
        (torch.randn, HOPPER_PROMOTED, 0.00009, 0.0002),
        (torch.rand, TensorCore(bits=None), 0.0, 6e-8),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),  # an address is no name
)
def test_errors_at_4096_products_are_those_measured_elsewhere(make, core, low, high):
    draw = torch.Generator().manual_seed(0)
    a, b = (make(16, 4096, generator=draw).to(torch.float8_e4m3fn).float() for _ in range(2))
    exact = a.double() @ b.double().T
    assert low <= float((matmul_emulated(a, b, core) - exact).norm() / exact.norm()) <= high


def test_an_exact_core_rounds_the_true_sum_once():
    draw = torch.Generator().manual_seed(2)
    a, b = (torch.randn(3, 200, generator=draw).to(torch.float8_e4m3fn).float() for _ in range(2))
    pairs = [[(x.tolist(), y.tolist()) for y in b] for x in a]
    true = [
        [float(sum(Fraction(p) * Fraction(q) for p, q in zip(*pair, strict=True))) for pair in row]
        for row in pairs
    ]
    rounded = torch.tensor(true, dtype=torch.float64).float()
    assert torch.equal(matmul_emulated(a, b, TensorCore(bits=None)), rounded)


def test_zeros_anywhere_change_nothing_and_no_terms_sum_to_zero():
    a = torch.tensor([[3.0, 0.0, -2.0, 0.0]])
    assert float(matmul_emulated(a, torch.ones(1, 4), TensorCore(group=1))) == 1.0
    assert matmul_emulated(torch.zeros(2, 5), torch.ones(3, 5)).tolist() == [[0.0] * 3] * 2
    assert matmul_emulated(torch.ones(2, 0), torch.ones(3, 0)).tolist() == [[0.0] * 3] * 2
    assert matmul_emulated(torch.ones(0, 5), torch.ones(3, 5)).shape == (0, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_makes_its_own_results_not_finite_and_no_others(bad):
    a = torch.ones(2, 40)
    a[0, 3] = bad
    out = matmul_emulated(a, torch.ones(2, 40), HOPPER)
    assert not out[0].isfinite().any() and out[1].tolist() == [40.0, 40.0]


def test_float8_operands_are_taken_as_they_are():
    a = torch.tensor([[1.5, -2.0]])
    assert float(matmul_emulated(a.to(torch.float8_e4m3fn), a.to(torch.float8_e4m3fn))) == 6.25


def test_64_by_64_results_of_4096_products_take_seconds_at_most():
    a = torch.rand(64, 4096)
    start = time.process_time()
    matmul_emulated(a, a, HOPPER)
    assert time.process_time() - start < 4.0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bits": 0}, "bits is 1 to 23 or None, got 0"),
        ({"bits": 24}, "got 24"),
        ({"bits": True}, "got True"),
        ({"group": 0}, "group is a whole number"),
        ({"group": 2.0}, "group is a whole number"),
        ({"promote": 100}, "promote is a multiple of group 32 or None, got 100"),
        ({"promote": 0}, "got 0"),
        ({"rounding": "up"}, "rounding is one of truncate, nearest"),
        ({"joint": 1}, "joint is True or False"),
    ],
    ids=str,
)
def test_an_accumulator_that_cannot_be_is_refused(fields, said):
    with pytest.raises(AccumulationError, match=said):
        TensorCore(**fields)


def test_everything_wrong_with_an_accumulator_is_said_at_once():
    with pytest.raises(AccumulationError, match=r"bits .*; rounding"):
        TensorCore(bits=-1, rounding="")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.ones(2, 3), torch.ones(2, 4)),
        (torch.ones(3), torch.ones(3)),
        (torch.ones(2, 3, dtype=torch.int8), torch.ones(2, 3)),
        (torch.ones(2, 3), torch.ones(2, 3, device="meta")),
    ],
    ids=["k differs", "vectors", "integers", "devices"],
)
def test_operands_that_do_not_fit_are_refused(a, b):
    with pytest.raises(AccumulationError, match="have no products to sum along k"):
        matmul_emulated(a, b)
