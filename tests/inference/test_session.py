import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.attention.cache import CacheError
from dsv3_tutorial.inference.compiled import fixed_shapes
from dsv3_tutorial.inference.requests import GenerationError
from dsv3_tutorial.inference.session import Session
from dsv3_tutorial.model import DeepSeekV3

prompts = st.lists(st.lists(st.integers(0, 47), min_size=1, max_size=9), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def exact(cfg):
    """A model in float64, where a cache may differ by rounding only."""
    torch.manual_seed(5)
    return DeepSeekV3(cfg).double().requires_grad_(False)


def whole(model, text):
    with torch.inference_mode():
        return model(torch.tensor([text]))[0]


@given(prompts, st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_padding_never_reaches_a_text_whoever_stands_beside_it(exact, texts, count):
    session = Session(exact, len(texts), 12)
    logits = session.prefill(texts)
    new = torch.arange(len(texts) * count).view(len(texts), count)
    stepped, hidden = session.step(new)
    assert session.lengths.tolist() == [len(text) + count for text in texts]
    assert session.hidden is hidden and hidden.shape == (len(texts), count, exact.cfg.hidden_size)
    for index, text in enumerate(texts):
        alone = whole(exact, [*text, *new[index].tolist()])
        torch.testing.assert_close(logits[index], alone[len(text) - 1], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(stepped[index], alone[len(text) :], rtol=1e-9, atol=1e-9)


def test_a_trimmed_text_goes_on_as_if_the_rest_had_never_come(exact):
    session = Session(exact, 2, 10)
    session.prefill([[1, 2, 3], [4]])
    session.step(torch.tensor([[7, 8, 9], [5, 6, 7]]))
    session.trim([4, 3])
    after, _ = session.step(torch.tensor([[11], [12]]))
    torch.testing.assert_close(after[0, 0], whole(exact, [1, 2, 3, 7, 11])[-1])
    torch.testing.assert_close(after[1, 0], whole(exact, [4, 5, 6, 12])[-1])


def test_what_was_read_last_is_kept_for_whoever_drafts(exact):
    session = Session(exact, 2, 8, drafts=True)
    logits = session.prefill([[1, 2, 3], [4]])
    assert session.input_ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    last = session.last_hidden([3, 1])
    torch.testing.assert_close(exact.lm_head(last), logits)
    assert len(session.caches) == 2 and len(session.draft_caches) == 1
    assert session.draft_caches[0].longest == 0


def test_the_bytes_are_those_of_the_caches_it_keeps(model, cfg):
    row = 4 * (cfg.kv_lora_rank + cfg.qk_rope_head_dim)
    plain, drafting = Session(model, 3, 10), Session(model, 3, 10, drafts=True)
    assert plain.nbytes == 2 * 3 * 10 * row and drafting.nbytes == 3 * 3 * 10 * row
    assert plain.row_bytes == drafting.row_bytes == row
    assert Session(model, 3, 10, "bf16").row_bytes == row / 2


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("texts", [[[1, 2, 3]], [[1, 2, 3], [4]]], ids=["one", "ragged"])
def test_a_step_of_fixed_shapes_is_the_same_step(exact, texts, count):
    free, fixed = Session(exact, len(texts), 11), Session(exact, len(texts), 11)
    for session in (free, fixed):
        session.prefill(texts)
    for _ in range(2):
        ids = torch.randint(48, (len(texts), count))
        expected, _ = free.step(ids)
        with fixed_shapes(fixed.caches, count):
            got, _ = fixed.step(ids)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        for one, other in zip(free.caches, fixed.caches, strict=True):
            assert (one.shortest, one.longest) == (other.shortest, other.longest)
            assert one.lengths.tolist() == other.lengths.tolist()


def test_a_step_of_fixed_shapes_that_fails_leaves_the_lengths_as_they_were(exact):
    session = Session(exact, 1, 5)
    session.prefill([[1, 2]])
    with pytest.raises(RuntimeError, match="cut off"), fixed_shapes(session.caches, 1):
        raise RuntimeError("cut off")
    assert {(cache.shortest, cache.longest) for cache in session.caches} == {(2, 2)}


def test_a_full_session_says_so_before_it_overwrites(exact):
    session = Session(exact, 1, 3)
    session.prefill([[1, 2, 3]])
    with pytest.raises(CacheError, match="3 tokens held, 1 more, room for 3"):
        session.step(torch.tensor([[4]]))


def test_on_a_cpu_there_is_no_graph_to_replay(exact):
    with pytest.raises(GenerationError, match="CUDA graph, and this model is on 'cpu'"):
        Session(exact, 1, 3, compiled=True)
    Session(exact, 1, 3).prepare(1)  # nothing to prepare, and nothing wrong


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2])
def test_a_replayed_graph_is_the_same_step(cfg, count):
    torch.manual_seed(5)
    model = DeepSeekV3(cfg).cuda().bfloat16().requires_grad_(False)
    free, replayed = Session(model, 2, 20), Session(model, 2, 20, compiled=True)
    for session in (free, replayed):
        session.prefill([[1, 2, 3], [4]])
    replayed.prepare(count)
    assert replayed.lengths.tolist() == [3, 1]
    for token in range(4):
        ids = torch.tensor([[token] * count, [token + 9] * count], device="cuda")
        expected = free.step(ids)[0]
        torch.testing.assert_close(replayed.step(ids)[0], expected, rtol=0.02, atol=0.05)
        assert replayed.lengths.tolist() == free.lengths.tolist()
        for one, other in zip(free.caches, replayed.caches, strict=True):
            assert (one.shortest, one.longest) == (other.shortest, other.longest)
        for session in (free, replayed):
            session.trim((free.lengths - count + 1).tolist())  # as a refused draft does
