"""One step's bill against the other counts of the cost model, and its receipt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial.config import ModelConfig, preset_names
from dsv3_tutorial.cost import attention, bill, flops, params, storage
from dsv3_tutorial.cost.serving import experts_touched

V3 = ModelConfig.named("deepseek-v3")


def by_part(lines):
    return {line.part: line for line in lines}


@pytest.mark.parametrize("name", preset_names())
def test_the_flops_of_a_token_are_those_of_the_parameter_count(name):
    cfg = ModelConfig.named(name)
    counted = params.count(cfg).by_part
    sides = sum(m * k for m, k in storage.matrices(cfg)["attention weights"])
    unmultiplied = counted["norms"] + counted["attention"] - cfg.num_hidden_layers * sides
    if cfg.topk_method == "noaux_tc" and cfg.n_routed_experts:
        unmultiplied += storage.moe_layers(cfg) * cfg.n_routed_experts
    expected = flops.decode_flops_per_token(cfg, 777) - 2 * unmultiplied
    assert bill.total(bill.decode_bill(cfg, 777)).flops == expected


@pytest.mark.parametrize("name", preset_names())
@given(batch=st.integers(1, 64), queries=st.integers(1, 4), context=st.integers(4, 9999))
def test_the_cache_line_is_attentions_own(name, batch, queries, context):
    cfg = ModelConfig.named(name)
    lines = bill.decode_bill(cfg, context, batch, queries)
    line = next(line for line in lines if line.part.endswith("cache"))
    layer = attention.decode_step(cfg, context, batch, queries)
    assert line.flops == cfg.num_hidden_layers * layer.cache_flops
    assert line.bytes == cfg.num_hidden_layers * layer.cache_bytes


def test_a_token_of_v3_reads_what_it_is_multiplied_with():
    total = bill.total(bill.decode_bill(V3, 1))
    counted = params.count(V3)
    row, biases, latents = V3.hidden_size, 58 * 256, 61 * 576
    assert total.bytes == 2 * (counted.activated + row + biases + latents)


def test_v3s_receipt_at_32k_names_the_routed_experts_at_every_batch():
    shares = {1: "54%", 32: "89%", 256: "68%"}
    for batch, share in shares.items():
        printed = bill.receipt(bill.decode_bill(V3, 32768, batch), "V3", tokens=batch)
        assert f"largest: routed experts, {share} of the bytes" in printed
        assert max(map(len, printed.splitlines())) <= 72


def test_the_largest_arithmetic_at_32k_is_attention_over_the_cache():
    lines = bill.decode_bill(V3, 32768)
    assert bill.largest(lines, by="flops").part == "latent cache"
    assert by_part(lines)["latent cache"].intensity == pytest.approx(241.8, abs=0.05)
    assert by_part(lines)["routed experts"].intensity == 1.0


def test_expert_bytes_a_token_fall_1_57x_to_batch_32_while_all_bytes_fall_more():
    one, many = (by_part(bill.decode_bill(V3, 32768, batch)) for batch in (1, 32))
    experts = one["routed experts"].bytes / (many["routed experts"].bytes / 32)
    assert experts == pytest.approx(1.57, abs=0.005)
    totals = [bill.total(lines.values()).bytes for lines in (one, many)]
    assert totals[0] / (totals[1] / 32) == pytest.approx(2.58, abs=0.005)


@given(st.integers(1, 300), st.integers(1, 3), st.sampled_from(storage.WEIGHTS))
def test_a_bill_is_made_of_integers_and_a_receipt_of_its_lines(batch, queries, weights):
    lines = bill.decode_bill(V3, 5000, batch, queries, weights, "fp8")
    assert all(isinstance(n, int) for line in lines for n in (line.flops, line.bytes))
    printed = bill.receipt(lines, tokens=batch).splitlines()
    assert len(printed) == len(lines) + 5 + (batch > 1)
    assert max(map(len, printed)) <= 72


def test_a_receipt_of_few_bytes_is_printed_in_their_own_unit():
    printed = bill.receipt([bill.Line("one", 4, 3), bill.Line("two", 0, 9)])
    assert "            FLOP             B" in printed.splitlines()[0].replace("part", "    ")
    assert "largest: two, 75% of the bytes" in printed
    assert "largest: one, 0%" in bill.receipt([bill.Line("one", 4, 0)])


def test_touched_experts_are_the_expected_ones_or_the_given():
    expected = by_part(bill.decode_bill(V3, 8, batch=32))["routed experts"]
    given_all = by_part(bill.decode_bill(V3, 8, batch=32, touched=[163] * 58))["routed experts"]
    assert expected == given_all and round(experts_touched(256, 8, 32)) == 163
    fewer = by_part(bill.decode_bill(V3, 8, batch=32, touched=100))["routed experts"]
    assert fewer.bytes == 58 * 100 * 2 * params.expert(V3) and fewer.flops == expected.flops


def test_a_tied_embedding_is_read_as_the_head():
    cfg = ModelConfig.from_dict(
        {**ModelConfig.named("qwen2.5-72b").to_dict(), "tie_word_embeddings": True}
    )
    assert "embedding" not in by_part(bill.decode_bill(cfg, 8))


@pytest.mark.parametrize(
    "wrong",
    [
        {"context": 0},
        {"batch": 0},
        {"queries": 9},
        {"weights": "fp4"},
        {"cache": "int4"},
        {"touched": [8, 8]},
    ],
    ids=str,
)
def test_what_cannot_be_billed_is_refused_with_what_to_do(wrong):
    with pytest.raises(ValueError, match=r"Give|Take"):
        bill.decode_bill(**{"cfg": V3, "context": 8, **wrong})
