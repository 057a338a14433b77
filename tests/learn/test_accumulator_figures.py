"""The accumulator lab's figures: drawn from the emulation, and their titles say what it found."""

import itertools

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from dsv3_tutorial.learn.figures import accumulators
from dsv3_tutorial.learn.figures.accumulators import error

DRAWN = {
    "6.6% or 0.15%, as the inputs are; promoted every 128, 0.05% or less on these inputs": (
        accumulators.error_against_k
    ),
    "131 times as exact on positive inputs and 12 times": accumulators.error_against_promotion,
    "error 6.6% unpromoted, 0.05% promoted every 128": accumulators.accumulator_lab,
    "8 fraction bits, 4,096 zero-mean products: error 6.9% unpromoted": (
        lambda: accumulators.accumulator_lab(8, None, "zero-mean")
    ),
    "2^-13 survives beside 1 and 2^-14 does not: 13 fraction bits": accumulators.fading_term,
}


@pytest.mark.parametrize("finding", DRAWN)
def test_a_figure_states_its_finding_with_axes_and_finite_data_and_repeats(finding):
    draw = DRAWN[finding]
    made = draw()
    assert isinstance(made, Figure) and finding in str(made)
    assert made.png() == draw().png()
    for axes in made.axes:
        assert axes.get_xlabel() and axes.lines
        numbers = [np.asarray(line.get_ydata(), dtype=float) for line in axes.lines]
        assert all(np.isfinite(each).all() for each in numbers)


def test_promotion_bounds_the_error_and_without_it_the_error_grows_with_k():
    for kind in accumulators.KINDS:
        grown = [error(kind, k) for k in accumulators.SIZES]
        assert all(later > 1.1 * earlier for earlier, later in itertools.pairwise(grown))
        bounded = [error(kind, k, 13, 128) for k in accumulators.SIZES]
        assert max(bounded) < 1.6 * min(bounded)


def test_the_reports_two_percent_lies_between_what_the_inputs_make_of_it():
    assert error("zero-mean", 4096) < 0.2 < 2 < error("positive", 4096)
    assert accumulators.largest_error("half zero") == pytest.approx(2, abs=0.3)


def test_on_zero_mean_inputs_e4m3_itself_costs_more_than_the_accumulator():
    assert accumulators.rounding_error("zero-mean") > 20 * error("zero-mean", 4096)
    assert accumulators.rounding_error("positive") < error("positive", 4096) / 20


def test_a_bit_more_halves_the_error():
    for kind in accumulators.KINDS:
        assert 1.6 < error(kind, 1024, 13) / error(kind, 1024, 14) < 3.2


def test_the_small_term_vanishes_between_13_and_14_and_rounds_up_above_a_half():
    width, rounding = accumulators.fading_term().axes
    for line in width.lines:
        kept = dict(zip(line.get_xdata(), line.get_ydata()))
        assert [j for j, value in kept.items() if value] == [9, 10, 11, 12, 13]
    cut, nearest = (dict(zip(line.get_xdata(), line.get_ydata())) for line in rounding.lines)
    assert [part for part, left in cut.items() if left] == [1.0]
    assert [part for part, left in nearest.items() if left] == [0.625, 0.75, 0.875, 1.0]


def test_the_table_shows_one_accumulator_and_both_errors_with_and_without_promotion(capsys):
    accumulators.inputs_table()
    over, heads, *rows = capsys.readouterr().out.splitlines()
    assert over.startswith("4,096 products") and over.endswith("promoted every 128")
    assert heads.split() == ["inputs", "norm", "largest", "norm", "norm", "largest"]
    found = [[cell for cell in row.split() if cell.endswith("%")] for row in rows]
    assert found == [
        ["6.6%", "6.9%", "0.26%", "0.05%", "0.058%"],
        ["1.5%", "1.8%", "0.29%", "0.0094%", "0.013%"],
        ["0.15%", "5.9%", "0.05%", "0.013%", "2.4%"],
        ["3%", "4.2%", "0.34%", "0.13%", "0.22%"],
        *([], [], []),
    ]


def test_heavy_tailed_inputs_are_e4m3_values_and_stand_in_no_figure():
    a, b = accumulators._inputs(accumulators.HEAVY, 256)
    for x in (a, b):
        assert x.max() == 448 and torch.equal(x.to(torch.float8_e4m3fn).float(), x)
    assert not torch.equal(a, b)
    assert accumulators.HEAVY not in accumulators.KINDS


def test_the_lab_says_in_words_what_it_draws():
    words = accumulators.accumulator_lab_in_words()
    assert "error 6.6% unpromoted, 0.05% promoted every 128." in words
    assert "rounding these inputs to E4M3 costs 0.071%" in words
    alone = accumulators.accumulator_lab(10, None, "half zero")
    assert len(alone.axes[0].lines) == 1 and len(alone.axes[1].lines) == 1
