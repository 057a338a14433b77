"""Networks drawn and re-timed: what is drawn is what the cost model and the clock compute."""

import re

import pytest
import torch
import torch.distributed as dist
from matplotlib.figure import Figure

from dsv3_tutorial.cost import comm, comm_moe, limits, tiers
from dsv3_tutorial.cost.tiers import NetworkError
from dsv3_tutorial.learn.figures import network_bars, network_map, network_traces, recommend
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
def test_the_parts_of_an_all_reduce_add_to_comms_time_and_are_latency_and_bytes(across, inside, mb):
    slow = H800.slower(across=across, inside=inside)
    parts = network_map.all_reduce_parts(across, inside, mb)
    for one, algorithm in zip(parts, ("ring", "tree", "hierarchical"), strict=True):
        total = comm.all_reduce(mb * 1e6, range(16), slow, algorithm)
        assert one.total == pytest.approx(total) and min(one[1:]) >= 0
        if mb == 0:
            assert one.latency == pytest.approx(total) and one.inside == one.across == 0
    # a rail of two carries an eighth, half of it twice; 8 of a node scatter and gather 7 / 8 each
    assert parts[2].across == pytest.approx(mb * 1e6 / 8 / slow.across.bandwidth)
    assert parts[2].inside == pytest.approx(2 * 7 / 8 * mb * 1e6 / slow.inside.bandwidth)
    if mb == 64:  # of a ring's steps all bytes wait for the slower tier
        size, far = 64e6 / 16, across * 4 > inside
        moving = parts[0].across if far else parts[0].inside
        rate = (slow.across if far else slow.inside).bandwidth
        assert moving == pytest.approx(30 * size / rate)
    made = network_map.all_reduce_retimed(across, inside, mb)
    drawn = [bar.get_width() for bar in made.axes[0].patches]
    assert drawn == pytest.approx([1e3 * part for one in parts for part in one[1:]])


def test_latency_favours_the_tree_and_bytes_going_inside_first():
    assert "Fastest is tree" in network_map.all_reduce_retimed_in_words(1, 1, 0.001)
    words = network_map.all_reduce_retimed_in_words(10, 1, 64)
    latency = network_map.all_reduce_parts(10, 1, 64)[2].latency
    total = comm.all_reduce(64e6, range(16), H800.slower(across=10), "hierarchical")
    assert f"Fastest is inside nodes first: {latency / total:.0%} of it is latency" in words
    assert "across 4 GB/s" in words
    shares = [
        int(
            re.search(r"(\d+)% of it is latency", network_map.all_reduce_retimed_in_words(mb=mb))[1]
        )
        for mb in (0.01, 0.1, 1, 10, 100)
    ]
    assert shares[0] > 95 and shares[-1] < 10  # and no jump where NVLink's latency is the larger


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
    assert "bytes are the busiest rank's" in words
    assert "the busiest rank's bytes" in made.axes[0].get_xlabel()
    assert "two stages do not overlap" in made.get_supxlabel()
    fast = network_traces.retimed_ways(traces, **{**asked, "slower_across": 1})
    assert all(slow.seconds > 20 * quick.seconds for slow, quick in zip(found, fast))


def test_a_toys_messages_are_latency_and_a_thousand_times_as_long_they_are_bytes(traces):
    small, large = (
        network_traces.retimed_ways(traces, ranks_per_node=2, larger=n) for n in (1, 1e5)
    )
    free = tiers.Network(
        *(tiers.Tier("in", 3.33e-6, float("inf")), tiers.Tier("out", 2.8e-6, float("inf"))), 2
    )
    for each, one, other in zip(traces.values(), small, large):
        assert one.latency == pytest.approx(max(retime(each, free)), rel=1e-6) == other.latency
        assert one.latency / one.seconds > 0.9 and other.latency / other.seconds < 0.2
    words = network_traces.retimed_in_words(traces, ranks_per_node=2)
    assert f"{small[0].latency / small[0].seconds:.0%} latency" in words


def test_ways_that_take_about_as_long_are_said_to(traces):
    same = {"one": traces["way_0"], "other": traces["way_0"]}
    assert "All 2 take about as long" in str(network_traces.retimed(same, ranks_per_node=2))


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
    paper = limits.effective(limits.exact(limits.infiniband())).tokens_per_second
    free = recommend.Hardware(latency_us=0).decode
    assert f"The paper's {paper:.1f} at" in words and f"(alone: {free:.1f})" in words
    assert free == pytest.approx(paper / (1 - 1 / 32)) and "1 in 32 stays in its node" in words
    assert "4 nodes of 64" in recommend.future_in_words(domain=64)
    with pytest.raises(ValueError, match="divides 256"):
        recommend.future(domain=72)
    for wrong in ({"bandwidth_ratio": 0}, {"bits": 0}, {"latency_us": -1}):
        with pytest.raises(ValueError, match="nothing would arrive"):
            recommend.future(**wrong)
