"""The precision benchmark: its pairs, its curve, its receipts, and taking up where it was."""

import math
from dataclasses import replace

import pytest
import torch

from dsv3_tutorial import __main__ as cli
from dsv3_tutorial import receipts
from dsv3_tutorial.bench import precision
from dsv3_tutorial.bench.precision_pairs import PROMISE, apart, by_chance, factor, paired
from dsv3_tutorial.fp8.linear import Fp8Linear
from dsv3_tutorial.moe.gate import Gate
from dsv3_tutorial.train import corpus
from dsv3_tutorial.train.fault import NotFinite

EVERY_VARIANT = [*precision.VARIANTS, *precision.MORE]


@pytest.fixture
def text():
    """A few thousand bytes with some order in them."""
    data = torch.arange(4000) % 61 + torch.randint(0, 3, (4000,))
    return corpus.Corpus(data[:3000].byte(), data[3000:].byte(), 1, 1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Two layers, batches of 2 x 16 tokens, means of two steps, and a tail of three."""
    config = replace(precision.CONFIG, num_hidden_layers=2, n_routed_experts=4)
    for name, value in {"CONFIG": config, "BATCH": 2, "SEQ_LEN": 16, "EVERY": 2}.items():
        monkeypatch.setattr(precision, name, value)
    monkeypatch.setattr(precision, "TAIL", 3)
    monkeypatch.setattr(precision, "WINDOWS", 4)


def test_a_run_on_record_has_500_steps_and_products_that_fill_a_tile():
    assert precision.STEPS >= 500 and precision.STEPS % 10 == 0
    assert precision.CONFIG.hidden_size == precision.CONFIG.moe_intermediate_size == 128


def test_a_run_has_its_training_curve_and_its_tail_of_held_out_losses(text):
    curve = precision.run("bf16", 0, text, steps=5)
    assert curve.steps == [2, 4, 5] and len(curve.loss) == 3
    assert curve.held_out_steps == [4, 5]
    assert curve.value == pytest.approx(sum(curve.held_out) / 2, rel=1e-12)
    assert 5 < curve.value < 12  # hardly trained, near 8 bits of a byte


def test_a_live_run_is_the_recorded_ones_side_by_side(text, monkeypatch):
    monkeypatch.setattr(precision, "STEPS", 4)
    rows = list(precision.live(["bf16", "fp8"], 600, seed=0, text=text))
    assert [step for step, _ in rows] == [1, 2, 3, 4]
    for variant in ("bf16", "fp8"):
        losses = [row[variant] for _, row in rows]
        blocks = [sum(losses[at : at + 2]) / 2 for at in (0, 2)]
        curve = precision.run(variant, 0, text, steps=4)
        assert blocks == pytest.approx(curve.loss, abs=1e-5)


def test_a_live_run_without_time_still_takes_one_step_of_every_variant(text):
    ((step, losses),) = precision.live(seconds=0.0, text=text)
    assert step == 1 and list(losses) == list(precision.VARIANTS)


def test_every_variant_starts_from_the_same_weights_and_reads_the_same_text(text):
    states = {v: precision._begin(v, 3, text, 10) for v in EVERY_VARIANT}
    base = states.pop("bf16")
    drawn = base.sampler.draw()
    for state in states.values():
        assert all(map(torch.equal, state.model.parameters(), base.model.parameters()))
        assert torch.equal(state.sampler.draw(), drawn)
    another = precision._begin("bf16", 4, text, 10)
    assert not torch.equal(another.sampler.draw(), drawn)


def test_each_variant_computes_as_its_name_says(text):
    found = {}
    for variant in EVERY_VARIANT:
        state = precision._begin(variant, 0, text, 10)
        scalings = {m.scaling for m in state.worker.modules() if isinstance(m, Fp8Linear)}
        found[variant] = scalings, state.recipe.moments_in
        assert not any(isinstance(m, Fp8Linear) for m in state.model.modules())
    assert found["bf16"] == found["float32"] == (set(), "float32")
    assert {moments for _, moments in list(found.values())[1:4]} == {"bf16"}
    (deepseek,), (tensor,) = found["fp8"][0], found["fp8-tensor"][0]
    assert (deepseek.x, deepseek.w, deepseek.dy, deepseek.grad_scale) == (
        *("tile", "block", "tile"),
        None,
    )
    assert {tensor.x, tensor.w, tensor.dy} == {"tensor"}
    constant = {"fp8, one loss scale": 2.0**-10, "fp8, gradients unscaled": 1.0}
    for variant, scale in constant.items():
        assert found[variant][0] == {replace(deepseek, grad_scale=scale)}


def test_gradients_without_a_scale_never_reach_the_experts(text):
    """The largest is below 2 ** -10, which E4M3 rounds to zero."""
    moved = {}
    for variant in ("fp8", "fp8, gradients unscaled"):
        state = precision._begin(variant, 0, text, 10)
        experts = state.model.model.layers[1].mlp.experts.gate_up_proj
        with torch.no_grad():
            state.worker.lm_head.weight.mul_(1e-2)  # as small as a longer batch has them
        before = experts.detach().clone()
        state.optimizer.param_groups[0]["weight_decay"] = 0.0
        precision._step(state)
        moved[variant] = not torch.equal(experts, before)
    assert moved == {"fp8": True, "fp8, gradients unscaled": False}


def test_one_seed_repeats_exactly_and_another_does_not(text):
    one, two = (precision.run("fp8", 0, text, steps=2) for _ in range(2))
    assert replace(one, seconds=0) == replace(two, seconds=0)
    assert precision.run("fp8", 1, text, steps=2).loss != one.loss


def test_the_balance_bias_moves_in_the_model_and_in_what_computes(text):
    state = precision._begin("fp8", 0, text, 10)
    precision._step(state)
    each = [
        [m.e_score_correction_bias for m in model.modules() if isinstance(m, Gate)]
        for model in (state.model, state.worker)
    ]
    assert each[0] and all(map(torch.equal, *each)) and each[0][0].abs().max() > 0


def test_an_unknown_variant_names_those_there_are(text):
    with pytest.raises(ValueError, match=r"bf16; fp8; fp8-tensor"):
        next(precision.live(["fp4"], 1, text=text))


def receipt(variant, seed, value, length=500, device="a"):
    shapes = {"variant": variant, "seed": seed, "length": length, "tokens_per_step": 1024}
    return receipts.Receipt(
        what="held-out loss",
        device=device,
        device_kind="cpu",
        versions={"torch": "2"},
        date="2026-11-22",
        shapes=shapes,
        value=value,
        unit="bits per byte",
        spread={"min": value, "max": value},
        repeats=1,
        threads=1,
    )


def pairs_of(*differences):
    base = [receipt("bf16", seed, 2.0 + seed) for seed in range(len(differences))]
    other = [receipt("fp8", seed, (2.0 + seed) * (1 + d)) for seed, d in enumerate(differences)]
    return paired(base + other)["fp8"]


def test_a_difference_is_relative_and_paired_by_seed_with_its_standard_error():
    found = pairs_of(0.001, 0.002, 0.006)
    assert found.seeds == [0, 1, 2] and found.mean == pytest.approx(0.003)
    assert found.error == pytest.approx(math.sqrt(7e-6) / math.sqrt(3))
    assert found.within
    assert "+0.300% +- 0.153% over 3 seeds, within 0.25%" in str(found)


@pytest.mark.parametrize(
    "differences, within",
    [
        ((0.0026, 0.0026), False),
        ((0.0024, 0.0024), True),
        ((-0.004, -0.0041), False),
        ((0.0, 0.01, 0.002), True),
        ((0.004,), None),
    ],
)
def test_the_verdict_allows_a_quarter_percent_and_two_standard_errors(differences, within):
    assert pairs_of(*differences).within is within


# Student's t, two-sided, at 0.27 % and 4.55 %: for one and two degrees of freedom in closed form.
@pytest.mark.parametrize("errors", [2, 3])
def test_few_pairs_ask_for_as_many_errors_as_students_distribution_says(errors):
    inside = math.erf(errors / math.sqrt(2))
    assert factor(1, errors) == math.inf
    assert factor(2, errors) == pytest.approx(math.tan(math.pi * inside / 2))
    assert factor(3, errors) == pytest.approx(inside * math.sqrt(2 / (1 - inside**2)))
    assert factor(2000, errors) == pytest.approx(errors, rel=0.01)
    many = [factor(pairs, errors) for pairs in range(2, 40)]
    assert many == sorted(many, reverse=True)


def test_three_errors_of_few_pairs_are_exceeded_by_chance_as_rarely_as_of_many():
    for pairs, expected in {4: 9.219, 5: 6.620, 6: 5.507, 8: 4.530, 30: 3.280}.items():
        assert factor(pairs, 3) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(
    "differences, verdict",
    [
        ((0.001, 0.0011, 0.0009), "within 0.25%"),
        ((0.0030, 0.0031, 0.0029), "differs"),
        ((0.0, 0.01, 0.002), "undecided: a difference of up to 1.78% cannot be excluded"),
        ((0.83, 0.74), "undecided: a difference of up to 141.35% cannot be excluded"),
        ((0.83, 0.74, 0.83), "differs"),
        ((0.004,), "one pair: no error"),
        ((0.0, 0.0), "within 0.25%"),
    ],
)
def test_the_verdict_is_harder_to_meet_the_noisier_the_runs(differences, verdict):
    found = pairs_of(*differences)
    low, high = found.interval
    if len(differences) > 1:
        reach = factor(len(differences), 2) * found.error
        assert (low, high) == pytest.approx((found.mean - reach, found.mean + reach))
        inside = max(abs(low), abs(high)) <= PROMISE
        assert inside or not verdict.startswith("within")
    if verdict == "within 0.25%" and found.error:
        assert not found.differs()
    assert found.verdict() == verdict


def test_large_differences_are_told_by_two_pairs_and_by_one_against_the_spread_of_fp8():
    values = {"fp8": (0.001, -0.002, 0.004), "fp8, one loss scale": (0.83, 0.74)}
    base = [receipt("bf16", seed, 2.0) for seed in range(3)]

    def compared(values):
        made = [receipt(v, s, 2 * (1 + d)) for v, ds in values.items() for s, d in enumerate(ds)]
        return paired(base + made)

    known = compared(values)
    assert by_chance(known) == pytest.approx(factor(3, 3) * 0.003)
    assert apart(known) == ["fp8, one loss scale"]
    assert known["fp8, one loss scale"].verdict(by_chance(known)) == "differs"
    one = compared({**values, "fp8, one loss scale": (0.83,)})
    assert apart(one) == ["fp8, one loss scale"]
    assert "beyond what fp8's pairs" in one["fp8, one loss scale"].verdict(by_chance(one))
    either_side = compared({**values, "fp8, one loss scale": (0.83, -0.74)})
    assert apart(either_side) == []
    assert apart(compared({"fp8, one loss scale": (0.83, 0.74)})) == []  # no spread is known
    assert by_chance({}) == math.inf


def test_one_pair_has_no_error_and_no_verdict():
    assert pairs_of(0.001).error == math.inf and pairs_of(0.001).within is None
    assert "+0.100% for one seed, and no error" in str(pairs_of(0.001))


def test_only_runs_of_one_seed_length_and_device_are_paired():
    found = [receipt("bf16", 0, 2.0), receipt("fp8", 1, 2.1), receipt("fp8", 0, 2.1, length=9)]
    assert paired([*found, receipt("fp8", 0, 2.1, device="b")]) == {}
    assert paired([*found, receipt("fp8", 0, 2.1)])["fp8"].seeds == [0]


@pytest.fixture
def quick(monkeypatch, text, tmp_path):
    """The command on that text, three steps of two variants."""
    monkeypatch.setattr(corpus, "load", lambda: text)
    few = ["--variants", "bf16", "fp8-tensor", "--steps", "3", "--out", str(tmp_path)]
    return lambda *more: cli.main(["bench", "precision", *few[:-2], *more, *few[-2:]])


def test_receipts_read_back_and_an_interrupted_run_is_taken_up(quick, tmp_path, capsys):
    assert quick("--seeds", "0", "1") == 0
    said = capsys.readouterr().out
    assert said.count("held out") == 4 and "fp8-tensor: " in said and "over 2 seeds" in said
    whole = receipts.read("precision", folder=tmp_path)
    assert [(r.shapes["variant"], r.shapes["seed"]) for r in whole] == [
        *(("bf16", 0), ("fp8-tensor", 0), ("bf16", 1), ("fp8-tensor", 1)),
    ]
    assert whole[0].shapes["steps"] == [2, 3] and whole[0].unit == "bits per byte"
    path = tmp_path / "precision.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert quick("--seeds", "0", "1") == 0
    assert capsys.readouterr().out.count("held out") == 1
    again = receipts.read("precision", folder=tmp_path)
    assert [r.value for r in again] == [r.value for r in whole]


def test_a_run_that_breaks_off_leaves_no_receipt_and_the_next_is_begun(
    quick, monkeypatch, tmp_path, capsys
):
    whole = precision.run

    def breaks(variant, *rest):
        if variant == "bf16":
            raise NotFinite("Step 2 stopped the run")
        return whole(variant, *rest)

    monkeypatch.setattr(precision, "run", breaks)
    assert quick("--seeds", "0") == 0
    assert "bf16, seed 0: Step 2 stopped the run" in capsys.readouterr().out
    (only,) = receipts.read("precision", folder=tmp_path)
    assert only.shapes["variant"] == "fp8-tensor"


def test_without_masters_nothing_of_a_weight_is_left_that_bf16_does_not_hold():
    state = precision._begin(precision.NO_MASTERS, 0, corpus.load(), 1)
    precision._step(state)
    assert any((w != w.bfloat16()).any() for w in state.model.parameters())
    precision._forget_masters(state)
    assert all(torch.equal(w, w.bfloat16().float()) for w in state.model.parameters())
    for own, weight in zip(state.worker.parameters(), state.model.parameters()):
        assert torch.equal(own.float(), weight)
