"""Baselines: what is compressed is the held-out text, and every byte of it is scored once."""

import math
import random
import zlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import baselines
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.train import corpus

TINY = replace(ModelConfig.named("tiny"), num_hidden_layers=1, first_k_dense_replace=1)
DRAFTING = replace(TINY, num_nextn_predict_layers=1)


@pytest.fixture
def text():
    return torch.frombuffer(bytearray(random.Random(0).randbytes(150)), dtype=torch.uint8)


@pytest.fixture
def model():
    """Random weights large enough that its guesses differ from place to place."""
    made = DeepSeekV3(DRAFTING)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.double()


def test_random_bytes_cannot_be_compressed_and_known_ones_cost_nothing():
    noise = random.Random(0).randbytes(40_000)
    new, known = noise[:20_000][::-1], noise[-20_000:]
    assert all(length() > 19_990 for length in baselines.compressors(noise, [new]).values())
    for by, length in baselines.compressors(noise, [known]).items():
        assert (length() < 1000) == ("after the training text" in by)


def test_the_streams_hold_the_held_out_files_joined_as_the_corpus_joins_them():
    files = [b"one and another", b"two and another"]
    lengths = {by: length() for by, length in baselines.compressors(b"", files).items()}
    assert lengths["zlib -9, one stream"] == len(zlib.compress(b"\n".join(files), 9))
    assert lengths["zlib -9, each file alone"] == sum(len(zlib.compress(f, 9)) for f in files)


@given(st.integers(1, 3000), st.integers(1, 600))
def test_the_windows_score_every_byte_once_with_half_a_context_before_it(length, context):
    scored = []
    for window in baselines.cover(length, context):
        assert 0 <= window.begin < window.end <= length
        assert window.end - window.begin <= context
        first = window.end - window.scored
        assert window.begin == 0 or first - window.begin >= context // 2
        scored += range(first, window.end)
    assert scored == list(range(length))


@given(st.integers(1, 3000), st.integers(1, 40))
def test_a_few_windows_are_some_of_all(length, windows):
    whole, few = baselines.cover(length, 64), baselines.cover(length, 64, windows)
    assert set(few) <= set(whole)
    assert len(few) == len(set(few)) == min(windows, len(whole))
    assert few[0] == whole[0]


def test_a_model_that_knows_nothing_pays_eight_bits(text):
    model = DeepSeekV3(TINY)
    torch.nn.init.zeros_(model.lm_head.weight)
    found = baselines.score(model, text, context=32)
    assert found.bits_per_byte == pytest.approx(8, abs=1e-6)
    assert found.scored_bytes == len(text)
    assert found.draft_agreement is None


def alone(model, text, context, windows=None):
    """The same score window by window and byte by byte, with the draft's guesses beside it."""
    padded, nats, same = [ord("\n"), *text.tolist()], [], []
    for window in baselines.cover(len(text), context, windows):
        ids = torch.tensor([padded[window.begin : window.end]])
        logits, (draft,) = model(ids, drafts=True)
        for target in range(window.end - window.scored + 1, window.end + 1):
            at = target - window.begin - 1
            nats.append(F.cross_entropy(logits[0, at], torch.tensor(padded[target])).item())
            if at > 0:
                same.append(bool(logits[0, at].argmax() == draft[0, at - 1].argmax()))
    return sum(nats) / len(nats) / math.log(2), len(nats), sum(same) / len(same)


@pytest.mark.parametrize("context, windows", [(512, None), (40, None), (32, 3)])
def test_the_score_is_the_mean_over_single_bytes(text, model, context, windows):
    with torch.no_grad():
        bits, scored, agreement = alone(model, text, context, windows)
    found = baselines.score(model, text, context, windows, batch=3)
    assert found.bits_per_byte == pytest.approx(bits, rel=1e-9)
    assert found.scored_bytes == scored
    assert found.draft_agreement == pytest.approx(agreement)
    assert 0 <= found.draft_agreement < 1


@pytest.fixture
def folder(tmp_path):
    words = random.Random(0).choices(["def", "return", "self", "None", "for", "in"], k=9000)
    for i in range(120):
        (tmp_path / f"{i}.txt").write_text(" ".join(words[70 * i : 70 * i + 70]))
    return tmp_path


def test_the_command_keeps_a_receipt_of_every_baseline(folder, tmp_path, capsys):
    out = tmp_path / "receipts"
    assert baselines.main(["--text", str(folder), "--out", str(out)]) == 0
    rows = receipts.read("baselines", folder=out)
    assert len({r.shapes["by"] for r in rows}) == len(rows) == 9
    held_out = corpus.load(folder).held_out
    assert {r.shapes["held_out_bytes"] for r in rows} == {len(held_out)}
    assert b"\n".join(baselines.held_out_files(folder)) == bytes(held_out.numpy())
    assert len(capsys.readouterr().out.splitlines()) == 9
    assert all(0 < r.value < 8 for r in rows)


def test_a_saved_model_is_scored_on_the_same_text(folder, tmp_path, model, monkeypatch, capsys):
    load = lambda path, dtype, device: model.to(dtype=dtype)  # noqa: E731
    monkeypatch.setattr(DeepSeekV3, "from_pretrained", load, raising=False)
    arguments = ["--text", str(folder), "--out", str(tmp_path / "out"), "--model", "small"]
    assert baselines.main([*arguments, "--context", "64", "--windows", "4"]) == 0
    (row,) = receipts.read("baselines", folder=tmp_path / "out")
    assert row.shapes["by"] == "model small"
    assert (row.shapes["context"], row.shapes["stride"]) == (64, 32)
    assert row.shapes["scored_bytes"] <= 4 * 32
    expected = baselines.score(model, corpus.load(folder).held_out, 64, 4)
    assert row.value == pytest.approx(expected.bits_per_byte, abs=1e-5)
    assert "draft agrees" in capsys.readouterr().out


def test_a_model_of_other_tokens_than_bytes_is_refused(folder, monkeypatch):
    other = DeepSeekV3(replace(TINY, vocab_size=300))
    load = lambda path, dtype, device: other  # noqa: E731
    monkeypatch.setattr(DeepSeekV3, "from_pretrained", load, raising=False)
    with pytest.raises(ValueError, match="300 symbols, not the 256 bytes"):
        baselines.main(["--text", str(folder), "--model", "small"])
