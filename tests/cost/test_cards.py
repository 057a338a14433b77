"""A card carries one message at a time, in the order in which they left."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial.cost import comm
from dsv3_tutorial.cost.cards import Cards, Message
from dsv3_tutorial.cost.comm import Network, Tier
from dsv3_tutorial.cost.schedule import SCHEDULES, Times, dual_pipe, gpipe

NETWORK = Network(Tier("inside", 0.1, 1e4), Tier("across", 0.3, 1e3), 2)
LATENCY = Network(Tier("inside", 0.1, float("inf")), Tier("across", 0.3, float("inf")), 2)


@given(st.floats(0, 1e6), st.floats(0, 1e3), st.integers(0, 3), st.integers(0, 3))
def test_a_message_alone_takes_point_to_point(n, at, a, b):
    cards = Cards(NETWORK)
    assert cards.post(n, a, b, at, "it") == (
        at if a == b else at + n / NETWORK.tier(a, b).bandwidth
    )
    assert cards.deliver() == ("it", at + comm.point_to_point(n, a, b, NETWORK))
    assert cards.deliver() is None


def test_messages_of_one_moment_arrive_by_their_senders_rank_each_after_the_other():
    cards = Cards(NETWORK)
    for a in (3, 2):
        assert cards.post(1000, a, 0, 5.0, a) == 6.0
    assert [cards.deliver() for _ in range(2)] == [(2, 6.3), (3, 7.3)]


def test_a_message_that_left_later_waits_only_as_long_as_the_card_is_busy():
    cards = Cards(NETWORK)
    cards.post(1000, 2, 0, 0.5, "later"), cards.post(1000, 3, 0, 0.0, "first")
    cards.post(1000, 1, 0, 0.0, "another tier")
    found = dict(cards.deliver() for _ in range(3))
    assert found == pytest.approx({"first": 1.3, "later": 2.3, "another tier": 0.2})


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_on_cards_of_infinite_bandwidth_has_its_latencies_alone(name):
    schedule, times = SCHEDULES[name](4, 8), Times(0.1, 0.27, 0.11, 0.33)
    alone = schedule.timeline(times, lambda a, b: comm.point_to_point(288, a, b, LATENCY))
    assert schedule.timeline(times, Message(288, LATENCY)) == alone


def test_a_schedule_that_sends_faster_than_its_cards_carry_goes_at_their_pace():
    """GPipe, each micro-batch 1 s on the card from stage 1 to 2, and 0.1 s in a stage."""
    slots = gpipe(4, 20).timeline(Times(0.1, 0.2), Message(1000, NETWORK))
    starts = [s.start for s in slots if s.device == 2 and s.op.kind == "F"]
    assert [b - a for a, b in pairwise(starts)] == pytest.approx([1.0] * 19)


def test_the_two_results_of_a_pair_wait_for_each_other_only_on_one_card():
    """Every device alone in its node: both leave over one card, and the step is longer."""
    apart, times = Network(NETWORK.inside, NETWORK.across, 1), Times(1, 2)
    schedule = dual_pipe(4, 8)
    free = schedule.length(times, lambda a, b: comm.point_to_point(900, a, b, apart))
    assert schedule.length(times, Message(900, apart)) > free
