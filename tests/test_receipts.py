import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3_tutorial import receipts
from dsv3_tutorial.receipts import Receipt, ReceiptError

GOOD = {
    "what": "mla_decode",
    "device": "NVIDIA H100 80GB HBM3",
    "device_kind": "gpu",
    "versions": {"python": "3.12", "torch": "2.11.0+cu128"},
    "date": "2026-11-21",
    "shapes": {"batch": 1, "dtype": "bf16"},
    "value": 2.0,
    "unit": "GB/s",
    "spread": {"q1": 1.5, "q3": 2.5},
    "repeats": 11,
    "threads": 4,
}

awkward = 'ab0 é"\\{}[],:\n\r\t\u2028\x00\U0001f600\ud800'  # what JSON and line splitting trip over
text = st.text(awkward, max_size=6).map(lambda it: f"x{it}")
number = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**60), 2**60)
plain = st.recursive(
    st.none() | st.booleans() | number | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=2),
    max_leaves=4,
)


@st.composite
def any_receipt(draw):
    low, value, high = sorted(draw(st.tuples(number, number, number)))
    pair = draw(st.sampled_from(receipts.SPREADS))
    ceiling = draw(st.none() | st.tuples(text, number))
    return Receipt(
        what=draw(text),
        device=draw(text),
        device_kind=draw(st.sampled_from(receipts.DEVICE_KINDS)),
        versions={"torch": draw(text), "python": "3.11"},
        date=draw(st.dates()).isoformat(),
        shapes=draw(st.dictionaries(text, plain, max_size=3)),
        value=value,
        unit=draw(text),
        spread=dict(zip(pair, (low, high), strict=True)),
        repeats=draw(st.integers(1, 10**6)),
        threads=draw(st.integers(1, 512)),
        ceiling=ceiling and ceiling[0],
        fraction=ceiling and ceiling[1],
    )


@settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # a busy machine is no failure
@given(st.lists(any_receipt(), max_size=4), st.lists(any_receipt(), max_size=4))
def test_what_was_appended_is_read_back_exactly_and_in_order(first, second):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = receipts.append("a", first, folder=folder)
        before = path.read_bytes()
        receipts.append("a", second, folder=folder)
        assert receipts.read("a", folder=folder) == first + second
        assert path.read_bytes().startswith(before)  # a written line never changes
        assert path.read_bytes().count(b"\n") == len(first + second)


@settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # a busy machine is no failure
@given(st.lists(any_receipt(), min_size=1, max_size=4), st.data())
def test_a_line_cut_short_anywhere_is_refused_by_file_and_number(rows, data):
    with tempfile.TemporaryDirectory() as name:
        path = receipts.append("a", rows, folder=Path(name))
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        which = data.draw(st.integers(0, len(lines) - 1))
        lines[which] = lines[which][: data.draw(st.integers(1, len(lines[which]) - 1))]
        path.write_text("\n".join(lines), encoding="utf-8")
        with pytest.raises(ReceiptError, match=rf"a\.jsonl, line {which + 1} is damaged"):
            receipts.read("a", folder=Path(name))


def test_everything_wrong_with_a_receipt_is_said_at_once():
    bad = {
        "what": " ",
        "device": 3,
        "device_kind": "tpu",
        "versions": {"python": "3.12.1", "torch": 2.11},
        "date": "21 November",
        "shapes": {"seed": {1}},
        "value": float("nan"),
        "unit": "",
        "spread": {"low": 1, "high": 2},
        "repeats": 0,
        "threads": True,
        "ceiling": "copy",
    }
    with pytest.raises(ReceiptError) as caught:
        Receipt(**bad)
    for name in bad:
        assert any(name in problem for problem in caught.value.problems), name
    assert len(caught.value.problems) == 13  # one each, versions has two


@pytest.mark.parametrize(
    "change",
    [
        {"value": 3.0},
        {"value": 10**400},
        {"value": True},
        {"value": "2.0"},
        {"spread": {"q1": 2.5, "q3": 1.5}},
        {"spread": {"q1": 1.5, "max": 2.5}},
        {"spread": {1: 1.5, "q3": 2.5}},
        {"spread": None},
        {"versions": {}},
        {"date": "20261121"},
        {"date": "2026-02-30"},
        {"shapes": {1: 2}},
        {"shapes": {"loss": float("inf")}},
        {"shapes": {"device": "the filter means the field"}},
        {"fraction": 0.5},
        {"ceiling": "copy", "fraction": float("nan")},
        {"device_kind": ["gpu"]},
    ],
    ids=repr,
)
def test_a_receipt_that_cannot_be_trusted_is_never_made(change):
    with pytest.raises(ReceiptError, match="This receipt cannot be kept"):
        Receipt(**{**GOOD, **change})


