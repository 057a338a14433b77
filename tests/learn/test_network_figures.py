"""Networks drawn and re-timed: what is drawn is what the cost model and the clock compute."""

import re

import pytest
import torch
import torch.distributed as dist
from matplotlib.figure import Figure

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import network
from dsv3_tutorial.cost import comm, comm_moe, limits, tiers
from dsv3_tutorial.cost.tiers import NetworkError
from dsv3_tutorial.learn.figures import network_bars, network_map, network_traces, recommend
from dsv3_tutorial.learn.figures import throttled as recorded
from dsv3_tutorial.learn.widgets import explore
from dsv3_tutorial.parallel import traffic
from dsv3_tutorial.parallel.calls import Call
from dsv3_tutorial.parallel.clock import retime
from dsv3_tutorial.parallel.launch import launch

H800 = tiers.network("h800")
DRAWN = {
    "Two stages, at most 4 nodes: 7.77 ms a layer, flat 15.58": network_map.all_to_all_retimed,
    "Deduplicated: 0.24 ms a layer, flat 0.25": lambda: network_map.all_to_all_retimed(1, 8, 64),
    "0.952 ms, 3.24 times as fast as a ring": network_map.all_reduce_retimed,
    "Decoding 1.00 times as fast, the all-to-all of training 1.00": recommend.future,
    "Decoding 5.71 times": lambda: recommend.future(1.0, 256, 8, 0.5),
}


@pytest.mark.parametrize("finding", DRAWN)
def test_a_figure_states_its_finding_with_axes_and_repeats(finding):
    made = DRAWN[finding]()
    assert isinstance(made, Figure) and finding in str(made)
    assert made.png() == DRAWN[finding]().png()
    assert all(axes.get_xlabel() and axes.get_yticklabels() for axes in made.axes)


def test_the_four_ways_take_what_the_cost_model_says_and_bars_are_bytes_over_bandwidth():
    slow = H800.slower(across=3, inside=2)
    ways = network_map.all_to_all_ways(3, 2, 512)
    schemes = [("flat", None), ("deduplicated", None), ("two_stage", None), ("two_stage", 4)]
    for way, (scheme, limit) in zip(ways, schemes, strict=True):
        asked = (512, comm_moe.Layer(node_limit=limit), 64, slow, scheme)
        assert way.seconds == comm_moe.dispatch_time(*asked) + comm_moe.combine_time(*asked)
        parts = [comm_moe.sent_bytes(*asked, width)["across"] for width in (1.03125, 2)]
        assert way.sent["across"] == pytest.approx(sum(parts))
    ax = network_map.all_to_all_retimed(3, 2, 512).axes[0]
    widths = [bar.get_width() for bar in ax.patches]
    expected = [
        way.sent[tier] / getattr(slow, tier).bandwidth * 1e3
        for way in ways
        for tier in ("inside", "across")
    ]
    assert widths == pytest.approx(expected)
    assert [line.get_xdata()[0] for line in ax.lines] == [way.seconds * 1e3 for way in ways]


def test_flat_wins_once_links_inside_are_slow_enough():
    def gain(slower_inside):
        words = network_map.all_to_all_retimed_in_words(1, slower_inside)
        return float(re.search(r"([\d.]+) times as fast as flat", words)[1]), words

    fast, slow = gain(1), gain(10)
    assert fast[0] > 2 and "bytes across decide" in fast[1] and "flat 15.58 ms" in fast[1]
    assert slow[0] < 1 and "bytes inside decide" in slow[1]


@pytest.mark.parametrize("across", [1.0, 8.0])
@pytest.mark.parametrize("inside", [1.0, 8.0])
@pytest.mark.parametrize("mb", [0.0, 0.001, 64.0])
def test_the_parts_of_an_all_reduce_add_to_comms_time_and_wait_for_the_slower_tier(
    across, inside, mb
):
    slow = H800.slower(across=across, inside=inside)
    parts = network_map.all_reduce_parts(across, inside, mb)
    for one, algorithm in zip(parts, ("ring", "tree", "hierarchical"), strict=True):
        total = comm.all_reduce(mb * 1e6, range(16), slow, algorithm)
        assert one.inside + one.across == pytest.approx(total)
    rails = comm.all_reduce(mb * 1e6 / 8, (0, 8), slow)
    assert parts[2].across == pytest.approx(rails)
    free = slow.slower(across=1e-9) if parts[0].inside else slow.slower(inside=1e-9)
    assert sum(parts[0][1:]) == pytest.approx(comm.all_reduce(mb * 1e6, range(16), free))
    network_map.all_reduce_retimed(across, inside, mb)


