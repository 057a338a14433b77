import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.inference.requests import GenerationError
from dsv3_tutorial.inference.sample import (
    Sampling,
    choose,
    draw,
    next_tokens,
    probabilities,
    problem_of,
    top_k,
    top_p,
)

NAN, INF = float("nan"), float("inf")
weights = st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any)


def normal(values):
    """Whole numbers as a distribution; their sums are exact in float64."""
    probs = torch.tensor(values, dtype=torch.float64)
    return probs / probs.sum()


def test_greedy_puts_everything_on_the_likeliest_and_of_equals_on_the_first():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 3.0]])
    assert probabilities(logits, Sampling()).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_a_temperature_divides_the_logits():
    logits = torch.randn(2, 3, 9)
    expected = (logits.double() / 0.7).softmax(-1)
    torch.testing.assert_close(probabilities(logits, Sampling(0.7)).double(), expected)


def test_a_tiny_temperature_is_greedy_and_a_huge_one_uniform_and_neither_overflows():
    logits = torch.tensor([1e4, -1e30, 9e3, -INF])
    assert probabilities(logits, Sampling(1e-30)).tolist() == [1, 0, 0, 0]
    finite = torch.tensor([5.0, -5.0, 0.0])
    torch.testing.assert_close(probabilities(finite, Sampling(1e30)), torch.full((3,), 1 / 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_probabilities_are_float32_whatever_the_logits_are(dtype, temperature):
    probs = probabilities(torch.randn(4, 7, dtype=dtype), Sampling(temperature, top_p=0.9))
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs.sum(-1), torch.ones(4))


def test_a_token_that_was_masked_out_is_never_drawn():
    logits = torch.tensor([0.0, -INF, 1.0])
    assert probabilities(logits, Sampling(2.0))[1] == 0


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    probs = torch.tensor([[0.125, 0.5, 0.25, 0.125], [0.25, 0.25, 0.25, 0.25]])
    torch.testing.assert_close(top_p(probs, 0.75)[0], torch.tensor([0, 2 / 3, 1 / 3, 0]))
    torch.testing.assert_close(top_p(probs, 0.76)[0], torch.tensor([1 / 7, 4 / 7, 2 / 7, 0]))


def test_of_equals_the_lower_token_is_kept():
    equal = torch.full((4,), 0.25)
    assert top_p(equal, 0.5).tolist() == [0.5, 0.5, 0, 0]
    assert top_k(equal, 2).tolist() == [0.5, 0.5, 0, 0]


def test_the_likeliest_is_kept_however_small_the_mass():
    assert top_p(torch.tensor([0.3, 0.6, 0.1]), 1e-9).tolist() == [0, 1, 0]


@settings(deadline=None)
@given(weights, st.floats(1e-6, 1.0))
def test_what_top_p_keeps_reaches_p_and_no_smaller_set_does(values, p):
    probs = normal(values)
    kept = top_p(probs, p) > 0
    mass, least = probs[kept].sum(), probs[kept].min()
    assert mass >= p - 1e-12
    assert kept.sum() == 1 or mass - least < p + 1e-12
    assert (probs[~kept] <= least).all()  # the likeliest ones
    torch.testing.assert_close(top_p(probs, p)[kept], probs[kept] / mass)


@settings(deadline=None)
@given(weights, st.integers(1, 15))
def test_what_top_k_keeps_is_the_k_likeliest(values, k):
    probs = normal(values)
    kept = top_k(probs, k)
    expected = probs.topk(min(k, len(values))).values
    torch.testing.assert_close(
        kept.sort(descending=True).values[: len(expected)], expected / expected.sum()
    )
    assert (kept > 0).sum() <= k


def test_everything_kept_leaves_a_distribution_as_it_is():
    probs = torch.randn(3, 200).softmax(-1)
    torch.testing.assert_close(top_p(probs, 1.0), probs)
    torch.testing.assert_close(top_k(probs, 500), probs)


def test_a_long_flat_tail_does_not_round_away():
    probs = torch.full((100_000,), 1e-5)
    assert 89_990 <= (top_p(probs, 0.9) > 0).sum() <= 90_010


def test_top_k_comes_before_top_p():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    both = probabilities(logits, Sampling(1.0, top_k=2, top_p=0.5))
    assert both.tolist() == [1, 0, 0, 0]  # 0.4 of 0.7 reaches a half; of 1 it would not


def test_a_number_falls_on_the_token_whose_mass_it_lies_in():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).expand(5, -1)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 1 - 2**-53], dtype=torch.float64)
    assert draw(probs, uniform).tolist() == [1, 1, 3, 3, 4]


