"""Tables of the gradients benchmark: what they print is what the receipts hold."""

import pytest

from dsv3_tutorial import receipts
from dsv3_tutorial.bench.gradients import NAME, WAYS
from dsv3_tutorial.learn.figures import gradients

SHARES = dict(zip(WAYS, (0.25, 0.125, 0.0625, 0.00001, 0.0)))


def receipt(step, way, seed=0, device="some CPU", **changed):
    value = SHARES[way]
    shapes = {
        "seed": seed,
        "step": step,
        "way": way,
        "lost_tokens": value / 2,
        "largest_lost": value * step / 1e3,
        "median": 10.0**-step,
        "decades": [0.1 * step, 0.2 * step],
        "middle": [0.05 * step, 0.3],
    }
    return receipts.Receipt(
        what="gradients",
        device=device,
        device_kind="cpu",
        versions={"torch": "2.13"},
        date="2026-11-22",
        shapes={**shapes, **changed},
        value=value,
        unit="share of values that become zero",
        spread={"min": 0.0, "max": 0.5},
        repeats=3,
        threads=1,
    )


@pytest.fixture
def found():
    return {step: {way: receipt(step, way) for way in WAYS} for step in (1, 4)}


def test_the_longest_run_is_read_and_of_two_the_later(tmp_path):
    def run(steps, **of):
        receipts.append(NAME, [receipt(s, w, **of) for s in steps for w in WAYS], folder=tmp_path)

    run((1, 4))
    run((1,), seed=1)
    assert list(gradients.looks(tmp_path)) == [1, 4]
    run((4, 1), device="another CPU")
    looks = gradients.looks(tmp_path)
    assert list(looks) == [1, 4] and list(looks[4]) == list(WAYS)
    assert looks[1]["tile"].device == "another CPU"


def test_nothing_recorded_names_the_command(tmp_path, monkeypatch):
    whole = gradients.looks
    monkeypatch.setattr(gradients, "looks", lambda: whole(tmp_path))
    for table in (gradients.zeroed_table, gradients.spread_table):
        with pytest.raises(LookupError, match="python -m dsv3_tutorial bench gradients"):
            table()


def test_the_table_of_zeros_has_a_row_a_step_and_a_column_a_way(found, capsys):
    gradients.zeroed_table(found)
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split() == ["1", "1.0e-01", "25.00%", "12.50%", "6.25%", "<", "0.01%", "0"]
    assert lines[4].split()[:2] == ["4", "1.0e-04"]
    assert lines[-1] == "seed 0; some CPU (1 thread), 2026-11-22, torch 2.13"
    assert len({len(line) for line in lines[2:5]}) == 1


def test_the_table_of_spread_has_tokens_lost_and_the_largest_of_them(found, capsys):
    del found[4]["block"]
    gradients.spread_table(found)
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split()[:6] == ["1", "0.10", "0.20", "0.05", "12.50%", "6.25%"]
    assert lines[4].split()[4:] == ["12.50%", "6.25%", "3.12%", "-", "0"]
    cells = lines[6].removeprefix(" " * 16 + "largest token lost").split()
    assert cells == ["1.0e-03", "5.0e-04", "2.5e-04", "1.0e-08", "-"]
    assert len({len(line) for line in (*lines[2:5], lines[6])}) == 1
    assert lines[-1].startswith("seed 0; some CPU")
