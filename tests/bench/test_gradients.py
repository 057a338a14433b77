"""The gradients benchmark: what it counts, that it changes nothing, its receipts."""

import math
from dataclasses import replace

import pytest
import torch

from dsv3_tutorial import __main__ as cli
from dsv3_tutorial import receipts
from dsv3_tutorial.bench import gradients, precision
from dsv3_tutorial.fp8.errors import lost_tokens
from dsv3_tutorial.fp8.linear import Fp8Linear, fp8_linear
from dsv3_tutorial.fp8.scaling import DEEPSEEK
from dsv3_tutorial.fp8_model import Fp8Experts, Fp8MLP
from dsv3_tutorial.train import corpus

CONSTANT, WIDE = "constant 2^-10", "constant 2^-16"


@pytest.fixture
def text():
    """A few thousand bytes with some order in them."""
    data = torch.arange(4000) % 61 + torch.randint(0, 3, (4000,))
    return corpus.Corpus(data[:3000].byte(), data[3000:].byte(), 1, 1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Two layers, and batches of 2 x 16 tokens."""
    config = replace(precision.CONFIG, num_hidden_layers=2, n_routed_experts=4)
    for name, value in {"CONFIG": config, "BATCH": 2, "SEQ_LEN": 16}.items():
        monkeypatch.setattr(precision, name, value)


def rows(*sizes, times=64, width=256):
    """A gradient whose rows hold one size each, `times` rows of the first, then of the next."""
    return torch.tensor(sizes).repeat_interleave(times)[:, None].expand(-1, width).contiguous()


def test_the_run_looked_at_is_the_benchmarks_own_bit_for_bit(text):
    looks = list(gradients.run(3, text, steps=2))
    state = precision._begin("fp8", 3, text, precision.STEPS)
    assert [look.step for look in looks] == [1, 2]
    assert [look.bits for look in looks] == [precision._step(state) for _ in range(2)]


def test_every_product_counts_once_and_every_token_in_it(text):
    """Of M tokens a linear layer gets M, an expert's product its own: K * M for all experts."""
    worker = precision._begin("fp8", 0, text, 10).worker
    kinds = [
        [m for m in worker.modules() if isinstance(m, k)] for k in (Fp8Linear, Fp8MLP, Fp8Experts)
    ]
    linear, mlps, moe = map(len, kinds)
    assert linear and mlps == 2 and moe == 1
    (look,) = gradients.run(0, text, steps=1)
    each = precision.CONFIG.num_experts_per_tok
    assert look.tokens == 2 * 16 * (linear + 3 * mlps + 3 * each * moe)
    assert look.products == linear + 3 * mlps + 3 * 4 * moe  # no expert without a token here


def test_a_gradient_that_enters_two_products_counts_in_both():
    scaling = gradients.Observed.of(DEEPSEEK)
    scaling.seen.watching = True
    x, w = torch.randn(20, 128, requires_grad=True), torch.randn(128, 128, requires_grad=True)
    one, two = (fp8_linear(x, w, scaling=scaling)[0] for _ in range(2))
    (one + two).backward(torch.randn(20, 128))
    assert [found.tokens for found in scaling.seen.take()] == [20, 20]
    scaling.seen.watching = False
    fp8_linear(x, w, scaling=scaling)[0].sum().backward()
    assert scaling.seen.take() == []


def test_observing_stores_as_the_scaling_does():
    dy = torch.randn(40, 200)
    for scaling in gradients.WAYS.values():
        observed = gradients.Observed.of(scaling)
        assert torch.equal(observed.gradient(dy).restored, scaling.gradient(dy).restored)


def test_a_constant_scale_zeroes_below_half_its_smallest_step():
    """2 ** -10 of the scale is the tie, and goes to even: to zero."""
    edge = torch.tensor([[0.0, 2.0**-26, 2.0**-26 * 1.01, 2.0**-20, 2.0**-20 * 1.01, 2.0**-10]])
    found = gradients.examine(edge.repeat(2, 1))
    assert len(found.sizes) == 10
    assert (found.zeroed[CONSTANT], found.zeroed[WIDE]) == (6, 2)


def test_the_fewer_share_a_scale_the_less_is_lost():
    """Sizes 2 ** 19 apart: one scale reaches 448 * 2 ** 10 down, and 2 ** -16 ends at 448 of it."""
    large, small = 2.0**-3, 2.0**-22
    apart = gradients.examine(rows(large, small, times=128))  # in blocks of their own
    zeroed, lost = {CONSTANT: 0.5, WIDE: 0, "tensor": 0.5, "block": 0, "tile": 0}, {WIDE: 0.5}
    assert {way: count / (256 * 256) for way, count in apart.zeroed.items()} == zeroed
    found = {way: count / 256 for way, (count, _) in apart.lost.items()}
    assert found == {**zeroed, **lost}
    assert apart.lost[WIDE][1] == 2.0**19 and apart.lost["tensor"][1] == 1  # over the lower median
    mixed = gradients.examine(rows(*[large, small] * 64, times=2))  # together in every block
    assert mixed.zeroed == {**apart.zeroed, "block": 128 * 256}
    assert mixed.lost["block"][0] == 128 and mixed.lost["tile"] == (0, 0)


def test_lost_tokens_are_the_lessons():
    dy = torch.randn(64, 100) * 10.0 ** torch.linspace(-9, -2, 64)[:, None]
    found = gradients.examine(dy)
    for way, scaling in gradients.WAYS.items():
        count, largest = found.lost[way]
        assert count == 64 * lost_tokens(dy, scaling.gradient(dy).restored)
        assert (count > 0) == (largest > 0)
    assert found.lost[CONSTANT][0] > found.lost["tensor"][0] > found.lost["tile"][0] == 0


def test_spread_is_in_decades_and_leaves_out_tokens_of_zeros():
    dy = rows(1e-3, 1e-7, 0.0)
    deviation, middle = gradients.examine(dy).spread
    assert deviation == pytest.approx(2 * math.sqrt(128 / 127), rel=1e-6)
    assert middle == pytest.approx(2, rel=1e-6)
    few = rows(*[1e-3] * 60, *[1e-12] * 4, times=1)  # far away, but few
    deviation, middle = gradients.examine(few).spread
    assert deviation > 2 and middle == 0
    assert gradients.examine(dy[: gradients.FEW - 1]).spread is None
    assert gradients.examine(dy[: gradients.FEW]).spread == (0, 0)


def test_a_step_sums_its_products_by_value_and_by_token():
    one, two = rows(2.0**-5, 2.0**-30, times=8), rows(2.0**-7, times=32, width=64)
    look = gradients.summed(7, 4.0, [gradients.examine(dy) for dy in (one, two)])
    assert (look.step, look.products, look.tokens) == (7, 2, 48)
    assert look.values == 16 * 256 + 32 * 64
    assert look.zeroed["tensor"] == (8 * 256 / look.values, 0, 0.5)
    assert look.lost["tensor"][0] == pytest.approx(8 / 48)
    assert look.median == 2.0**-7  # 2048 values lie below, 2048 are this, 2048 above
    assert look.decades[1] == 2 * look.decades[0]


def test_the_last_step_is_looked_at_too():
    assert gradients.looked_at(100) == list(gradients.LOOKS) == [1, 10, 20, 40, 60, 100]
    assert gradients.looked_at(25) == [1, 10, 20, 25] and gradients.looked_at(1) == [1]


@pytest.mark.parametrize("steps", [0, precision.STEPS + 1])
def test_steps_that_the_run_does_not_have_are_refused(text, steps):
    with pytest.raises(ValueError, match=f"{steps} steps .* Ask for 1 to {precision.STEPS}"):
        next(gradients.run(0, text, steps))


def test_receipts_read_back_and_nothing_is_trained_twice(text, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(corpus, "load", lambda: text)
    command = ["bench", "gradients", "--steps", "2", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("become zero") == 2
    whole = receipts.read("gradients", folder=tmp_path)
    assert [(r.shapes["step"], r.shapes["way"]) for r in whole] == [
        (step, way) for step in (1, 2) for way in gradients.WAYS
    ]
    assert {r.what for r in whole} == {"gradients"} and whole[0].device_kind == "cpu"
    looks = {look.step: look for look in gradients.run(0, text, steps=2)}
    for r in whole:
        look, way = looks[r.shapes["step"]], r.shapes["way"]
        assert r.value == look.zeroed[way][0] and r.repeats == look.products
        assert r.shapes["lost_tokens"] == pytest.approx(look.lost[way][0], abs=1e-6)

    path = tmp_path / "gradients.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]))  # broken off behind the first step
    assert cli.main(command) == 0
    assert [r.value for r in receipts.read("gradients", folder=tmp_path)] == [
        r.value for r in whole
    ]
    capsys.readouterr()
    assert cli.main(command) == 0
    assert capsys.readouterr().out == "seed 0 is on record to step 2\n"
    assert len(path.read_text().splitlines()) == len(lines)
