"""Seconds that no work covers: by hand, by closed form, and by counting moments one by one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial.cost import overlap
from dsv3_tutorial.cost.overlap import covered, exposed, hidden

lengths = st.integers(0, 6)
spans = st.lists(
    st.builds(lambda start, length: (start, start + length), st.integers(0, 20), lengths),
    max_size=6,
)


def moments(of):
    """The whole seconds that spans with whole ends cover: each by its beginning."""
    return {at for start, end in of for at in range(start, end)}


@given(work=spans, other=spans)
def test_exposed_seconds_are_those_counted_one_by_one(work, other):
    assert exposed(work, other) == len(moments(other) - moments(work))
    assert hidden(work, other) == len(moments(other) & moments(work))
    assert covered(other) == len(moments(other))


@given(work=spans, other=spans, data=st.data())
def test_order_and_repetition_change_nothing(work, other, data):
    shuffled = data.draw(st.permutations(work)), data.draw(st.permutations(other))
    assert exposed(*shuffled) == exposed(work, other)
    assert exposed(work + work, other + other) == exposed(work, other)


def test_a_wait_that_work_covers_in_part_costs_the_rest():
    assert exposed([(0, 2), (3, 5)], [(1, 4)]) == 1
    assert exposed([(0, 10)], [(1, 4), (6, 9)]) == 0
    assert exposed([], [(1, 4), (2, 6)]) == 5
    assert exposed([(1, 2)], []) == 0
    assert exposed([(2, 3)], [(0, 2), (3, 4)]) == 3  # what touches does not cover


def test_arguments_are_left_as_they_were():
    work, other = [(3.0, 4.0), (0.0, 1.0)], [(2.0, 5.0), (0.5, 2.5)]
    assert exposed(work, other) == pytest.approx(3.0)
    assert work == [(3.0, 4.0), (0.0, 1.0)] and other == [(2.0, 5.0), (0.5, 2.5)]


@pytest.mark.parametrize("span", [(2, 1), (0, float("inf")), (float("nan"), 1)])
def test_a_span_that_ends_before_it_begins_is_refused_by_its_numbers(span):
    with pytest.raises(overlap.SpanError, match="1 of 2 spans") as caught:
        covered([(0, 1), span])
    assert str(span) in str(caught.value)
