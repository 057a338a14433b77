"""The trained model that the repository ships: whole, small enough, and better than counting."""

import json

import pytest
import torch
from tokenizers import Tokenizer

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import baselines
from dsv3_tutorial.files import data_path
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.train import bpe, corpus

FOLDER = data_path("checkpoints", "small")
LIMIT = 16_000_000  # bytes


@pytest.fixture(scope="module")
def model():
    return DeepSeekV3.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_the_folder_is_at_most_16_megabytes():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= LIMIT


def test_it_is_a_deep_sparse_model_in_bf16_with_its_draft_module(model):
    assert model.cfg.num_hidden_layers >= 12
    assert model.cfg.n_routed_experts and len(model.mtp) == 1
    stored = DeepSeekV3.from_pretrained(FOLDER)
    assert stored.lm_head.weight.dtype == torch.bfloat16


def test_its_log_says_how_it_was_trained():
    rows = [json.loads(line) for line in (FOLDER / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] > rows[0]["step"]
    assert rows[-1]["bits_per_byte"] < rows[0]["bits_per_byte"] / 2
    assert "python -m dsv3_tutorial train" in (FOLDER / "README.md").read_text()


def test_its_recorded_loss_clearly_beats_the_n_gram_and_zlib():
    found = {r.shapes["by"]: r.value for r in receipts.latest("baselines")}
    own = found["model small"]
    assert own < found["order-5 n-gram, kneser-ney"] - 0.05
    assert own < found["zlib -9, one stream"] - 0.3


def test_here_and_now_it_needs_fewer_bits_than_zlib(model):
    text = b"\n".join(corpus.files()[True].values())
    symbols, sizes = bpe.symbols_of(text, (FOLDER / "tokenizer.json").read_text("utf-8"))
    found = baselines.score(model, symbols, context=384, windows=24, sizes=sizes)
    assert found.bits_per_byte < 2.0


def test_its_greedy_text_is_the_same_with_a_cache(model):
    ids = Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode("def main(").ids
    whole, caches, step = list(ids), model.caches(1, 64), torch.tensor([ids])
    with torch.no_grad():
        for _ in range(12):
            cached = model(step, caches)[0, -1]
            plain = model(torch.tensor([whole]))[0, -1]
            torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-4)
            whole.append(int(plain.argmax()))
            step = torch.tensor([whole[-1:]])
