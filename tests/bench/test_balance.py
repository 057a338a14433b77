"""The balance benchmark: its curve, its kinds of text, its receipts, and taking up where it was."""

import pytest
import torch

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import balance
from dsv3_tutorial.moe.gate import Gate
from dsv3_tutorial.train import corpus

LAYERS, EXPERTS = 3, 16


@pytest.fixture
def text():
    """A few thousand bytes with some order in them."""
    data = torch.arange(4000) % 61 + torch.randint(0, 3, (4000,))
    return corpus.Corpus(data[:3000].byte(), data[3000:].byte(), 1, 1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Batches of 2 x 16 tokens, two means of two steps, and two kinds of text."""
    kinds = {"low": torch.arange(300) % 30, "high": torch.arange(300) % 30 + 90}
    monkeypatch.setattr(balance, "BATCH", 2)
    monkeypatch.setattr(balance, "SEQ_LEN", 16)
    monkeypatch.setattr(balance, "EVERY", 2)
    monkeypatch.setattr(balance, "domain_texts", lambda: {k: t.byte() for k, t in kinds.items()})


@pytest.fixture
def two_variants(monkeypatch, text):
    """Only two variants and three steps, on that text."""
    few = {name: balance.VARIANTS[name] for name in ("none", "bias, gamma 0.1")}
    monkeypatch.setattr(balance, "VARIANTS", few)
    monkeypatch.setattr(corpus, "load", lambda: text)
    whole = balance.run
    monkeypatch.setattr(balance, "run", lambda v, seed, text: whole(v, seed, text, 3))


def test_a_run_has_a_point_for_every_block_of_steps_the_last_one_shorter(text):
    curve = balance.run("none", 0, text, steps=3)
    assert curve.steps == [2, 3]
    assert len(curve.loss) == len(curve.max_violation) == 2
    assert all(0 <= v <= EXPERTS / 4 - 1 for v in [*curve.max_violation, curve.held_out_violation])
    assert 5 < curve.held_out < 12  # untrained, near 8 bits of a byte


def test_each_kind_of_text_shares_out_all_its_tokens_in_every_layer(text):
    found = balance.run("bias, gamma 0.1", 0, text, steps=1).domains
    assert list(found) == ["low", "high"] and found["low"] != found["high"]
    for layers in found.values():
        shares = torch.tensor(layers)
        assert shares.shape == (LAYERS, EXPERTS)
        torch.testing.assert_close(shares.sum(dim=-1), torch.ones(LAYERS), atol=1e-3, rtol=0)


def test_counting_takes_every_window_once_for_each_of_its_experts(text):
    model = balance._begin("none", 0, text, 1).model
    total = balance.counts(model, text.held_out, batches=3)
    tokens = 3 * balance.BATCH * balance.SEQ_LEN
    assert total.sum(dim=-1).tolist() == [tokens * balance.CONFIG.num_experts_per_tok] * LAYERS


def test_one_seed_repeats_exactly_and_another_does_not(text):
    one, two = (balance.run("loss, batch-wise", 0, text, steps=2) for _ in range(2))
    assert one == two
    assert balance.run("loss, batch-wise", 1, text, steps=2).loss != one.loss


def test_every_variant_starts_from_the_same_weights_and_reads_the_same_text(text):
    first = {next(balance.live(variant, 0, text=text)) for variant in balance.VARIANTS}
    assert len(first) == 1


def test_only_a_bias_moves_and_by_its_gamma_at_every_step(text):
    for variant, how in balance.VARIANTS.items():
        state = balance._begin(variant, 0, text, 2)
        gates = [part for part in state.model.modules() if isinstance(part, Gate)]
        balance._step(state)
        moved = torch.stack([gate.e_score_correction_bias for gate in gates]).abs()
        gamma = torch.tensor(how.get("gamma", 0.0))
        assert ((moved == gamma) | (moved == 0)).all() and (moved.max() == gamma)


def test_a_live_run_is_the_recorded_one_cut_short(text, monkeypatch):
    monkeypatch.setattr(balance, "STEPS", 4)
    rows = list(balance.live("none", 60, seed=0, text=text))
    assert [row[0] for row in rows] == [1, 2, 3, 4]
    curve = balance.run("none", 0, text, steps=4)
    blocks = [[sum(c) / 2 for c in list(zip(*rows[at : at + 2]))[1:]] for at in (0, 2)]
    assert [loss for loss, _ in blocks] == pytest.approx(curve.loss, abs=1e-4)
    assert [violation for _, violation in blocks] == pytest.approx(curve.max_violation, abs=1e-4)


def test_a_live_run_without_time_still_takes_one_step(text):
    assert len(list(balance.live("bias, gamma 0.01", 0.0, text=text))) == 1


def test_an_unknown_variant_names_those_there_are(text):
    with pytest.raises(ValueError, match="loss, batch-wise"):
        next(balance.live("bias", 1, text=text))


def test_receipts_read_back_and_an_interrupted_run_is_taken_up(two_variants, tmp_path, capsys):
    assert balance.main(["--seeds", "0", "--out", str(tmp_path)]) == 0
    whole = receipts.read("balance", folder=tmp_path)
    assert [r.shapes["variant"] for r in whole] == ["none", "bias, gamma 0.1"]
    assert whole[0].shapes["steps"] == [2, 3] and whole[0].unit == "bits per byte"
    capsys.readouterr()
    path = tmp_path / "balance.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])  # the first was done
    assert balance.main(["--seeds", "0", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert [r.value for r in receipts.read("balance", folder=tmp_path)] == [r.value for r in whole]


def test_every_kind_of_text_is_in_this_interpreters_library(monkeypatch):
    monkeypatch.undo()
    texts = balance.domain_texts()
    assert list(texts) == list(balance.DOMAINS)
    assert min(map(len, texts.values())) > 64 * balance.SEQ_LEN
