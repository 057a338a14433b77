"""Batches drawn ahead: the same ones, the same place in the text, the same run."""

import json
import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial import __main__ as cli
from dsv3_tutorial.train import corpus, log, prefetch, run, step
from dsv3_tutorial.train.prefetch import Prefetch, drawn_ahead

TEXT = torch.arange(200, dtype=torch.uint8)


def sampler():
    return corpus.Sampler(TEXT, 3, 8, seed=4)


def same_state(one, two):
    return one["drawn"] == two["drawn"] and torch.equal(one["generator"], two["generator"])


@given(ahead=st.integers(1, 4), draws=st.integers(0, 6), more=st.integers(0, 3))
def test_batches_and_places_are_those_of_the_sampler_alone(ahead, draws, more):
    plain = sampler()
    with Prefetch(sampler(), ahead) as drawing:
        for _ in range(draws):
            assert torch.equal(drawing.draw(), plain.draw())
            assert torch.equal(drawing.starts, plain.starts)
            assert same_state(drawing.state_dict(), plain.state_dict())
        place = drawing.state_dict()
        for _ in range(more):
            drawing.draw()
        drawing.load_state_dict(place)
        assert torch.equal(drawing.draw(), plain.draw())
        inner = drawing.sampler
    assert same_state(inner.state_dict(), plain.state_dict())  # as if nothing had been drawn ahead
    assert torch.equal(inner.starts, plain.starts)


class Counted(corpus.Sampler):
    """Says when so many batches have been drawn, and fails at one of them."""

    def __init__(self, fails_at=None):
        super().__init__(TEXT, 3, 8, seed=4)
        self.fails_at, self.done = fails_at, [threading.Event() for _ in range(9)]

    def draw(self):
        if self.drawn == self.fails_at:
            raise OSError("the disk is gone")
        batch = super().draw()
        self.done[self.drawn - 1].set()
        return batch


def test_batches_are_drawn_while_nobody_asks_and_no_more_than_were_ordered():
    inner = Counted()
    with Prefetch(inner, 2) as drawing:
        drawing.draw()
        assert inner.done[2].wait(10)  # the third, two ahead of the one that is used
        assert not inner.done[3].wait(0.02) and inner.drawn == 3
        assert drawing.state_dict()["drawn"] == 1
    assert inner.drawn == 1


def test_what_drawing_raises_comes_at_its_batch_and_stays_until_a_state_is_loaded():
    inner = Counted(fails_at=2)
    with Prefetch(inner, 2) as drawing:
        drawing.draw()
        place = drawing.state_dict()
        second = drawing.draw()
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                drawing.draw()
        inner.fails_at = None
        drawing.load_state_dict(place)
        assert torch.equal(drawing.draw(), second)


def test_the_thread_ends_with_the_block_whatever_ends_it():
    state = SimpleNamespace(sampler=sampler())
    before, inner = threading.active_count(), state.sampler
    with pytest.raises(KeyboardInterrupt), drawn_ahead(state, 2):
        state.sampler.draw()
        assert threading.active_count() == before + 1
        raise KeyboardInterrupt
    assert state.sampler is inner and threading.active_count() == before
    with drawn_ahead(state, 0):
        assert state.sampler is inner


@pytest.mark.parametrize("ahead", [0, -1, 1.5])
def test_a_number_that_hides_nothing_is_refused(ahead):
    with pytest.raises(prefetch.PrefetchError, match=f"ahead = {ahead}"):
        Prefetch(sampler(), ahead)


QUICK = "--batch 4 --seq-len 16 --warmup 2 --steps 6 --save-every 2 --evaluate-every 3 --prefetch"


def test_a_run_with_prefetch_is_the_run_without_and_goes_on_bit_for_bit(
    tmp_path, text_folder, monkeypatch, capsys
):
    def train(name, *options):
        return cli.main(["train", "--out", str(tmp_path / name), "--threads", "1", *options])

    def interrupted(state, *rest):
        if state.step == 5:
            raise KeyboardInterrupt
        return step.train_step(state, *rest)

    begun = ["--config", str(tmp_path / "moe.json"), "--text", str(text_folder), *QUICK.split()]
    assert train("plain", *begun, "0") == 0
    monkeypatch.setattr(run, "train_step", interrupted)
    assert train("ahead", *begun, "2") == 130
    monkeypatch.undo()
    assert train("ahead", "--resume", "--prefetch", "3", "--profile") == 0
    said = capsys.readouterr().out
    assert "resumed after step 4" in said and "\nwaiting " in said
    spans = json.loads((tmp_path / "ahead/profile/spans.json").read_text())["traceEvents"]
    behind = {e["name"] for e in spans if e["tid"] == 1 and e["ph"] == "X"}
    assert behind == {"data", "checkpoint"}
    rows = [[{**r, "tokens_per_s": 0} for r in log.read(tmp_path / n)] for n in ("plain", "ahead")]
    assert rows[0] == rows[1] and len(rows[0]) == 6
    weights = [(tmp_path / n / "model/model.safetensors").read_bytes() for n in ("plain", "ahead")]
    assert weights[0] == weights[1]


def test_less_than_nothing_ahead_is_refused_before_a_run_begins(tmp_path, capsys):
    assert cli.main(["train", "--out", str(tmp_path / "run"), "--prefetch", "-1"]) == 1
    assert "prefetch = -1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
