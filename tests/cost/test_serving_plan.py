"""Serving: the largest batch that keeps a promised rate, what ends it, and when nothing serves."""

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsv3_tutorial import paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import comm_moe, expert_network, limits, serving_plan
from dsv3_tutorial.cost.deployment import Deployment
from dsv3_tutorial.cost.expert_network import Exchange
from dsv3_tutorial.cost.scaled import scaled
from dsv3_tutorial.cost.serving_plan import ServingError, Target, best, serve
from dsv3_tutorial.hardware import Cluster, HardwareError, chip, chip_names, cluster

V3, LITE = ModelConfig.named("deepseek-v3"), ModelConfig.named("deepseek-v2-lite")
QWEN = ModelConfig.named("qwen2.5-72b")
PLAIN = Target(drafts=0)


@given(
    st.sampled_from([LITE, QWEN, V3]),
    st.sampled_from(["h800", "h100-sxm", "b200", "h20"]),
    st.sampled_from([1, 4, 8]),
    st.integers(2, 60_000),
    st.floats(0.5, 400),
    st.sampled_from(["fp8", "int4"]),
)
@settings(max_examples=60, deadline=None)
def test_the_batch_keeps_the_rate_and_fits_and_the_next_does_not(
    cfg, name, devices, context, rate, weights
):
    found = serve(cfg, chip(name), Target(context, rate, weights=weights), devices)
    assume(found.fits)
    assert found.deployment.fits and found.per_user >= rate
    each = devices if not found.deployment.cut and found.batch >= devices else 1
    more = found.deployment.with_batch(found.batch + each)
    assert not more.fits or serving_plan.Serving(more, found.target, more.batch).per_user < rate


def test_without_drafts_a_pass_is_the_deployments_own_step():
    found = serve(V3, chip("h800"), PLAIN, 32)
    placed = Deployment(V3, chip("h800"), 32, context=4989, batch=found.batch)
    assert found.deployment == placed and found.pass_s == placed.time_s
    assert found.tokens_per_second_per_gpu == pytest.approx(placed.tokens_per_second / 32)
    assert found.time_per_token_s == pytest.approx(placed.time_s)


def test_an_accepted_draft_gives_two_tokens_for_two_queries_and_one_more_layer():
    plain, drafted = (
        serving_plan.Serving(Deployment(V3, chip("h200"), 16, batch=16, queries=n), PLAIN, 16)
        for n in (1, 2)
    )
    assert plain.tokens_per_pass == 1 and drafted.tokens_per_pass == 1.85
    step, more = drafted.deployment.time_s, drafted.pass_s - drafted.deployment.time_s
    assert drafted.deployment.limit == "bandwidth"
    head = 2 * V3.vocab_size * V3.hidden_size / 4.8e12
    assert more == pytest.approx((step - head) / 61 + head)


def test_a_draft_gains_for_few_hurried_users_and_loses_where_the_network_is_full():
    hasty, patient = Target(tokens_per_second=130), Target(tokens_per_second=20)
    for target, gains in ((hasty, True), (patient, False)):
        plain, drafted = (serve(V3, chip("h800"), replace(target, drafts=n), 64) for n in (0, 1))
        assert (drafted.tokens_per_second > plain.tokens_per_second) == gains
        chosen = serve(V3, chip("h800"), target, 64)
        assert chosen.target.drafts == int(gains)
        assert chosen.batch == (drafted if gains else plain).batch


def test_devices_that_cut_every_matrix_add_up_over_the_link():
    one, two = (
        serving_plan.Serving(Deployment(QWEN, chip("b200"), n, batch=16), PLAIN, 16) for n in (1, 2)
    )
    assert one.pass_s == one.deployment.time_s
    sent = 80 * 2 * (1 / 2) * (16 * 8192 * 2) * 2  # layers, all-reduces, ring, BF16, both halves
    over = sent / chip("b200").scale_up.bandwidth
    assert two.pass_s == pytest.approx(two.deployment.time_s + over)


def test_a_target_that_cannot_be_is_refused_with_all_that_is_wrong():
    with pytest.raises(ServingError, match=r"context = 0.*tokens_per_second = -1.*acceptance = 2"):
        Target(context=0, tokens_per_second=-1, acceptance=2)
    with pytest.raises(ServingError, match=r"devices = 0.*drafts = -1"):
        Target(devices=0, drafts=-1)
    with pytest.raises(ServingError, match="2 drafts, and the model has 1 MTP"):
        serve(V3, chip("h800"), Target(drafts=2), 64)
    assert [way.drafts for way in Target().ways(V3)] == [0, 1]
    assert [way.drafts for way in Target().ways(QWEN)] == [0]


def test_what_does_not_serve_says_which_number_to_change():
    heavy = serve(V3, chip("h100-sxm"), Target(), 8)
    assert not heavy.fits and heavy.tokens_per_second == heavy.per_user == 0
    assert "100.8 GB of weights on each of 8" in heavy.reason and "more devices" in heavy.reason
    assert heavy.time_per_token_s == heavy.dollars_per_million(2) == float("inf")
    long = serve(V3, chip("h200"), Target(context=10_000_000), 8)
    assert not long.fits and "10,000,000 tokens caches" in long.reason
    hasty = serve(V3, chip("h800"), Target(tokens_per_second=1000), 64)
    assert not hasty.fits and "below the 1000 asked for" in hasty.reason
    advised = float(hasty.reason.split("Ask for ")[1].split(" or less")[0])
    assert serve(V3, chip("h800"), Target(tokens_per_second=advised), 64).fits


