"""The loop: it learns, it repeats, and it stops before a broken loss reaches the weights."""

import itertools
import math

import pytest
import torch
from torch import nn

from dsv3_tutorial.train import loop
from dsv3_tutorial.train.corpus import Corpus


class Bigram(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(256, 256)
        nn.init.zeros_(self.table.weight)

    def forward(self, input_ids):
        return self.table(input_ids)


@pytest.fixture
def corpus():
    text = torch.frombuffer(bytearray(b"the cat sat on the mat. " * 400), dtype=torch.uint8)
    return Corpus(text, text[:2400], 1, 1)


SHORT = loop.Schedule(steps=60, batch=4, seq_len=32, peak_lr=0.3, warmup=5, evaluate_every=20)


def test_a_model_that_knows_nothing_needs_eight_bits_a_byte():
    loss = loop.bits_per_byte(torch.zeros(2, 3, 256), torch.zeros(2, 3, dtype=torch.long))
    assert loss.item() == pytest.approx(8.0)


def test_training_lowers_the_held_out_loss_to_what_a_bigram_can_know(corpus):
    torch.manual_seed(0)
    rows = list(loop.train(Bigram(), corpus, SHORT))
    assert rows[0].loss == pytest.approx(8.0)
    assert rows[-1].held_out < 1.5
    assert [r.step for r in rows if r.held_out is not None] == [20, 40, 60]


def test_the_same_seed_gives_the_same_losses(corpus):
    runs = [[r.loss for r in loop.train(Bigram(), corpus, SHORT, seed=1)] for _ in range(2)]
    assert runs[0] == runs[1]
    other = [r.loss for r in loop.train(Bigram(), corpus, SHORT, seed=2)]
    assert other != runs[0]


def test_a_time_limit_ends_the_run_on_the_same_path(corpus):
    full = [r.loss for r in loop.train(Bigram(), corpus, SHORT)]
    cut = loop.Schedule(**{**SHORT.__dict__, "seconds": 0.0})
    rows = list(loop.train(Bigram(), corpus, cut))
    assert len(rows) == 1 and rows[0].loss == full[0]
    assert rows[0].held_out is not None


def test_the_learning_rate_warms_up_peaks_and_falls_to_its_floor():
    schedule = loop.Schedule(steps=100, warmup=10, peak_lr=1.0, final_lr=0.1)
    rates = [schedule.learning_rate(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[100] == pytest.approx(0.1)


def test_a_loss_that_is_no_number_stops_before_the_weights_change(corpus):
    model = Bigram()
    with torch.no_grad():
        model.table.weight[:] = math.nan
        model.table.weight[0] = 1.0
    before = model.table.weight.clone()
    with pytest.raises(FloatingPointError, match="Lower the learning rate"):
        list(loop.train(model, corpus, SHORT))
    assert torch.equal(model.table.weight[0], before[0])


def test_norms_and_biases_do_not_decay():
    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4))
    decayed, kept = loop.optimizer_for(model, 1e-3).param_groups
    assert [p.ndim for p in decayed["params"]] == [2] and decayed["weight_decay"] == 0.1
    assert [p.ndim for p in kept["params"]] == [1, 1] and kept["weight_decay"] == 0.0
