"""Accepting and refusing leaves the model's distribution as it is: enumerated, then drawn."""

import math
from collections import Counter
from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial.inference.requests import Answer
from dsv3_tutorial.inference.sample import Sampling, probabilities
from dsv3_tutorial.inference.session import Session
from dsv3_tutorial.inference.speculate import accept, accept_greedy, run

TWELFTHS = 12  # every ratio and every mass below is a number of twelfths
DRAFT = [Fraction(1, 2), Fraction(1, 4), Fraction(1, 4)]
TARGET = [Fraction(1, 4), Fraction(1, 3), Fraction(5, 12)]  # ratios 1/2, 4/3, 5/3
BEHIND = [Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)]


def turned(row, by):
    """The same row, its tokens renamed: what comes next depends on what was drafted."""
    return row[by % 3 :] + row[: by % 3]


def table(rows):
    return torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64)


def every_outcome(drafts):
    """(probability, drafted, kept, next) over all drafts and a grid of uniforms, as fractions."""
    grid = [(2 * i + 1) / (2 * TWELFTHS) for i in range(TWELFTHS)]
    for drafted in product(range(3), repeat=drafts):
        q = [turned(DRAFT, sum(drafted[:i])) for i in range(drafts)]
        p = [turned(TARGET, sum(drafted[:i])) for i in range(drafts)]
        rows = table(q), table([*p, turned(BEHIND, sum(drafted))])
        chance = math.prod(row[token] for row, token in zip(q, drafted))
        for uniforms in product(grid, repeat=drafts + 1):
            numbers = torch.tensor(uniforms, dtype=torch.float64)
            kept, token = accept(torch.tensor(drafted), *rows, numbers)
            yield chance / TWELFTHS ** (drafts + 1), drafted, kept, token


def test_the_first_token_has_exactly_the_models_distribution_and_the_second_too():
    """Fractions, no tolerance: 9 pairs of drafts times 12^3 uniforms, each with its probability."""
    first, pairs, triples = Counter(), Counter(), Counter()
    for chance, drafted, kept, token in every_outcome(2):
        text = (*drafted[:kept], token)
        first[text[0]] += chance
        if kept >= 1:
            pairs[text[:2]] += chance
        if kept == 2:
            triples[text] += chance
    assert [first[token] for token in range(3)] == TARGET
    for a in range(3):
        reached = sum(pairs[a, b] for b in range(3))
        assert [pairs[a, b] / reached for b in range(3)] == turned(TARGET, a)
        for b in range(3):
            reached = sum(triples[a, b, c] for c in range(3))
            assert [triples[a, b, c] / reached for c in range(3)] == turned(BEHIND, a + b)


def test_a_draft_is_kept_as_often_as_the_two_distributions_overlap():
    kept = sum(chance for chance, _, kept, _ in every_outcome(1) if kept)
    assert kept == sum(map(min, DRAFT, TARGET)) == Fraction(3, 4)


distributions = st.lists(st.integers(0, 4), min_size=4, max_size=4).filter(any)


@given(st.data(), st.integers(0, 4))
def test_no_token_without_mass_comes_and_what_is_kept_was_drafted(data, drafts):
    rows = [data.draw(distributions) for _ in range(2 * drafts + 1)]
    probs = torch.tensor(rows, dtype=torch.float32)
    probs = probs / probs.sum(-1, keepdim=True)
    draft_probs, target_probs = probs[:drafts], probs[drafts:]
    drafted = torch.tensor(
        [data.draw(st.sampled_from([t for t in range(4) if row[t]])) for row in rows[:drafts]],
        dtype=torch.int64,
    )
    edge = st.sampled_from([0.0, 0.5, 1 - 2**-24])  # the last number below 1 in float32
    uniforms = torch.tensor([data.draw(edge) for _ in range(drafts + 1)])
    kept, token = accept(drafted, draft_probs, target_probs, uniforms)
    assert 0 <= kept <= drafts
    assert target_probs[kept, token] > 0
    assert all(target_probs[i, drafted[i]] > 0 for i in range(kept))
    if kept < drafts:  # what was refused was too frequent, and what comes was too rare
        assert draft_probs[kept, drafted[kept]] > target_probs[kept, drafted[kept]]
        assert draft_probs[kept, token] < target_probs[kept, token]


def test_drafts_of_the_models_own_distribution_are_all_kept():
    probs = torch.rand(4, 9).softmax(-1)
    drafted = torch.tensor([8, 0, 3])
    last = torch.tensor([1 - 2**-24] * 3 + [0.0])
    assert accept(drafted, probs[:3], probs, last) == (3, 0)


def test_a_refusal_that_rounding_alone_caused_draws_from_the_models_distribution():
    draft = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    target = torch.tensor([[0.4, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    uniforms = torch.tensor([0.9, 0.9], dtype=torch.float64)
    assert accept(torch.tensor([0]), draft, target, uniforms) == (0, 1)


@given(st.data(), st.integers(0, 4), st.floats(0, 1, exclude_max=True))
def test_greedy_acceptance_is_the_same_rule_with_all_mass_on_one_token(data, drafts, uniform):
    tokens = st.integers(0, 2)
    drafted = data.draw(st.lists(tokens, min_size=drafts, max_size=drafts))
    best = data.draw(st.lists(tokens, min_size=drafts + 1, max_size=drafts + 1))
    one_hot = torch.eye(3, dtype=torch.float64)
    numbers = torch.full((drafts + 1,), uniform, dtype=torch.float64)
    kept = torch.tensor(drafted, dtype=torch.int64)
    assert accept_greedy(drafted, best) == accept(kept, one_hot[kept], one_hot[best], numbers)


def chi_square(counts, expected):
    """Pearson's statistic as a normal deviate (Wilson and Hilferty), rare tokens put together."""
    often = expected >= 5
    counts = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]]).clamp(min=1e-9)
    free = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    spread = 2 / (9 * free)
    return ((statistic / free) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


@pytest.mark.parametrize("drafts", [1, 2])
def test_sampled_tokens_of_the_trained_model_have_its_own_distribution(trained, drafts):
    """600 texts from one prompt, one pass: what follows has the distribution without drafts.

    The same check refuses the module's distribution, by far: it would see an unfair acceptance.
    """
    prompt, first, texts = [118, 77, 300], 40, 600
    sampling = Sampling(temperature=1.2, top_k=60, seed=3)
    session = Session(trained, texts, len(prompt) + 8, drafts=True)
    session.prefill([prompt] * texts)
    answers = [Answer(2 + drafts) for _ in range(texts)]
    for answer in answers:
        answer.add(first)
    before = session.hidden[:1].clone()
    done = run(session, [first] * texts, answers, sampling, sampling.generators(texts), drafts)
    assert 0.1 < done.acceptance < 0.9  # both ways of getting a token are exercised
    with torch.inference_mode():
        logits = trained(torch.tensor([[*prompt, first]]))[0, -1]
        after = torch.tensor([[*prompt[1:], first]])
        guess = trained.draft(before, after)[1][0, -1]
    drawn = torch.tensor([answer.tokens[1] for answer in answers])
    counts = torch.bincount(drawn, minlength=trained.cfg.vocab_size).double()
    expected, drafted = (texts * probabilities(x, sampling).double() for x in (logits, guess))
    assert abs(chi_square(counts, expected)) < 4
    assert chi_square(counts, drafted) > 20
