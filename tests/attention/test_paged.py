import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.attention.cache import CacheError, LatentCache
from dsv3_tutorial.attention.cache_fp8 import Fp8LatentCache
from dsv3_tutorial.attention.decode_paged import PagedRows, latent_decode_paged
from dsv3_tutorial.attention.mla import MLA
from dsv3_tutorial.attention.paged import LatentPages, PagePool, PoolFull, slots
from dsv3_tutorial.config import ModelConfig

CFG = ModelConfig.named("tiny")
C, R, H = CFG.kv_lora_rank, CFG.qk_rope_head_dim, CFG.num_attention_heads


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.manual_seed(seed))


def latent_pages(n_pages=40, page_size=4, **options):
    return LatentPages(CFG, n_pages, page_size, **{"layers": 1, **options})


def scattered(pages, *lengths):
    """Texts of these lengths whose pages are anything but consecutive, as after much traffic."""
    fillers = [f"filler {i}" for i in range(pages.free)]
    for filler in fillers:
        pages.open(filler, 1)
    order = torch.randperm(len(fillers), generator=torch.manual_seed(1)).tolist()
    for key, tokens in enumerate(lengths):
        for _ in range(pages.needs(tokens)):
            pages.close(fillers[order.pop()])
        pages.open(key, tokens)
    return list(range(len(lengths)))


# Slots and the allocator


def test_slots_follow_the_page_table():
    tables = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)
    positions = torch.tensor([[0, 3, 4], [7, 1, 5]])
    found = slots(tables, positions, page_size=4)
    assert found.tolist() == [[12, 15, 0], [11, 5, 9]] and found.dtype == torch.int64


@settings(deadline=None, max_examples=60)
@given(data=st.data(), n_pages=st.integers(1, 12))
def test_a_page_is_free_or_one_takers_whatever_the_order(data, n_pages):
    pool, taken = PagePool(n_pages), []
    for _ in range(data.draw(st.integers(1, 20))):
        if taken and data.draw(st.booleans()):
            pool.give_back(taken.pop(data.draw(st.integers(0, len(taken) - 1))))
        else:
            n, free = data.draw(st.integers(1, 6)), pool.free
            if n > free:
                with pytest.raises(PoolFull, match=f"{n} pages are needed and {free} of"):
                    pool.take(n)
            else:
                taken.append(pool.take(n))
                assert len(taken[-1]) == n
        held = [page for pages in taken for page in pages]
        assert len(set(held)) == len(held) == n_pages - pool.free
        assert set(held) <= set(range(n_pages))
    for pages in taken:
        pool.give_back(pages)
    assert sorted(pool.take(n_pages)) == list(range(n_pages))


def test_pages_that_follow_each_other_are_preferred():
    pool = PagePool(10)
    first, second = pool.take(3), pool.take(2)
    assert (first, second) == ([0, 1, 2], [3, 4])
    pool.give_back([1])
    assert pool.take(2) == [5, 6]
    assert pool.take(4) == [1, 7, 8, 9]


@pytest.mark.parametrize(
    "pages, what",
    [([2, 3], "page 3 is not taken"), ([0, 0], "named twice"), ([-1], "-1 is not"), ([7], "7 is")],
)
def test_what_is_freed_twice_or_is_nobodys_is_refused_and_nothing_freed(pages, what):
    pool = PagePool(4)
    pool.take(3)
    with pytest.raises(CacheError, match=what):
        pool.give_back(pages)
    assert pool.free == 1 and pool.take(1) == [3]


def test_an_empty_pool_and_empty_pages_are_refused():
    with pytest.raises(CacheError, match="no text could ever start"):
        PagePool(0)
    with pytest.raises(CacheError, match="Ask for as many"):
        PagePool(3).take(0)
    with pytest.raises(CacheError, match="hold nothing"):
        LatentPages(CFG, 3, page_size=0)
    llama = ModelConfig(16, 64, 16, 1, 8, model_type="llama")
    with pytest.raises(CacheError, match=r"no latent.*Use FullCache"):
        LatentPages(llama, 3)


# Opening and closing texts


def test_opening_reserves_all_pages_and_closing_gives_them_back():
    pages = latent_pages(n_pages=6, page_size=4)
    pages.open("a", 9)
    assert pages.held("a") == (0, 1, 2) and pages.free == 3
    with pytest.raises(PoolFull, match="4 pages are needed and 3 of 6 are free"):
        pages.open("b", 13)
    assert pages.free == 3 and len(pages) == 1
    pages.close("a")
    assert pages.free == 6 and len(pages) == 0
    with pytest.raises(CacheError, match="'a' is not open"):
        pages.close("a")


