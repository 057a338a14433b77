"""Mistakes made on purpose: the same losses with each, and receipts that say where time went."""

import threading
from collections import Counter

import pytest
import torch

from dsv3_tutorial import __main__ as cli
from dsv3_tutorial import receipts
from dsv3_tutorial.bench import stalls, stalls_experts, stalls_runs
from dsv3_tutorial.train import corpus
from dsv3_tutorial.train.storage import Writer
from dsv3_tutorial.train.trace import REST

TEXT = (torch.arange(5000) % 61).byte()


@pytest.fixture
def small(monkeypatch):
    """Batches of 2 x 16 of a short text, in shards of 512 bytes, and stores that hardly wait."""
    sizes = {"BATCH": 2, "SEQ_LEN": 16, "STORE": 0.01, "text": lambda: TEXT}
    for name, value in sizes.items():
        monkeypatch.setattr(stalls_runs, name, value)
    quick = {"shard": 512, "wait": 0.01}
    often = {n: {"save_every": 2} for n, how in stalls.CASES.items() if "save_every" in how}
    cases = {n: how | quick | often.get(n, {}) for n, how in stalls.CASES.items()}
    monkeypatch.setattr(stalls, "CASES", cases)


def test_packed_windows_are_the_samplers_own_at_every_place_and_shard_size():
    for shard in (100, 1024, 8192):
        plain = corpus.Sampler(TEXT[:2050], 40, 16, seed=1)
        packed = stalls_runs.Packed(TEXT[:2050], 40, 16, seed=1, shard=shard)
        for _ in range(3):
            assert torch.equal(plain.draw(), packed.draw())
    last = packed._window(2050 - 17)
    assert torch.equal(last, TEXT[2050 - 17 : 2050].long())


def test_no_case_changes_a_loss_and_each_waits_for_what_its_name_says(small):
    runs = {name: stalls_runs.run(**how, steps=4) for name, how in stalls.CASES.items()}
    assert len({tuple(run.losses) for run in runs.values()}) == 1
    for name, how in stalls.CASES.items():
        found, saves = runs[name].stalls, "save_every" in how
        assert set(found.waited) == {"data", REST} | ({"checkpoint"} if saves else set())
        hides = ["data"] * ("prefetch" in how) + ["checkpoint"] * (
            saves and "background" not in how
        )
        assert list(found.behind) == hides and len(runs[name].seconds) == 4
        assert found.wall == pytest.approx(found.work + sum(found.waited.values()))
        assert found.wall <= sum(runs[name].seconds)
    assert runs["waits for its text"].stalls.waited["data"] >= 4 * 0.01
    assert runs["stops to save"].stalls.waited["checkpoint"] >= 2 * 0.01
    assert "data" in str(runs["waits for its text"]) and "waiting" in str(runs["stops to save"])


def test_a_step_goes_on_while_the_store_has_not_taken_the_checkpoint_before(small, monkeypatch):
    released, went_on, plain = threading.Event(), [], stalls_runs.step

    def finish(self, metadata, results):
        went_on.append(released.wait(20))
        Writer.finish(self, metadata, results)

    def step(state, timeline):
        loss = plain(state, timeline)
        if state.step == 5:  # the one after the checkpoint
            released.set()
        return loss

    monkeypatch.setattr(stalls_runs.SlowWriter, "finish", finish)
    monkeypatch.setattr(stalls_runs, "step", step)
    found = stalls_runs.run(save_every=4, steps=3)
    assert went_on == [True] and len(found.losses) == 3


def test_an_unknown_source_is_refused_by_its_name():
    with pytest.raises(ValueError, match="'tape' is no source"):
        stalls_runs.begin("tape")