def test_latency_favours_the_tree_and_bytes_going_inside_first():
    assert "Fastest is tree" in network_map.all_reduce_retimed_in_words(1, 1, 0.001)
    words = network_map.all_reduce_retimed_in_words(10, 1, 64)
    assert "Fastest is inside nodes first; 73% of it waits" in words and "across 4 GB/s" in words


def test_what_cannot_be_is_said_in_words_by_the_explorer():
    shown = explore(
        *(network_map.all_to_all_retimed,),
        say=network_map.all_to_all_retimed_in_words,
        slower_across=[0.0, 1.0, 4.0],
    )
    assert shown.picture == b"" and "no link remains" in shown.caption
    shown._controls["slower_across"].value = 4.0
    assert shown.picture and "across 10 GB/s" in shown.caption


# Traces of real ranks


def _exchanged(by_node):
    """Two exchanges among four ranks: uneven shares, and a sum."""
    rank = dist.get_rank()
    with traffic.record() as seen:
        splits = [256 * (1 + (rank + i) % 4) for i in range(4)]
        into = [256 * (1 + (rank + i) % 4) for i in range(4)]
        dist.all_to_all_single(torch.empty(sum(into)), torch.ones(sum(splits)), into, splits)
        if by_node:
            dist.all_reduce(torch.ones(64))
    return seen.trace


@pytest.fixture(scope="module")
def traces():
    return {f"way_{n}": launch(_exchanged, 4, bool(n), echo=False) for n in (0, 1)}


def test_recorded_ranks_are_retimed_as_the_clock_does(traces):
    slow = tiers.Network(H800.inside, H800.slower(across=5).across, 2)
    found = network_traces.retimed_ways(traces, slower_across=5, ranks_per_node=2)
    assert [way.seconds for way in found] == [max(retime(each, slow)) for each in traces.values()]
    # rank r sends (1 + (r + i) % 4) KiB to rank i: 2 to its neighbour, at most 7 to the others
    assert found[0].sent == {"inside": 2048, "across": 7 * 1024}
    # the ring adds 2 x 3 / 4 of 256 bytes: across for the ranks at a node's end, who sent 5 KiB
    assert found[1].sent == {"inside": 2048 + 384, "across": 7 * 1024}


def test_larger_messages_are_messages_of_that_many_times_the_bytes():
    def played(n, **asked):
        sent = [[(n + 16 * i) * (i != j) for j in range(4)] for i in range(4)]
        ranks = (0, 1, 2, 3)
        made = [[Call("all_to_all", sum(row), ranks, tuple(row))] for row in sent]
        return network_traces.retimed_ways({"one": made}, ranks_per_node=2, **asked)[0]

    sent = [[1000 * (100 + 16 * i) * (i != j) for j in range(4)] for i in range(4)]
    on = tiers.Network(H800.inside, H800.across, 2)
    assert played(100, larger=1000).seconds == pytest.approx(comm.all_to_all(sent, range(4), on))
    assert played(100, larger=1000).sent["across"] == 1000 * 2 * 148


def test_clocks_are_drawn_and_said_and_a_slow_link_is_felt(traces):
    asked = {"slower_across": 100, "ranks_per_node": 2, "larger": 1e3}
    found = network_traces.retimed_ways(traces, **asked)
    made = network_traces.retimed(traces, **asked)
    first, last = (network_bars.ms(way.seconds) for way in found)
    assert f"Way 0 is done after {first}, way 1 after {last}" in str(made)
    assert made.png() == network_traces.retimed(traces, **asked).png()
    words = network_traces.retimed_in_words(traces, **asked)
    assert f"way 0 {first}, 7.17 MB across" in words and "across 0.4 GB/s" in words
    fast = network_traces.retimed_ways(traces, **{**asked, "slower_across": 1})
    assert all(slow.seconds > 20 * quick.seconds for slow, quick in zip(found, fast))