def test_names_are_used_once_at_a_time():
    pages = latent_pages()
    pages.open("a", 3)
    with pytest.raises(CacheError, match="'a' is open already"):
        pages.open("a", 3)
    for keys in ([], ["a", "a"]):
        with pytest.raises(CacheError, match="make no batch"):
            pages.caches(keys)
    with pytest.raises(CacheError, match="'b' is not open"):
        pages.caches(["a", "b"])


def test_the_bytes_are_those_of_the_rows():
    elements = C + R
    assert latent_pages(10, 4, layers=3).nbytes == 10 * 4 * 3 * elements * 4
    assert latent_pages(10, 4, dtype=torch.bfloat16).nbytes == 10 * 4 * elements * 2
    row = C + 4 * -(-C // 128) + 2 * R
    assert latent_pages(10, 4, fp8=True).nbytes == 10 * 4 * row
    assert LatentPages(CFG, 2, 4).nbytes == CFG.num_hidden_layers * 2 * 4 * elements * 4
    pages = latent_pages(10, 4)
    pages.open("a", 5)
    assert pages.caches(["a"])[0].nbytes == 2 * 4 * elements * 4


def test_the_same_batch_gets_the_same_views_and_another_one_ends_them():
    pages = latent_pages()
    for key in "abc":
        pages.open(key, 8)
    (first,) = pages.caches("ab")
    assert pages.caches("ab")[0] is first
    first.append(draw(2, 3, C), draw(2, 3, R))
    (second,) = pages.caches("bc")
    assert second.lengths.tolist() == [3, 0] and pages.length("a") == 3
    for use in (
        lambda: first.append(draw(2, 1, C), draw(2, 1, R)),
        lambda: first.attend(draw(2, 1, H, C + R), 1.0),
        lambda: first.trim([1, 1]),
        lambda: first.c_kv,
    ):
        with pytest.raises(CacheError, match="out of date"):
            use()
    pages.close("c")
    with pytest.raises(CacheError, match="out of date"):
        second.append(draw(2, 1, C), draw(2, 1, R))
    assert pages.length("b") == 3


def test_the_order_of_a_batch_is_the_callers():
    pages = latent_pages()
    for key, count in (("a", 2), ("b", 5)):
        pages.open(key, 8)
        pages.caches(key)[0].append(draw(1, count, C), draw(1, count, R))
    for keys, lengths in (("ab", [2, 5]), ("ba", [5, 2]), ("ab", [2, 5])):
        (cache,) = pages.caches(keys)
        assert cache.lengths.tolist() == list(cache.extent.ends) == lengths


def test_each_layer_goes_its_own_way():
    pages = latent_pages(layers=2)
    pages.open("a", 8)
    main, draft = pages.caches(["a"])
    main.append(draw(1, 3, C), draw(1, 3, R))
    draft.append(draw(1, 2, C), draw(1, 2, R))
    assert (main.longest, draft.longest, pages.length("a")) == (3, 2, 2)
    pages.open("b", 8)
    main, draft = pages.caches(["b", "a"])
    assert main.lengths.tolist() == [0, 3] and draft.lengths.tolist() == [0, 2]


def test_layers_that_are_equally_far_share_their_lengths_and_slots():
    pages = latent_pages(layers=3)
    pages.open("a", 8)
    caches = pages.caches(["a"])
    for cache in caches:
        cache.append(draw(1, 2, C), draw(1, 2, R))
    assert len({id(cache.extent) for cache in caches}) == 1
    for cache in caches:
        cache.trim([1])
    assert len({id(cache.extent) for cache in caches}) == 1 and caches[0].lengths.tolist() == [1]


def test_a_text_never_writes_beyond_its_own_pages():
    pages = latent_pages(n_pages=3, page_size=4)
    pages.open("a", 4)
    pages.open("b", 8)
    (cache,) = pages.caches("ab")
    cache.append(draw(2, 3, C), draw(2, 3, R))
    before = pages.storages[0].clone()
    with pytest.raises(CacheError, match="Sequence 0 of the batch is full: 3 tokens held, 2 more"):
        cache.append(draw(2, 2, C), draw(2, 2, R))
    assert torch.equal(pages.storages[0], before) and cache.lengths.tolist() == [3, 3]


@pytest.mark.parametrize("lengths", [[4, 1], [-1, 1], [1], [1, 1, 1], [0.5, 1.0]], ids=str)
def test_lengths_that_were_never_read_cannot_be_kept(lengths):
    pages = latent_pages()
    keys = scattered(pages, 8, 8)
    (cache,) = pages.caches(keys)
    cache.append(draw(2, 3, C), draw(2, 3, R))
    with pytest.raises(CacheError, match="Cannot trim"):
        cache.trim(lengths)
    assert cache.lengths.tolist() == [3, 3]


@pytest.mark.parametrize(
    "c_kv, k_rope",
    [
        (torch.zeros(3, 1, C), torch.zeros(3, 1, R)),
        (torch.zeros(2, 1, C + 1), torch.zeros(2, 1, R)),
        (torch.zeros(2, 1, C), torch.zeros(2, 2, R)),
        (torch.zeros(2, 0, C), torch.zeros(2, 0, R)),
        (torch.zeros(2, C), torch.zeros(2, R)),
        (torch.zeros(2, 1, C, dtype=torch.int64), torch.zeros(2, 1, R)),
    ],
    ids=["batch", "width", "two lengths", "no token", "dimension", "integers"],
)
def test_tokens_of_another_shape_are_refused(c_kv, k_rope):
    pages = latent_pages()
    (cache,) = pages.caches(scattered(pages, 8, 8))
    with pytest.raises(CacheError, match=r"Got .* LatentPages.caches"):
        cache.append(c_kv, k_rope)


# Paged is contiguous


def test_rows_that_lie_together_are_a_view_and_others_are_gathered_in_order():
    storage = torch.arange(24.0).view(12, 2)
    rows = PagedRows(storage, torch.tensor([[1, 2, 0], [2, 1, 0]]), page_size=3)
    together, apart = rows[0, :5], rows[1, :5]
    assert together.data_ptr() == storage[3].data_ptr()
    assert torch.equal(together, storage[3:8])
    assert torch.equal(apart, storage[[6, 7, 8, 3, 4]])


@settings(deadline=None, max_examples=40)
@given(
    data=st.data(),
    page_size=st.sampled_from([1, 3, 8, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_paged_is_contiguous_bit_for_bit(data, page_size, dtype):
    rooms = data.draw(st.lists(st.integers(4, 40), min_size=1, max_size=4))
    pages = latent_pages(sum(-(-room // page_size) for room in rooms) + 3, page_size, dtype=dtype)
    (paged,) = pages.caches(scattered(pages, *rooms))
    whole, held = LatentCache(len(rooms), 64, C, R, dtype), [0] * len(rooms)
    for step in range(data.draw(st.integers(1, 5))):
        room = min(room - end for room, end in zip(rooms, held))
        if room == 0 or (any(held) and data.draw(st.booleans())):
            held = [data.draw(st.integers(0, end)) for end in held]
            for cache in (paged, whole):
                cache.trim(held)
            continue
        count = data.draw(st.integers(1, room))
        new = draw(len(rooms), count, C, seed=step), draw(len(rooms), count, R, seed=step)
        q = draw(len(rooms), count, H, C + R, seed=step + 50)
        for cache in (paged, whole):
            cache.append(*new)
        held = [end + count for end in held]
        assert torch.equal(paged.attend(q, 0.3), whole.attend(q, 0.3))
        for b, end in enumerate(held):
            assert torch.equal(paged.c_kv[b, :end], whole.c_kv[b, :end])
            assert torch.equal(paged.k_rope[b, :end], whole.k_rope[b, :end])
    assert paged.lengths.tolist() == whole.lengths.tolist() == held
    same = "shortest", "longest", "uniform", "batch"
    assert [getattr(paged, name) for name in same] == [getattr(whole, name) for name in same]


@pytest.mark.parametrize("rope_fp8", [False, True], ids=["rope in bf16", "rope in fp8"])
def test_paged_bytes_are_contiguous_bytes_bit_for_bit(rope_fp8):
    pages = latent_pages(page_size=3, fp8=True, rope_fp8=rope_fp8)
    (paged,) = pages.caches(scattered(pages, 20, 14))
    whole = Fp8LatentCache(2, 20, C, R, rope_fp8=rope_fp8)
    for step, count in enumerate((6, 1, 3)):
        for cache in (paged, whole):
            cache.append(draw(2, count, C, seed=step), draw(2, count, R, seed=step))
        q = draw(2, count, H, C + R, seed=step)
        assert torch.equal(paged.attend(q, 0.3), whole.attend(q, 0.3))
        assert torch.equal(paged.c_kv, whole.c_kv.float())
        assert torch.equal(paged.k_rope, whole.k_rope.float())
        for cache in (paged, whole):
            cache.trim([cache.shortest, cache.longest - step])


@pytest.mark.parametrize("fp8", [False, True], ids=["numbers", "bytes"])
@pytest.mark.parametrize("page_size", [4, 16])
def test_the_kernels_read_pages_as_the_reference_does(kernel_device, page_size, fp8):
    pages = latent_pages(60, page_size, fp8=fp8, device=kernel_device)
    (cache,) = pages.caches(scattered(pages, 40, 21))
    for count in (20, 1):
        new = draw(2, count, C), draw(2, count, R)
        cache.append(*(part.to(kernel_device) for part in new))
        q = draw(2, count, H, C + R).to(kernel_device)
        found, wanted = (cache.attend(q, 0.1, side) for side in ("triton", "reference"))
        assert (found - wanted).abs().max() < 2e-5
        cache.trim([5, cache.longest])


@pytest.mark.parametrize("absorb", [None, False, True])
def test_an_mla_layer_reads_and_writes_pages_as_it_does_a_latent_cache(absorb):
    layer = MLA(CFG)
    pages = latent_pages(page_size=4)
    (paged,) = pages.caches(scattered(pages, 30, 30))
    whole = LatentCache(2, 30, C, R)
    with torch.no_grad():
        for step, count in enumerate((9, 1, 1, 12)):
            x = draw(2, count, CFG.hidden_size, seed=step)
            got, wanted = (layer(x, cache, absorb) for cache in (paged, whole))
            assert torch.equal(got, wanted)
            for cache in (paged, whole):
                cache.trim([cache.shortest, cache.longest - 1])


def test_a_former_texts_nan_is_not_read_behind_a_shorter_sequence():
    pages = latent_pages(n_pages=6, page_size=4)
    pages.open("ill", 24)
    pages.caches(["ill"])[0].append(torch.full((1, 24, C), torch.nan), draw(1, 24, R))
    pages.close("ill")
    (cache,) = pages.caches(scattered(pages, 12, 12))
    cache.append(draw(2, 10, C), draw(2, 10, R))
    cache.trim([3, 10])
    cache.append(draw(2, 1, C, seed=1), draw(2, 1, R, seed=1))
    assert cache.c_kv.isfinite().all() and cache.k_rope.isfinite().all()
    assert not cache.c_kv[0, 4:].any()
    assert cache.attend(draw(2, 1, H, C + R), 0.3).isfinite().all()


def test_pages_made_in_inference_mode_can_be_used_outside_it():
    with torch.inference_mode():
        pages = latent_pages()
        pages.open("a", 8)
        (cache,) = pages.caches(["a"])
        cache.append(draw(1, 2, C), draw(1, 2, R))
    new = draw(1, 2, C).requires_grad_()
    cache.append(new, draw(1, 2, R))
    assert cache.longest == 4 and not cache.c_kv.requires_grad


@pytest.mark.parametrize(
    "change, what",
    [
        ({"q": draw(1, 1, H, C)}, "wide"),
        ({"q": draw(1, H, C + R)}, "dimensions"),
        ({"tables": torch.zeros(2, 2, dtype=torch.int32)}, "2 tables"),
        ({"page_size": 5}, "no whole number of pages"),
        ({"lengths": torch.tensor([9])}, "outside 1 to 8"),
        ({"lengths": torch.tensor([0])}, "outside 1 to 8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_a_page_table_is_refused(change, what):
    right = {
        "q": draw(1, 1, H, C + R),
        "storage": draw(12, C + R),
        "tables": torch.tensor([[2, 0]], dtype=torch.int32),
        "page_size": 4,
        "lengths": torch.tensor([6]),
        "rank": C,
        "scale": 1.0,
    }
    assert latent_decode_paged(**right).shape == (1, 1, H, C)
    with pytest.raises(ValueError, match=what):
        latent_decode_paged(**right | change)
