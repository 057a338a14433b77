import math

import pytest
import torch

from dsv3_tutorial.files import data_path
from dsv3_tutorial.inference.text import Vocabulary
from dsv3_tutorial.learn.held_out import HeldOut, experts_of_two, rounded, with_tall_channel
from dsv3_tutorial.model import DeepSeekV3

FOLDER = data_path("checkpoints", "small")


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(FOLDER, 512)


@pytest.fixture(scope="module")
def model():
    return DeepSeekV3.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_windows_are_the_text_in_order_and_as_many_as_asked_for(vocabulary):
    text = data_path("text", "held_out.txt").read_text(encoding="utf-8")
    some, whole = HeldOut(vocabulary, windows=2), HeldOut(vocabulary)
    assert torch.equal(whole.windows[-2:], some.windows)
    assert text.startswith(vocabulary.decode(whole.windows.flatten().tolist())[:5000])
    assert whole.n_bytes > 3 * some.n_bytes


def test_even_logits_cost_the_logarithm_of_the_vocabulary(vocabulary):
    held_out = HeldOut(vocabulary, windows=1)
    guessed = held_out.windows[:, 1:].numel()
    bits = held_out.bits_per_byte(torch.zeros(1, 384, 512))
    assert bits == pytest.approx(guessed * math.log2(512) / held_out.n_bytes)


def test_the_trained_model_knows_a_text_that_it_has_not_seen(vocabulary, model):
    assert 1.1 < HeldOut(vocabulary).read_by(model) < 1.5


def test_rounding_takes_projections_and_experts_matrix_by_matrix_and_leaves_the_rest(model):
    seen = []
    halved = rounded(model, lambda matrix: seen.append(matrix.shape) or matrix / 2)
    before = dict(model.named_parameters())
    changed = {n for n, p in halved.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "proj" in n and "eh_proj" not in n}
    assert set(map(len, seen)) == {2}


def test_a_tall_channel_changes_weights_and_not_what_the_model_says(vocabulary, model):
    tall, ids = with_tall_channel(model), HeldOut(vocabulary, windows=1).windows[:, :32]
    layers = zip(model.model.layers, tall.model.layers)
    for layer, (before, after) in enumerate(layers):
        for (name, old), (_, new) in zip(
            before.mlp.named_parameters(), after.mlp.named_parameters()
        ):
            assert torch.equal(old, new) == ("up_proj" not in name and "down_proj" not in name), (
                layer,
                name,
            )
    with torch.inference_mode():
        torch.testing.assert_close(tall(ids), model(ids), rtol=0, atol=1e-3)


def test_two_tokens_read_between_their_own_experts_and_twice_as_many(vocabulary, model):
    ids = HeldOut(vocabulary, windows=1).windows
    near, far = experts_of_two(model, ids), experts_of_two(model, ids, apart=100)
    assert 4 <= near < far <= 8
    same = ids[:, :1].expand(1, 2)
    lone = DeepSeekV3.from_pretrained(FOLDER, dtype=torch.float32, mtp=False).eval()
    assert experts_of_two(lone, same.repeat(1, 8), apart=1) < near
