"""What `train` is asked for: told wrong all at once, before anything is loaded or written."""

import json

import pytest

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.train.options import NAMES, STDLIB, parser, plan
from dsv3_tutorial.train.recipe import Recipe, RecipeError


def asked(*argv):
    return plan(parser().parse_args([str(a) for a in argv]))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def begun(out):
    """A folder in which a run was begun with two options of its own."""
    planned = asked("--out", out, "--config", "tiny", "--steps", 50, "--gamma", 0.5)
    out.mkdir()
    (out / "run.json").write_text(json.dumps(planned.to_dict()))
    return out


def test_without_options_it_is_small_on_the_standard_library(out):
    planned = asked("--out", out)
    assert planned.config == ModelConfig.named("small") and planned.folder is None
    assert planned.recipe == Recipe(steps=1000) and planned.text == STDLIB
    assert not out.exists()


def test_every_field_of_the_recipe_has_its_option(out):
    values = {**Recipe(steps=3).to_dict(), "recompute": True, "vocab_size": 300}
    values |= {"tokenizer": "bpe", "balance": "batch", "precision": "fp8-tensor", "seed": 7}
    values |= {"moments": "float32"}
    assert values.keys() == set(NAMES)
    argv = [f"--{name.replace('_', '-')}" for name in ("recompute",)]
    for name, value in values.items():
        if name != "recompute":
            argv += [f"--{name.replace('_', '-')}", value]
    assert asked("--out", out, *argv).recipe.to_dict() == values


def test_a_vocabulary_gives_the_model_its_size(out):
    planned = asked("--out", out, "--tokenizer", "bpe", "--vocab-size", 512)
    assert planned.config.vocab_size == 512


def test_a_config_can_be_a_file(out, text_folder, tmp_path, moe_config):
    given = ("--config", tmp_path / "moe.json", "--text", text_folder, "--seq-len", 128)
    planned = asked("--out", out, *given)
    assert planned.config == moe_config and planned.folder == text_folder


def test_a_text_folder_is_the_same_from_wherever_it_is_named(out, text_folder, monkeypatch):
    monkeypatch.chdir(text_folder.parent)
    planned = asked("--out", out, "--config", "tiny", "--text", "text")
    out.mkdir()
    (out / "run.json").write_text(json.dumps(planned.to_dict()))
    monkeypatch.chdir(out)
    assert asked("--out", out, "--resume", "--text", "../text").folder == text_folder


def test_all_that_is_wrong_is_told_at_once_and_nothing_is_written(out, tmp_path):
    wrong = ["--config", "huge", "--text", tmp_path / "nowhere", "--steps", "many"]
    wrong += ["--batch", 6, "--micro-batches", 4, "--balance", "luck", "--threads", 0]
    wrong += ["--device", "abacus"]
    with pytest.raises(RecipeError) as caught:
        asked("--out", out, *wrong)
    told = [problem.split(" = ")[0] for problem in caught.value.problems]
    assert sorted(told) == [
        *("balance", "batch", "config", "device", "steps", "text", "threads"),
    ]
    assert "Nothing was started or written" in str(caught.value) and not out.exists()


@pytest.mark.parametrize(
    "options, problem",
    [
        (("--config", "tiny", "--seq-len", 5000), "the config's positions end at 4096"),
        (("--tokenizer", "bpe"), "a BPE starts from 256 bytes"),
        (("--vocab-size", 512), "bytes are 256 symbols"),
    ],
)
def test_what_cannot_go_together_is_refused(out, options, problem):
    with pytest.raises(RecipeError, match=problem):
        asked("--out", out, *options)


def test_a_folder_with_a_run_is_refused_without_resume(begun):
    with pytest.raises(RecipeError, match="a run is there already"):
        asked("--out", begun, "--config", "tiny")


def test_resume_needs_no_option_again(begun):
    planned = asked("--out", begun, "--resume")
    assert (planned.recipe.steps, planned.recipe.gamma) == (50, 0.5)
    assert planned.config == ModelConfig.named("tiny") and planned.resume


def test_resume_refuses_options_that_would_make_it_another_run(begun):
    with pytest.raises(RecipeError) as caught:
        asked("--out", begun, "--resume", "--gamma", 0.1, "--config", "small", "--steps", 80)
    assert [p.split(" = ")[0] for p in caught.value.problems] == ["gamma", "config"]
    assert "begun with 0.5" in caught.value.problems[0]


def test_resume_may_change_how_long_it_lasts_and_how_often_it_looks(begun):
    planned = asked("--out", begun, "--resume", "--steps", 80, "--save-every", 5)
    assert (planned.recipe.steps, planned.recipe.save_every) == (80, 5)


def test_a_run_from_before_moments_could_be_chosen_goes_on_and_knows_what_it_has(begun):
    assert "moments" not in json.loads((begun / "run.json").read_text())["recipe"]
    assert asked("--out", begun, "--resume", "--moments", "float32").recipe.moments is None
    with pytest.raises(RecipeError, match="moments = 'bf16': the run was begun with 'float32'"):
        asked("--out", begun, "--resume", "--moments", "bf16")


def test_help_says_what_each_precision_is():
    said = " ".join(parser().format_help().split())
    for part in ("BF16 copy of float32 weights", "1x128 values", "one scale a tensor"):
        assert part in said


def test_resume_without_a_run_begins_one(out):
    assert asked("--out", out, "--resume", "--steps", 9).recipe.steps == 9


@pytest.mark.parametrize("text", ["", "{", "[]", '{"recipe": {}}'])
def test_a_damaged_run_file_is_named_and_nothing_is_guessed(begun, text):
    (begun / "run.json").write_text(text)
    with pytest.raises(RecipeError, match=r"run\.json is not as a run wrote it"):
        asked("--out", begun, "--resume")
