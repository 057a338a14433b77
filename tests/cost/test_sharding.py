"""Splits on paper: caches, groups in and out of a node, idle stages, hidden messages."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import memory, schedule, sharding
from dsv3_tutorial.cost.schedule_orders import one_f_one_b_order

V3, LLAMA = ModelConfig.named("deepseek-v3"), ModelConfig.named("llama-3.1-405b")


@pytest.mark.parametrize("cfg", [V3, LLAMA], ids=["mla", "gqa"])
@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (8, 1), (1, 8), (4, 2), (16, 3), (3, 5)])
def test_a_gpu_holds_its_replicas_tokens_times_what_lesson_1_says_of_one(cfg, tp, dp):
    tokens = 120
    expected = tokens / dp * memory.cache_bytes_per_gpu(cfg, tp, 1)
    assert sharding.sharded_cache_bytes(cfg, tokens, tp, dp, 1) == expected


def test_eight_gpus_share_mlas_cache_by_dp_alone_and_gqas_either_way():
    layouts = [(8, 1), (4, 2), (2, 4), (1, 8)]
    latent = [sharding.sharded_cache_bytes(V3, 65536, tp, dp) for tp, dp in layouts]
    heads = [sharding.sharded_cache_bytes(LLAMA, 65536, tp, dp) for tp, dp in layouts]
    assert latent == [latent[-1] * 8, latent[-1] * 4, latent[-1] * 2, 70_272 * 65536 / 8]
    assert len(set(heads)) == 1
    assert sharding.sharded_cache_bytes(V3, 9, 1, 8) == 2 * 70_272  # the fullest replica holds two


@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 4, 8, 16]), st.integers(0, 99)), max_size=4),
    st.sampled_from([1, 4, 8, 72]),
)
def test_no_choice_of_groups_that_fit_in_a_node_saves_more_bytes(groups, node):
    sizes = {f"g{i}": size for i, (size, _) in enumerate(groups)}
    traffic = {f"g{i}": sent for i, (_, sent) in enumerate(groups)}
    order = sharding.place_groups(sizes, traffic, node)
    assert sorted(order) == sorted(sizes)
    needed = [name for name in sizes if sizes[name] > 1]
    saved = max(
        sum(traffic[name] for name in chosen)
        for count in range(len(needed) + 1)
        for chosen in itertools.combinations(needed, count)
        if math.prod(sizes[name] for name in chosen) <= node
    )
    across = sharding.bytes_across(order, sizes, traffic, node)
    assert across == sum(traffic[name] for name in needed) - saved


@given(st.integers(1, 8), st.integers(0, 8), st.integers(1, 5), st.integers(1, 9))
def test_1f1b_idles_as_its_closed_form_says(stages, more, t_f, t_b):
    micro_batches = stages + more
    orders = [one_f_one_b_order(stage, stages, micro_batches) for stage in range(stages)]
    assert sharding.bubble(orders, t_f, t_b) == (stages - 1) * (t_f + t_b)


@pytest.mark.parametrize("make", [schedule.gpipe, schedule.one_f_one_b])
def test_the_bubble_of_names_is_that_of_the_simulated_schedule(make):
    made = make(4, 7)
    names = [[str(op) for op in order] for order in made.orders]
    times = schedule.Times(t_f=1.5, t_b=2.5)
    assert sharding.bubble(names, 1.5, 2.5) == pytest.approx(made.bubble(times))


def test_stages_that_wait_for_each_other_are_an_error_and_no_endless_loop():
    with pytest.raises(ValueError, match="wait for each other"):
        sharding.bubble([["F0", "B0"], ["B0", "F1", "F0", "B1"]], 1, 1)


def test_twenty_of_132_sms_make_it_1_7_times_faster_where_work_and_messages_are_equal():
    assert sharding.overlap_speedup(1, 1) == pytest.approx(2 * 112 / 132)
    assert sharding.overlap_speedup(112, 132) == pytest.approx(244 / 132)  # the best balance
    assert sharding.overlap_speedup(1, 0) == pytest.approx(112 / 132)  # nothing to hide: a loss
    assert sharding.overlap_speedup(1, 1, reserved=0) == 2
