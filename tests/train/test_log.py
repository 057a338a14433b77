"""The log: a row a step, each once, whatever ended the run before."""

import csv
import json

from dsv3_tutorial.train import log


def rows(*steps):
    return [{"step": step, "loss": step / 8, "lr": 1e-3} for step in steps]


def test_rows_are_on_the_disk_as_they_are_written(tmp_path):
    with log.Log(tmp_path) as opened:
        for row in rows(1, 2):
            opened.write(row)
            assert log.read(tmp_path)[-1] == row


def test_a_resumed_log_keeps_the_rows_up_to_its_step_and_no_others(tmp_path):
    with log.Log(tmp_path, as_csv=True) as opened:
        for row in rows(1, 2, 3, 4):
            opened.write(row)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # killed while it wrote
    with log.Log(tmp_path, step=2, as_csv=True) as opened:
        opened.write({**rows(3)[0], "loss": 9.0})
    assert [(row["step"], row["loss"]) for row in log.read(tmp_path)] == [
        (1, 0.125),
        (2, 0.25),
        (3, 9.0),
    ]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


def test_a_fresh_run_begins_with_an_empty_log(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps(rows(1)[0]) + "\n")
    with log.Log(tmp_path):
        assert log.read(tmp_path) == []


def test_the_csv_has_the_same_numbers_and_blanks_where_nothing_was_measured(tmp_path):
    with log.Log(tmp_path) as opened:
        opened.write({**rows(1)[0], "held_out": 0.1})
    with log.Log(tmp_path, step=1, as_csv=True) as opened:  # asked for only now: filled up
        opened.write(rows(2)[0])
    with open(tmp_path / "log.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in table] == [0.125, 0.25]
    assert [row["held_out"] for row in table] == ["0.1", ""]
    assert tuple(table[0]) == log.FIELDS
