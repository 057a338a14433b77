"""The n-gram model: closed forms, a plain dictionary implementation, and distributions that sum."""

from collections import Counter, defaultdict
from math import log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.train.ngram import SMOOTHINGS, NGram, discounts, grams


def as_bytes(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8)


def counted(text: bytes, order: int, smoothing: str) -> list[Counter]:
    """Per gram length 1 to order + 1, how often each gram of a text counts: strings in a Counter.

    Kneser-Ney below the top: in how many different bytes a gram was seen after.
    """
    levels = []
    for length in range(1, order + 2):
        padded = b"\n" * (length - 1) + text
        levels.append(Counter(padded[i : i + length] for i in range(len(text))))
    if smoothing == "kneser-ney":
        padded = b"\n" * order + text
        longer = {padded[i : i + order + 1] for i in range(len(text))}
        for length in range(order, 0, -1):
            levels[length - 1] = Counter(gram[1:] for gram in longer)
            longer = set(levels[length - 1])
    return levels


def plain_discounts(counts: Counter) -> dict[int, float]:
    seen = Counter(counts.values())
    y = seen[1] / (seen[1] + 2 * seen[2]) if seen[1] else 0.75
    if not all(seen[times] for times in (1, 2, 3, 4)):
        return {1: y, 2: y, 3: y}
    raw = {k: k - (k + 1) * y * seen[k + 1] / seen[k] for k in (1, 2, 3)}
    return {k: min(max(d, y), k) for k, d in raw.items()}


def plain(text: bytes, order: int, smoothing: str):
    """p(byte | context) with dictionaries and recursion, as the textbook has it."""
    levels = counted(text, order, smoothing)
    after = []
    for counts in levels:
        by_context = defaultdict(list)
        for gram, count in counts.items():
            by_context[gram[:-1]].append(count)
        after.append(by_context)
    taken = [plain_discounts(counts) for counts in levels]

    def p(gram: bytes) -> float:
        if not gram:
            return 1 / 256
        shorter, at = p(gram[1:]), len(gram) - 1
        seen = after[at].get(gram[:-1])
        if not seen:
            return shorter
        count, total = levels[at][gram], sum(seen)
        if smoothing == "witten-bell":
            return (count + len(seen) * shorter) / (total + len(seen))
        d = taken[at]
        left = sum(d[min(c, 3)] for c in seen)
        return (count - (d[min(count, 3)] if count else 0) + left * shorter) / total

    return p


texts = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).geometric(0.3, 400).clip(1, 40).astype(np.uint8)
)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@given(texts | st.binary(min_size=1, max_size=60).map(as_bytes), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_it_is_the_dictionary_implementation(smoothing, text, order):
    cut = max(1, len(text) * 3 // 4)
    train, rest = text[:cut].tobytes(), text[cut:].tobytes()
    p, padded = plain(train, order, smoothing), b"\n" * order + rest
    expected = [p(padded[i : i + order + 1]) for i in range(len(rest))]
    model = NGram.fit(text[:cut], order, smoothing)
    np.testing.assert_allclose(model.probabilities(text[cut:]), expected, rtol=1e-12)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@given(texts, st.integers(0, 7), st.binary(max_size=9))
@settings(max_examples=25, deadline=None)
def test_the_bytes_after_any_context_have_probabilities_that_sum_to_one(
    smoothing, text, order, noise
):
    model = NGram.fit(text, order, smoothing)
    for context in (b"", noise, text[:20].tobytes(), noise + text[3:5].tobytes()):
        p = model.next_byte(context)
        assert p.min() > 0
        assert p.sum() == pytest.approx(1, abs=1e-12)


def test_scoring_a_text_is_the_chain_rule_over_next_byte():
    text = as_bytes(b"the cat sat on the mat, and the rat sat on the cat")
    model = NGram.fit(text, 3)
    new = b"the bat sat"
    bits = [-log2(model.next_byte(new[:i])[byte]) for i, byte in enumerate(new)]
    assert model.bits_per_byte(as_bytes(new)) == pytest.approx(sum(bits) / len(bits), rel=1e-12)


def test_uniform_random_bytes_cost_eight_bits_and_what_was_made_up_about_pairs():
    train, rest = np.random.default_rng(0).integers(0, 256, (2, 200_000)).astype(np.uint8)
    assert 8 <= NGram.fit(train, 0).bits_per_byte(rest) < 8.001
    for order in (1, 5):  # 65,536 pairs seen three times each; six bytes are never seen again
        assert 8 <= NGram.fit(train, order).bits_per_byte(rest) < 8.1


def test_a_periodic_text_costs_next_to_nothing():
    text = as_bytes(b"abcdefgh" * 2000)
    for smoothing in SMOOTHINGS:
        assert NGram.fit(text, 5, smoothing).bits_per_byte(text[:1000]) < 0.01


def test_a_biased_coin_costs_its_entropy():
    coins = (np.random.default_rng(0).random(400_000) < 0.9).astype(np.uint8)
    entropy = -0.9 * log2(0.9) - 0.1 * log2(0.1)
    assert NGram.fit(coins, 2).bits_per_byte(coins) == pytest.approx(entropy, abs=0.003)


def test_an_empty_text_before_gives_no_way_to_know_and_a_single_byte_some():
    model = NGram.fit(as_bytes(b"a"), 1, "witten-bell")
    # count 1 and one kind, twice: (1 + (1 + 1/256) / 2) / 2
    assert model.next_byte(b"")[ord("a")] == pytest.approx((1 + (1 + 1 / 256) / 2) / 2)
    assert model.next_byte(b"")[ord("b")] == pytest.approx((1 / 256) / 4)


def test_the_discounts_are_chen_and_goodmans():
    seen = np.repeat([1, 2, 3, 4], [4, 2, 1, 1])  # y = 4 / (4 + 2 * 2)
    np.testing.assert_allclose(discounts(seen)[1:], [1 - 0.5, 2 - 0.75, 3 - 2.0])
    np.testing.assert_allclose(discounts(np.array([1, 1, 2]))[1:], 2 / (2 + 2 * 1))
    np.testing.assert_allclose(discounts(np.array([2, 3, 9]))[1:], 0.75)


def test_no_discount_leaves_the_unseen_without_a_share():
    """Where four times is far more frequent than three, the estimate for three is below zero."""
    seen = np.repeat([1, 2, 3, 4], [10, 10, 1, 100])
    assert discounts(seen)[1:].min() == discounts(seen)[1] == pytest.approx(1 / 3)


def test_a_gram_is_its_bytes_as_a_number():
    keys = grams(as_bytes(b"abcdefghij"), 8)
    assert keys[-1] == int.from_bytes(b"cdefghij", "big")
    assert keys[0] == int.from_bytes(b"\n" * 7 + b"a", "big")


@pytest.mark.parametrize(
    "text, order, smoothing, word",
    [
        (b"", 5, "kneser-ney", "empty"),
        (b"abc", 8, "kneser-ney", "order=8"),
        (b"abc", -1, "kneser-ney", "order=-1"),
        (b"abc", 5, "good-turing", "good-turing"),
    ],
)
def test_what_cannot_be_fitted_is_refused(text, order, smoothing, word):
    with pytest.raises(ValueError, match=word):
        NGram.fit(as_bytes(text), order, smoothing)