def test_routing_draws_without_repetition_as_often_as_its_skew_says():
    even, skewed = (stalls_experts.routing(skew, seed=3) for skew in (0.0, 1.5))
    for chosen in (even, skewed):
        assert chosen.shape == (stalls_experts.TOKENS, stalls_experts.TOP_K)
        assert all(len(set(row)) == len(row) for row in chosen.tolist())
    expected = stalls_experts.TOKENS * stalls_experts.TOP_K / stalls_experts.EXPERTS
    counts = Counter(even.flatten().tolist())
    assert all(counts[e] == pytest.approx(expected, rel=0.3) for e in range(32))
    first = Counter(skewed[:, 0].tolist()).most_common(1)[0][1] / len(skewed)  # the largest draw
    odds = 1 / sum((place + 1) ** -1.5 for place in range(32))
    assert first == pytest.approx(odds, abs=0.04)


def test_a_load_counts_every_row_once_and_replicas_even_it_out():
    load = stalls_experts.load(1.0, repeats=1)
    assert sum(load.rows) == stalls_experts.TOKENS * stalls_experts.TOP_K
    assert len(load.rows) == len(load.seconds) == stalls_experts.RANKS
    assert load.counted == max(load.rows) / (sum(load.rows) / len(load.rows)) > 1.3
    assert 1 <= load.repaired < 1.1 and load.max_violation > load.counted - 1
    assert load.waiting == pytest.approx(1 - sum(load.seconds) / 8 / max(load.seconds))
    alone = stalls_experts.load(1.0, ranks=1, repeats=1)
    assert (alone.counted, alone.measured, alone.waiting) == (1, 1, 0)


def test_the_command_writes_a_receipt_for_every_case_and_prints_them(
    small, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(stalls_experts, "REPEATS", 1)
    monkeypatch.setattr(stalls, "SEEDS", (0,))
    argv = ["bench", "stalls", "--out", str(tmp_path), "--rounds", "1", "--steps", "3"]
    assert cli.main(argv) == 0
    rows = receipts.read("stalls", folder=tmp_path)
    found = stalls.recorded(tmp_path)
    assert list(found) == list(stalls.CASES)
    assert [row.shapes["skew"] for row in rows if row.what == stalls.BUSIEST] == [0.0, 0.5, 1.0]
    assert all(row.threads == 1 and row.value >= 0 for row in rows)
    assert found["waits for its text"].waits["data"] >= 0.01
    for name, case in found.items():
        assert case.seconds >= sum(case.waits.values()) > 0
        assert set(case.hides) <= {"data", "checkpoint"}
        assert bool(case.hides) == ("prefetched" in name or "background" in name)
    said = capsys.readouterr().out
    assert all(name in said for name in stalls.CASES) and "experts, skew 1.0" in said


def test_a_second_measurement_of_a_case_takes_the_place_of_the_first(small, tmp_path, monkeypatch):
    one = {"waits for its text": stalls.CASES["waits for its text"]}
    monkeypatch.setattr(stalls, "CASES", one)
    for _ in range(2):
        receipts.append("stalls", stalls.step_receipts(rounds=1, steps=2), folder=tmp_path)
    rows = receipts.read("stalls", folder=tmp_path)
    assert len(receipts.latest("stalls", folder=tmp_path)) == len(rows) / 2
    last = next(row for row in reversed(rows) if row.what == "step")
    assert stalls.recorded(tmp_path)["waits for its text"].seconds == last.value


def test_a_machine_is_quiet_when_one_core_is_left_beside_the_one_that_trains():
    quiet = {0.3: True, 0.9: False, None: False}
    for busy, expected in quiet.items():
        assert stalls.Case(0.1, {}, {}, busy, cores=2).quiet is expected


def test_the_receipts_on_record_tell_every_case_and_its_repair():
    found = stalls.recorded()
    assert list(found) == list(stalls.CASES)
    for mistake, repair, cause in (
        ("waits for its text", "waits for its text, prefetched", "data"),
        ("stops to save", "saves in the background", "checkpoint"),
    ):
        assert found[repair].waits[cause] < 0.2 * found[mistake].waits[cause]
        if all(found[name].quiet for name in (mistake, repair)):  # else the clock was a neighbour's
            assert found[repair].seconds < found[mistake].seconds