def test_the_best_unit_is_at_least_as_good_as_every_number_of_devices():
    found = best(V3, cluster("h800:256"))
    tried = [serve(V3, chip("h800"), Target(), n) for n in (16, 32, 64, 128, 256)]
    assert found.tokens_per_second_per_gpu == max(s.tokens_per_second_per_gpu for s in tried)
    assert best(V3, cluster("h800:256"), Target(devices=64)).devices == 64
    small = best(V3, cluster("h800:8"))
    assert not small.fits and small.devices == 8 and small.reason


def test_v3_serves_from_8_h20_only_with_every_matrix_cut():
    found = best(V3, cluster("h20:16"), Target())
    assert found.fits and found.devices == 8 and found.deployment.cut
    with pytest.raises(HardwareError, match="no link of a known rate"):
        best(V3, cluster("h20:16"), Target(cut=False))


def test_more_memory_never_serves_fewer_tokens_where_cut_matrices_are_faster():
    """With more, V3 fits on 8 H20 uncut too, and is slower for a hurried user."""
    few, hurried = cluster("h20:8"), Target(tokens_per_second=150)
    richer = best(V3, Cluster(scaled(few.chip, memory=1.5), 8), hurried)
    assert richer.tokens_per_second_per_gpu >= best(V3, few, hurried).tokens_per_second_per_gpu > 0
    uncut = replace(hurried, cut=False)
    assert best(V3, Cluster(scaled(few.chip, memory=1.5), 8), uncut).fits


def test_every_chip_gets_an_answer_or_a_reason():
    for name in chip_names():
        for cfg in (LITE, QWEN, V3):
            try:
                found = best(cfg, Cluster(chip(name), 8), Target(weights="int4"))
            except HardwareError as error:
                assert chip(name).title in str(error)
            else:
                assert found.fits or len(found.reason) > 40


def test_v3s_own_service_stays_below_the_bound():
    unit = serve(V3, chip("h800"), PLAIN, 144)
    reached = paper.row("serving.output_per_node").value / 8
    assert 1 < unit.tokens_per_second_per_gpu / reached < 3


def test_a_flat_exchange_is_the_papers_bound_and_shared_copies_are_fewer():
    sent = expert_network.copies_by_link(V3, chip("h800"), 64)
    assert sent == [(8 * 7 / 64, 160e9), (8 * 56 / 64, 40e9)]
    bound = limits.Decode(
        40e9, 16, 8 * 56 / 64, V3.hidden_size, 58, comm_moe.FP8, comm_moe.BF16
    ).per_token
    assert expert_network.step_s(V3, chip("h800"), 64, 32) == bound
    times = {
        scheme: expert_network.step_s(V3, chip("h800"), 64, 32, exchange=Exchange(scheme))
        for scheme in comm_moe.SCHEMES
    }
    assert times["two_stage"] < times["deduplicated"] < times["flat"] == bound
    free = replace(V3, topk_group=V3.n_group)  # no limit of nodes
    unlimited = expert_network.step_s(free, chip("h800"), 64, 32, exchange=Exchange("two_stage"))
    assert unlimited > times["two_stage"]
    with pytest.raises(ValueError, match="256 experts on 320 devices"):
        expert_network.step_s(V3, chip("h800"), 320, 32, exchange=Exchange("two_stage"))


def test_a_busier_device_and_wider_numbers_slow_the_exchange_in_proportion():
    step = expert_network.step_s(V3, chip("h800"), 64, 32)
    for exchange, factor in (
        (Exchange(load=1.5), 1.5),
        (Exchange(dispatch=comm_moe.BF16), 4 / (comm_moe.FP8 + 2)),
    ):
        slower = expert_network.step_s(V3, chip("h800"), 64, 32, exchange=exchange)
        assert slower == pytest.approx(factor * step)
    even, busy = (
        Deployment(V3, chip("h800"), 64, batch=6400, exchange=Exchange(load=n)) for n in (1, 2)
    )
    routed = next(line for line in even.lines if line.part == "routed experts")
    assert busy.times["compute"] - even.times["compute"] == pytest.approx(
        routed.flops / 64 / chip("h800").rate("fp8")
    )


def test_the_table_has_every_batch_at_every_context():
    rows = serving_plan.table(V3, chip("h800"), Target(), 32, (32, 2880, 9600), (1000, 4989))
    assert {r.target.context for r in rows[:3]} == {1000}
    assert [r.batch for r in rows[:3]] == [32, 2880, 9600]
    assert [r.batch for r in rows[3:]] == [32, 2880, 0]
    assert "9,600 do not fit, 2,944 would" in rows[-1].reason
    assert rows[0].per_user > rows[1].per_user > rows[2].per_user
