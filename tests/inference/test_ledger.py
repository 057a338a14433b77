"""The ledger's integers are the bill's, on real tensors and on meta, and each byte counts once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost.bill import decode_bill, total
from dsv3_tutorial.inference import ledger
from dsv3_tutorial.inference.ledger_sizes import Regions, runs
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.moe.balance import watch

WIDE = {"weights": "float32", "cache": "float32"}
STEPS = [(1, 1, 1), (128, 1, 1), (64, 3, 1), (64, 2, 3), (1500, 1, 1)]  # context, batch, queries
QWEN = ModelConfig.from_dict(
    {
        **ModelConfig.named("qwen2.5-72b").to_dict(),
        **{"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 50},
        **{"num_attention_heads": 4, "num_key_value_heads": 2},
    }
)


def made(cfg, seed=0):
    torch.manual_seed(seed)
    return DeepSeekV3(cfg)


@pytest.fixture(scope="module")
def tiny():
    return made(ModelConfig.named("tiny"))


@pytest.fixture(scope="module")
def small():
    return made(ModelConfig.named("small"))


@pytest.fixture(scope="module")
def v3():
    with torch.device("meta"):
        return DeepSeekV3(ModelConfig.named("deepseek-v3")).to(torch.bfloat16)


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_a_real_step_of_tiny_is_the_bill_integer_by_integer(tiny, step):
    book = ledger.decode(tiny, *step)
    assert book.lines == decode_bill(tiny.cfg, *step, **WIDE)
    assert book.other_flops == 0 and book.touched == []


@pytest.mark.parametrize("step", [*STEPS[1:3], (40, 2, 2), (40, 7, 2)], ids=str)
def test_a_real_step_with_experts_is_the_bill_of_those_that_were_touched(small, step):
    with watch(small) as seen:
        book = ledger.decode(small, *step)
    chosen = (seen.counts() > 0).sum(dim=1).tolist()
    assert book.touched == chosen[: len(book.touched)] and len(book.touched) == 11
    assert book.lines == decode_bill(small.cfg, *step, touched=book.touched, **WIDE)


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_meta_tensors_give_the_same_integers(name):
    cfg = ModelConfig.named(name)
    for step in STEPS:
        book = ledger.decode(cfg, *step, dtype=torch.float32)
        assert book.lines == decode_bill(cfg, *step, **WIDE)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "fp8-rope"])
def test_a_narrow_cache_is_read_in_its_own_bytes(small, kind):
    book = ledger.decode(small, 64, 2, kind=kind)
    bill = decode_bill(small.cfg, 64, 2, weights="float32", cache=kind, touched=book.touched)
    assert book.lines == bill
    assert ledger.decode(small.cfg, 64, 2, kind=kind).lines == decode_bill(
        small.cfg, 64, 2, cache=kind
    )


def test_a_bf16_model_is_the_bills_default():
    model = made(ModelConfig.named("small")).bfloat16()
    book = ledger.decode(model, 50, 2)
    assert book.lines == decode_bill(model.cfg, 50, 2, touched=book.touched)


@pytest.mark.parametrize("tied", [False, True])
def test_heads_and_tied_embeddings_are_counted_too(tied):
    cfg = ModelConfig.from_dict({**QWEN.to_dict(), "tie_word_embeddings": tied})
    assert ledger.decode(made(cfg), 20, 2).lines == decode_bill(cfg, 20, 2, **WIDE)


@pytest.mark.parametrize("batch", [1, 32, 256])
def test_deepseek_v3_at_32k_is_its_bill_without_a_byte_of_memory(v3, batch):
    book = ledger.decode(v3, 32768, batch)
    assert book.lines == decode_bill(v3.cfg, 32768, batch)
    assert book.touched == [{1: 8, 32: 163, 256: 256}[batch]] * 58
    assert "forward" not in vars(v3.model.layers[3].mlp.experts)  # nothing stays replaced


def test_all_flops_are_those_of_torchs_own_counter(tiny):
    with FlopCounterMode(display=False) as counter:
        book = ledger.decode(tiny, 77, 2)
    assert counter.get_total_flops() == total(book.lines).flops
    assert sum(entry.flops for entry in book.operators.values()) == total(book.lines).flops


def test_a_product_of_what_the_step_made_stands_apart(small):
    book = ledger.decode(small, 40, 9, 2)  # 72 rows: sorted, and combined by a product
    weighted = 11 * 18 * 2 * small.cfg.num_experts_per_tok * small.cfg.hidden_size
    assert book.other_flops in (0, weighted)
    everything = sum(entry.flops for entry in book.operators.values())
    assert everything == total(book.lines).flops + book.other_flops


def test_a_weight_that_is_used_twice_is_read_once():
    model = torch.nn.Sequential(torch.nn.Linear(6, 6, bias=False))
    x = torch.randn(1, 6)
    with ledger.count(model) as book, torch.no_grad():
        model(model(x))
    assert book.owners["0"].bytes == 6 * 6 * 4 and book.owners["0"].flops == 2 * 2 * 36
    assert book.operators["mm"].calls == 2 and book.operators["mm"].bytes == 2 * (144 + 48)


def test_rows_that_are_looked_up_twice_count_once():
    table = torch.nn.Embedding(50, 8)
    with ledger.count(table) as book:
        table(torch.tensor([[3, 3, 7]]))
    assert book.owners[""].bytes == 2 * 8 * 4


@settings(deadline=None)
@given(st.data())
def test_the_runs_of_a_view_are_its_bytes(data):
    sides = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    whole = torch.arange(torch.tensor(sides).prod().item(), dtype=torch.int16).view(sides)
    view = whole.permute(data.draw(st.permutations(range(len(sides)))))
    for axis, size in enumerate(view.shape):
        start = data.draw(st.integers(0, size - 1))
        step = data.draw(st.integers(1, 2))
        view = view.movedim(axis, 0)[start::step].movedim(0, axis)
    covered = {byte for start, stop in runs(view) for byte in range(start, stop)}
    assert covered == {2 * n + half for n in view.flatten().tolist() for half in (0, 1)}
    regions = Regions()
    for part in (view, view, whole[:1]):
        regions.add(runs(part))
    first = {2 * n + half for n in whole[:1].flatten().tolist() for half in (0, 1)}
    assert regions.size() == len(covered | first)


def test_of_ragged_sequences_each_reads_its_own_length(tiny):
    caches = tiny.caches(2, 64)
    for cache in caches:
        cache.longest = 20
        cache.lengths.fill_(20)
        cache.trim([20, 5])
    with torch.no_grad(), ledger.count(tiny, caches) as book:
        tiny(torch.tensor([[1], [2]]), caches)
    line = next(line for line in book.lines if line.part == "latent cache")
    one, other = (decode_bill(tiny.cfg, length, **WIDE) for length in (21, 6))
    alone = [next(n for n in bill if n.part == "latent cache") for bill in (one, other)]
    assert line.bytes == sum(n.bytes for n in alone)
    assert line.flops == sum(n.flops for n in alone)
