"""Copies of a token counted by drawing experts, and what sending them takes."""

import random

import pytest

from dsv3_tutorial import paper
from dsv3_tutorial.cost import comm, comm_moe, routing
from dsv3_tutorial.cost.comm import Network, Tier, network
from dsv3_tutorial.cost.comm_moe import BF16, FP8, SCHEMES, Layer

V3 = Layer(node_limit=4)
H800 = network("h800")


def draws(layer, nodes, times=3000, seed=0):
    """Experts as a gate chooses them: the best within the nodes that hold the best single ones."""
    rng, each = random.Random(seed), layer.n_experts // nodes
    for _ in range(times):
        score = [rng.random() for _ in range(layer.n_experts)]
        best = [max(score[i * each : (i + 1) * each]) for i in range(nodes)]
        kept = sorted(range(nodes), key=lambda i: -best[i])[: layer.node_limit or nodes]
        allowed = [e for i in kept for e in range(i * each, (i + 1) * each)]
        yield sorted(allowed, key=lambda e: -score[e])[: layer.top_k]


@pytest.mark.parametrize("limit", [None, 4])
def test_nodes_and_ranks_reached_are_what_drawing_experts_gives(limit):
    layer = Layer(node_limit=limit)
    sets = list(draws(layer, 8))
    nodes = sum(len({e // 32 for e in chosen}) for chosen in sets) / len(sets)
    ranks = sum(len({e // 4 for e in chosen}) for chosen in sets) / len(sets)
    assert comm_moe.nodes_reached(layer, 8) == pytest.approx(nodes, rel=0.01)
    assert comm_moe.ranks_reached(layer, 64, 8) == pytest.approx(ranks, rel=0.02)


def test_without_a_limit_nodes_are_those_of_an_even_draw():
    for nodes in (1, 2, 4, 8, 32):
        free = routing.expected_nodes(256, 8, nodes)
        assert comm_moe.nodes_reached(Layer(), nodes) == free
        loose = Layer(node_limit=nodes + 1)
        assert comm_moe.nodes_reached(loose, nodes) == free


def test_a_limit_that_binds_is_an_upper_bound_that_nearly_every_token_meets():
    assert comm_moe.nodes_reached(Layer(), 8) == pytest.approx(5.29, abs=0.005)
    assert comm_moe.nodes_reached(V3, 8) == pytest.approx(3.98, abs=0.005)
    assert comm_moe.nodes_reached(Layer(node_limit=1), 8) == pytest.approx(1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_copies_are_what_sending_a_draw_of_tokens_counts(scheme):
    """Every rank sends tokens; a message is kept once for what the scheme does not repeat."""
    ranks, net = 16, Network(H800.inside, H800.across, 4)
    layer = Layer(n_experts=32, top_k=4, hidden=1)
    seen, tokens = {"inside": 0, "across": 0}, 200
    for me in range(ranks):
        for chosen in draws(layer, 4, tokens, seed=me):
            targets = [e // 2 for e in chosen]
            if scheme != "flat":
                targets = set(targets)
            if scheme == "two_stage":
                seen["across"] += len({t // 4 for t in targets} - {me // 4})
                seen["inside"] += sum(t % 4 != me % 4 for t in targets)
            else:
                for t in targets:
                    if t != me:
                        seen["inside" if t // 4 == me // 4 else "across"] += 1
    expected = comm_moe.copies(layer, ranks, net, scheme)
    for tier, n in seen.items():
        assert expected[tier] == pytest.approx(n / ranks / tokens, rel=0.03), tier


def test_each_scheme_sends_less_across_than_the_one_before():
    across = [comm_moe.copies(V3, 64, H800, scheme)["across"] for scheme in SCHEMES]
    assert across[0] == 7 and across == sorted(across, reverse=True)
    assert across[2] / across[0] == pytest.approx(0.498, abs=0.001)
    free = comm_moe.copies(Layer(), 64, H800)["across"]
    assert across[2] / free == pytest.approx(3.98 / 5.29, abs=0.001)


def test_one_rank_sends_nothing_and_one_node_nothing_across():
    for scheme in SCHEMES:
        assert comm_moe.copies(V3, 1, H800, scheme) == {"inside": 0, "across": 0}
        assert comm_moe.dispatch_time(128, V3, 1, H800, scheme) == 0
        assert comm_moe.copies(V3, 8, H800, scheme)["across"] == 0
    pure = Network(H800.inside, H800.across, 1)
    assert comm_moe.copies(V3, 8, pure, "flat") == {"inside": 0, "across": 7}


def test_a_flat_dispatch_is_the_all_to_all_of_its_bytes():
    n = 128 * 8 / 64 * 7168 * FP8  # bytes of one rank to each other
    want = comm.all_to_all_uniform(n, range(64), H800)
    assert comm_moe.dispatch_time(128, Layer(), 64, H800, "flat") == pytest.approx(want)


def test_combine_carries_bf16_where_dispatch_carries_fp8_and_its_scales():
    assert FP8 == 1 + 4 / 128
    sent = [comm_moe.sent_bytes(4096, V3, 64, H800, "two_stage", b) for b in (FP8, BF16)]
    for tier in ("inside", "across"):
        saved = 1 - sent[0][tier] / sent[1][tier]
        assert saved == pytest.approx(0.484, abs=0.0005)
    free = Network(Tier("in", 0.0, 160e9), Tier("across", 0.0, 40e9), 8)
    dispatch, combine = (
        f(4096, V3, 64, free) for f in (comm_moe.dispatch_time, comm_moe.combine_time)
    )
    assert combine / dispatch == pytest.approx(BF16 / FP8)


def test_two_stages_pay_both_latencies_and_the_slower_tier():
    sent = comm_moe.sent_bytes(4096, V3, 64, H800)
    want = 3.33e-6 + 2.8e-6 + max(sent["inside"] / 160e9, sent["across"] / 40e9)
    assert comm_moe.dispatch_time(4096, V3, 64, H800) == pytest.approx(want)


def test_the_papers_experts_for_free_come_from_the_ratio_of_its_links():
    line = H800.slower(across=40 / 50)  # the report takes all of InfiniBand's 50 GB/s
    free = comm_moe.experts_for_free(line)
    assert free == pytest.approx(paper.row("network.experts_per_node").value)
    assert free == pytest.approx(paper.row("network.report_ratio").value)
    limit = paper.row("network.node_limit").value
    assert round(limit * free) == paper.row("network.experts_possible").value
    assert comm_moe.experts_for_free(H800) == paper.row("network.scale_up_over_out").value


def test_a_token_of_v3_uses_fewer_experts_a_node_than_are_free():
    assert 8 / comm_moe.nodes_reached(V3, 8) < comm_moe.experts_for_free(H800)
    sent = comm_moe.sent_bytes(4096, V3, 64, H800)
    assert sent["inside"] / 160e9 < sent["across"] / 40e9


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="12 ranks on nodes of 8"):
        comm_moe.copies(V3, 12, H800)
    with pytest.raises(ValueError, match="no scheme 'pigeon'"):
        comm_moe.copies(V3, 16, H800, "pigeon")
    with pytest.raises(ValueError, match="must divide evenly"):
        comm_moe.nodes_reached(Layer(n_experts=10), 3)


def grouped_draws(layer, times=2000):
    """Experts as V3's gate chooses them: within the groups whose best two sum highest."""
    rng, each = random.Random(1), layer.n_experts // layer.n_group
    for _ in range(times):
        score = [rng.random() for _ in range(layer.n_experts)]
        groups = [sorted(score[i * each : (i + 1) * each])[-2:] for i in range(layer.n_group)]
        kept = sorted(range(layer.n_group), key=lambda i: -sum(groups[i]))[: layer.node_limit]
        allowed = [e for i in kept for e in range(i * each, (i + 1) * each)]
        yield sorted(allowed, key=lambda e: -score[e])[: layer.top_k]


def test_a_limit_of_groups_is_what_v3s_gate_reaches_on_any_number_of_nodes():
    layer = Layer(node_limit=4, n_group=8)
    sets = list(grouped_draws(layer))
    off = {1: 0, 2: 0.01, 4: 0.02, 8: 0.02, 16: 0.09, 32: 0.06, 64: 0.05}
    for parts, most in off.items():
        reached = sum(len({e * parts // 256 for e in chosen}) for chosen in sets) / len(sets)
        assert comm_moe.nodes_reached(layer, parts) == pytest.approx(reached, rel=most)
        assert comm_moe.ranks_reached(layer, parts, 1) == comm_moe.nodes_reached(layer, parts)
    assert comm_moe.nodes_reached(layer, 8) == comm_moe.nodes_reached(V3, 8)
    assert comm_moe.ranks_reached(layer, 64, 8) == comm_moe.ranks_reached(V3, 64, 8)
