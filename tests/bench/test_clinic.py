"""The clinic: bugs do what they say and leave no trace, records are whole, verdicts are fair."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from dsv3_tutorial.attention import mla
from dsv3_tutorial.bench import clinic, clinic_bugs, clinic_train
from dsv3_tutorial.bench.clinic_cases import CASES, Case, named
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.files import data_path
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.moe import gate
from dsv3_tutorial.train import corpus, step

BY_NAME = {case.name: case for case in CASES}
each_case = pytest.mark.parametrize("case", CASES, ids=BY_NAME)
SHORT = replace(clinic_train.RECIPE, steps=3, batch=4, seq_len=16, evaluate_every=2)


@pytest.fixture(scope="module")
def text():
    """Real text, little of it: this package's own data."""
    data = torch.frombuffer(bytearray(data_path("hardware.json").read_bytes()), dtype=torch.uint8)
    return corpus.Corpus(data[1000:], data[:1000], 1, 1)


@pytest.fixture
def model():
    return DeepSeekV3(clinic_train.CONFIG)


def patched():
    """Everything that a bug may replace, as it is now."""
    places = {"gate": gate, "step": step, "mla": mla, "config": ModelConfig}
    return {(where, name): value for where, p in places.items() for name, value in vars(p).items()}


@each_case
def test_a_bug_is_gone_after_its_block_even_when_that_fails(case):
    before = patched()
    with pytest.raises(KeyError, match="planted"), case.plant():
        raise KeyError("planted")
    assert patched() == before


def test_the_bias_enters_the_weight_and_leaves_the_choice_alone(model):
    part, x = model.model.layers[1].mlp.gate, torch.randn(1, 8, 64)
    part.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, 16))
    right = part(x)
    with clinic_bugs.bias_in_the_weight():
        wrong = part(x)
    assert torch.equal(wrong.indices, right.indices) and torch.equal(wrong.scores, right.scores)
    biased = (right.scores + part.e_score_correction_bias).gather(1, right.indices)
    torch.testing.assert_close(wrong.weights, 2.5 * biased / biased.sum(dim=1, keepdim=True))
    assert not torch.allclose(wrong.weights, right.weights, atol=1e-3)


def train_step(model, recipe, text):
    """One update, and the biases (1, E) after it."""
    sampler = corpus.Sampler(text.train, recipe.batch, recipe.seq_len, seed=0)
    optimizer = step.optimizer_for(model, recipe.peak_lr)
    state = step.TrainingState(model, optimizer, sampler, recipe)
    alone = step.Ranks(0, 1, torch.device("cpu"))
    counts = step.train_step(state, sampler.draw(), alone, clinic_train.no_phase).counts
    return model.model.layers[1].mlp.gate.e_score_correction_bias, counts


def test_the_reversed_update_raises_who_is_overloaded(model, text):
    with clinic_bugs.bias_moves_the_wrong_way():
        bias, counts = train_step(model, SHORT, text)
    torch.testing.assert_close(bias, SHORT.gamma * (counts[0] - counts[0].float().mean()).sign())


def test_a_bias_that_moves_with_every_micro_batch_takes_more_than_one_step(model, text):
    recipe = replace(SHORT, micro_batches=4)
    with clinic_bugs.bias_moves_every_micro_batch(times=10.0):
        bias, _ = train_step(model, recipe, text)
    steps = bias / (10 * recipe.gamma)
    torch.testing.assert_close(steps, steps.round())
    assert 1 < steps.abs().max() <= 4
    right, _ = train_step(DeepSeekV3(clinic_train.CONFIG), recipe, text)
    assert right.abs().max() == recipe.gamma


def test_masking_with_zero_chooses_outside_the_best_groups_and_minus_infinity_does_not():
    biased = torch.rand(64, 16)
    how = {"n_group": 4, "topk_group": 2, "top_k": 2}
    right = gate.choose_experts(biased, **how)
    assert torch.equal(right, gate.choose_experts(biased - 1.0, **how))
    with clinic_bugs.groups_masked_with_zero():
        wrong = gate.choose_experts(biased, **how)
    worth = biased.view(64, 4, 4).topk(2).values.sum(dim=-1)
    best = worth.topk(2).indices
    inside = [(choice[:, :, None] // 4 == best[:, None]).any(dim=-1) for choice in (right, wrong)]
    assert inside[0].all() and not inside[1].any()


def test_weights_are_scaled_twice_or_carry_no_gradient(model):
    part, x = model.model.layers[1].mlp.gate, torch.randn(1, 8, 64)
    right = part(x).weights
    with clinic_bugs.scaled_twice():
        torch.testing.assert_close(part(x).weights, 2.5 * right)
    with clinic_bugs.gate_detached():
        assert torch.equal(part(x).weights, right) and not part(x).weights.requires_grad
    assert part(x).weights.requires_grad


def test_without_a_mask_the_first_position_sees_the_last(model):
    ids = torch.randint(256, (1, 8))
    other = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % 256], dim=1)
    assert torch.equal(model(ids)[:, 0], model(other)[:, 0])
    with clinic_bugs.future_visible():
        assert not torch.allclose(model(ids)[:, 0], model(other)[:, 0])


