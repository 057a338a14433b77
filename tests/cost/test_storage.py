"""Bytes at rest against tensors that really lie there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.attention.rows_fp8 import RowLayout
from dsv3_tutorial.config import ModelConfig, preset_names
from dsv3_tutorial.cost import memory, params, storage
from dsv3_tutorial.weights import formats

V3 = ModelConfig.named("deepseek-v3")


@settings(deadline=None, max_examples=30)
@given(m=st.integers(1, 300), k=st.integers(1, 300), fmt=st.sampled_from(formats.FORMATS))
def test_a_quantised_matrix_takes_the_bytes_that_are_counted(m, k, fmt):
    assert formats.quantize(torch.randn(m, k), fmt).nbytes == storage.matrix_bytes(m, k, fmt)


def test_every_weight_format_there_is_is_counted():
    assert set(formats.FORMATS) <= set(storage.WEIGHTS)


@pytest.mark.parametrize("kind", ["fp8", "fp8-rope"])
def test_a_cached_row_takes_the_bytes_of_its_layout(kind):
    for name in ("deepseek-v3", "tiny", "small"):
        cfg = ModelConfig.named(name)
        layout = RowLayout(cfg.kv_lora_rank, cfg.qk_rope_head_dim, kind == "fp8-rope")
        assert storage.cache_row(cfg, kind) == layout.width
    assert storage.cache_row(V3, kind) == {"fp8": 656, "fp8-rope": 596}[kind]


@pytest.mark.parametrize("name", preset_names())
def test_weights_in_bf16_are_two_bytes_a_parameter(name):
    cfg, counted = ModelConfig.named(name), params.count(ModelConfig.named(name))
    for mtp in (False, True):
        biases = storage.moe_layers(cfg, mtp) * (cfg.n_routed_experts or 0)  # kept in float32
        biases *= cfg.topk_method == "noaux_tc"
        held = sum(storage.held_bytes(cfg, "bf16", mtp).values())
        assert held == 2 * (counted.total + mtp * counted.mtp + biases)


def test_fp8_and_the_cache_agree_with_the_rougher_count():
    held = sum(storage.held_bytes(V3, "fp8").values())
    assert held == pytest.approx(memory.weight_bytes(V3, "fp8"), rel=1e-6)
    for name in preset_names():
        cfg = ModelConfig.named(name)
        assert storage.cache_bytes(cfg, "bf16", 100) == memory.kv_cache_bytes(cfg, 100)
    expanded = storage.cache_bytes(V3, "bf16", 1, "expanded")
    assert expanded == memory.kv_cache_bytes_expanded(V3)
    assert storage.cache_row(V3, "fp8", "expanded") == 40_960 + 4 * 320
