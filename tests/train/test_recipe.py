"""The recipe: the report's schedule as fractions of a run, and every wrong option told at once."""

import itertools

import pytest

from dsv3_tutorial.train.recipe import PRECISIONS, Recipe, RecipeError


def test_the_learning_rate_follows_the_reports_stations_at_any_length():
    recipe = Recipe(steps=14800, peak_lr=2.2e-4, warmup=2)
    rates = [recipe.learning_rate(step) for step in range(14800)]
    assert rates[:2] == [1.1e-4, 2.2e-4]
    assert set(rates[1:10000]) == {2.2e-4}  # 10T of 14.8T tokens
    assert rates[10001] < 2.2e-4 and rates[12150] == pytest.approx((2.2e-4 + 2.2e-5) / 2)
    assert rates[14300] == pytest.approx(2.2e-5) and rates[14632] == pytest.approx(2.2e-5)
    assert rates[14633] == rates[-1] == pytest.approx(7.3e-6)  # the last 167B
    assert all(a >= b for a, b in itertools.pairwise(rates[1:]))


def test_the_cosine_schedule_is_the_plain_loops():
    from dsv3_tutorial.train.loop import Schedule

    recipe = Recipe(steps=90, peak_lr=1.0, warmup=9, schedule="cosine")
    plain = Schedule(steps=90, peak_lr=1.0, final_lr=0.1, warmup=9)
    for step in range(90):
        assert recipe.learning_rate(step) == pytest.approx(plain.learning_rate(step), rel=1e-12)


def test_the_mtp_weight_falls_to_a_third_and_the_bias_comes_to_rest_where_the_report_has_it():
    recipe = Recipe(steps=1480, gamma=0.5)
    assert [recipe.mtp_weight_at(s) for s in (0, 999, 1001)] == pytest.approx([0.3, 0.3, 0.1])
    assert [recipe.gamma_at(s) for s in (0, 1429, 1431)] == [0.5, 0.5, 0.0]
    assert Recipe(steps=10, balance="sequence").gamma_at(0) == 0.0
    assert Recipe(steps=10, freeze_bias=0.0).gamma_at(9) == 0.001


def test_a_recipe_survives_being_written_down():
    recipe = Recipe(steps=7, tokenizer="bpe", vocab_size=512, balance="batch")
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(RecipeError, match="unknown field 'stesp'"):
        Recipe.from_dict({"stesp": 7})


def test_moments_are_as_the_report_has_them_unless_asked_for():
    kept = {p: Recipe(steps=1, precision=p).moments_in for p in PRECISIONS}
    assert kept == {"float32": "float32", "bf16": "float32", "fp8": "bf16", "fp8-tensor": "bf16"}
    assert Recipe(steps=1, precision="fp8", moments="float32").moments_in == "float32"
    assert Recipe(steps=1, moments="bf16").moments_in == "bf16"


def test_a_recipe_that_asks_for_no_moments_is_written_down_as_before_there_were_any():
    assert "moments" not in Recipe(steps=7).to_dict()
    asked = Recipe(steps=7, moments="bf16")
    assert asked.to_dict()["moments"] == "bf16" and Recipe.from_dict(asked.to_dict()) == asked


WRONG = {
    "steps": [0, -1, 1.5, "ten", True, None],
    "batch": [0, "8"],
    "seq_len": [3],
    "peak_lr": [float("nan"), float("inf"), -1e-3, "fast", True],
    "schedule": ["linear"],
    "balance": ["luck", None],
    "gamma": [-0.1, 2],
    "freeze_bias": [1.1],
    "precision": ["fp4", "fp8_tensor", None],
    "moments": ["fp8", 16],
    "recompute": ["yes", 1],
    "tokenizer": ["words"],
    "save_every": [0],
}


@pytest.mark.parametrize("name, value", [(n, v) for n, values in WRONG.items() for v in values])
def test_a_wrong_value_is_refused_by_name(name, value):
    with pytest.raises(RecipeError) as caught:
        Recipe(**{"steps": 10, name: value})
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"{name} = {value!r}")


def test_everything_wrong_is_told_at_once_and_each_thing_once():
    with pytest.raises(RecipeError) as caught:
        Recipe(steps=0, batch=6, micro_batches=4, gamma=-1.0, tokenizer="bpe", vocab_size=100)
    said = caught.value.problems
    assert [p.split(" = ")[0] for p in said] == ["steps", "gamma", "batch", "vocab_size"]
    assert "Nothing was started" in str(caught.value) and "4 problems" in str(caught.value)


def test_a_vocabulary_size_needs_the_tokenizer_that_has_one():
    with pytest.raises(RecipeError, match="bytes are 256 symbols"):
        Recipe(steps=1, vocab_size=512)
