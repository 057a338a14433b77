"""Placement of experts: what holds for every load, what no other choice beats, what is refused."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.moe.placement import deal, in_order, place, rebalance, replicate, swap_down

LOAD = st.one_of(st.just(0.0), st.floats(1e-3, 1e6), st.integers(1, 9).map(float))


@st.composite
def requests(draw):
    """Arguments of rebalance that can be met, hierarchical and global ones alike."""
    n_nodes = draw(st.integers(1, 4))
    devices_a_node = draw(st.integers(1, 4))
    n_devices = n_nodes * devices_a_node
    n_groups = draw(st.one_of(st.integers(1, 3).map(lambda m: m * n_nodes), st.integers(1, 6)))
    n_experts = n_groups * draw(st.integers(1, 4))
    least = -(-n_experts // n_devices)
    copies = n_devices if n_groups % n_nodes else devices_a_node
    most = n_experts * copies // n_devices
    n_replicas = n_devices * draw(st.integers(least, min(most, least + 3)))
    layers = draw(st.integers(1, 3))
    loads = draw(st.lists(LOAD, min_size=layers * n_experts, max_size=layers * n_experts))
    loads = torch.tensor(loads, dtype=torch.float64).view(layers, n_experts)
    return loads, n_replicas, n_groups, n_nodes, n_devices


def possible(request):
    loads, n_replicas, n_groups, n_nodes, n_devices = request
    copies = n_devices if n_groups % n_nodes else n_devices // n_nodes
    return loads.shape[1] <= n_replicas <= loads.shape[1] * copies


requests_that_can_be_met = requests().filter(possible)
often = settings(max_examples=80, deadline=None)


@given(requests_that_can_be_met)
@often
def test_every_expert_is_placed_as_often_as_it_is_counted_and_every_slot_is_filled(request):
    loads, n_replicas, _, _, n_devices = request
    placement = rebalance(*request)
    for slots, counts in zip(placement.physical_to_logical, placement.logical_count):
        assert torch.equal(torch.bincount(slots, minlength=loads.shape[1]), counts)
        assert counts.min() >= 1 and counts.sum() == n_replicas == len(slots)
    held = torch.bincount(placement.device_of)
    assert held.tolist() == [n_replicas // n_devices] * n_devices


@given(requests_that_can_be_met)
@often
def test_no_device_holds_an_expert_twice(request):
    placement = rebalance(*request)
    for slots in placement.physical_to_logical:
        held = list(zip(placement.device_of.tolist(), slots.tolist()))
        assert len(set(held)) == len(held)


@given(requests_that_can_be_met)
@often
def test_all_load_is_carried_and_an_expert_shares_it_evenly_over_its_replicas(request):
    loads, *_, n_devices = request
    placement = rebalance(*request)
    torch.testing.assert_close(placement.device_load.sum(dim=1), loads.sum(dim=1))
    for row, slots, counts, carried in zip(
        loads, placement.physical_to_logical, placement.logical_count, placement.device_load
    ):
        for device in range(n_devices):
            mine = slots[placement.device_of == device]
            torch.testing.assert_close(carried[device], (row[mine] / counts[mine]).sum())


@given(requests_that_can_be_met)
@often
def test_a_group_stays_on_one_node_where_nodes_divide_groups(request):
    loads, _, n_groups, n_nodes, n_devices = request
    if n_groups % n_nodes:
        return
    placement = rebalance(*request)
    node_of = placement.device_of // (n_devices // n_nodes)
    group_of = torch.arange(loads.shape[1]) // (loads.shape[1] // n_groups)
    for slots in placement.physical_to_logical:
        pairs = set(zip(group_of[slots].tolist(), node_of.tolist()))
        assert len(pairs) == n_groups  # each group with one node
        assert len({node for _, node in pairs}) == n_nodes


@given(requests_that_can_be_met)
@often
def test_devices_of_one_node_differ_by_less_than_one_replica(request):
    """The bound of the rounds: busiest - idlest <= heaviest - lightest replica of the node."""
    loads, _, n_groups, n_nodes, _ = request
    placement = rebalance(*request)
    nodes = 1 if n_groups % n_nodes else n_nodes
    per_slot = (loads / placement.logical_count).gather(1, placement.physical_to_logical)
    per_slot = per_slot.view(len(loads), nodes, -1)
    carried = placement.device_load.view(len(loads), nodes, -1)
    apart = carried.amax(dim=2) - carried.amin(dim=2)
    replicas_apart = per_slot.amax(dim=2) - per_slot.amin(dim=2)
    assert (apart <= replicas_apart + 1e-9 * loads.sum(dim=1, keepdim=True)).all()
    assert (carried.amax(dim=2) <= carried.mean(dim=2) + per_slot.amax(dim=2) * (1 + 1e-9)).all()


@given(st.lists(LOAD, min_size=1, max_size=4), st.integers(0, 5), st.integers(1, 4))
@often
def test_no_other_replica_counts_have_a_less_busy_busiest_replica(loads, extra, limit):
    total = len(loads) + extra
    if total > len(loads) * limit:
        return
    loads = torch.tensor(loads, dtype=torch.float64)
    counts = replicate(loads, total, limit)
    assert counts.sum() == total and counts.min() >= 1 and counts.max() <= limit
    choices = itertools.product(range(1, limit + 1), repeat=len(loads))
    best = min(
        (loads / torch.tensor(choice)).max().item() for choice in choices if sum(choice) == total
    )
    assert (loads / counts).max().item() <= best * (1 + 1e-12)


def test_a_very_hot_expert_gets_replica_after_replica():
    assert replicate(torch.tensor([9.0, 2]), 5).tolist() == [4, 1]
    assert replicate(torch.tensor([8.0, 4, 1]), 6).tolist() == [3, 2, 1]


def test_without_loads_replicas_are_spread_and_not_heaped_on_the_first_expert():
    assert replicate(torch.zeros(4), 7).tolist() == [2, 2, 2, 1]


def test_an_expert_gets_no_second_replica_on_a_device():
    loads = torch.tensor([[1000.0, 1, 1, 1]])
    placement = rebalance(loads, 8, n_groups=1, n_nodes=1, n_devices=2)
    assert placement.logical_count.tolist() == [[2, 2, 2, 2]]
    assert rebalance(loads, 6, 1, 1, 2).logical_count[0, 0] == 2


def test_a_hot_expert_that_one_device_cannot_carry_is_split():
    loads = torch.tensor([[6.0, 1, 1, 1, 1, 1, 1]])
    placement = rebalance(loads, n_replicas=8, n_groups=1, n_nodes=1, n_devices=2)
    assert placement.device_load.tolist() == [[6.0, 6.0]]
    assert placement.imbalance.tolist() == [1.0]
    assert in_order(torch.tensor([[6.0, 1, 1, 1]]), n_devices=2).imbalance.item() == 7 / 4.5


def test_equal_loads_that_divide_evenly_are_carried_evenly():
    loads = torch.ones(2, 16, dtype=torch.int64)
    placement = rebalance(loads, 16, n_groups=4, n_nodes=2, n_devices=8)
    assert (placement.device_load == 2).all()


def test_the_prefill_of_v3_has_nine_slots_a_gpu_and_beats_no_placement_on_skewed_loads():
    generator = torch.Generator().manual_seed(0)
    loads = torch.randn(58, 256, generator=generator).exp()  # 58 MoE layers, log-normal loads
    ours = rebalance(loads, n_replicas=288, n_groups=8, n_nodes=4, n_devices=32)
    assert ours.physical_to_logical.shape == (58, 288)
    assert torch.bincount(ours.device_of).tolist() == [9] * 32
    anywhere = rebalance(loads, n_replicas=288, n_groups=1, n_nodes=1, n_devices=32)
    trivial = in_order(loads, n_devices=32)
    assert anywhere.imbalance.mean() < ours.imbalance.mean() < trivial.imbalance.mean()
    assert anywhere.imbalance.max() < 1.1 < 1.5 < trivial.imbalance.mean()


@given(st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_on_random_loads_the_busiest_device_is_on_the_mean_no_busier_than_in_order(seed):
    generator = torch.Generator().manual_seed(seed)
    loads = torch.rand(20, 16, generator=generator)
    ours = rebalance(loads, 16, n_groups=1, n_nodes=1, n_devices=4)
    assert ours.imbalance.mean() <= in_order(loads, 4).imbalance.mean()


def test_swaps_mend_what_rounds_cannot():
    weight = torch.tensor([9.0, 8, 7, 6, 5, 1], dtype=torch.float64)
    dealt = deal([0, 1, 2, 3, 4, 5], weight, n_devices=2)
    assert weight[dealt].sum(dim=1).tolist() == [20.0, 16.0]
    assert weight[swap_down(dealt, weight)].sum(dim=1).tolist() == [18.0, 18.0]


@given(requests_that_can_be_met)
@often
def test_swaps_keep_every_replica_and_never_make_the_busiest_busier(request):
    (loads, *_), _, _, _, n_devices = request
    if len(loads) < n_devices:
        return
    weight = torch.cat([loads, loads.new_zeros(-len(loads) % n_devices)])
    dealt = torch.randperm(len(weight)).view(n_devices, -1)
    swapped = swap_down(dealt, weight)
    assert sorted(swapped.flatten().tolist()) == list(range(len(weight)))
    before, after = weight[dealt].sum(dim=1), weight[swapped].sum(dim=1)
    assert after.max() <= before.max() * (1 + 1e-12)
    assert after.min() >= before.min() * (1 - 1e-12)


def test_more_nodes_than_groups_means_the_global_policy():
    loads = torch.rand(1, 8)
    one = rebalance(loads, 12, n_groups=2, n_nodes=4, n_devices=4)
    other = rebalance(loads, 12, n_groups=1, n_nodes=1, n_devices=4)
    assert torch.equal(one.physical_to_logical, other.physical_to_logical)


def test_loads_are_read_and_left_alone():
    loads = torch.randint(0, 100, (2, 8))
    kept = loads.clone()
    rebalance(loads, 8, 2, 2, 4)
    assert torch.equal(loads, kept)


LOADS = torch.ones(2, 8)
REFUSED = {
    "too few replicas": ((LOADS, 4, 1, 1, 4), "n_replicas is 4, fewer than the 8 experts"),
    "uneven slots": ((LOADS, 9, 1, 1, 4), "n_replicas is 9, no multiple of the 4 devices"),
    "groups": ((LOADS, 8, 3, 1, 4), "n_groups is 3, which does not divide the 8 experts"),
    "nodes": ((LOADS, 8, 3, 3, 4), "n_nodes is 3, which does not divide the 4 devices"),
    "more copies than devices": ((LOADS, 24, 2, 2, 4), "on each of its devices makes 16"),
    "zero": ((LOADS, 8, 1, 0, 4), "n_nodes is 0, not a positive number"),
    "shape": ((LOADS[0], 8, 1, 1, 4), r"shape \(8,\), not \(layers, E\)"),
    "NaN": ((LOADS * float("nan"), 8, 1, 1, 4), "negative or not finite"),
    "negative": ((-LOADS, 8, 1, 1, 4), "negative or not finite"),
}


@pytest.mark.parametrize(("arguments", "says"), REFUSED.values(), ids=REFUSED)
def test_the_impossible_is_refused_with_the_number_to_change(arguments, says):
    with pytest.raises(ValueError, match=says) as caught:
        rebalance(*arguments)
    assert str(caught.value).endswith("Change the numbers named.")


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ValueError, match=r"n_groups is 3.*n_nodes is 3.*n_replicas is 9"):
        rebalance(LOADS, 9, n_groups=3, n_nodes=3, n_devices=4)


def test_the_parts_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="from 3 to 6"):
        replicate(torch.ones(3), 7, limit=2)
    with pytest.raises(ValueError, match="from 3 to"):
        replicate(torch.ones(3), 2)
    with pytest.raises(ValueError, match="3 replicas, up to 2 of one expert"):
        place(torch.ones(2), torch.tensor([2, 1]), n_devices=2)
    with pytest.raises(ValueError, match="up to 3 of one expert"):
        place(torch.ones(2), torch.tensor([3, 1]), n_devices=2)
    with pytest.raises(ValueError, match="Change n_devices to a divisor"):
        in_order(LOADS, 3)
