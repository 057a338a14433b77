"""Messages occupy cards: no rank is faster than its links, and none slower than it must be."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial.cost import comm
from dsv3_tutorial.cost.comm import Network, Tier
from dsv3_tutorial.parallel.calls import Call
from dsv3_tutorial.parallel.clock import Compute, TraceError, Wait, retime, timeline

NETWORK = Network(Tier("inside", 3e-6, 160e9), Tier("across", 5e-6, 40e9), 2)
BANDWIDTH = {True: 160e9, False: 40e9}  # by whether both ends are in one node
WORLD = (0, 1, 2, 3)
# Six steps of a quarter against one of twice the whole: 5 latencies more, n / 2 bytes less.
PLENTY = 10 * 5e-6 * 40e9


def traces_of(events, ranks=4):
    """Traces from (rank, event) and (a, b, n, a waits, b waits), a message in both traces."""
    traces = [[] for _ in range(ranks)]
    for event in events:
        if len(event) == 2:
            traces[event[0]].append(event[1])
            continue
        a, b, n, *waits = event
        for kind, rank, wait in zip(("send", "recv"), (a, b), waits, strict=True):
            traces[rank].append(Call(kind, n, (a, b)))
            if wait:
                traces[rank].append(Wait(sum(isinstance(e, Call) for e in traces[rank]) - 1))
    return traces


@st.composite
def runs(draw):
    """Messages and arithmetic in one order of the world, in which no rank waits for a later one."""
    ranks = draw(st.integers(2, 6))
    rank = st.integers(0, ranks - 1)
    crowd = st.tuples(rank, st.just(0))  # often to rank 0: messages that meet at its card
    pair = st.one_of(crowd, st.tuples(rank, rank)).filter(lambda pair: pair[0] != pair[1])
    size = st.sampled_from([3_333_333, 1_000_000, 250_000, 1000, 0])
    flag = st.sampled_from([False, False, True])
    message = st.builds(lambda p, *rest: (*p, *rest), pair, size, flag, flag)
    work = st.tuples(rank, st.builds(Compute, st.sampled_from([30.0, 7.0, 1.0, 0])))
    events = draw(st.lists(st.one_of(message, message, work), min_size=2, max_size=14))
    return traces_of(events, ranks)


def loads(traces):
    """Bytes by (direction, rank, whether inside) of all messages."""
    total = Counter()
    for call in (e for trace in traces for e in trace if isinstance(e, Call)):
        a, b = call.ranks
        inside = NETWORK.node(a) == NETWORK.node(b)
        total[call.kind, a if call.kind == "send" else b, inside] += call.n
    return total


@given(runs())
def test_no_rank_is_done_before_its_cards_could_have_carried_its_bytes(traces):
    clocks = retime(traces, NETWORK, rate=1e6)
    for (_, rank, inside), n in loads(traces).items():
        assert clocks[rank] >= n / BANDWIDTH[inside] * (1 - 1e-12)


def by_sorting(traces, rate):
    """The same clocks another way: guess all arrivals, play, sort, and repeat until they stand."""
    arrivals = {}
    for _ in range(sum(map(len, traces)) + 2):
        clocks, left = [], []
        for rank, trace in enumerate(traces):
            now, over, free, turns = 0.0, [], {}, Counter()
            for event in trace:
                if isinstance(event, Compute):
                    now += event.flops / rate
                elif isinstance(event, Wait):
                    now = max(now, over[event.call])
                else:
                    name = event.ranks, turns[event.kind, event.ranks]
                    turns[event.kind, event.ranks] += 1
                    tier = NETWORK.tier(*event.ranks)
                    if event.kind == "send":
                        depart = max(now, free.get(tier, 0.0))
                        free[tier] = depart + event.n / tier.bandwidth
                        left.append((depart, rank, len(left), event.n, name))
                        over.append(free[tier])
                    else:
                        over.append(arrivals.get(name, 0.0))
            clocks.append(max([now, *over]))
        taken, found = {}, {}
        for depart, _, _, n, name in sorted(left):
            tier, to = NETWORK.tier(*name[0]), name[0][1]
            alone, behind = depart + tier.time(n), taken.get((tier, to), 0.0) + n / tier.bandwidth
            taken[tier, to] = found[name] = max(alone, behind)
        if found == arrivals:
            return clocks
        arrivals = found
    raise AssertionError("no arrivals stand")


@given(runs())
def test_messages_are_taken_in_the_order_in_which_they_left(traces):
    assert retime(traces, NETWORK, rate=1e6) == by_sorting(traces, 1e6)


@given(st.sampled_from([(0, 1), (0, 2)]), st.integers(0, 10**9), st.sampled_from([0.0, 0.7]))
def test_a_message_alone_takes_point_to_point_and_its_sender_only_the_bytes(pair, n, since):
    a, b = pair
    traces = traces_of([(a, Compute(since)), (a, b, n, True, True)])
    clocks = retime(traces, NETWORK, rate=1)
    assert clocks[b] == since + comm.point_to_point(n, a, b, NETWORK)
    assert clocks[a] == since + n / NETWORK.tier(a, b).bandwidth


def test_ten_messages_over_one_card_take_ten_times_their_bytes():
    for b, tier in ((1, NETWORK.inside), (2, NETWORK.across)):
        clocks = retime(traces_of([(0, b, 2**24, False, False)] * 10), NETWORK)
        assert clocks[b] == pytest.approx(tier.alpha + 10 * 2**24 / tier.bandwidth)
        assert clocks[0] == pytest.approx(10 * 2**24 / tier.bandwidth)


def test_the_tiers_and_directions_of_a_rank_are_cards_of_their_own():
    n = 2**20
    both_tiers = [(0, 1, n, False, False), (0, 2, n, False, False), (2, 0, n, False, False)]
    found = retime(traces_of(both_tiers), NETWORK)
    assert found[1] == comm.point_to_point(n, 0, 1, NETWORK)
    assert found[0] == found[2] == comm.point_to_point(n, 0, 2, NETWORK)


def test_two_messages_to_one_rank_arrive_one_after_the_other_the_earlier_first():
    n, late = 4_000_000, Compute(1.0)
    traces = traces_of([(2, late), (2, 0, n, True, False), (3, 0, n, True, False)])
    traces[0] = [Call("recv", n, (2, 0)), Wait(0), Call("recv", n, (3, 0)), Wait(1)]
    later, earlier = (s.end for s in timeline(traces, NETWORK, 1e6)[0] if type(s.event) is Call)
    assert earlier == comm.point_to_point(n, 3, 0, NETWORK)
    assert later == pytest.approx(5e-6 + 2 * n / 40e9)
    together = retime(traces_of([(r, 0, n, True, True) for r in (2, 3)]), NETWORK)
    assert together[0] == pytest.approx(5e-6 + 2 * n / 40e9)


def test_a_wait_for_a_send_is_over_before_the_message_is_there():
    n = 2**20
    (spans, *_) = timeline(traces_of([(0, 2, n, True, True)]), NETWORK)
    assert spans[1].end == n / 40e9 < comm.point_to_point(n, 0, 2, NETWORK)


# Whole exchanges, as messages


def ring(n, p=4):
    """A ring all-reduce of n bytes: in each step every rank sends on, and waits for both."""
    steps = []
    for rank in range(p):
        trace = []
        for step in range(2 * (p - 1)):
            trace.append(Call("send", n // p, (rank, (rank + 1) % p)))
            trace.append(Call("recv", n // p, ((rank - 1) % p, rank)))
            trace += [Wait(2 * step), Wait(2 * step + 1)]
        steps.append(trace)
    return steps


def everybody(n, order):
    """All of n bytes from everybody to everybody: order(rank) is whom a rank sends to, in turn."""
    return [
        [Call("send", n, (rank, to)) for to in order(rank)]
        + [Call("recv", n, (of, rank)) for of in WORLD if of != rank]
        for rank in WORLD
    ]


def by_number(rank):
    return [to for to in WORLD if to != rank]


def by_pairs(rank):
    """In each round the ranks are paired, and each tier of a rank has one message at a time."""
    return [rank ^ step for step in (1, 2, 3)]


@given(st.integers(0, 10**9))
def test_everybody_to_everybody_is_an_all_to_all_if_no_two_send_to_one_at_once(n):
    one = comm.all_to_all_uniform(n, WORLD, NETWORK)
    assert max(retime(everybody(n, by_pairs), NETWORK)) == pytest.approx(max(one, 5e-6))
    crowded = max(retime(everybody(n, by_number), NETWORK))
    assert crowded == pytest.approx(5e-6 + 3 * n / 40e9)  # rank 3's card idles, then has two


@given(st.floats(PLENTY, 1e10), st.sampled_from([by_number, by_pairs]))
def test_a_ring_beats_everybody_to_everybody_wherever_bytes_weigh_more_than_latencies(n, order):
    n = 4 * int(n / 4 + 1)
    assert max(retime(everybody(n, order), NETWORK)) > max(retime(ring(n), NETWORK))


def test_everybody_to_everybody_beats_a_ring_where_latencies_are_all():
    """One latency against six: that is no error of the clock."""
    n = int(PLENTY / 20)
    assert max(retime(everybody(n, by_number), NETWORK)) < max(retime(ring(n), NETWORK))


@given(st.integers(0, 10**9), st.sampled_from([2, 4, 6]))
def test_a_ring_of_messages_goes_at_the_slow_cards_pace(chunk, p):
    """At most the model's time, and less only by the latencies but one: chunks follow closely."""
    clock, model = (
        max(retime(ring(p * chunk, p), NETWORK)),
        comm.all_reduce(p * chunk, range(p), NETWORK),
    )
    steps = 2 * (p - 1)
    slow = NETWORK.inside if p == 2 else NETWORK.across
    floor = slow.alpha + steps * chunk / slow.bandwidth
    assert floor * (1 - 1e-9) <= clock <= model * (1 + 1e-9)
    if p > 2 and chunk > (3e-6 + 5e-6) / (1 / 40e9 - 1 / 160e9):
        assert clock == pytest.approx(floor, rel=1e-9)


