"""The router: who is chosen, with what weight, and what the balance bias may and may not change."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.moe.gate import Gate, affinities, choose_experts, combine_weights, route

SMALL = ModelConfig.named("small")
METHODS = ("noaux_tc", "group_limited_greedy", "greedy")


def config(groups=4, kept=2, size=4, k=4, method="noaux_tc", **changed) -> ModelConfig:
    sizes = {"n_routed_experts": groups * size, "n_group": groups, "topk_group": kept}
    chosen = {"num_experts_per_tok": k, "topk_method": method}
    return replace(SMALL, **sizes, **chosen, **changed)


@st.composite
def cases(draw, methods=METHODS):
    """A config, logits (M, E) in float64 and a bias (E,); logits are all different."""
    groups, size = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    kept = draw(st.integers(1, groups))
    k = draw(st.integers(1, kept * size))
    scoring = draw(st.sampled_from(["sigmoid", "softmax"]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (draw(st.integers(1, 5)), groups * size)
    logits = 2 * torch.randn(shape, generator=random, dtype=torch.float64)
    bias = torch.randn(shape[1], generator=random, dtype=torch.float64)
    method = draw(st.sampled_from(methods))
    cfg = config(groups, kept, size, k, method, scoring_func=scoring)
    return replace(cfg, norm_topk_prob=draw(st.booleans())), logits, bias


def routed(logits, bias, cfg):
    """The routing of given logits (M, E): experts whose vectors are the unit vectors."""
    return route(logits, torch.eye(logits.shape[1], dtype=logits.dtype), bias, cfg)


def by_hand(logits, bias, cfg):
    """One token's experts and their weights, in Python, from the definition."""
    exps = [math.exp(z) for z in logits]
    sigmoid = cfg.scoring_func == "sigmoid"
    scores = [e / (1 + e) if sigmoid else e / sum(exps) for e in exps]
    biased = [s + b for s, b in zip(scores, bias)] if cfg.topk_method == "noaux_tc" else scores
    size = len(scores) // cfg.n_group
    open_groups = range(cfg.n_group)
    if cfg.topk_method != "greedy":
        best = 2 if cfg.topk_method == "noaux_tc" else 1
        worth = [sum(sorted(biased[g * size : (g + 1) * size])[-best:]) for g in range(cfg.n_group)]
        open_groups = sorted(open_groups, key=lambda g: -worth[g])[: cfg.topk_group]
    able = [e for e in range(len(scores)) if e // size in open_groups]
    chosen = sorted(able, key=lambda e: -biased[e])[: cfg.num_experts_per_tok]
    total = sum(scores[e] for e in chosen) if cfg.norm_topk_prob else 1.0
    return {e: scores[e] / total * cfg.routed_scaling_factor for e in chosen}


@settings(deadline=None, max_examples=60)
@given(cases())
def test_choice_and_weights_are_those_of_the_definition(case):
    cfg, logits, bias = case
    got = routed(logits, bias, cfg)
    for token, z in enumerate(logits.tolist()):
        expected = by_hand(z, bias.tolist(), cfg)
        indices, weights = got.indices[token].tolist(), got.weights[token].tolist()
        assert set(indices) == set(expected)
        assert dict(zip(indices, weights)) == pytest.approx(expected, rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_no_token_chooses_an_expert_twice_or_too_many_groups(case):
    cfg, logits, bias = case
    got = routed(logits, bias, cfg)
    size = cfg.n_routed_experts // cfg.n_group
    for row in got.indices.tolist():
        assert len(set(row)) == cfg.num_experts_per_tok
        assert all(0 <= expert < cfg.n_routed_experts for expert in row)
        if cfg.topk_method != "greedy":
            assert len({expert // size for expert in row}) <= cfg.topk_group


@settings(deadline=None, max_examples=60)
@given(cases(["noaux_tc"]))
def test_a_bias_never_changes_the_scores_nor_the_weight_of_an_expert_that_stays(case):
    cfg, logits, bias = case
    cfg = replace(cfg, norm_topk_prob=False, routed_scaling_factor=1.0)
    without, biased = routed(logits, None, cfg), routed(logits, bias, cfg)
    assert torch.equal(without.scores, biased.scores)
    for got in (without, biased):
        assert torch.equal(got.weights, without.scores.gather(1, got.indices))


def test_a_bias_changes_who_is_chosen():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    cfg = config(1, 1, 4, 2)
    assert routed(logits, torch.zeros(4), cfg).indices.tolist() == [[0, 1]]
    pushed = routed(logits, torch.tensor([0.0, 0.0, 0.0, 0.7]), cfg)
    assert set(pushed.indices[0].tolist()) == {0, 3}
    assert pushed.indices[0, 0].item() == 3  # 0.27 + 0.7 > 0.88
    assert pushed.weights[0, 0] < pushed.weights[0, 1]  # and yet it weighs less


@settings(deadline=None, max_examples=60)
@given(cases(["noaux_tc"]))
def test_no_bias_is_a_bias_of_zero(case):
    cfg, logits, _ = case
    none, zero = routed(logits, None, cfg), routed(logits, torch.zeros(logits.shape[1]), cfg)
    assert all(torch.equal(a, b) for a, b in zip(none, zero))


@settings(deadline=None, max_examples=60)
@given(cases(["noaux_tc"]), st.floats(-3, 3))
def test_the_same_bias_for_all_experts_changes_nothing(case, shift):
    cfg, logits, _ = case
    if cfg.scoring_func == "softmax":  # its scores may be so close that a shift rounds them equal
        logits = logits / 4
    moved = routed(logits, torch.full((logits.shape[1],), shift, dtype=torch.float64), cfg)
    still = routed(logits, None, cfg)
    assert torch.equal(moved.indices.sort(-1).values, still.indices.sort(-1).values)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_normalised_weights_sum_to_the_scaling_factor(case):
    cfg, logits, bias = case
    cfg = replace(cfg, norm_topk_prob=True)
    sums = routed(logits, bias, cfg).weights.sum(-1)
    torch.testing.assert_close(sums, torch.full_like(sums, cfg.routed_scaling_factor))


def test_scores_too_small_for_float32_to_divide_by_give_no_nan():
    weights = combine_weights(torch.zeros(1, 4), torch.tensor([[0, 1]]))
    assert torch.equal(weights, torch.zeros(1, 2))


def test_negative_biased_scores_lose_to_no_masked_expert():
    biased = torch.tensor([[-0.1, -0.2, -0.9, -0.8, -0.5, -0.6]])  # groups of two, one is kept
    assert choose_experts(biased, 3, 1, 2).tolist() == [[0, 1]]
    zeroed = biased.masked_fill(torch.tensor([[False] * 2 + [True] * 4]), 0.0)
    assert not set(zeroed.topk(2).indices[0].tolist()) & {0, 1}  # what a mask of 0 would choose


@settings(deadline=None, max_examples=60)
@given(cases(["noaux_tc"]))
def test_the_group_limit_holds_when_every_biased_score_is_negative(case):
    cfg, logits, bias = case
    low = routed(logits, bias.clamp(max=0) - 1.5, cfg)
    size = cfg.n_routed_experts // cfg.n_group
    for row, z in zip(low.indices.tolist(), logits.tolist()):
        assert len({expert // size for expert in row}) <= cfg.topk_group
        assert set(row) == set(by_hand(z, (bias.clamp(max=0) - 1.5).tolist(), cfg))


def test_v3_weighs_a_group_by_its_two_best_and_v2_by_its_best():
    logits = torch.tensor([[0.9, 0.1, 0.6, 0.5]]).logit()  # 1.0 against 1.1; 0.9 against 0.6
    for method, expected in (("noaux_tc", {2, 3}), ("group_limited_greedy", {0, 1})):
        got = routed(logits, None, config(2, 1, 2, 2, method))
        assert set(got.indices[0].tolist()) == expected


@settings(deadline=None, max_examples=60)
@given(cases(["greedy"]))
def test_greedy_is_the_top_k_of_all_experts_whatever_groups_and_bias_say(case):
    cfg, logits, bias = case
    got = routed(logits, bias, cfg)
    assert torch.equal(got.indices, got.scores.topk(cfg.num_experts_per_tok).indices)


@settings(deadline=None, max_examples=60)
@given(cases(["noaux_tc"]))
def test_keeping_every_group_limits_nothing(case):
    cfg, logits, bias = case
    cfg = replace(cfg, topk_group=cfg.n_group)
    got = routed(logits, bias, cfg).indices
    free = (routed(logits, bias, cfg).scores + bias).topk(cfg.num_experts_per_tok).indices
    assert torch.equal(got, free)
    limited = choose_experts(
        routed(logits, bias, cfg).scores + bias, cfg.n_group, cfg.n_group, cfg.num_experts_per_tok
    )
    assert torch.equal(limited, free)


@settings(deadline=None, max_examples=60)
@given(cases(["noaux_tc", "group_limited_greedy"]), st.randoms(use_true_random=False))
def test_renaming_experts_within_and_across_whole_groups_renames_the_choice(case, random):
    cfg, logits, bias = case
    size = cfg.n_routed_experts // cfg.n_group
    groups = random.sample(range(cfg.n_group), cfg.n_group)
    new = torch.tensor([g * size + e for g in groups for e in random.sample(range(size), size)])
    before, after = routed(logits, bias, cfg), routed(logits[:, new], bias[new], cfg)
    assert torch.equal(new[after.indices], before.indices)
    torch.testing.assert_close(after.weights, before.weights, rtol=1e-14, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_ties_still_give_k_different_experts_of_few_groups_with_equal_weights(method):
    cfg = config(method=method)
    got = routed(torch.zeros(3, 16), torch.zeros(16), cfg)
    for row in got.indices.tolist():
        assert len(set(row)) == 4
        assert method == "greedy" or len({expert // 4 for expert in row}) <= 2
    torch.testing.assert_close(got.weights, torch.full((3, 4), 2.5 / 4))


def test_sigmoid_scores_an_expert_alone_and_softmax_lets_them_compete():
    eye, x = torch.eye(3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    raised = x.clone()
    raised[0, 0] = 3.0
    alone, before = (affinities(v, eye, "sigmoid") for v in (raised, x))
    assert torch.equal(alone[0, 1:], before[0, 1:])
    shared = affinities(raised, eye, "softmax")
    assert shared.sum().item() == pytest.approx(1.0)
    assert (shared[0, 1:] < 1 / 3).all()


def test_scores_are_float32_for_narrow_inputs_and_no_autocast_narrows_them():
    x, weight = torch.randn(6, 32).bfloat16(), torch.randn(8, 32)
    expected = (x.float() @ weight.T).sigmoid()
    torch.testing.assert_close(affinities(x, weight), expected, rtol=1e-6, atol=1e-6)
    cfg = config(2, 1, 4, 2, hidden_size=32)
    with torch.autocast("cpu", torch.bfloat16):
        under = route(x, weight, None, cfg)
    assert under.scores.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(under, route(x, weight, None, cfg)))


def gate(method="noaux_tc") -> Gate:
    made = Gate(config(method=method))
    torch.nn.init.normal_(made.weight)
    return made


def test_the_gate_routes_every_position_as_if_it_were_alone():
    made, x = gate().double(), torch.randn(2, 3, SMALL.hidden_size, dtype=torch.float64)
    whole = made(x)
    assert [tuple(part.shape) for part in whole] == [(6, 4), (6, 4), (6, 16)]
    for place, token in enumerate(x.flatten(0, 1)):
        for got, expected in zip(whole, made(token[None])):
            torch.testing.assert_close(got[place], expected[0], rtol=1e-12, atol=0)


def test_gradient_reaches_the_gate_through_the_weights_of_the_chosen_alone():
    made = gate().double()
    made.cfg = replace(made.cfg, norm_topk_prob=False, routed_scaling_factor=1.0)
    x = torch.randn(5, SMALL.hidden_size, dtype=torch.float64)
    got = made(x)
    pull = torch.randn_like(got.weights)
    (got.weights * pull).sum().backward()
    expected = torch.zeros_like(made.weight)
    for m in range(5):
        for k in range(4):
            e, s = got.indices[m, k], got.weights[m, k].item()
            expected[e] += pull[m, k] * s * (1 - s) * x[m]  # the sigmoid's slope
    torch.testing.assert_close(made.weight.grad, expected, rtol=1e-12, atol=1e-12)
    assert not got.indices.requires_grad
    assert made.e_score_correction_bias.grad is None


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.half()]
)
def test_the_bias_stays_float32_and_exact_whatever_the_model_is_cast_to(cast):
    made = torch.nn.Sequential(gate())
    values = 1 + 0.001 * torch.arange(16)
    made[0].e_score_correction_bias.copy_(values)
    cast(made)
    assert made[0].weight.dtype != torch.float32
    assert made[0].e_score_correction_bias.dtype == torch.float32
    assert torch.equal(made[0].e_score_correction_bias, values)


def test_the_bias_moves_with_the_model_and_casts_nowhere_on_the_way():
    bias = gate().to("meta", torch.bfloat16).e_score_correction_bias
    assert (bias.device.type, bias.dtype) == ("meta", torch.float32)
    back = gate().to("meta").to_empty(device="cpu").bfloat16().e_score_correction_bias
    assert (back.device.type, back.dtype) == ("cpu", torch.float32)


def test_the_bias_is_saved_and_no_optimizer_sees_it():
    made = gate()
    made.e_score_correction_bias.fill_(0.25)
    assert [name for name, _ in made.named_parameters()] == ["weight"]
    other = gate()
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.e_score_correction_bias, torch.full((16,), 0.25))


@pytest.mark.parametrize("method", ["group_limited_greedy", "greedy"])
def test_only_v3_has_a_bias(method):
    made = gate(method)
    assert made.e_score_correction_bias is None
    assert list(made.state_dict()) == ["weight"]
    assert made(torch.randn(2, SMALL.hidden_size)).indices.shape == (2, 4)