def test_without_rotated_keys_the_shared_key_is_as_projected(model):
    key, query = torch.randn(1, 4, 1, 16), torch.randn(1, 4, 4, 16)
    cos, sin = torch.zeros(4, 8), torch.ones(4, 8)
    with clinic_bugs.keys_not_rotated():
        assert torch.equal(mla.rotate(key, cos, sin), key)
        assert not torch.equal(mla.rotate(query, cos, sin), query)
    assert not torch.equal(mla.rotate(key, cos, sin), key)


def test_the_target_two_bytes_on_is_what_the_loss_compares_with():
    logits, target = torch.randn(2, 6, 256), torch.randint(256, (2, 6))
    right = step.nats(logits[:, :-1], target[:, 1:])
    with clinic_bugs.target_one_too_far():
        assert step.nats(logits, target) == right


def test_decay_scale_and_clipping_are_what_they_say(model):
    with clinic_bugs.decay_on_everything(3.0):
        (group,) = step.optimizer_for(model, 1e-3).param_groups
    assert group["weight_decay"] == 3.0 and len(group["params"]) == len(list(model.parameters()))
    with clinic_bugs.softmax_scale(lambda cfg: 0.25):
        assert model.cfg.softmax_scale == 0.25
    assert model.cfg.softmax_scale == 32**-0.5
    with clinic_bugs.clipping_off():
        assert not math.isfinite(step.CLIP)


@pytest.mark.parametrize("name", ["healthy", "bias_oscillates", "gate_detached"])
def test_the_same_seed_gives_the_same_run_and_another_one_another(name, text):
    one, two, other = (clinic_train.train(BY_NAME[name], s, text, SHORT) for s in (0, 0, 1))
    assert one == two and one["loss"] != other["loss"]
    assert [len(one[c]) for c in clinic_train.COLUMNS] == [3, 3, 3, 3, 1]
    assert 7 < one["loss"][0] < 9  # 8 bits: nothing learned yet


def test_a_run_ends_where_its_loss_stops_being_a_number(text, monkeypatch):
    def diverging(state, *rest):
        if state.step == 2:
            raise FloatingPointError
        return right(state, *rest)

    right = step.train_step
    monkeypatch.setattr(step, "train_step", diverging)
    assert len(clinic_train.train(BY_NAME["healthy"], 0, text, SHORT)["loss"]) == 2


def test_zeros_are_those_of_the_gradient_without_the_embedding(model):
    assert clinic_train.zero_fraction(model) == 1.0
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.model.embed_tokens.weight.grad.zero_()
    assert clinic_train.zero_fraction(model) == 0.0
    model.lm_head.weight.grad[:128] = 0
    rest = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel()
    assert clinic_train.zero_fraction(model) == 128 * 64 / rest


def test_a_run_is_recorded_and_not_run_again(tmp_path, monkeypatch, capsys, text):
    monkeypatch.setattr(clinic_train, "RECIPE", SHORT)
    monkeypatch.setattr(clinic.clinic_train.train, "__defaults__", (SHORT,))
    monkeypatch.setattr(corpus, "load", lambda: text)
    arguments = ["--cases", "healthy", "bias_sign", "--out", str(tmp_path)]
    assert (
        clinic.main([*arguments, "--seeds", "1"]) == clinic.main([*arguments, "--seeds", "0"]) == 0
    )
    assert capsys.readouterr().out.count("seed") == 4
    assert clinic.main([*arguments, "--seeds", "0", "1"]) == 0
    assert capsys.readouterr().out == ""
    first, second = clinic.load("bias_sign", folder=tmp_path)
    assert (first.case, first.seed, second.seed) == ("bias_sign", 0, 1)
    assert first.held_out_at.tolist() == [2.0] and len(first.loss) == 3
    line = json.loads((tmp_path / "clinic/bias_sign.jsonl").read_text().splitlines()[0])
    assert {"device", "versions", "date", "threads", "recipe"} <= set(line) and line["threads"] == 1