def test_in_one_node_a_ring_of_messages_is_the_model():
    one_node = Network(NETWORK.inside, NETWORK.across, 4)
    clocks = retime(ring(4 * 98304), one_node)
    assert clocks == pytest.approx([comm.all_reduce(4 * 98304, WORLD, one_node)] * 4, rel=1e-15)


def test_slower_cards_never_make_a_run_faster():
    traces = everybody(10**6, by_number)
    found = [max(retime(traces, NETWORK.slower(across=k))) for k in (1, 2, 4, 8)]
    assert all(a < b for a, b in pairwise(found))


# What two ranks must agree in


@pytest.mark.parametrize(
    ("ours", "theirs"), [((16, "float64"), (16, "float32")), ((16, "float64"), (32, "float64"))]
)
def test_a_message_that_is_received_as_another_is_refused_with_both_ranks_and_sizes(ours, theirs):
    sent, taken = (
        Call(k, n, (0, 1), dtype=t) for k, (n, t) in zip(("send", "recv"), (ours, theirs))
    )
    said = (
        f"rank 0 has {ours[0]} bytes of {ours[1]} for it, rank 1 {theirs[0]} bytes of {theirs[1]}"
    )
    for traces in ([[sent], [taken, Wait(0)]], [[sent, Wait(0)], [Compute(1.0), taken]]):
        with pytest.raises(TraceError, match=f"One message, and {said}"):
            retime(traces, NETWORK, rate=1)


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "broadcast", "gather"])
def test_a_collective_of_unlike_tensors_is_refused(kind):
    views = [Call(kind, 16 if r < 2 else 24, (0, 1, 2), root=0) for r in range(3)]
    with pytest.raises(TraceError, match=f"One {kind}, and rank 0 has 16 .* rank 2 24 bytes"):
        retime([[view] for view in views], NETWORK)


def test_an_all_to_all_may_send_each_what_it_likes_of_one_dtype():
    rows = [
        Call("all_to_all", n, (0, 1), (0, n) if r == 0 else (n, 0), dtype="uint8")
        for r, n in enumerate((8, 24))
    ]
    assert retime([[row] for row in rows], NETWORK) == [3e-6 + 24 / 160e9] * 2
