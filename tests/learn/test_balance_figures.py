"""Figures of the balance runs: what they say is computed, whatever the receipts hold."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from dsv3_tutorial import receipts
from dsv3_tutorial.bench.balance import NAME, VARIANTS
from dsv3_tutorial.learn.figures import balance_domains, balance_runs

STEPS = list(range(10, 101, 10))
ENDS = dict(zip(VARIANTS, (2.0, 0.8, 0.5, 1.5, 0.4, 0.9)))  # MaxVio
LOSS = dict(zip(VARIANTS, (3.0, 3.1, 3.05, 2.9, 2.95, 3.2)))
KINDS = ("prose", "tables")


def receipt(variant, seed, loss=None, end=None, apart=0.02):
    """A run whose MaxVio falls from 3 to `end` within 60 steps and stays there."""
    end = (ENDS[variant] if end is None else end) + 0.01 * seed
    value = (LOSS[variant] if loss is None else loss) + 0.001 * seed
    ramp = [3 + (end - 3) * min(1, step / 60) for step in STEPS]
    even = np.full((3, 16), 1 / 16)
    lean = np.zeros(16)
    lean[3], lean[5] = apart, -apart
    shapes = {
        "variant": variant,
        "seed": seed,
        "steps": STEPS,
        "loss": [8 - step / 25 for step in STEPS],
        "max_violation": ramp,
        "held_out_violation": end / 2,
        "domains": {"prose": (even + lean).tolist(), "tables": (even - lean).tolist()},
    }
    facts = {"device": "some CPU", "device_kind": "cpu", "versions": {"torch": "2.13"}}
    spread = {"min": value, "max": value}
    day = {"date": "2026-11-22", "repeats": 1, "threads": 1}
    return receipts.Receipt(
        "held-out loss", shapes=shapes, value=value, unit="bits per byte", spread=spread,
        **facts, **day,
    )  # fmt: skip


@pytest.fixture
def found():
    return {v: {seed: receipt(v, seed) for seed in (0, 1, 2)} for v in VARIANTS}


def test_runs_come_in_the_benchmarks_order_with_the_later_line_in_force(tmp_path):
    rows = [receipt(v, 0) for v in reversed(VARIANTS)] + [receipt("none", 0, loss=2.5)]
    receipts.append(NAME, rows, folder=tmp_path)
    found = balance_runs.runs(tmp_path)
    assert list(found) == list(VARIANTS)
    assert found["none"][0].value == 2.5


def test_the_predictions_are_answered_by_the_receipts(found):
    assert balance_runs.best_balanced(found) == "bias, gamma 0.01"
    assert balance_runs.least_balanced(found) == "none"
    assert balance_runs.learns_best(found) == "bias, gamma 0.001"
    found["none"] = {0: receipt("none", 0, loss=1.0, end=0.1)}
    assert balance_runs.best_balanced(found) == balance_runs.learns_best(found) == "none"
    assert balance_runs.least_balanced(found) == "bias, gamma 0.001"


def test_the_outcome_is_the_mean_of_the_last_fifty_steps(found):
    found["none"][0].shapes["max_violation"][:] = [9.0] * 5 + [1.0, 2.0, 3.0, 4.0, 5.0]
    assert balance_runs.last_violation({"none": {0: found["none"][0]}}) == {"none": 3.0}


def test_gaps_are_differences_seed_by_seed_over_the_seeds_that_both_have(found):
    other = {s: receipt("none", s, loss=x) for s, x in enumerate((1.0, 2.0, 3.0))}
    mine = {s: receipt("none", s, loss=x) for s, x in enumerate((1.1, 2.2, 3.3))}
    gap, error = balance_runs.paired({"none": other, "bias, gamma 0.1": mine})["bias, gamma 0.1"]
    assert gap == pytest.approx(0.2) and error == pytest.approx(0.1 / 3**0.5)
    one = {"none": other, "bias, gamma 0.1": {2: mine[2], 7: mine[0]}}
    gap, error = balance_runs.paired(one)["bias, gamma 0.1"]
    assert gap == pytest.approx(0.3) and error is None
    assert balance_runs.paired({"bias, gamma 0.1": mine}) == {}


def test_the_table_has_every_variant_in_order_with_its_numbers(found, capsys):
    balance_runs.balance_table(found)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:20].strip() for line in lines[1:7]] == list(VARIANTS)
    assert lines[2].split()[-6:] == ["3.101", "+0.100", "+-", "0.000", "0.81", "0.41"]
    assert lines[-1].startswith("3 seeds each")
    balance_runs.balance_table({"none": {0: receipt("none", 0)}})
    assert "1 seed each" in capsys.readouterr().out


def test_a_gamma_is_fast_enough_when_it_ends_below_half_of_no_balancing(found):
    arrived = balance_runs.fast_enough(found)
    assert arrived["bias, gamma 0.001"] is None
    half = balance_runs.last_violation(found)["none"] / 2
    for variant in ("bias, gamma 0.01", "bias, gamma 0.1"):
        ramp = np.mean([r.shapes["max_violation"] for r in found[variant].values()], axis=0)
        at = STEPS.index(arrived[variant])
        assert ramp[at] <= half < ramp[at - 1]
    found["bias, gamma 0.1"] = {0: receipt("bias, gamma 0.1", 0)}
    found["bias, gamma 0.1"][0].shapes["max_violation"][-5:] = [1.9] * 5  # there, and away again
    assert balance_runs.fast_enough(found)["bias, gamma 0.1"] is None


def test_titles_say_what_the_receipts_say(found):
    title = str(balance_runs.gammas(found))
    arrived = balance_runs.fast_enough(found)
    for gamma in ("0.01", "0.1"):
        assert f"gamma {gamma} after {arrived[f'bias, gamma {gamma}']} steps" in title
    assert "gamma 0.001 ends at" in title
    curves = str(balance_runs.balance_curves(found))
    ends = balance_runs.last_violation(found)
    assert f"{ends['none']:.2f} (none) to {ends['bias, gamma 0.01']:.2f}" in curves
    for variant in ("bias, gamma 0.01", "bias, gamma 0.1"):
        found[variant] = {0: receipt(variant, 0, end=2.5)}
    assert "halved by no gamma" in str(balance_runs.gammas(found))


def test_every_figure_repeats_and_names_its_axes_and_its_device(found):
    rows = [(step, 8.0, 3 - step / 40) for step in range(1, 25)]
    drawn = {
        "curves": lambda: balance_runs.balance_curves(found),
        "gammas": lambda: balance_runs.gammas(found),
        "heat map": lambda: balance_domains.domain_heat_map(found=found),
        "live": lambda: balance_runs.balance_live(rows, "none", found),
    }
    assert drawn["live"]().png() == drawn["live"]().png()
    for draw in drawn.values():
        made = draw()
        assert isinstance(made, Figure)
        assert "some CPU (1 thread), 2026-11-22, torch 2.13" in made.get_supxlabel()
        assert all(axes.get_xlabel() or axes.get_label() == "<colorbar>" for axes in made.axes)


def test_curves_of_an_unfinished_benchmark_draw():
    found = {v: {0: receipt(v, 0)} for v in list(VARIANTS)[:2]}
    assert "none" in str(balance_runs.balance_curves(found))


def test_the_heat_map_names_the_expert_on_which_the_kinds_differ_most(found):
    made = str(balance_domains.domain_heat_map("none", 1, 0, found))
    assert "layer 1: expert 3 gets 1.3x an even share of prose, 0.7x of tables" in made
    assert "layer 3:" in str(balance_domains.domain_heat_map("none", 1, -1, found))
    words = balance_domains.domain_heat_map_in_words("none", 1, 2, found)
    assert "none, seed 1, layer 3" in words
    assert "tables: most to expert 5 (1.3x an even share), least to 3 (0.7x)" in words


@pytest.mark.parametrize("where", [("nothing", 0, 0), ("none", 9, 0), ("none", 0, 3)])
def test_what_was_not_recorded_is_refused_with_what_was(found, where):
    with pytest.raises(ValueError, match=r"bias, gamma 0.1 .*layers go from 0"):
        balance_domains.domain_heat_map(*where, found)


def test_distance_is_the_share_of_tokens_that_would_have_to_move():
    far = balance_domains.distances(receipt("none", 0, apart=0.05))
    assert far == pytest.approx(dict.fromkeys(KINDS, 0.05))
    uneven = receipt("none", 0, apart=0.0)
    same = [[1.0] + [0.0] * 15] * 3  # all to one expert, and no kind differs from another
    uneven.shapes["domains"].update(dict.fromkeys(KINDS, same))
    assert balance_domains.distances(uneven) == dict.fromkeys(KINDS, 0.0)


def test_the_specialisation_table_finds_the_flattest_and_its_ratio(found, capsys):
    found["loss, sequence-wise"] = {0: receipt("loss, sequence-wise", 0, apart=0.01)}
    found["loss, batch-wise"] = {0: receipt("loss, batch-wise", 0, apart=0.03)}
    balance_domains.specialisation_table(found)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[-3:] == ["1.0%"] * 3
    assert lines[-1] == (
        "kinds differ least with loss, sequence-wise, most with loss, batch-wise: 3.00x"
    )


def test_a_live_run_is_averaged_as_the_record_is(found):
    rows = [(step, 8.0, float(step > 10)) for step in range(1, 28)]
    made = balance_runs.balance_live(rows, "bias, gamma 0.01", found)
    line = next(line for line in made.axes[0].lines if line.get_label() == "this run")
    assert line.get_xdata().tolist() == [10, 20] and line.get_ydata().tolist() == [0.0, 1.0]
    recorded = np.mean([r.shapes["max_violation"][1] for r in found["bias, gamma 0.01"].values()])
    assert f"After 20 steps here: MaxVio 1.00, recorded {recorded:.2f}" in str(made)
    assert "After 4 steps here: MaxVio 0.00" in str(
        balance_runs.balance_live(rows[:4], "none", found)
    )
    with pytest.raises(ValueError, match="takes one step"):
        balance_runs.balance_live([], "none", found)
