"""A network is two tiers and a node's size; its numbers come from hardware.json and the papers."""

import math

import pytest

from dsv3_tutorial import hardware, paper
from dsv3_tutorial.cost.tiers import FABRICS, Network, NetworkError, Tier, network

FAST, SLOW = Tier("fast", 1e-6, 100.0), Tier("slow", 2e-6, 10.0)


def test_the_h800s_links_are_the_rates_and_latencies_that_the_paper_uses():
    h800 = network("h800")
    assert (h800.inside.bandwidth, h800.across.bandwidth) == (160e9, 40e9)
    assert h800.inside.bandwidth == paper.row("network.nvlink_effective").value * 1e9
    assert h800.across.bandwidth == paper.row("network.infiniband_effective").value * 1e9
    assert h800.inside.alpha == pytest.approx(3.33e-6, rel=1e-12)
    assert h800.across.alpha == pytest.approx(2.8e-6, rel=1e-12)
    assert h800.ranks_per_node == 8


def test_a_chip_of_which_no_reached_rate_is_published_gets_its_peak_and_says_so():
    for name in ("h100-sxm", "gb200-nvl72", "b200", "a100", "h200"):
        net, chip = network(name), hardware.chip(name)
        assert net.inside.bandwidth == chip.scale_up.bandwidth and "peak" in net.inside.note
        assert net.across.bandwidth == chip.scale_out.bandwidth and "peak" in net.across.note
    assert network("gb200-nvl72").ranks_per_node == 72
    assert "peak" not in network("h800").inside.note


def test_scale_out_is_not_slow_to_answer_its_bandwidth_is_lower():
    h800 = network("h800")
    assert h800.across.alpha < h800.inside.alpha
    assert h800.across.bandwidth < h800.inside.bandwidth


def test_every_fabric_has_its_own_latency_and_a_second_switch_adds_to_it():
    alpha = {fabric: network("h800", fabric).across.alpha for fabric in FABRICS}
    assert len(set(alpha.values())) == len(FABRICS)
    assert alpha["infiniband"] < alpha["infiniband_cross_leaf"]
    assert alpha["roce"] < alpha["roce_cross_leaf"]
    assert {network("h800", fabric).inside for fabric in FABRICS} == {network("h800").inside}


def test_ranks_of_one_node_meet_inside():
    net = Network(FAST, SLOW, 3)
    assert [net.node(rank) for rank in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    assert net.tier(0, 2) is FAST and net.tier(2, 3) is SLOW and net.tier(5, 5) is FAST


def test_slower_divides_bandwidths_and_leaves_latencies():
    net = Network(FAST, SLOW, 3).slower(inside=2, across=0.5)
    assert (net.inside.bandwidth, net.across.bandwidth) == (50.0, 20.0)
    assert (net.inside.alpha, net.across.alpha) == (1e-6, 2e-6)
    assert net.slower() == net


@pytest.mark.parametrize(
    "build, told",
    [
        (lambda: Tier("x", -1e-6, 1.0), "alpha is -1e-06"),
        (lambda: Tier("x", math.nan, 1.0), "alpha is nan"),
        (lambda: Tier("x", 0.0, 0.0), "bandwidth is 0.0"),
        (lambda: Tier("x", 0.0, math.nan), "bandwidth is nan"),
        (lambda: Tier("x", -1.0, -1.0), "alpha is -1.0.*bandwidth is -1.0"),
        (lambda: Network(FAST, SLOW, 0), "node of 0 ranks"),
        (lambda: Network(FAST, SLOW, True), "node of True ranks"),
        (lambda: Network(FAST, SLOW, 2.0), "node of 2.0 ranks"),
        (lambda: Network(FAST, SLOW, 2).node(-1), "rank -1"),
        (lambda: Network(FAST, SLOW, 2).tier(0, 1.5), "rank 1.5"),
        (lambda: Network(FAST, SLOW, 2).slower(across=0), "divided by 1.0 and 0"),
        (lambda: Network(FAST, SLOW, 2).slower(inside=math.inf), "divided by inf"),
        (lambda: network("rtx-4090"), "RTX 4090 .*is no part of a network"),
        (lambda: network("h20"), "H20 .* no part of a network"),
        (lambda: network("h800", "carrier pigeon"), "no fabric 'carrier pigeon'"),
    ],
)
def test_nonsense_is_refused_with_what_is_wrong(build, told):
    with pytest.raises(NetworkError, match=told):
        build()


def test_an_unknown_chip_is_answered_with_the_names_there_are():
    with pytest.raises(hardware.HardwareError, match="no chip 'h900'"):
        network("h900")
