"""Exchanges that were measured: receipts drawn beside predictions, and a live fit."""

import re
from dataclasses import replace

import pytest

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import network
from dsv3_tutorial.cost import comm, tiers
from dsv3_tutorial.learn.figures import throttled as recorded


def _row(what, shapes, value, unit="s"):
    spread = {"q1": 0.9 * value, "q3": 1.1 * value}
    facts = {"device": "a box", "device_kind": "cpu", "versions": {"torch": "2.13.0"}}
    rest = {"threads": 1, "date": "2026-11-22", "repeats": 3, "unit": unit, "spread": spread}
    return receipts.Receipt(what, shapes=shapes, value=value, **facts, **rest)


@pytest.fixture
def folder(tmp_path):
    """Receipts as `bench network` writes them: a fit of messages, and exchanges by rate."""
    rows = []
    for nodes, mbit in ((1, None), (2, None), (2, 200)):
        at = {"ranks": 4, "nodes": nodes, "mbit": mbit}
        for form, bandwidth in (("inside", 2e9), ("across", 25e6 if mbit else 1e9))[:nodes]:
            fit = {"op": "p2p", "form": form, **at}
            rows += [_row("alpha", fit, 50e-6), _row("bandwidth", fit, bandwidth, "B/s")]
        if nodes == 1:
            rows.append(_row("alpha", {"op": "all_reduce", "form": "flat", **at}, 90e-6))
        for op in recorded.TITLES if nodes > 1 else ():
            for form, share in (("flat", 0.4), ("hierarchical", 0.2 if op == "dispatch" else 0.3)):
                shapes = {"op": op, "form": form, "bytes": 2**20, **at}
                rows.append(_row("exchange", shapes, share if mbit else share / 20))
    receipts.append("network", rows, folder=tmp_path)
    return tmp_path


def test_the_throttled_link_is_drawn_beside_predictions(folder):
    made = recorded.throttled(folder)
    assert "On cables of 200 Mbit/s, by node: a dispatch 2.00 times as fast as flat" in str(made)
    assert "an all-reduce 1.33 times as fast" in str(made)
    assert [ax.get_title() for ax in made.axes] == list(recorded.TITLES.values())
    assert [tick.get_text() for tick in made.axes[0].get_xticklabels()] == ["no limit", "200"]
    link = tiers.Network(tiers.Tier("i", 50e-6, 2e9), tiers.Tier("a", 50e-6, 25e6), 2)
    said = comm.all_reduce(2**20, range(4), link) * 1e3
    hollow = [line for line in made.axes[0].lines if line.get_fillstyle() == "none"]
    assert hollow[0].get_ydata()[1] == pytest.approx(said)
    note = made.get_supxlabel()
    ratios = [
        full / empty
        for ax in made.axes
        for full, empty in zip(*(
            [y for line in ax.lines if line.get_fillstyle() == style
             and line.get_linestyle() == "None" and len(line.get_ydata()) == 2
             and line.get_marker() in ("o", "s") for y in line.get_ydata()]
            for style in ("full", "none")
        ))
    ]  # fmt: skip
    free, slow = ratios[::2], sorted(abs(1 / ratio - 1) for ratio in ratios[1::2])
    assert len(ratios) == 12 and f"took {min(free):.1f} to {max(free):.1f} times" in note
    assert f"off by {(slow[2] + slow[3]) / 2:.0%} in the median, {slow[-1]:.0%} at most" in note
    assert made.png() == recorded.throttled(folder).png()


def test_what_gains_least_by_node_is_said_as_well(folder):
    rows = receipts.latest("network", folder=folder)
    lost = [
        replace(row, value=0.5, date="2026-11-23", spread={"q1": 0.4, "q3": 0.6})
        for row in rows
        if (row.shapes["op"], row.shapes["form"]) == ("all_to_all", "hierarchical")
        and row.shapes["mbit"]
    ]
    receipts.append("network", lost, folder=folder)
    said = str(recorded.throttled(folder))
    assert "an all-to-all (nothing to share) takes 1.25 times as long" in said


def test_the_fits_are_printed_with_where_and_when(folder, capsys):
    recorded.fit_table(folder)
    _head, message, summed, caption = capsys.readouterr().out.splitlines()
    assert message.split() == ["message", "4", "50", "us", "2,000", "MB/s"]
    assert summed.split() == ["all-reduce", "4", "90", "us", "no", "limit", "seen"]
    assert caption == "measured: a box (1 thread), 2026-11-22, torch 2.13"


def test_without_a_receipt_it_is_said_how_to_get_one(tmp_path, capsys):
    recorded.fit_table(tmp_path)
    assert "No exchange between processes is recorded" in capsys.readouterr().out
    with pytest.raises(LookupError, match=r"bench network \(the throttled link needs root"):
        recorded.throttled(tmp_path)


def test_a_live_measurement_fits_predicts_and_then_runs(monkeypatch, capsys):
    monkeypatch.setattr(recorded, "MESSAGES", (4, 2**18))
    recorded.live(0.2)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 6 and rows[3].startswith("alpha ")
    assert rows[-1].endswith("cores, and also add numbers")
    predicted, took, ratio = map(float, re.findall(r"([\d.]+) (?:ms|times)", rows[4]))
    assert ratio == pytest.approx(took / predicted, rel=0.1, abs=0.06)


def test_a_live_prediction_is_that_of_the_fitted_line(monkeypatch, capsys):
    def measure(cases, world, seconds):
        assert world == 4
        times = {c: [1e-4 + c.bytes / 1e9] if c.op == "p2p" else [0.02] for c in cases}
        if recorded.WARM in times:  # comes first, and counts for nothing
            assert cases[0] == recorded.WARM and len(cases) > 2
            times[recorded.WARM] = [9.0]
        return times

    monkeypatch.setattr(network, "measure", measure)
    recorded.live()
    printed = capsys.readouterr().out
    assert "alpha 100 us, beta 1,000 MB/s" in printed
    said = 6 * (1e-4 + 2**20 / 1e9) * 1e3
    assert f"{said:.2f} ms predicted, 20.00 ms measured, {20 / said:.1f} times" in printed


def test_the_receipts_that_ship_are_drawn_or_their_absence_is_said(capsys):
    recorded.fit_table()
    printed = capsys.readouterr().out
    if network.NAME not in receipts.names():
        assert "No exchange between processes is recorded" in printed
        return
    assert "measured: " in printed
    assert ", by node: " in str(recorded.throttled())
