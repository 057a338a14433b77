import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.inference.generate import generate
from dsv3_tutorial.inference.requests import GenerationError
from dsv3_tutorial.inference.sample import Sampling
from dsv3_tutorial.model import DeepSeekV3

NAN = float("nan")


@pytest.fixture(scope="module")
def exact(cfg):
    """A model in float64: who shares the batch changes no token by rounding."""
    torch.manual_seed(5)
    return DeepSeekV3(cfg).double().requires_grad_(False)


prompts = st.lists(st.lists(st.integers(0, 47), min_size=1, max_size=9), min_size=1, max_size=4)
samplings = st.sampled_from([Sampling(), Sampling(1.2, seed=3), Sampling(0.8, 9, 0.9, seed=4)])


@pytest.mark.parametrize("prompt", [[7], [3, 1, 4, 1, 5, 9, 2, 6]], ids=["one token", "eight"])
def test_greedy_tokens_are_those_of_the_whole_text_read_anew_each_time(exact, reread, prompt):
    made = generate(exact, [prompt], 12)
    assert made.sequences == [reread(exact, prompt, 12)]
    assert (made.reasons, made.passes, made.decoded) == (["length"], 11, 11)
    assert made.drafted == made.accepted == 0


@settings(max_examples=20, deadline=None)
@given(prompts, samplings)
def test_a_texts_tokens_do_not_depend_on_its_neighbours(exact, texts, sampling):
    together = generate(exact, texts, 6, sampling).sequences
    for index, text in enumerate(texts):
        seed = None if sampling.greedy else sampling.seed + index
        own = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed)
        assert generate(exact, [text], 6, own).sequences == [together[index]]


def test_a_seed_repeats_and_another_gives_another_text(exact):
    def made(seed):
        return generate(exact, [[1, 2]], 20, Sampling(1.0, seed=seed)).sequences

    assert made(1) == made(1) != made(2)


def test_only_the_likeliest_token_is_drawn_when_one_is_kept(exact):
    greedy = generate(exact, [[5, 6], [7]], 10).sequences
    assert generate(exact, [[5, 6], [7]], 10, Sampling(2.0, top_k=1)).sequences == greedy
    assert generate(exact, [[5, 6], [7]], 10, Sampling(2.0, top_p=1e-6)).sequences == greedy


def test_a_stop_token_ends_its_text_alone_and_is_left_out(exact):
    plain = generate(exact, [[5, 6], [7]], 10).sequences
    stop = next(token for token in plain[0] if token not in plain[1])
    made = generate(exact, [[5, 6], [7]], 10, stop=[stop])
    assert made.sequences == [plain[0][: plain[0].index(stop)], plain[1]]
    assert made.reasons == ["stop", "length"]


def test_it_stops_computing_when_all_have_ended(exact):
    first = generate(exact, [[5, 6]], 1).sequences[0]
    made = generate(exact, [[5, 6]], 30, stop=first)
    assert (made.sequences, made.passes, made.reasons) == ([[]], 0, ["stop"])


def test_tokens_are_told_as_they_come_and_the_listener_may_end_a_text(exact):
    plain, told = generate(exact, [[5, 6], [7]], 8).sequences, []

    def hear(text, token):
        told.append((text, token))
        return text == 1 and len(told) > 5

    made = generate(exact, [[5, 6], [7]], 8, on_token=hear)
    assert made.sequences == [plain[0], plain[1][:3]] and made.reasons == ["length", "stop"]
    assert [token for text, token in told if text == 0] == plain[0]
    assert told[:4] == [(0, plain[0][0]), (1, plain[1][0]), (0, plain[0][1]), (1, plain[1][1])]


@pytest.mark.parametrize("speculate", [0, 2])
def test_the_last_position_can_be_reached_and_not_passed(exact, speculate, cfg):
    limit = cfg.max_position_embeddings
    made = generate(exact, [[1] * (limit - 3)], 3, speculate=speculate)
    assert len(made.sequences[0]) == 3
    with pytest.raises(GenerationError, match=f"{limit + 1} in all"):
        generate(exact, [[1] * (limit - 3)], 4, speculate=speculate)


