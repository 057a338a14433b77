"""Continuous batching: the same tokens as alone, nobody lost, no page leaked, whatever happens."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.attention.cache import CacheError
from dsv3_tutorial.attention.paged import LatentPages
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.inference import batch
from dsv3_tutorial.inference.batch import Request, Server
from dsv3_tutorial.inference.generate import generate
from dsv3_tutorial.inference.requests import GenerationError
from dsv3_tutorial.inference.sample import Sampling, next_tokens
from dsv3_tutorial.model import DeepSeekV3

ILL = 47  # a token whose embedding the tests make NaN


def prompts(count, longest=12, seed=0, tokens=ILL):
    draw = random.Random(seed)
    return [[draw.randrange(tokens) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def alone(model, request):
    """What `generate` gives for this request and nobody else."""
    made = generate(model, [request.prompt], request.max_new_tokens, request.sampling, request.stop)
    return made.sequences[0], made.reasons[0]


def of_kind(events, kind):
    return [event.request for event in events if event.kind == kind]


@pytest.fixture(scope="module")
def shared(cfg):
    """One model for the tests that change nothing in it."""
    torch.manual_seed(5)
    return DeepSeekV3(cfg).requires_grad_(False)


def made_ill(model):
    """Makes the logits NaN of any text with the token ILL in it, which no greedy answer has."""
    model.model.embed_tokens.weight.data[ILL] = torch.nan
    model.lm_head.weight.data[ILL] = 0
    return model


@pytest.fixture
def ill(model):
    return made_ill(model)


@pytest.fixture
def ill_and_small(plain_cfg):
    """One dense layer: a step takes a millisecond."""
    cfg = replace(plain_cfg, num_hidden_layers=1, first_k_dense_replace=1, num_attention_heads=1)
    torch.manual_seed(5)
    return made_ill(DeepSeekV3(cfg).requires_grad_(False))


# The same as alone


def test_each_gets_the_tokens_that_it_gets_alone(trained):
    texts = prompts(6, longest=20, tokens=512)
    server = Server(trained, 12, max_batch=4, page_size=16)
    wanted = [Request(text, 5 + 3 * i) for i, text in enumerate(texts)]
    ids = [server.submit(request) for request in wanted]
    results = server.run()
    for i, request in zip(ids, wanted):
        assert (results[i].tokens, results[i].reason) == alone(trained, request)
    assert server.idle and server.pages.free == 12


def test_one_step_is_a_whole_models_step_over_the_growing_text(shared, reread):
    server = Server(shared, 20, page_size=4)
    ids = [server.submit(Request(text, 9)) for text in prompts(5)]
    results = server.run()
    for i, text in zip(ids, prompts(5)):
        assert results[i].tokens == reread(shared, text, 9)


def test_a_request_s_prompt_may_be_a_tensor_and_is_refused_as_a_list_is(shared, reread):
    server = Server(shared, 4, page_size=16)
    number = server.submit(Request(torch.tensor([3, 1, 4]), 5))
    assert server.run()[number].tokens == reread(shared, [3, 1, 4], 5)
    for wrong in (torch.tensor([]), torch.tensor(3), torch.tensor([0.5]), 3):
        with pytest.raises(GenerationError, match=r"The prompt (is|holds) "):
            server.submit(Request(wrong, 5))
    assert server.idle


ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 12),  # the step before which it comes
        st.integers(1, 9),
        st.integers(1, 12),
        st.sampled_from([0.0, 0.8]),
        st.sampled_from([(), (3, 11)]),
    ),
    min_size=1,
    max_size=6,
).map(sorted)


@settings(deadline=None, max_examples=30)
@given(arrivals=ARRIVALS, page_size=st.sampled_from([1, 4, 16]), max_batch=st.integers(1, 4))
def test_arrivals_lengths_and_room_change_nothing_in_any_answer(
    shared, arrivals, page_size, max_batch
):
    server = Server(shared, -(-32 // page_size), max_batch, page_size, prefill_tokens=16)
    wanted, results = {}, {}
    while arrivals or not server.idle:
        while arrivals and arrivals[0][0] <= server.stats.steps:
            _, length, count, temperature, stop = arrivals.pop(0)
            text = (prompts(1, seed=len(wanted))[0] * length)[:length]
            sampling = Sampling(temperature, top_k=9, seed=len(wanted))
            request = Request(text, count, sampling, stop)
            wanted[server.submit(request)] = request
        for event in server.step():
            if event.result:
                results[event.request] = event.result
    assert results.keys() == wanted.keys()
    for i, request in wanted.items():
        assert (results[i].tokens, results[i].reason) == alone(shared, request)
    assert server.pages.free == server.pages.n_pages and len(server.pages) == 0


def test_logits_differ_by_rounding_only_whoever_shares_the_batch(trained):
    pages = LatentPages(trained.cfg, 40, 8)
    texts = prompts(6, longest=24, tokens=512)
    with torch.inference_mode():
        for key, text in enumerate(texts):
            pages.open(key, len(text) + 8)
            trained(torch.tensor([text]), pages.caches([key]))
        new = torch.tensor(prompts(1, tokens=512, seed=9)[0] * 6)[:6, None]  # (B, 1)
        ends = [len(text) for text in texts]
        for batch in ([0, 1, 2, 3, 4, 5], [5, 0], [3, 1, 4], [2]):
            caches = pages.caches(batch)
            together = trained(new[batch], caches)
            for cache in caches:
                cache.trim([ends[key] for key in batch])
            for place, key in enumerate(batch):
                caches = pages.caches([key])
                wanted = trained(new[key : key + 1], caches)
                for cache in caches:
                    cache.trim([ends[key]])
                difference = (together[place] - wanted[0]).abs().max() / wanted.abs().max()
                assert difference <= 1e-5


def test_a_seed_gives_the_same_tokens_in_any_company(shared):
    request = Request([4, 5, 6], 12, Sampling(1.0, top_p=0.9, seed=7))
    wanted, _ = alone(shared, request)
    for others in (0, 1, 3):
        server = Server(shared, 40, page_size=4)
        for text in prompts(others):
            server.submit(Request(text, 9, Sampling(1.5, seed=3)))
        mine = server.submit(request)
        assert server.run()[mine].tokens == wanted


@pytest.mark.gpu
def test_a_gpu_gives_each_the_tokens_that_it_gets_alone_there(model):
    model = model.cuda()
    server = Server(model, 20, page_size=16)
    wanted = {server.submit(Request(text, 6)): text for text in prompts(5)}
    for i, result in server.run().items():
        assert result.tokens == alone(model, Request(wanted[i], 6))[0]


@pytest.mark.parametrize("kind", ["bf16", "fp8", "fp8-rope"])
def test_narrow_pages_give_what_the_narrow_cache_gives(trained, kind):
    options = {"bf16": {"dtype": torch.bfloat16}, "fp8": {"fp8": True}, "fp8-rope": {}}[kind]
    pages = LatentPages(trained.cfg, 12, 8, **options, rope_fp8=kind == "fp8-rope")
    texts = prompts(3, tokens=512)
    server = Server(trained, pages)
    ids = [server.submit(Request(text, 8)) for text in texts]
    results = server.run()
    for i, text in zip(ids, texts):
        assert results[i].tokens == generate(trained, [text], 8, cache=kind).sequences[0]


# Who starts when


def test_a_request_waits_until_its_pages_are_reserved_and_nobody_passes_it(shared):
    server = Server(shared, 6, max_batch=4, page_size=4)
    first = server.submit(Request([1, 2], 10))  # 3 pages
    large = server.submit(Request([1, 2, 3], 17))  # 5 pages: not beside the first
    little = server.submit(Request([1], 2))  # would fit, but came later
    events = server.step()
    assert of_kind(events, "started") == [first] and server.stats.queued == 2
    started = {}
    while not server.idle:
        for event in server.step():
            if event.kind == "started":
                started[event.request] = server.stats.steps
    assert started == {large: 10, little: 10}  # the first made one token a step, ten in all
    assert server.stats.longest_wait == 9 and server.stats.mean_wait == 6


def test_a_step_gives_each_running_request_one_token_and_starts_what_fits(shared):
    server = Server(shared, 20, max_batch=2, page_size=4)
    ids = [server.submit(Request(text, 3)) for text in prompts(3)]
    assert of_kind(server.step(), "token") == ids[:2]
    assert of_kind(server.step(), "token") == ids[:2]
    third = server.step()
    assert of_kind(third, "token") == ids  # two end, the third starts where they were
    assert of_kind(third, "finished") == ids[:2] and of_kind(third, "started") == ids[2:]
    assert (server.stats.running, server.stats.finished, server.stats.tokens) == (1, 2, 7)


def test_prompts_of_one_length_are_read_together_up_to_the_limit(shared):
    server = Server(shared, 40, max_batch=8, page_size=4, prefill_tokens=8)
    shapes = []
    hook = shared.model.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    for text in ([1] * 3, [2] * 3, [3] * 3, [4] * 5, [5] * 3, [6] * 20):
        server.submit(Request(text, 1))
    server.run()
    hook.remove()
    assert [tuple(shape) for shape in shapes] == [(2, 3), (1, 3), (1, 5), (1, 3), (1, 20)]


def test_a_text_that_fills_its_pages_to_the_last_slot_is_served(shared):
    server = Server(shared, 4, page_size=4)
    mine = server.submit(Request([1] * 7, 9))
    assert len(server.run()[mine].tokens) == 9


# What is refused at once


@pytest.mark.parametrize(
    "request_, what",
    [
        (Request([], 4), "empty"),
        (Request([1], 0), "max_new_tokens"),
        (Request([48], 4), "48"),
        (Request([1] * 60, 5), "64 positions"),
        (Request([1] * 30, 3), r"needs 9 pages for 33 tokens and the whole pool has 8"),
        (Request([1], 4, stop=(99,)), "99"),
    ],
    ids=["empty prompt", "no new token", "token", "positions", "pool", "stop"],
)
def test_what_can_never_be_served_is_refused_and_changes_nothing(shared, request_, what):
    server = Server(shared, 8, page_size=4)
    with pytest.raises(GenerationError, match=what):
        server.submit(request_)
    assert server.idle and server.submit(Request([1], 1)) == 0


def test_a_server_for_nobody_and_a_pool_that_others_hold_are_errors(shared):
    with pytest.raises(GenerationError, match="max_batch is 0"):
        Server(shared, 8, max_batch=0)
    with pytest.raises(CacheError, match="no text could ever start"):
        Server(shared, 0)
    for other in (LatentPages(shared.cfg, 8, layers=1), LatentPages(ModelConfig.named("tiny"), 8)):
        with pytest.raises(GenerationError, match="its rows would not fit"):
            Server(shared, other)
    pages = LatentPages(shared.cfg, 8, 4)
    pages.open("somebody else", 20)
    server = Server(shared, pages)
    server.submit(Request([1] * 10, 10))
    with pytest.raises(GenerationError, match=r"1 requests wait and none can start.*holds 5"):
        server.run()
    pages.close("somebody else")
    assert len(server.run()[0].tokens) == 10


# Cancelling, errors, interrupts


def test_a_request_can_be_cancelled_in_every_state(shared):
    server = Server(shared, 8, max_batch=1, page_size=4)
    running, queued, last = (server.submit(Request([1, 2, 3], 6)) for _ in range(3))
    server.step()
    server.step()
    assert server.cancel(running) and server.pages.free == 8
    assert server.cancel(queued) and not server.cancel(queued)
    events = server.step()
    ended = {event.request: event.result for event in events if event.result}
    wanted, _ = alone(shared, Request([1, 2, 3], 6))
    assert (ended[running].tokens, ended[running].reason) == (wanted[:2], "cancelled")
    assert (ended[queued].tokens, ended[queued].waited) == ([], None)
    assert server.run()[last].tokens == wanted
    assert not server.cancel(last) and server.stats.cancelled == 2
    for never in (3, -1):
        with pytest.raises(GenerationError, match=f"no request {never}"):
            server.cancel(never)


def test_cancelling_all_is_told_by_the_next_step(shared):
    server = Server(shared, 8, page_size=4)
    mine = server.submit(Request([1], 3))
    server.cancel(mine)
    assert not server.idle and server.run()[mine].reason == "cancelled" and server.idle


def test_logits_that_are_nan_end_that_request_alone(ill):
    server = Server(ill, 40, page_size=4)
    texts = prompts(3)
    good = [server.submit(Request(text, 6)) for text in texts]
    bad = server.submit(Request([1, ILL, 2], 6))
    results = server.run()
    assert results[bad].reason == "error" and results[bad].tokens == []
    assert "logits are NaN" in results[bad].problem
    for i, text in zip(good, texts):
        assert results[i].tokens == alone(ill, Request(text, 6))[0]
    assert server.pages.free == 40 and server.stats.failed == 1


def test_the_pages_of_a_nan_are_safe_for_the_next_text(ill):
    server = Server(ill, 4, max_batch=2, page_size=4)
    server.submit(Request([ILL] * 15, 1))
    server.run()
    ids = [server.submit(Request(text, 3)) for text in ([1, 2, 3], [1])]
    results = server.run()
    for i, text in zip(ids, ([1, 2, 3], [1])):
        assert results[i].tokens == alone(ill, Request(text, 3))[0]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("broken_call", range(5))
def test_a_step_that_failed_half_way_is_repeated_as_if_it_had_not(shared, layer, broken_call):
    server = Server(shared, 20, max_batch=3, page_size=4)
    wanted = [Request(text, 5, Sampling(1.0, seed=i)) for i, text in enumerate(prompts(5))]
    ids, calls, results = [server.submit(request) for request in wanted], [], {}

    def fail_once(module, args, out):
        calls.append(module)
        if len(calls) == broken_call + 1:
            raise KeyboardInterrupt

    hook = shared.model.layers[layer].register_forward_hook(fail_once)
    interrupts = 0
    while not server.idle:
        try:
            results |= {event.request: event.result for event in server.step() if event.result}
        except KeyboardInterrupt:
            interrupts += 1
    hook.remove()
    assert interrupts == 1
    for i, request in zip(ids, wanted):
        assert results[i].tokens == alone(shared, request)[0]
    assert server.pages.free == 20 and server.stats.tokens == 25


def test_a_step_that_failed_after_drawing_draws_the_same_numbers_again(shared, monkeypatch):
    server = Server(shared, 20, page_size=4)
    request = Request([1, 2], 6, Sampling(1.0, seed=3))
    mine, calls = server.submit(request), []

    def fail_at_first(*args):
        calls.append(next_tokens(*args))
        if len(calls) in (1, 4):
            raise KeyboardInterrupt
        return calls[-1]

    monkeypatch.setattr(batch, "next_tokens", fail_at_first)
    with pytest.raises(KeyboardInterrupt):
        server.run()
    with pytest.raises(KeyboardInterrupt):
        server.run()
    assert server.run()[mine].tokens == alone(shared, request)[0] and len(calls) == 8


def test_what_a_step_did_before_it_failed_is_told_by_the_next(shared):
    server = Server(shared, 20, max_batch=2, page_size=4)
    first = server.submit(Request([1, 2], 2))
    server.step()
    second = server.submit(Request([3, 4, 5], 1))

    def fail_on_prompts(module, args, out):
        if out.shape[1] == 3:
            raise MemoryError

    hook = shared.model.layers[1].register_forward_hook(fail_on_prompts)
    for _ in range(2):  # the running one has its last token, the new one never starts
        with pytest.raises(MemoryError):
            server.step()
    hook.remove()
    assert (server.stats.queued, server.pages.free) == (1, 20)
    told = [(event.request, event.kind) for event in server.step()]
    assert told == [
        (first, "token"),
        (first, "finished"),
        (second, "started"),
        (second, "token"),
        (second, "finished"),
    ]


@pytest.mark.slow
def test_two_thousand_requests_with_cancellations_and_failures_lose_nobody_and_leak_no_page(
    ill_and_small,
):
    model, draw, made, ended = ill_and_small, random.Random(1), {}, {}
    server = Server(model, 24, max_batch=6, page_size=4, prefill_tokens=32)

    def fail_sometimes(module, args, out):
        if draw.random() < 0.01:
            raise MemoryError

    hook = model.model.layers[0].register_forward_hook(fail_sometimes)
    failures, order = 0, []
    while len(made) < 2000 or not server.idle:
        for _ in range(draw.randrange(5) if len(made) < 2000 and server.stats.queued < 30 else 0):
            request = any_request(draw)
            made[server.submit(request)] = request
        for _ in range(draw.randrange(2) if made else 0):
            server.cancel(draw.choice([draw.randrange(len(made)), len(made) - 1]))
        try:
            events = server.step()
        except MemoryError:
            failures += 1
            continue
        order += of_kind(events, "started")
        for event in events:
            if event.result:
                assert event.request not in ended
                ended[event.request] = event.result
        held = [page for job in server._running for page in server.pages.held(job.id)]
        assert len(set(held)) == len(held) == 24 - server.pages.free
    hook.remove()
    assert ended.keys() == made.keys() and server.pages.free == 24 and len(server.pages) == 0
    assert order == sorted(order) and failures > 5
    reasons = [result.reason for result in ended.values()]
    assert min(map(reasons.count, ("length", "stop", "cancelled", "error"))) > 50
    stats = server.stats
    assert stats.finished + stats.cancelled + stats.failed == len(made)
    assert (stats.queued, stats.running) == (0, 0)
    check_answers(model, made, ended)


def any_request(draw):
    """A random request: some sampled, some with stop tokens, some whose logits will be NaN."""
    text = [draw.randrange(48) for _ in range(draw.choice([1, 2, 2, 4, 9]))]
    sampling = Sampling(draw.choice([0.0, 0.9]), seed=draw.randrange(99))
    return Request(text, draw.randint(1, 12), sampling, draw.choice([(), (5, 6, 7)]))


def check_answers(model, made, ended):
    """Every 20th request that ended by itself has the answer that it gets alone."""
    whole = [i for i, result in ended.items() if result.reason in ("length", "stop")]
    for i in whole[::20]:
        assert (ended[i].tokens, ended[i].reason) == alone(model, made[i])
