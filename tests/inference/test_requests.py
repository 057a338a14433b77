import numpy as np
import pytest
import torch

from dsv3_tutorial.inference.requests import (
    Answer,
    GenerationError,
    check_prompt,
    check_prompts,
    check_speculation,
    check_stop,
)


def test_the_longest_text_that_fits_is_taken_and_one_token_more_is_refused(cfg):
    check_prompt(cfg, [1] * 60, cfg.max_position_embeddings - 60)
    with pytest.raises(GenerationError, match=r"60 tokens and 5 more .* 65 in all.* 64 positions"):
        check_prompt(cfg, [1] * 60, 5)


def test_what_may_still_be_asked_for_is_said(cfg):
    with pytest.raises(GenerationError, match="ask for 4 tokens"):
        check_prompt(cfg, [1] * 60, 5)
    with pytest.raises(GenerationError, match="ask for 0 tokens"):
        check_prompt(cfg, [1] * 70, 1)


@pytest.mark.parametrize("token", [-1, 48, 1.0, True, "a"], ids=repr)
def test_a_token_that_the_model_does_not_know_is_refused_by_name(cfg, token):
    with pytest.raises(GenerationError, match=r"Prompt 1 holds .*tokens 0 to 47"):
        check_prompts(cfg, [[0, 47], [5, token]], 1)


@pytest.mark.parametrize(
    "made",
    [torch.tensor, np.array, tuple, lambda t: torch.tensor(t, dtype=torch.uint8), np.int32],
    ids=["tensor", "array", "tuple", "bytes", "int32"],
)
def test_integers_of_any_kind_are_taken_as_lists_of_int(cfg, made):
    for texts in ([[5], [3, 1, 4]], [[0, 47]]):
        found = check_prompts(cfg, [made(text) for text in texts], 2)
        assert found == texts and all(type(token) is int for text in found for token in text)
    assert check_prompts(cfg, made([[1, 2], [3, 4]]), 2) == [[1, 2], [3, 4]]
    assert check_prompt(cfg, [made([7])[0]], 1) == [7]  # a number of its own kind in a list
    assert check_stop(cfg, made([7, 7])) == {7}


NO_TOKENS = {
    "Prompt 0 is 5, which is no sequence": [5],
    "Prompt 0 is tensor": [torch.tensor(5)],
    "Prompt 0 is empty": [torch.tensor([], dtype=torch.int64)],
    "Prompt 0 holds 1.0": [torch.tensor([1.0, 2.0])],
    "Prompt 0 holds True": [np.array([True])],
    r"Prompt 0 holds \[1, 2\]": [torch.tensor([[1, 2]])],
    "Prompt 0 holds 48": [np.array([48])],
    "The prompts are 5, which": 5,
    "There is no prompt": np.zeros((0, 3), dtype=int),
}


@pytest.mark.parametrize("told", NO_TOKENS)
def test_what_is_no_sequence_of_tokens_is_refused_in_three_parts(cfg, told):
    with pytest.raises(GenerationError, match=rf"{told}.*: .*\. (Give|Encode) "):
        check_prompts(cfg, NO_TOKENS[told], 1)


def test_no_prompts_an_empty_prompt_and_nothing_wanted_are_refused(cfg):
    with pytest.raises(GenerationError, match="batch of 0"):
        check_prompts(cfg, [], 1)
    with pytest.raises(GenerationError, match="Prompt 1 is empty"):
        check_prompts(cfg, [[1], []], 1)
    for count in (0, -1, 2.5, True):
        with pytest.raises(GenerationError, match="max_new_tokens is"):
            check_prompts(cfg, [[1]], count)


def test_a_stop_token_that_can_never_come_is_refused(cfg):
    assert check_stop(cfg, [3, 3, 47]) == {3, 47}
    for wrong in (48, -1, "\n"):
        with pytest.raises(GenerationError, match="stop holds"):
            check_stop(cfg, [wrong])


def test_speculation_needs_a_module_and_a_count(cfg, plain_cfg):
    check_speculation(cfg, 3)
    check_speculation(plain_cfg, 0)
    with pytest.raises(GenerationError, match="no MTP module"):
        check_speculation(plain_cfg, 1)
    for wrong in (-1, 1.5, True):
        with pytest.raises(GenerationError, match="how many tokens are drafted"):
            check_speculation(cfg, wrong)


def test_an_answer_ends_at_its_length_and_takes_no_more():
    answer = Answer(2)
    assert answer.left == 2 and answer.add(7) and answer.left == 1
    assert not answer.add(8) and answer.reason == "length" and answer.left == 0
    assert not answer.add(9) and answer.tokens == [7, 8]


def test_a_stop_token_ends_an_answer_and_is_not_kept():
    answer = Answer(5, stop=[3])
    assert answer.add(1) and not answer.add(3) and not answer.add(4)
    assert answer.tokens == [1] and answer.reason == "stop"


def test_who_listens_hears_each_kept_token_and_may_end_it():
    heard = []
    answer = Answer(5, stop=[3], on_token=lambda token: heard.append(token) or token == 6)
    assert answer.add(5) and not answer.add(6) and not answer.add(7)
    assert heard == answer.tokens == [5, 6] and answer.reason == "stop"


def test_a_stop_at_the_last_token_is_a_stop():
    assert not (answer := Answer(1, on_token=lambda _: True)).add(4)
    assert answer.reason == "stop"