def test_records_that_are_missing_or_damaged_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(clinic.ClinicError, match="bench clinic --cases healthy --seeds 0"):
        clinic.load("healthy", folder=tmp_path)
    (tmp_path / "clinic").mkdir()
    (tmp_path / "clinic/healthy.jsonl").write_text('{"seed": 0, "lo')
    with pytest.raises(clinic.ClinicError, match=r"healthy\.jsonl is damaged"):
        clinic.load("healthy", folder=tmp_path)
    with pytest.raises(ValueError, match=r"no case 'cold'.*healthy"):
        clinic.load("cold")


# What the repository records


def test_every_case_is_recorded_at_three_seeds_within_400_kilobytes():
    folder = data_path("measured") / "clinic"
    assert {path.stem for path in folder.iterdir()} == set(BY_NAME)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 400_000
    assert len([c for c in CASES if not c.sick]) == 2 and len(CASES) >= 14


@each_case
def test_a_recorded_run_is_whole_and_was_made_with_the_recipe_of_its_case(case):
    for run in clinic.load(case.name, seeds=(0, 1, 2)):
        steps = len(run.loss)
        columns = run.grad_norm, run.max_violation, run.zero_fraction
        assert {len(c) for c in columns} == {steps} and len(run.held_out) == steps // 20
        assert all(np.isfinite(c).all() for c in (*columns, run.loss, run.held_out))
        assert steps == clinic_train.RECIPE.steps or case.name == "no_clipping"
        assert run.max_violation.max() <= 16 / 2 - 1 and run.zero_fraction.min() >= 0
        assert not run.loss.flags.writeable
    for line in (data_path("measured") / f"clinic/{case.name}.jsonl").read_text().splitlines():
        record = json.loads(line)
        wanted = {**clinic_train.RECIPE.to_dict(), **case.recipe, "seed": record["seed"]}
        assert record["recipe"] == wanted


def test_doubled_counts_leave_the_healthy_run_as_it_is():
    healthy, doubled = (clinic.load(name, (0, 1, 2)) for name in ("healthy", "counts_doubled"))
    for one, other in zip(healthy, doubled):
        for column in clinic_train.COLUMNS:
            assert np.array_equal(getattr(one, column), getattr(other, column))


def test_charts_hide_the_diagnosis_and_leave_none_out():
    charts = clinic.charts()
    assert sorted(charts.values()) == sorted(BY_NAME) and list(charts) == sorted(charts)
    assert list(charts.values()) != [case.name for case in CASES]


@each_case
def test_every_case_has_a_diagnosis_of_its_own_and_says_what_shows(case):
    assert case.title and case.symptom.endswith(".") and case.explanation.endswith(".")
    assert [c.title for c in CASES].count(case.title) == 1
    assert not re.search(case.name.replace("_", " "), case.symptom)


sick_cases = pytest.mark.parametrize("case", [c for c in CASES if c.sick], ids=lambda c: c.name)


@sick_cases
def test_the_statistic_of_a_case_parts_it_from_the_healthy_unseen_seeds_included(case):
    answer = clinic.separates(case.statistic, case.name)
    assert answer.passed, answer.message
    if case.statistic is not None:
        assert clinic.separates(None, case.name).status == "not_yet"


@pytest.mark.parametrize("case", [c for c in CASES if c.sick and not c.told], ids=lambda c: c.name)
def test_what_cannot_be_told_is_told_by_no_other_cases_statistic(case):
    for other in CASES:
        if other.statistic is not None:
            assert not clinic.separates(other.statistic, case.name).passed, other.name


@sick_cases
def test_a_statistic_that_looks_at_nothing_passes_nowhere(case):
    for statistic in (lambda run: 1.0, lambda run: len(run.held_out_at) * 0):
        assert clinic.separates(statistic, case.name).status == "not_yet"


def test_a_statistic_sees_neither_name_nor_seed():
    seen = []
    clinic.separates(lambda run: seen.append((run.case, run.seed)) or 0.0, "no_balance")
    assert set(seen) == {("", -1)} and len(seen) == 9


def test_a_statistic_that_fits_the_shown_seeds_only_is_caught():
    shown = {run.loss.tobytes() for run in clinic.load("no_balance")}
    answer = clinic.separates(lambda run: float(run.loss.tobytes() in shown), "no_balance")
    assert answer.status == "not_yet" and "held back" in answer.message and answer.threshold == 0.5


@pytest.mark.parametrize(
    ("statistic", "says"),
    [
        (lambda run: run.lost, "AttributeError"),
        (lambda run: run.loss, "TypeError"),
        (lambda run: float("nan"), "nan, not a finite number"),
        (lambda run: None, "TypeError"),
    ],
)
def test_a_statistic_that_raises_is_reported_and_not_raised(statistic, says):
    answer = clinic.separates(statistic, "no_balance")
    assert answer.status == "raised" and says in answer.message and not answer.passed


def test_a_case_is_a_plain_value():
    assert isinstance(named("healthy"), Case) and not named("healthy").sick