@pytest.mark.parametrize("drafts", [1, 3])
def test_speculation_gives_the_same_tokens_in_fewer_passes(trained, drafts):
    texts = [[100, 101, 102], [7], [40, 41]]
    plain = generate(trained, texts, 24)
    made = generate(trained, texts, 24, speculate=drafts)
    assert made.sequences == plain.sequences and made.reasons == plain.reasons
    assert 0 < made.accepted <= made.drafted and made.passes < plain.passes


@pytest.mark.parametrize("kind", [None, "bf16", "fp8", "fp8-rope"], ids=str)
def test_the_caches_bytes_are_counted(model, cfg, kind):
    made = generate(model, [[1, 2, 3], [4]], 5, cache=kind)
    rank, rope = cfg.kv_lora_rank, cfg.qk_rope_head_dim
    row = {None: 4 * (rank + rope), "bf16": 2 * (rank + rope), "fp8": rank + 4 + 2 * rope}
    assert made.row_bytes == made.cache_bytes / (2 * 2 * 8)
    if kind in row:
        assert made.row_bytes == row[kind]
    else:
        assert made.row_bytes < row["fp8"]


def test_a_bf16_cache_changes_little_and_an_fp8_one_a_little_more(trained):
    prompt = [[100, 101, 102, 7, 40, 41, 9, 300]]
    plain = generate(trained, prompt, 8)
    assert generate(trained, prompt, 8, cache="bf16").sequences == plain.sequences
    assert generate(trained, prompt, 8, cache="fp8").sequences[0][:2] == plain.sequences[0][:2]


def test_times_and_passes_are_told(model):
    made = generate(model, [[1]], 3)
    assert made.prefill_s > 0 and made.decode_s > 0


@pytest.mark.parametrize("speculate", [0, 2])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=0)], ids=["greedy", "drawn"])
def test_logits_that_are_no_distribution_end_it_with_the_texts_number(model, sampling, speculate):
    model.model.embed_tokens.weight[9] = NAN
    with pytest.raises(GenerationError, match=r"Text 1: .* logits are NaN"):
        generate(model, [[1], [9]], 4, sampling, speculate=speculate)
    model.lm_head.weight.fill_(NAN)
    with pytest.raises(GenerationError, match="Text 0: "):
        generate(model, [[1]], 4, sampling, speculate=speculate)


def test_a_text_that_ended_may_go_on_to_nonsense_unseen(model):
    kept = generate(model, [[2]], 6).sequences[0]
    firsts = {p: generate(model, [[p]], 1).sequences[0][0] for p in range(10)}
    other, stop = next((p, t) for p, t in firsts.items() if t not in (2, *kept))
    model.model.embed_tokens.weight[stop] = NAN  # what the ended text would read next
    made = generate(model, [[other], [2]], 6, stop=[stop])
    assert made.sequences == [[], kept] and made.passes == 5


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"prompts": []}, "batch of 0"),
        ({"prompts": [[1], []]}, "Prompt 1 is empty"),
        ({"prompts": [[48]]}, "tokens 0 to 47"),
        ({"prompts": [[1] * 64]}, "64 positions"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop": [99]}, "stop holds 99"),
        ({"speculate": -1}, "speculate is -1"),
    ],
    ids=["no prompts", "empty", "token", "too long", "nothing", "stop", "drafts"],
)
def test_a_request_that_cannot_be_served_is_refused_before_anything_is_read(model, wrong, said):
    model.forward = model.model.forward = None  # reading would fail
    with pytest.raises(GenerationError, match=said):
        generate(model, **({"prompts": [[1]], "max_new_tokens": 2} | wrong))


@pytest.mark.parametrize("made", [torch.tensor, np.array], ids=["tensors", "arrays"])
def test_prompts_and_stops_may_be_tensors_or_arrays(exact, made):
    texts = [[3, 1, 4], [7]]
    wanted = generate(exact, texts, 6)
    assert generate(exact, [made(text) for text in texts], 6).sequences == wanted.sequences
    ended = generate(exact, [made([3, 1, 4])], 6, stop=made(wanted.sequences[0][2:3]))
    assert ended.sequences == [wanted.sequences[0][:2]] and ended.reasons == ["stop"]


def test_a_model_without_an_mtp_module_cannot_speculate(plain_cfg):
    with pytest.raises(GenerationError, match="no MTP module"):
        generate(DeepSeekV3(plain_cfg), [[1]], 2, speculate=1)
