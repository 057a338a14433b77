"""The learning benchmark: equal parameters, what it claims to cache, and taking up where it was."""

import pytest

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import learning
from dsv3_tutorial.cost import memory, params
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.train.loop import Schedule


def test_all_variants_have_the_same_parameters_within_a_tenth_of_a_percent():
    counts = {name: params.count(cfg).total for name, cfg in learning.variants().items()}
    assert max(counts.values()) / min(counts.values()) < 1.001
    for name, cfg in learning.variants().items():
        assert sum(p.numel() for p in DeepSeekV3(cfg).parameters()) == counts[name]


def test_the_caches_are_those_that_the_docstring_names():
    variants = learning.variants().values()
    held = [memory.kv_elements_per_token_and_layer(cfg) for cfg in variants]
    assert held == [512, 128, 64, 128, 64]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(learning, "SCHEDULE", Schedule(4, batch=2, seq_len=16, evaluate_every=2))
    few = dict(list(learning.variants().items())[:2])
    monkeypatch.setattr(learning, "variants", lambda: few)


def test_a_run_is_recorded_and_not_run_again(quick, tmp_path, capsys):
    assert learning.main(["--seeds", "0", "--out", str(tmp_path)]) == 0
    rows = receipts.read("learning", folder=tmp_path)
    assert [(r.shapes["variant"], r.shapes["step"]) for r in rows] == [
        *(("MHA", 2), ("MHA", 4)),
        *(("GQA, 2 groups", 2), ("GQA, 2 groups", 4)),
    ]
    capsys.readouterr()
    assert learning.main(["--seeds", "0", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == ""
    assert receipts.read("learning", folder=tmp_path) == rows


def test_the_same_seed_gives_the_same_losses(quick, tmp_path):
    for name in ("one", "two"):
        learning.main(["--seeds", "3", "--out", str(tmp_path / name)])
    one, two = (
        [r.value for r in receipts.read("learning", folder=tmp_path / name)]
        for name in ("one", "two")
    )
    assert one == two