@settings(deadline=None)
@given(weights, st.floats(0, 1, exclude_max=True))
def test_no_token_without_mass_is_ever_drawn(values, uniform):
    probs = torch.tensor([values], dtype=torch.float32) / 7  # need not sum to 1
    token = int(draw(probs, torch.tensor([uniform], dtype=torch.float64)))
    assert values[token] > 0


def test_draws_come_as_often_as_the_distribution_says():
    probs = torch.tensor([0.4, 0.3, 0.0, 0.15, 0.1, 0.05])
    generator = torch.Generator().manual_seed(3)
    drawn = choose(probs.expand(20_000, -1), generator).bincount(minlength=6)
    assert drawn[2] == 0
    expected = 20_000 * probs[probs > 0]
    chi_square = ((drawn[probs > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 23.5  # 4 degrees of freedom: exceeded once in 10,000 seeds


def test_a_text_draws_the_same_tokens_whoever_stands_beside_it():
    logits, sampling = torch.randn(3, 20), Sampling(1.3, top_k=10, top_p=0.95, seed=7)
    together = next_tokens(logits, [sampling] * 3, sampling.generators(3))
    for index in range(3):
        generator = sampling.generators(3)[index]
        assert next_tokens(logits[index : index + 1], [sampling], [generator]) == [together[index]]


def test_texts_with_rules_of_their_own_share_a_batch():
    logits = torch.randn(4, 30)
    rules = [
        Sampling(),
        Sampling(0.9, seed=1),
        Sampling(2.0, top_k=3, seed=2),
        Sampling(0.9, seed=9),
    ]
    together = next_tokens(logits, rules, [rule.generators(1)[0] for rule in rules])
    alone = [
        next_tokens(logits[i : i + 1], [rule], rule.generators(1))[0]
        for i, rule in enumerate(rules)
    ]
    assert together == alone and together[0] == logits[0].argmax()


def test_choose_takes_one_distribution_or_many():
    generator = torch.Generator().manual_seed(0)
    one = choose(torch.tensor([0.0, 1.0]), generator)
    assert one.shape == () and int(one) == 1
    many = choose(torch.full((50, 100), 0.01), generator)
    assert many.shape == (50,) and len(set(many.tolist())) > 20  # each draws its own number


def test_the_same_seed_gives_the_same_generators_and_none_gives_fresh_ones():
    def first(seed):
        return [
            int(torch.randint(2**40, (), generator=g)) for g in Sampling(1, seed=seed).generators(2)
        ]

    assert first(5) == first(5) and first(5)[1] == first(6)[0]
    assert first(None) != first(None)


@pytest.mark.parametrize(
    ("values", "said"),
    [([1, NAN], "1 of 4 logits are NaN"), ([-INF, -INF], "All logits"), ([INF, 0], r"\+inf")],
    ids=["nan", "nothing", "overflow"],
)
def test_logits_that_are_no_distribution_are_refused_and_say_why(values, said):
    logits = torch.tensor([[0.0, 1.0], values])
    for sampling in (Sampling(), Sampling(1.0, top_p=0.5)):
        with pytest.raises(GenerationError, match=said):
            probabilities(logits, sampling)
        assert next_tokens(logits, [sampling] * 2, sampling.generators(2))[1] is None
        assert next_tokens(logits, [sampling] * 2, sampling.generators(2))[0] is not None
    assert problem_of(logits[0]) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": NAN},
        {"temperature": math.inf},
        {"temperature": "warm"},
        {"top_k": 0},
        {"top_k": 1.5},
        {"top_p": 0},
        {"top_p": 1.01},
        {"top_p": NAN},
        {"seed": -1},
        {"seed": 1.0},
    ],
    ids=lambda wrong: "-".join(map(str, *wrong.items())),
)
def test_a_sampling_that_no_token_can_be_chosen_by_is_refused_by_name(wrong):
    with pytest.raises(GenerationError, match=f"^{next(iter(wrong))} is "):
        Sampling(**wrong)
