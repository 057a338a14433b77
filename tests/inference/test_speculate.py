"""Speculation changes the number of passes alone: same tokens and caches, any acceptance."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.inference import speculate
from dsv3_tutorial.inference.generate import generate
from dsv3_tutorial.inference.requests import GenerationError
from dsv3_tutorial.inference.sample import Sampling
from dsv3_tutorial.inference.session import Session
from dsv3_tutorial.inference.speculate import Drafter, mtp_inputs
from dsv3_tutorial.inference.speculate_count import Speculation
from dsv3_tutorial.model import DeepSeekV3

PROMPTS = ["def read(self, size=-1):\n", "import os\n\ndef main(", "class Test", "    if not isi"]


@pytest.fixture(scope="module")
def encoded(small):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(small / "tokenizer.json"))
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS]


@pytest.fixture(scope="module")
def exact(cfg):
    """The random model in float64: no tie that rounding could turn."""
    torch.manual_seed(5)
    return DeepSeekV3(cfg).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def foresight(exact):
    """foresight(prompts, wrong): a drafter's guess that knows what plain decoding gives.

    Each guess is right unless the next of the booleans `wrong` says otherwise.
    """

    def made(prompts, wrong):
        plain = [generate(exact, [prompt], 30).sequences[0] for prompt in prompts]
        texts = [[*prompt, *new] for prompt, new in zip(prompts, plain)]
        wrong = itertools.chain(wrong, itertools.repeat(False))

        def guess(drafter, place):
            ends = drafter.session.lengths.tolist()
            right = [text[min(end + 1 + place, len(text) - 1)] for text, end in zip(texts, ends)]
            return torch.tensor([(token + next(wrong)) % 48 for token in right])

        return plain, guess

    return made


def test_each_hidden_state_stands_beside_the_token_after_it(model):
    """As in training: the module's logits over these inputs are the model's own drafts."""
    ids = torch.randint(0, 48, (2, 9))
    hidden = model.model(ids)
    given, next_ids = mtp_inputs(hidden[:, :-1], ids[:, :-1], ids[:, -1])
    assert given.data_ptr() == hidden.data_ptr()
    assert torch.equal(next_ids, ids[:, 1:])
    _, (drafts,) = model(ids, drafts=True)
    torch.testing.assert_close(model.draft(given, next_ids)[1], drafts, rtol=0, atol=0)


def test_a_single_position_stands_beside_the_chosen_token_alone():
    hidden, next_ids = mtp_inputs(
        torch.zeros(2, 1, 4), torch.tensor([[3], [4]]), torch.tensor([7, 8])
    )
    assert next_ids.tolist() == [[7], [8]]
    assert hidden.shape == (2, 1, 4)


@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
def test_greedy_output_of_the_trained_model_is_that_of_plain_decoding(trained, encoded, drafts):
    for prompt in encoded[:2]:
        plain = generate(trained, [prompt], 32)
        fast = generate(trained, [prompt], 32, speculate=drafts)
        assert fast.sequences == plain.sequences
        assert fast.reasons == plain.reasons
        assert fast.passes < plain.passes == 31
        assert 0 < fast.accepted <= fast.drafted
        assert len(fast.sequences[0]) == 1 + fast.passes + fast.accepted


def test_texts_of_a_batch_keep_different_numbers_of_drafts_and_stay_what_they_are(trained, encoded):
    """Prompts of four lengths: from the first pass on, no two caches are equally long."""
    plain = [generate(trained, [prompt], 20).sequences[0] for prompt in encoded]
    fast = generate(trained, encoded, 20, speculate=3)
    assert fast.sequences == plain
    assert fast.accepted > 0.3 * fast.drafted


@pytest.mark.parametrize("cache", ["bf16", "fp8"])
def test_with_a_narrow_cache_the_output_is_plain_decodings_over_that_cache(trained, encoded, cache):
    plain = generate(trained, encoded[:1], 16, cache=cache)
    assert generate(trained, encoded[:1], 16, cache=cache, speculate=2).sequences == plain.sequences


prompt_batches = st.lists(
    st.lists(st.integers(0, 47), min_size=1, max_size=7), min_size=1, max_size=3
)


@settings(deadline=None, max_examples=15)
@given(prompt_batches, st.integers(1, 4), st.integers(1, 14), st.lists(st.booleans(), max_size=40))
def test_whatever_is_accepted_the_tokens_are_plain_decodings(
    exact, foresight, prompts, drafts, count, wrong
):
    """Drafts right or wrong as hypothesis likes, text by text: each pattern of acceptance."""
    plain, guess = foresight(prompts, wrong)
    real, calls = Drafter.draft, []

    def draft(self, read, ends, chosen, number, _):
        calls.append(number)
        return real(self, read, ends, chosen, number, lambda _, place: guess(self, place))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drafter, "draft", draft)
        done = generate(exact, prompts, count, speculate=drafts)
    assert done.sequences == [tokens[:count] for tokens in plain]
    assert done.passes == len(calls)
    assert sum(map(len, done.sequences)) >= len(prompts) + done.accepted
    if not any(wrong):
        assert done.passes == -(-(count - 1) // (drafts + 1))
        assert done.accepted == done.drafted


@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_the_module_drafts_from_what_it_would_have_read_without_a_cache(exact, monkeypatch, drafts):
    """Its cache holds true hidden states only, although it drafted from imitations in between."""
    seen = []
    guess = speculate._Greedy.guess

    def spy(self, logits, place):
        seen.append(logits if place == 0 else None)
        # Half of the guesses wrong and half as they come: texts of a batch part company.
        return torch.where(
            torch.arange(len(logits)) % 2 == len(seen) % 2, guess(self, logits, place), 5
        )

    monkeypatch.setattr(speculate._Greedy, "guess", spy)
    prompts = [[1, 2, 3, 4, 5], [7], [9, 8, 7]]
    read_at = []
    step = Session.step
    monkeypatch.setattr(
        Session,
        "step",
        lambda self, ids: (read_at.append((self.lengths.tolist(), ids[:, 0])), step(self, ids))[1],
    )
    done = generate(exact, prompts, 12, speculate=drafts)
    firsts = [logits for logits in seen if logits is not None]
    assert len(firsts) >= 6
    for logits, (lengths, chosen) in zip(firsts, read_at):
        for text, length in enumerate(lengths):
            whole = torch.tensor([[*prompts[text], *done.sequences[text]]])[:, : length + 1]
            assert whole[0, -1] == chosen[text]
            inputs = mtp_inputs(exact.model(whole[:, :-1]), whole[:, :-1], whole[:, -1])
            expected = exact.draft(*inputs)[1][0, -1]
            torch.testing.assert_close(logits[text], expected, rtol=1e-9, atol=1e-9)


def test_the_caches_end_where_the_text_does(exact):
    prompts = [[1, 2, 3, 4, 5], [7], [9, 8, 7]]
    session = Session(exact, 3, 40, drafts=True)
    tokens = session.prefill(prompts).argmax(-1).tolist()
    answers = [speculate.Answer(count) for count in (9, 4, 7)]
    for answer, token in zip(answers, tokens):
        answer.add(token)
    generators = Sampling(seed=0).generators(3)
    speculate.run(session, tokens, answers, Sampling(), generators, 3)
    ends = [len(p) + len(a.tokens) - 1 for p, a in zip(prompts, answers)]
    assert session.lengths.tolist() == ends  # the last token of each is chosen and not yet read


def test_a_stop_token_among_the_drafts_ends_a_text_as_in_plain_decoding(trained, encoded):
    new = generate(trained, encoded[:1], 12).sequences[0]
    for stop in {new[6], new[9]}:
        plain = generate(trained, encoded[:2], 24, stop=[stop])
        fast = generate(trained, encoded[:2], 24, stop=[stop], speculate=4)
        assert (fast.sequences, fast.reasons) == (plain.sequences, plain.reasons)


def test_no_draft_is_made_for_a_place_that_is_not_wanted(exact):
    assert generate(exact, [[1, 2]], 1, speculate=4).passes == 0
    one = generate(exact, [[1, 2]], 2, speculate=4)
    assert (one.passes, one.drafted) == (1, 0)
    assert generate(exact, [[1, 2]], 3, speculate=4).drafted <= 1


@pytest.mark.parametrize("drafts", [1, 3])
def test_what_a_text_draws_does_not_depend_on_its_neighbours(exact, drafts):
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]
    together = generate(exact, prompts, 12, Sampling(1.0, seed=7), speculate=drafts)
    for text, prompt in enumerate(prompts):
        sampling = Sampling(1.0, seed=7 + text)
        alone = generate(exact, [prompt], 12, sampling, speculate=drafts)
        assert alone.sequences[0] == together.sequences[text]
    again = generate(exact, prompts, 12, Sampling(1.0, seed=7), speculate=drafts)
    assert again.sequences == together.sequences


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_distribution_name_the_text_and_a_text_that_ended_is_not_asked(
    exact, monkeypatch, temperature
):
    head = exact.lm_head.forward

    def broken(hidden):
        logits = head(hidden)
        return logits.index_fill(0, torch.tensor([1]), float("nan")) if hidden.ndim == 3 else logits

    sampling = Sampling(temperature, seed=0)
    first = generate(exact, [[1, 2], [3]], 1, sampling).sequences[1]
    monkeypatch.setattr(exact.lm_head, "forward", broken)
    with pytest.raises(GenerationError, match=r"Text 1: .* NaN"):
        generate(exact, [[1, 2], [3]], 6, sampling, speculate=2)
    ended = generate(exact, [[1, 2], [3]], 6, sampling, stop=first, speculate=2)
    assert (len(ended.sequences[0]), ended.sequences[1]) == (6, [])


def test_drafts_are_counted_by_how_far_ahead_they_guessed():
    done = Speculation(3)
    done.count([3, 3, 1, 0], [4, 2, 1, 0], 0.25, 0.5)  # all kept, one, none; the last had ended
    done.count([2, 0, 0, 0], [3, 1, 0, 0], 0.25, 0.5)  # a text of a last token has no draft
    assert (done.passes, done.turns) == (2, 5)
    assert (done.drafted_at, done.accepted_at) == ([4, 3, 2], [3, 2, 1])
    assert (done.drafted, done.accepted, done.acceptance) == (9, 6, 0.75)
    assert done.tokens_per_pass == 1 + 6 / 5
    assert (done.draft_s, done.verify_s) == (0.5, 1.0)


def test_without_a_draft_there_is_one_token_a_pass_and_no_acceptance():
    assert (Speculation(2).acceptance, Speculation(2).tokens_per_pass) == (0.0, 1.0)
