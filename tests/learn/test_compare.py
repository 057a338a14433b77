"""The comparison says what is wrong, and lets through what only rounding explains."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial.learn.compare import TOLERANCE, difference

X = torch.linspace(-3, 3, 12).reshape(3, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_passes_and_ten_times_the_tolerance_does_not(dtype):
    tolerance = TOLERANCE[str(dtype).removeprefix("torch.")]
    x = X.to(dtype)
    assert difference(x, x.clone()) is None
    assert difference(x.double().mul(1 + tolerance / 4).to(dtype), x) is None
    assert "values differ" in difference(x.double().mul(1 + 10 * tolerance).to(dtype), x)


def test_float8_may_be_one_step_off_and_no_more():
    x = torch.tensor([1.0, 0.015625, 448.0]).to(torch.float8_e4m3fn)
    step = torch.tensor([1.125, 0.015625, 416.0]).to(torch.float8_e4m3fn)
    far = torch.tensor([1.0, 0.03125, 448.0]).to(torch.float8_e4m3fn)
    assert difference(step, x) is None
    assert "values differ" in difference(far, x)


def test_infinities_of_a_mask_must_be_where_they_are_expected():
    masked = X.masked_fill(X > 1, float("-inf"))
    assert difference(masked.clone(), masked) is None
    assert "is missing" in difference(X, masked)
    assert "NaN or infinity in 4" in difference(masked, X)
    assert "is missing" in difference(masked.abs(), masked)


def test_integers_and_bools_are_exact():
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == "1 of 2 values differ"
    assert difference(70272, 70272.0) is None
    assert difference(70273, 70272) == "returned 70273, expected 70272"
    assert difference(70273, 70272, spoil=False) == "the number differs"
    assert difference(1, True) == "returned a number, expected a bool"


def test_a_tensor_without_axes_counts_as_the_number_in_it():
    third = torch.tensor(1 / 3)
    assert difference(third, 1 / 3) is None
    assert difference(third.double(), 1 / 3) == "returned 0.33333334, expected 0.33333333"
    assert difference(torch.tensor(4), 4) is None
    assert difference(torch.tensor(5), 4) == "returned 5, expected 4"
    assert difference(third + 1e-4, 1 / 3) == "returned 0.333433, expected 0.333333"
    assert difference(torch.tensor(True), 1) == "returned a bool, expected a number"
    assert difference(third[None], 1 / 3) == "returned a tensor of shape (1,), expected a number"


def test_numbers_text_and_structures_are_told_apart():
    assert difference({"a": 1}, {"a": 2}) == "'a': returned 1, expected 2"
    assert difference({"b": 1}, {"a": 2}) == "the keys differ, expected 'a'"
    assert difference((X, X.T), (X, X)) == "item 1 of the result: shape (4, 3), expected (3, 4)"
    assert difference([1, 2], (1, 2)) is None
    assert difference((1,), (1, 2)) == "returned a tuple of 1, expected a tuple of 2"
    assert difference("memory", "compute") == "returned 'memory', expected 'compute'"
    assert difference(X, 3) == "returned a tensor of shape (3, 4), expected a number"
    assert difference(float("nan"), 3.0) == "returned nan, expected a finite number"
    assert difference(range(3), range(4)) == "it is not the expected value"


def test_numbers_that_differ_are_never_printed_alike():
    assert difference(2.4999999, 2.5, 1e-9) == "returned 2.4999999, expected 2.5"
    assert difference(2.6, 2.5, 1e-9) == "returned 2.6, expected 2.5"
    assert difference(2500000.25, 2500000.0) == "returned 2500000.2, expected 2500000"


@given(st.floats(1e-3, 1e9), st.floats(1e-12, 1e-3))
def test_whatever_two_numbers_differ_they_read_differently(expected, by):
    said = difference(expected * (1 + by), expected, 1e-15)
    if said is not None:
        got, wanted = said.removeprefix("returned ").split(", expected ")
        assert got != wanted


def test_empty_tensors_and_zeros_compare():
    assert difference(torch.zeros(0), torch.zeros(0)) is None
    assert difference(torch.zeros(3), torch.zeros(3)) is None
    assert "values differ" in difference(torch.full((3,), 1e-9), torch.zeros(3))


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8), st.floats(0.01, 100))
def test_a_difference_is_found_whenever_it_exceeds_the_tolerance(values, extra):
    expected = torch.tensor(values, dtype=torch.float64)
    got = expected.clone()
    got[0] += extra
    allowed = 1e-10 * float(expected.abs().max())
    assert (difference(got, expected) is None) == (extra <= allowed)