def test_no_traces_or_broken_nodes_are_refused(traces):
    for none in ({}, {"one": []}):
        with pytest.raises(NetworkError, match="Run its ranks first"):
            network_traces.retimed(none)
    with pytest.raises(NetworkError, match="4 ranks fill no whole nodes of 3"):
        network_traces.retimed(traces, ranks_per_node=3)


# What the authors ask for


def test_todays_decoding_is_the_papers_bound_but_for_what_never_leaves_and_the_latency():
    paper = limits.effective(limits.exact(limits.infiniband()))
    stays = 8 / 256  # of the nine copies, in the own node of 8
    expected = paper.communication * (1 - stays) + 2 * 2.8e-6
    assert recommend.TODAY.decode == pytest.approx(1 / (61 * 2 * expected))
    assert 50 < recommend.TODAY.decode < paper.tokens_per_second / (1 - stays)


def test_every_knob_turned_as_asked_helps_and_never_hurts():
    today = recommend.TODAY
    for knob, value in {"bandwidth_ratio": 2.0, "domain": 64, "bits": 8, "latency_us": 0.5}.items():
        better = recommend.Hardware(**{knob: value})
        assert better.decode > today.decode
        assert better.all_to_all <= today.all_to_all
    assert recommend.Hardware(bandwidth_ratio=2).all_to_all == pytest.approx(today.all_to_all / 2)
    width = recommend.Hardware(bits=8).returned
    shrunk = today.all_to_all * (1.03125 + width) / 3.03125
    assert width == 1.03125 and recommend.Hardware(bits=8).all_to_all == pytest.approx(shrunk)
    assert recommend.Hardware(domain=64).network.ranks_per_node == 64


def test_the_words_carry_both_bounds_beside_todays_and_the_impossible_is_refused():
    words = recommend.future_in_words(1.0, 256, 8, 0.5)
    asked, today = recommend.Hardware(1.0, 256, 8, 0.5), recommend.TODAY
    assert f"{asked.decode:.1f} tokens/s (today {today.decode:.1f})" in words
    assert "160 GB/s between nodes" in words and "all in one node" in words
    assert "4 nodes of 64" in recommend.future_in_words(domain=64)
    with pytest.raises(ValueError, match="divides 256"):
        recommend.future(domain=72)
    for wrong in ({"bandwidth_ratio": 0}, {"bits": 0}, {"latency_us": -1}):
        with pytest.raises(ValueError, match="nothing would arrive"):
            recommend.future(**wrong)


# What is measured


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
    assert "On cables of 200 Mbit/s a dispatch by node is 2.00 times as fast" in str(made)
    assert [ax.get_title() for ax in made.axes] == list(recorded.TITLES.values())
    assert [tick.get_text() for tick in made.axes[0].get_xticklabels()] == ["no limit", "200"]
    link = tiers.Network(tiers.Tier("i", 50e-6, 2e9), tiers.Tier("a", 50e-6, 25e6), 2)
    said = comm.all_reduce(2**20, range(4), link) * 1e3
    hollow = [line for line in made.axes[0].lines if line.get_fillstyle() == "none"]
    assert hollow[0].get_ydata()[1] == pytest.approx(said)
    assert made.png() == recorded.throttled(folder).png()


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
    predicted, took, ratio = map(float, re.findall(r"([\d.]+) (?:ms|times)", rows[4]))
    assert ratio == pytest.approx(took / predicted, rel=0.1, abs=0.06)


def test_a_live_prediction_is_that_of_the_fitted_line(monkeypatch, capsys):
    def measure(cases, world, seconds):
        assert world == 4
        return {c: [1e-4 + c.bytes / 1e9] if c.op == "p2p" else [0.02] for c in cases}

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
    assert "by node is" in str(recorded.throttled())