def test_a_receipt_holds_its_own_copy_in_the_form_the_file_has():
    shapes = {"tile": (1, 128)}
    receipt = Receipt(**{**GOOD, "shapes": shapes})
    shapes["tile"] = None
    assert receipt.shapes == {"tile": [1, 128]}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[]", "got a list"),
        ("null", "got a NoneType"),
        ("{", "not JSON"),
        ("[" * 10**6, "not JSON"),
        (json.dumps({**GOOD, "colour": 1}), "'colour' is not a field"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "unit"}), "unit is missing"),
        (json.dumps({**GOOD, "repeats": 0}), "repeats must be a whole number"),
        (json.dumps({**GOOD, "value": float("nan")}), "value must be a finite number"),
    ],
    ids=lambda text: text[:24],
)
def test_a_damaged_line_is_named_and_nothing_is_added_to_its_file(tmp_path, line, problem):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")  # the empty line counts
    before = path.read_bytes()
    with pytest.raises(ReceiptError, match=r"a\.jsonl, line 3 is damaged") as caught:
        receipts.read("a", folder=tmp_path)
    assert problem in str(caught.value)
    with pytest.raises(ReceiptError, match="line 3"):
        receipts.append("a", [Receipt(**GOOD)], folder=tmp_path)
    assert path.read_bytes() == before


def test_a_file_that_is_not_text_is_refused_by_name(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ReceiptError, match=r"a\.jsonl cannot be read"):
        receipts.read("a", folder=tmp_path)


def test_a_last_line_without_its_newline_is_not_glued_to_the_next(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD))
    receipts.append("a", [Receipt(**GOOD)], folder=tmp_path)
    assert receipts.read("a", folder=tmp_path) == [Receipt(**GOOD)] * 2


def test_an_interrupted_append_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = receipts.append("a", [Receipt(**GOOD)], folder=tmp_path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ReceiptError, match="disk full"):
        receipts.append("a", [Receipt(**GOOD)], folder=tmp_path)
    assert path.read_bytes() == before
    assert [it.name for it in tmp_path.iterdir()] == ["a.jsonl"]


def test_filters_compare_fields_and_shapes_alike(tmp_path):
    one, two = Receipt(**GOOD), Receipt(**{**GOOD, "shapes": {"batch": 8, "sides": [1, 2]}})
    receipts.append("a", [one, two], folder=tmp_path)
    assert receipts.read("a", folder=tmp_path, batch=8) == [two]
    assert receipts.read("a", folder=tmp_path, sides=[1, 2]) == [two]
    assert receipts.read("a", folder=tmp_path, what="mla_decode", dtype="bf16") == [one]
    assert receipts.read("a", folder=tmp_path, device="NVIDIA L4") == []


def test_a_mistyped_filter_is_an_error_and_not_an_empty_figure(tmp_path):
    receipts.append("a", [Receipt(**GOOD)], folder=tmp_path)
    with pytest.raises(ReceiptError, match="'bach'"):
        receipts.read("a", folder=tmp_path, bach=1)


def test_latest_keeps_the_newest_of_each_device_threads_and_shapes(tmp_path):
    old = Receipt(**GOOD)
    same_day = replace(old, value=2.25)
    other = replace(old, threads=1)
    newer = replace(other, date="2026-12-01")
    outdated = replace(other, date="2025-01-01")
    receipts.append("a", [old, other, newer, same_day, outdated], folder=tmp_path)
    assert receipts.latest("a", folder=tmp_path) == [same_day, newer]


def test_names_lists_the_benchmarks_that_have_receipts(tmp_path):
    assert receipts.names(tmp_path / "absent") == []
    for name in ("b", "a"):
        receipts.append(name, [Receipt(**GOOD)], folder=tmp_path)
    assert receipts.names(tmp_path) == ["a", "b"]


def test_a_benchmark_without_receipts_names_those_that_have_some(tmp_path):
    receipts.append("attention", [Receipt(**GOOD)], folder=tmp_path)
    with pytest.raises(ReceiptError, match=r"\['attention'\]"):
        receipts.read("atention", folder=tmp_path)


@pytest.mark.parametrize("name", ["", "../a", "A b", "a/b", "a.jsonl"])
def test_a_name_cannot_leave_the_folder(name, tmp_path):
    with pytest.raises(ReceiptError, match="no name for a benchmark"):
        receipts.append(name, [Receipt(**GOOD)], folder=tmp_path)


def test_a_caption_says_device_day_and_torch():
    gpu = Receipt(**GOOD)
    cpu = replace(gpu, device="AMD EPYC", device_kind="cpu", threads=1, versions={"numpy": "2"})
    assert receipts.caption([gpu]) == "NVIDIA H100 80GB HBM3, 2026-11-21, torch 2.11"
    assert receipts.caption([cpu]) == "AMD EPYC (1 thread), 2026-11-21"
    later = replace(gpu, date="2026-12-01", versions={"torch": "2.13.0"})
    both = "2026-11-21 to 2026-12-01, torch 2.11 and 2.13"
    assert receipts.caption([later, gpu]) == f"NVIDIA H100 80GB HBM3, {both}"
    assert receipts.caption([gpu, cpu]).endswith("torch 2.11; AMD EPYC (1 thread), 2026-11-21")
    assert receipts.caption([]) == "not measured yet"


def test_every_receipt_that_ships_can_be_read():
    for name in receipts.names():
        assert receipts.read(name)


def test_reading_receipts_does_not_load_torch():
    code = "import sys, dsv3_tutorial.receipts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
