"""What a GPU sends in a step: by hand for small layouts, and what must hold for all of them."""

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import comm_moe, params, tiers
from dsv3_tutorial.cost.step_traffic import Split, experts, gradients, stages, tensor, traffic
from dsv3_tutorial.cost.tiers import Network, NetworkError, Tier

V3, H800 = ModelConfig.named("deepseek-v3"), tiers.network("h800")
SMALL = replace(ModelConfig.named("small"), n_group=1, topk_group=1)  # no limit
D, E, K = SMALL.hidden_size, SMALL.n_routed_experts, SMALL.num_experts_per_tok
BOTH = 1 + 4 / 128 + 2  # bytes of a number there and back: FP8 with its scale, BF16
POWERS = st.sampled_from([1, 2, 4, 8])


def nodes(of):
    """A network of nodes of `of` ranks, with round speeds."""
    return Network(Tier("in", 0.0, 4e9), Tier("out", 0.0, 1e9), of)


def reached(parts):
    """How many of `parts` equal shares of the experts a token's choice touches, all counted."""
    choices = list(combinations(range(E), K))
    return sum(len({e * parts // E for e in choice}) for choice in choices) / len(choices)


def moe_layers():
    return sum(SMALL.is_moe_layer(i) for i in range(SMALL.num_hidden_layers))


def test_a_small_layout_sends_what_is_counted_by_hand():
    split = Split(pp=2, dp=4, ep=2, tp=2, sequences=8, seq_len=16, copies=1)
    network = nodes(of=4)
    assert split.gpus == 16 and split.tokens == 32
    # an all-reduce behind attention, of D forward and of the latents backward, and two of D behind
    # a dense FFN; each of 2 ranks sends 2 x half of the numbers
    latents = SMALL.q_lora_rank + SMALL.kv_lora_rank + SMALL.qk_rope_head_dim
    dense = SMALL.num_hidden_layers - moe_layers()
    numbers = (SMALL.num_hidden_layers * (D + latents) + dense * 2 * D) / 2
    assert tensor(SMALL, network, split) == {"inside": 32 * numbers * 2, "across": 0}
    # forward one way, gradients the other; each of the 2 tensor ranks half
    assert stages(SMALL, network, split) == {"inside": 0, "across": 2 * 32 * D * 2 / 2}
    # 2 owners on the 2 places of one node: half of the copies are for oneself
    sent = experts(SMALL, network, split)
    copies = reached(2) / 2
    expected = 2 * moe_layers() / 2 * 16 * D * BOTH * copies
    assert sent["across"] == 0 and sent["inside"] == pytest.approx(expected)
    counted = params.count(SMALL)
    routed = counted.by_part["routed_experts"]
    rest, own = (counted.total - routed) / 4, routed / 4  # pp x tp, pp x ep
    # of 4 replicas 2 share a node: half inside, then a ring of 2 nodes passes half of a half; of an
    # expert, which 2 GPUs in a row hold together, each node has 2 of 4 replicas as well
    assert gradients(SMALL, network, split) == {
        "inside": pytest.approx(6 * (rest + own) / 2),
        "across": pytest.approx(6 * (rest + own) / 4),
    }
    # DualPipe's two stages a GPU: twice the bytes, and a ring over twice as many nodes
    assert gradients(SMALL, network, replace(split, copies=2)) == {
        "inside": pytest.approx(2 * 6 * (rest + own) / 2),
        "across": pytest.approx(2 * 6 * (rest + own) / 2 * 3 / 4),
    }


def test_experts_on_two_nodes_cross_once_a_node_and_are_forwarded_inside():
    split = Split(pp=1, dp=4, ep=4, tp=1, sequences=4, seq_len=8)
    sent = experts(SMALL, nodes(of=2), split)
    each = 2 * moe_layers() * 8 * D * BOTH
    assert sent["across"] == pytest.approx(each * reached(2) / 2)
    assert sent["inside"] == pytest.approx(each * reached(4) / 2)


def test_a_narrower_way_back_saves_in_proportion():
    split = Split(pp=1, dp=4, ep=4, tp=1, sequences=4, seq_len=8)
    whole = experts(SMALL, nodes(of=2), split)
    narrow = experts(SMALL, nodes(of=2), split, (1.0, 1.0))
    assert narrow == {tier: pytest.approx(n * 2 / BOTH) for tier, n in whole.items()}


def test_v3_spends_most_on_its_experts_across_and_nothing_on_tensors():
    found = {kind.name: kind for kind in traffic(V3, H800, Split())}
    tokens = 15360 * 4096 / 128
    crossing = comm_moe.nodes_reached(comm_moe.Layer(node_limit=4), 8) * 7 / 8
    expected = 2 * 58 / 16 * tokens * 7168 * BOTH * crossing
    assert found["experts"].across == pytest.approx(expected)
    assert found["experts"].seconds == pytest.approx(expected / 40e9)
    assert found["stages"].across == pytest.approx(2 * tokens * 7168 * 2)
    assert [(k.name, k.ranks, k.nodes) for k in found.values()] == [
        *(("tensor", 1, 1), ("experts", 64, 8), ("stages", 16, 16), ("gradients", 128, 16))
    ]
    assert found["tensor"].inside == found["tensor"].across == found["tensor"].seconds == 0
    # of each GPU's two stages an expert has 2 x 2 holders, all in different nodes, the rest 2 x 128
    numbers = params.count(V3)
    routed = numbers.by_part["routed_experts"] / 1024
    rest = (numbers.total - 1024 * routed) / 16
    across = 2 * 6 * (routed * 3 / 4 + rest / 8 * (1 - 8 / 256))
    assert found["gradients"].across == pytest.approx(across) == pytest.approx(7.30e9, rel=1e-3)


def test_tensor_parallelism_leaves_the_experts_traffic_and_adds_half_a_terabyte_of_its_own():
    plain, split = Split(), Split(dp=16, tp=8)
    assert experts(V3, H800, split) == experts(V3, H800, plain)
    attention = 61 * (7168 + 1536 + 512 + 64)
    numbers = (attention + 3 * 2 * 7168) / 16
    sent = 2 * 7 / 8 * 15360 / 16 * 4096 * numbers * 2
    assert tensor(V3, H800, split)["inside"] == pytest.approx(sent) == pytest.approx(523.9e9, 1e-3)


@pytest.mark.parametrize("of", [1, 2, 4, 8, 64])
@pytest.mark.parametrize("layout", [(2, 8, 4, 2), (4, 4, 8, 2), (1, 2, 1, 4), (2, 1, 2, 4)])
def test_gradients_cross_as_often_as_counting_the_holders_of_each_part_says(layout, of):
    pp, dp, ep, tp = layout
    split = Split(pp, dp, ep, tp, sequences=8, seq_len=4)
    sent, total = gradients(V3, nodes(of), split), params.count(V3)
    routed = total.by_part["routed_experts"]
    inside = across = 0.0
    for numbers, apart in (((total.total - routed) / pp / tp, tp), (routed / pp / ep, ep)):
        first = [rank for rank in range(dp * tp) if rank % apart == 0]
        if pp > 1:  # the last stage's GPUs hold a copy of the first stage, and the other way round
            first += [rank + (pp - 1) * dp * tp for rank in first]
        near = sum(rank < of for rank in first)
        size = 6 * numbers * (2 if pp > 1 else 1)
        inside += size * (near - 1) / near
        across += size / near * (1 - near / len(first))
    assert sent == {"inside": pytest.approx(inside), "across": pytest.approx(across)}


@given(pp=POWERS, dp=POWERS, ep=POWERS, tp=POWERS, of=POWERS)
def test_twice_the_sequences_send_twice_the_tokens_and_the_same_gradients(pp, dp, ep, tp, of):
    split = Split(pp, dp, min(ep, dp), tp, sequences=8, seq_len=4)
    cfg, network = replace(SMALL, n_routed_experts=64), nodes(of)
    pairs = zip(traffic(cfg, network, split), traffic(cfg, network, replace(split, sequences=16)))
    for once, twice in pairs:
        factor = 1 if once.name == "gradients" else 2
        assert twice.inside == pytest.approx(factor * once.inside)
        assert twice.across == pytest.approx(factor * once.across)
        assert once.inside >= 0 and once.across >= 0
        alone = once.ranks == 1 if once.name != "gradients" else dp * tp * min(pp, 2) == 1
        assert not alone or once.inside == once.across == once.seconds == 0
        if split.gpus <= of:
            assert once.across == 0 and once.nodes == 1


def test_gradients_are_gathered_and_scattered_at_what_a_ring_sends_in_all():
    """Inside and across together never beat (dp - 1) / dp of the bytes, ZeRO-1's least."""
    for of in (1, 2, 4, 8, 16):
        sent = gradients(V3, nodes(of), Split(pp=1, dp=16, ep=1))
        size = 6 * params.count(V3).total
        assert sum(sent.values()) == pytest.approx(size * 15 / 16)
        assert sent["across"] == pytest.approx(size * (1 / of - 1 / 16))


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ({"ep": 48}, "ep = 48 does not divide dp = 128"),
        ({"ep": 48, "tp": 2, "dp": 16}, "ep = 48 does not divide dp x tp = 32"),
        ({"copies": 0}, "copies = 0"),
        ({"dp": 7, "ep": 1}, "dp = 7 does not divide the step's 15360 sequences"),
        ({"dp": 36, "ep": 5, "sequences": 35}, "ep = 5 .* dp = 36; dp = 36 .* 35 sequences"),
        ({"pp": 0, "tp": 1.5}, "pp = 0; tp = 1.5"),
        ({"pp": True}, "pp = True"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_all_that_is_wrong(layout, said):
    with pytest.raises(NetworkError, match=said):
        Split(**layout)


def test_the_gradients_of_given_numbers_are_those_of_equal_stages_where_these_are_given():
    counted = params.count(V3)
    routed = counted.by_part["routed_experts"]
    given_numbers = ((counted.total - routed) / 16, routed / 16 / 64)
    network, split = tiers.network("h800"), Split()
    assert gradients(V3, network, split, given_numbers) == gradients(V3, network, split)
    twice = gradients(V3, network, split, (2 * given_numbers[0], 2 * given_numbers[1]))
    for tier, sent in gradients(V3, network, split).items():
        assert twice[tier] == pytest.approx(2 * sent)
