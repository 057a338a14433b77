"""What is packed and counted before anything is sent, against its definition, token by token."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.cost.comm import tier_bytes
from dsv3_tutorial.cost.tiers import Network, Tier
from dsv3_tutorial.parallel.counts import destination_counts, node_copies
from dsv3_tutorial.parallel.dispatch import (
    backward_bytes,
    forward_bytes,
    messages,
    pack,
    pairs_of,
    starts,
)
from dsv3_tutorial.parallel.exchange import row_bytes


@st.composite
def choices(draw):
    """(E, ranks per node, each rank's (M, K)): experts of a token differ, some ranks are idle."""
    places = draw(st.sampled_from([1, 2, 3]))
    world = places * draw(st.integers(1, 3))
    n_experts = world * draw(st.integers(1, 3))
    k = draw(st.integers(1, min(4, n_experts)))
    token = st.permutations(range(n_experts)).map(lambda order: order[:k])
    ranks = draw(st.lists(st.lists(token, max_size=5), min_size=world, max_size=world))
    return n_experts, places, [torch.tensor(r, dtype=torch.int64).view(-1, k) for r in ranks]


def brute(indices, n_experts, places, way):
    """Rows from rank to rank by hop, written out."""
    world = len(indices)
    per = n_experts // world
    hops = [[[0] * world for _ in range(world)] for _ in range(2 if way == "two_stage" else 1)]
    for i, own in enumerate(indices):
        for token in own.tolist():
            ranks = [expert // per for expert in token]
            if way == "two_stage":
                relays = {rank // places * places + i % places for rank in ranks}
                for relay in relays:
                    hops[0][i][relay] += 1
                    for rank in {r for r in ranks if r // places == relay // places}:
                        hops[1][relay][rank] += 1
            else:
                for rank in ranks if way == "flat" else set(ranks):
                    hops[0][i][rank] += 1
    return hops


@settings(max_examples=60, deadline=None)
@given(choices(), st.sampled_from(["flat", "deduplicated", "two_stage"]))
def test_rows_are_counted_as_tokens_travel(choice, way):
    n_experts, places, indices = choice
    assert [s.rows for s in messages(indices, n_experts, way, places)] == brute(
        indices, n_experts, places, way
    )


@settings(max_examples=60, deadline=None)
@given(choices())
def test_the_counts_are_those_of_the_exercises(choice):
    n_experts, places, indices = choice
    world = len(indices)
    (flat,), (across, _) = (messages(indices, n_experts, w, places) for w in ("flat", "two_stage"))
    for rank, own in enumerate(indices):
        wanted = destination_counts(own, n_experts // world, world)
        assert flat.rows[rank] == wanted.tolist()
        nodes, home = world // places, rank // places
        _, copies = node_copies(own, n_experts // nodes, nodes, home)
        relays = across.rows[rank][rank % places :: places]
        assert [0 if n == home else r for n, r in enumerate(relays)] == copies.tolist()


@settings(max_examples=60, deadline=None)
@given(choices())
def test_each_way_sends_no_more_rows_across_than_the_one_before(choice):
    n_experts, places, indices = choice
    tier = Tier("link", 0.0, 1.0)
    network, ranks = Network(tier, tier, places), range(len(indices))
    across = []
    for way in ("flat", "deduplicated", "two_stage"):
        stages = messages(indices, n_experts, way, places)
        across.append(sum(tier_bytes(s.rows, ranks, network)["across"] for s in stages))
    assert across[0] >= across[1] >= across[2]
    inside = messages(indices, n_experts, "two_stage", places)[1]
    assert tier_bytes(inside.rows, ranks, network)["across"] == 0


@settings(max_examples=60, deadline=None)
@given(choices())
def test_a_parcel_holds_every_pair_and_no_row_twice_for_a_destination(choice):
    n_experts, _, indices = choice
    world = len(indices)
    own = indices[0]
    row, expert, _ = pairs_of(own, torch.ones(own.shape))
    parcel = pack(row, expert // (n_experts // world), world, len(own))
    begin = starts(parcel.counts[:, 0])
    to = (expert // (n_experts // world))[parcel.order]
    assert torch.equal(to, to.sort().values)
    assert torch.equal(parcel.row[begin[to] + parcel.place], row[parcel.order])
    for rows in parcel.row.split(parcel.counts[:, 0].tolist()):
        assert len(rows.unique()) == len(rows)
    assert parcel.counts[:, 1].tolist() == torch.bincount(to, minlength=world).tolist()


def test_v3_sends_a_token_across_to_four_nodes_at_most_instead_of_eight_times():
    draw = torch.Generator().manual_seed(0)
    node = torch.rand(64, 8, generator=draw).argsort(dim=1)[:, :4].repeat_interleave(2, dim=1)
    within = torch.rand(64, 32, generator=draw).argsort(dim=1)[:, :8]
    indices = [node * 32 + within] + [torch.zeros(0, 8, dtype=torch.int64)] * 63
    (flat,), (across, inside) = (messages(indices, 256, way, 8) for way in ("flat", "two_stage"))
    home = int((node == 0).any(dim=1).sum())
    assert sum(flat.rows[0]) == 64 * 8 and sum(across.rows[0]) == 64 * 4
    assert sum(across.rows[0]) - across.rows[0][0] == 64 * 4 - home
    assert sum(map(sum, inside.rows)) <= 64 * 8


def test_a_forward_and_a_backward_pass_send_the_rows_both_ways():
    indices = [torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 3]])]
    (stage,) = messages(indices, 4, "deduplicated")
    assert stage.rows == [[1, 1], [1, 1]] and stage.pairs == [[2, 2], [1, 1]]
    there, back = row_bytes(256, "fp8"), row_bytes(256, "bf16")
    assert (there, back, row_bytes(256, "as is", 8)) == (264, 512, 2048)
    counts = [[16, 16], [16, 16]]
    rows, names, weights = [[264, 264]] * 2, [[16, 16], [8, 8]], [[8, 8], [4, 4]]
    home = [[512, 512]] * 2
    assert forward_bytes([stage], there, back) == [counts, rows, names, weights, home]
    assert backward_bytes([stage], there, back) == [rows, [[8, 4], [8, 4]], home]


def test_a_flat_dispatch_announces_every_expert_and_names_nothing():
    (stage,) = messages([torch.tensor([[0, 5]]), torch.tensor([[4, 5]])], 6)
    assert stage.counts == [[24, 24], [24, 24]] and stage.pairs == [[0, 0], [0, 0]]
