"""Times of collectives: closed forms, identities, and a count of every single message."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.cost import comm
from dsv3_tutorial.cost.comm import Network, NetworkError, Tier, network

INSIDE, ACROSS = Tier("in", 3.0, 8.0), Tier("across", 2.0, 1.0)
NET = Network(INSIDE, ACROSS, 4)
PAIR = (0, 4)  # ranks of two nodes

sizes = st.floats(0, 1e12)
groups = st.lists(st.integers(0, 40), min_size=1, max_size=10, unique=True)


@st.composite
def exchanges(draw, nodes=None):
    ranks = draw(groups) if nodes is None else nodes
    row = st.lists(st.integers(0, 1000), min_size=len(ranks), max_size=len(ranks))
    return ranks, draw(st.lists(row, min_size=len(ranks), max_size=len(ranks)))


def test_a_message_takes_its_latency_and_its_bytes_over_the_bandwidth():
    assert comm.point_to_point(16, 0, 3, NET) == 3 + 16 / 8
    assert comm.point_to_point(16, 3, 4, NET) == 2 + 16 / 1
    assert comm.point_to_point(16, 5, 5, NET) == 0


def test_a_small_message_is_faster_across_and_a_large_one_inside():
    h800 = network("h800")
    small, large = (
        [comm.point_to_point(n, 0, there, h800) for there in (1, 8)] for n in (64, 2**20)
    )
    assert small[1] < small[0] and large[0] < large[1]


def test_ring_collectives_are_their_closed_forms():
    for p in (2, 3, 4):
        steps = comm.all_gather(120, range(p), NET)
        assert steps == pytest.approx((p - 1) * (3 + 120 / p / 8))
        assert comm.reduce_scatter(120, range(p), NET) == steps
        assert comm.all_reduce(120, range(p), NET) == 2 * steps
    # over two nodes every step waits for the pair that crosses
    assert comm.all_reduce(80, range(8), NET) == 14 * (2 + 10 / 1)


def test_a_ring_closes():
    assert comm.ring_step(0, [4, 0], NET) == 2
    assert comm.ring_step(0, [0, 4, 1], NET) == 3  # only the last pair meets inside


def test_a_tree_takes_the_logarithm_of_the_ranks_in_steps_of_everything():
    for p, steps in ((1, 0), (2, 1), (3, 2), (4, 2)):
        assert comm.broadcast(16, range(p), NET) == steps * (3 + 2)
        assert comm.all_reduce(16, range(p), NET, "tree") == 2 * steps * (3 + 2)
    assert comm.broadcast(16, range(5), NET) == 3 * (2 + 16)
    assert comm.broadcast(0, range(5), NET) == 3 * 3.0  # the slowest tier is the one inside
    assert comm.broadcast(0, PAIR, NET) == 2.0  # of which these two use nothing


def test_a_tree_wins_where_latency_counts_and_a_ring_where_bytes_do():
    h800 = network("h800")
    for n, best in ((1e3, "tree"), (1e9, "ring")):
        times = {a: comm.all_reduce(n, range(0, 256, 8), h800, a) for a in ("ring", "tree")}
        assert min(times, key=times.get) == best


def test_the_hierarchical_all_reduce_adds_its_three_parts():
    p, g, n = 8, 4, 320.0
    within = (g - 1) * (3 + n / g / 8)
    rails = 2 * (2 - 1) * (2 + n / g / 2 / 1)
    assert comm.all_reduce(n, range(p), NET, "hierarchical") == pytest.approx(2 * within + rails)


@settings(deadline=None)
@given(sizes, st.integers(1, 6))
def test_a_hierarchy_of_one_level_is_the_ring(n, p):
    for ranks in (range(min(p, 4)), range(0, 4 * p, 4)):
        ring, levels = (comm.all_reduce(n, ranks, NET, a) for a in ("ring", "hierarchical"))
        assert levels == pytest.approx(ring)


def test_between_nodes_of_h800s_the_hierarchy_is_worth_its_steps():
    h800 = network("h800")
    ring, levels = (comm.all_reduce(1e9, range(16), h800, a) for a in ("ring", "hierarchical"))
    assert ring / levels == pytest.approx(3.33, abs=0.01)


@settings(deadline=None)
@given(sizes, groups, st.sampled_from(["ring", "tree"]))
def test_times_are_no_less_with_more_bytes_or_a_slower_link(n, ranks, algorithm):
    base = comm.all_reduce(n, ranks, NET, algorithm)
    assert comm.all_reduce(2 * n, ranks, NET, algorithm) >= base >= 0
    assert comm.all_reduce(n, ranks, NET.slower(inside=2, across=3), algorithm) >= base
    assert (base == 0) == (len(ranks) == 1)


def test_an_all_to_all_takes_one_latency_and_the_busiest_rank():
    sent = [[0] * 8 for _ in range(8)]
    sent[0][1], sent[2][1] = 40, 24  # rank 1 takes in 64 inside
    assert comm.all_to_all(sent, range(8), NET) == 3 + 64 / 8
    sent[0][5] = 6  # 6 across, at a sixth of the time
    assert comm.all_to_all(sent, range(8), NET) == 3 + 8
    sent[3][6] = 9
    assert comm.all_to_all(sent, range(8), NET) == 3 + 9


def test_only_a_tier_with_traffic_costs_its_latency_and_ones_own_share_is_free():
    assert comm.all_to_all([[7, 6], [0, 9]], PAIR, NET) == 2 + 6
    assert comm.all_to_all([[7, 0], [0, 9]], PAIR, NET) == 0
    assert comm.all_to_all([[5]], [3], NET) == 0


def test_both_tiers_may_be_the_same_link():
    same = Network(ACROSS, ACROSS, 2)
    sent = [[0, 9, 0, 0], [0] * 4, [0] * 4, [4, 0, 0, 0]]
    assert comm.all_to_all(sent, range(4), same) == 2 + 9


@settings(deadline=None)
@given(exchanges())
def test_an_all_to_all_is_what_adding_up_every_message_gives(exchange):
    ranks, sent = exchange
    loads = {}
    for i, a in enumerate(ranks):
        for j, b in enumerate(ranks):
            if a != b and sent[i][j]:
                tier = NET.tier(a, b)
                for end in ((a, "out", tier), (b, "in", tier)):
                    loads[end] = loads.get(end, 0) + sent[i][j]
    busiest = max((n / tier.bandwidth for (_, _, tier), n in loads.items()), default=0)
    latency = max((tier.alpha for _, _, tier in loads), default=0)
    assert comm.all_to_all(sent, ranks, NET) == pytest.approx(latency + busiest)
    mirrored = [list(column) for column in zip(*sent)]
    assert comm.all_to_all(mirrored, ranks, NET) == comm.all_to_all(sent, ranks, NET)


@settings(deadline=None)
@given(exchanges())
def test_bytes_by_tier_are_all_bytes_but_the_own_shares(exchange):
    ranks, sent = exchange
    total = sum(map(sum, sent)) - sum(sent[i][i] for i in range(len(ranks)))
    assert sum(comm.tier_bytes(sent, ranks, NET).values()) == total
    nowhere = Network(INSIDE, ACROSS, 1)
    assert comm.tier_bytes(sent, ranks, nowhere)["inside"] == 0


def test_a_uniform_exchange_has_its_closed_form():
    got = comm.all_to_all_uniform(10, range(8), NET)
    assert got == 3 + max(3 * 10 / 8, 4 * 10 / 1)
    assert comm.all_to_all_uniform(10, range(4), NET) == 3 + 3 * 10 / 8


@settings(deadline=None)
@given(exchanges(nodes=[0, 1, 2, 4, 5, 6, 12, 13, 14]))
def test_two_stages_bring_every_byte_there_by_one_message_a_node(exchange):
    ranks, sent = exchange
    across, inside = comm.two_stage(sent, ranks, NET)
    p = len(ranks)
    for i in range(p):
        for relay in range(p):
            if across[i][relay]:  # only to the own place of other nodes
                assert i % 3 == relay % 3 and i // 3 != relay // 3
            if inside[i][relay]:
                assert i // 3 == relay // 3
    arrived = [sum(inside[i][j] for i in range(p)) for j in range(p)]
    assert arrived == [sum(sent[i][j] for i in range(p)) for j in range(p)]
    flat = comm.tier_bytes(sent, ranks, NET)
    assert comm.tier_bytes(across, ranks, NET) == {"inside": 0, "across": flat["across"]}
    assert comm.tier_bytes(inside, ranks, NET)["across"] == 0


def test_two_stages_forward_bytes_inside_that_a_flat_exchange_does_not():
    ranks, sent = range(8), [[1] * 8 for _ in range(8)]
    flat = comm.tier_bytes(sent, ranks, NET)["inside"]
    _, inside = comm.two_stage(sent, ranks, NET)
    assert flat == 24 and comm.tier_bytes(inside, ranks, NET)["inside"] == 48


def test_the_hierarchical_all_to_all_takes_both_stages_and_saves_nothing_by_itself():
    sent = [[1] * 8 for _ in range(8)]
    flat, levels = (f(sent, range(8), NET) for f in (comm.all_to_all, comm.all_to_all_two_stage))
    assert flat == 3 + 4 / 1
    assert levels == (2 + 4 / 1) + (3 + 3 * 2 / 8)


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: comm.all_reduce(8, [], NET), "empty or names a rank twice"),
        (lambda: comm.all_gather(8, [], NET), "empty or names a rank twice"),
        (lambda: comm.broadcast(8, [1, 1], NET), r"group \[1, 1\]"),
        (lambda: comm.all_gather(-1, [0, 1], NET), "-1 bytes"),
        (lambda: comm.point_to_point(math.nan, 0, 1, NET), "nan bytes"),
        (lambda: comm.point_to_point(8, -1, -1, NET), "rank -1"),
        (lambda: comm.all_reduce(8, [0, 1], NET, "butterfly"), "no algorithm 'butterfly'"),
        (
            lambda: comm.all_reduce(8, [0, 1, 4], NET, "hierarchical"),
            r"ranks by node: \{0: 2, 1: 1",
        ),
        (lambda: comm.two_stage([[0] * 3] * 3, [0, 1, 4], NET), "ranks by node"),
        (lambda: comm.all_to_all([[0, 1]], [0, 1], NET), "2 ranks and a matrix"),
        (lambda: comm.all_to_all([[0, 1], [0]], [0, 1], NET), r"rows of \[2, 1\]"),
        (lambda: comm.all_to_all([[0, -1], [0, 0]], [0, 1], NET), "-1 bytes"),
        (lambda: comm.tier_bytes([[0, 1], [0, 0]], [0, 0], NET), "names a rank twice"),
    ],
)
def test_what_cannot_be_timed_is_refused(call, told):
    with pytest.raises(NetworkError, match=told):
        call()
