"""The counts that a dispatcher hands to the all-to-all, against counting by hand."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial.parallel.counts import destination_counts, node_copies


@st.composite
def choices(draw):
    """(indices, experts of a place, places): every token's different experts."""
    places, each, m = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(0, 12))
    k = draw(st.integers(1, places * each))
    seed = draw(st.integers(0, 999))
    scores = torch.rand(m, places * each, generator=torch.Generator().manual_seed(seed))
    return scores.topk(k, dim=-1).indices, each, places


@given(choices())
def test_every_pair_is_counted_where_its_expert_lives(chosen):
    indices, each, world = chosen
    counts = destination_counts(indices, each, world)
    by_hand = [0] * world
    for expert in indices.flatten().tolist():
        by_hand[expert // each] += 1
    assert counts.tolist() == by_hand and counts.dtype == torch.int64


@given(choices(), st.integers(0, 5))
def test_a_token_crosses_once_to_each_other_node_that_has_an_expert_for_it(chosen, home):
    indices, each, nodes = chosen
    home %= nodes
    tokens, rows = node_copies(indices, each, nodes, home)
    assert tokens.dtype == rows.dtype == torch.int64 and rows[home] == 0
    for node, part in enumerate(tokens.split(rows.tolist())):
        wanted = [
            token
            for token, experts in enumerate(indices.tolist())
            if node != home and any(expert // each == node for expert in experts)
        ]
        assert part.tolist() == wanted
    assert len(tokens) <= destination_counts(indices, each, nodes).sum()
