"""The ring sums exactly, on simulated ranks and on real ones, with the bytes its budget says."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial.learn.exercises.parallel.lockstep import pass_on, together
from dsv3_tutorial.parallel import traffic
from dsv3_tutorial.parallel.launch import launch
from dsv3_tutorial.parallel.rings import (
    hierarchical_all_reduce,
    neighbour_exchange,
    node_collectives,
    pass_round,
    ring_all_reduce,
    sum_over_ranks,
)


def simulated(xs):
    """The ring on len(xs) simulated ranks."""

    def make(rank, collective):
        return xs[rank].clone(), rank, len(xs), collective("exchange")

    return together(ring_all_reduce, make, len(xs), {"exchange": pass_on})


def test_passing_all_of_x_round_gives_the_same_sum_for_half_the_steps_and_more_bytes():
    xs = torch.arange(15).view(3, 5)

    def make(rank, collective):
        return xs[rank].clone(), rank, 3, collective("exchange")

    ran = together(pass_round, make, 3, {"exchange": pass_on})
    assert ran.trouble is None and ran.changed is None
    assert all(torch.equal(result, xs.sum(dim=0)) for result in ran.results)
    assert [len(sent) for sent in ran.sent] == [2] * 3 and ran.bytes() == 2 * xs[0].nbytes


@given(st.integers(1, 9), st.integers(0, 5), st.integers(0, 99))
def test_every_rank_holds_the_exact_sum_after_two_p_minus_one_messages_of_a_pth(world, part, seed):
    draw = torch.Generator().manual_seed(seed)
    xs = torch.randint(-(2**40), 2**40, (world, world * part), generator=draw)
    ran = simulated(xs)
    assert ran.trouble is None and ran.changed is None
    assert all(torch.equal(result, xs.sum(dim=0)) for result in ran.results)
    assert [len(sent) for sent in ran.sent] == [2 * (world - 1)] * world
    assert ran.bytes() * world == 2 * (world - 1) * xs[0].numel() * 8


def test_all_ranks_hold_the_same_bits_whatever_the_rounding():
    xs = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    results = simulated(xs).results
    assert all(torch.equal(result, results[0]) for result in results)
    assert not torch.equal(results[0], xs.sum(dim=0))  # the order of the sum differs by chunk


def _on_real_ranks() -> dict:
    """Run on 4 ranks: the ring over all, over pairs, and alone; and the sum in two levels."""
    rank, world = dist.get_rank(), dist.get_world_size()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    rails = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    alone = [dist.new_group([each]) for each in range(world)][rank]
    x = torch.arange(8.0, dtype=torch.float64) * (rank + 1) ** 2
    pair = pairs[rank // 2]

    def scatter(whole):
        return sum_over_ranks(whole, pair).chunk(2)[rank % 2]

    def gather(part):
        parts = [torch.empty_like(part) for _ in range(2)]
        dist.all_gather(parts, part.contiguous(), group=pair)
        return torch.cat(parts)

    def across(part):
        return sum_over_ranks(part, rails[rank % 2])

    exchanged = neighbour_exchange()
    return {
        "x": x,
        "ring": ring_all_reduce(x, rank, world, exchanged),
        "bf16": ring_all_reduce(x.bfloat16(), rank, world, exchanged),
        "pair": ring_all_reduce(x, rank % 2, 2, neighbour_exchange(pair)),
        "alone": ring_all_reduce(x, 0, 1, neighbour_exchange(alone)),
        "from": exchanged(torch.tensor([rank])).item(),
        "strided": exchanged(torch.arange(6).view(2, 3).T + 10 * rank),
        "library": sum_over_ranks(x),
        "hierarchical": hierarchical_all_reduce(x, scatter, across, gather),
        "kept": x.clone(),
    }


@pytest.fixture(scope="module")
def ranks():
    return launch(_on_real_ranks, 4, echo=False)


def test_real_ranks_get_the_sum_in_all_and_in_subgroups_and_keep_their_input(ranks):
    total = torch.arange(8.0, dtype=torch.float64) * 30  # 1 + 4 + 9 + 16
    pairs = [5, 5, 25, 25]
    for rank, (got, pair) in enumerate(zip(ranks, pairs, strict=True)):
        for name in ("ring", "library", "hierarchical"):
            assert torch.equal(got[name], total), name
        assert torch.equal(got["pair"], torch.arange(8.0, dtype=torch.float64) * pair)
        assert torch.equal(got["alone"], got["x"]) and torch.equal(got["kept"], got["x"])
        assert torch.equal(got["bf16"], total.bfloat16())  # small whole numbers: exact
        assert got["from"] == (rank - 1) % 4
        assert torch.equal(got["strided"], torch.arange(6).view(2, 3).T + 10 * ((rank - 1) % 4))


def _exchanged(kinds: list) -> tuple:
    """What a rank gets, or is told, and the bytes that it is seen to send."""
    shape, dtype = kinds[dist.get_rank()]
    with traffic.record() as seen:
        try:
            found = neighbour_exchange()(torch.ones(shape, dtype=dtype))
        except ValueError as error:
            found = str(error)
    return found, [(call.kind, call.n) for call in seen.calls]


@pytest.mark.parametrize(
    "other", [((2,), torch.float64), ((4, 1), torch.float32), ((4,), torch.int32)]
)
def test_a_neighbour_that_sends_another_shape_or_dtype_is_refused(other):
    mine = ((4,), torch.float32)
    told = [f"{dtype} {shape}" for shape, dtype in (mine, other)]
    for rank, (said, calls) in enumerate(launch(_exchanged, 2, [mine, other])):
        assert f"Rank {1 - rank} sends {told[1 - rank]}, and this rank {told[rank]}." in said
        assert calls == []


def test_the_header_in_front_of_a_chunk_is_not_counted_as_traffic():
    for found, calls in launch(_exchanged, 2, [((2, 3), torch.bfloat16)] * 2):
        assert torch.equal(found, torch.ones(2, 3, dtype=torch.bfloat16))
        assert sorted(calls) == [("recv", 12), ("send", 12)]


def _by_node(ranks_per_node: int) -> tuple:
    scatter, reduce, gather = node_collectives(ranks_per_node)
    x = torch.arange(8.0, dtype=torch.float64) * 3 ** dist.get_rank()
    return scatter(x), hierarchical_all_reduce(x, scatter, reduce, gather)


@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_the_collectives_of_nodes_make_the_sum_over_all_ranks(ranks_per_node):
    whole = torch.arange(8.0, dtype=torch.float64) * (1 + 3 + 9 + 27)
    for rank, (part, total) in enumerate(launch(_by_node, 4, ranks_per_node)):
        node = range(rank // ranks_per_node * ranks_per_node, 4)[:ranks_per_node]
        inside = torch.arange(8.0, dtype=torch.float64) * sum(3**r for r in node)
        assert torch.equal(part, inside.chunk(ranks_per_node)[rank % ranks_per_node])
        assert torch.equal(total, whole)
