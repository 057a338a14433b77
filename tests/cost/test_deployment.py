"""A model on devices: what fits, what binds, and the bounds of the paper and of the service."""

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dsv3_tutorial import paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import bill, deployment, expert_network, limits, memory, serving, storage
from dsv3_tutorial.cost.deployment import USABLE, Deployment
from dsv3_tutorial.hardware import HardwareError, chip, chip_names

V3, LITE = ModelConfig.named("deepseek-v3"), ModelConfig.named("deepseek-v2-lite")
QWEN = ModelConfig.named("qwen2.5-72b")


def test_one_device_bound_by_bandwidth_is_bytes_over_bandwidth():
    placed = Deployment(QWEN, chip("h200"), weights="int8", context=8000, batch=16)
    assert placed.limit == "bandwidth" and placed.times["network"] == 0
    read = bill.decode_bill(QWEN, 8000, 16, weights="int8")
    weights = bill.total(read).bytes - 16 * placed.sequence_bytes
    expected = serving.tokens_per_second(4.8e12, weights, placed.sequence_bytes, 16)
    assert placed.tokens_per_second == pytest.approx(expected, rel=1e-12)
    assert placed.per_user == pytest.approx(expected / 16)


def test_a_dense_model_is_cut_evenly():
    one, four = (Deployment(QWEN, chip("h100-sxm"), n, batch=3) for n in (1, 4))
    assert four.weight_bytes == one.weight_bytes / 4
    assert four.times["bandwidth"] == pytest.approx(one.times["bandwidth"] / 4)
    assert four.times["compute"] == pytest.approx(one.times["compute"] / 4)


@pytest.mark.parametrize("devices", [1, 2, 8, 16])
def test_cut_heads_leave_each_device_the_cache_of_its_own_heads_and_a_latent_all(devices):
    for cfg in (QWEN, V3):
        placed = Deployment(cfg, chip("b200"), devices, context=500, batch=3, tensor_parallel=True)
        held = memory.cache_bytes_per_gpu(cfg, devices) * 500 * 3
        assert placed.cache_bytes == pytest.approx(held)
        assert placed.times["network"] == 0
        read = bill.total(placed.lines).bytes - 3 * placed.sequence_bytes
        assert placed.read_bytes == pytest.approx(read / devices + held)


def test_v3_fits_8_h20_only_with_every_matrix_cut():
    dealt, cut = (Deployment(V3, chip("h20"), 8, tensor_parallel=tp) for tp in (False, True))
    assert not dealt.fits and cut.fits and 1 < cut.max_batch < 20


def test_v3_in_fp8_fits_8_h200_and_not_8_h100():
    fits = {name: Deployment(V3, chip(name), 8).fits for name in ("h200", "h100-sxm", "h800")}
    assert fits == {"h200": True, "h100-sxm": False, "h800": False}
    assert Deployment(V3, chip("h800"), 8).limit == "memory"
    held = Deployment(V3, chip("h800"), 16).weight_bytes
    routed = storage.held_bytes(V3, "fp8")["routed experts"]
    whole = sum(storage.held_bytes(V3, "fp8").values()) - routed
    assert held == whole + routed / 16


@given(
    st.sampled_from(chip_names()),
    st.sampled_from([1, 8, 16]),
    st.integers(1, 30_000),
    st.sampled_from([LITE, QWEN, V3]),
    st.sampled_from(["bf16", "fp8"]),
)
def test_the_largest_batch_fits_and_one_more_does_not(name, devices, context, cfg, cache):
    placed = Deployment(cfg, chip(name), devices, "int4", cache, context)
    most = placed.max_batch
    assume(most > 0)
    room = USABLE * placed.chip.memory_bytes
    full, over = placed.with_batch(most), placed.with_batch(most + 1)
    assert full.fits and full.weight_bytes + full.cache_bytes <= room * (1 + 1e-12)
    assert not over.fits and over.weight_bytes + over.cache_bytes > room * (1 - 1e-12)


def test_the_network_is_the_papers_bound_with_the_models_own_numbers():
    placed = Deployment(V3, chip("h800"), 320, batch=64 * 320, bandwidth=50e9)
    bound = limits.Decode(copies=8 * 319 / 320, hidden=7168, layers=58, dispatch=1 + 4 / 128)
    assert placed.times["network"] == pytest.approx(bound.per_token)
    assert replace(placed, devices=1, batch=64).times["network"] == 0


def _crossing(name, devices, **changed):
    return Deployment(V3, chip(name), devices, batch=64 * devices, **changed).times["network"]


def test_experts_in_the_domain_are_reached_by_scale_up_and_all_others_by_scale_out():
    """The slower of the two counts: 8 of 16 experts at 40 GB/s, and not the 7 beside at 160."""
    assert _crossing("h800", 8) / _crossing("h800", 16) == pytest.approx(
        7 / 8 / 160 / (8 / 16 / 40)
    )
    assert _crossing("h800", 72) / _crossing("h800", 16) == pytest.approx(64 / 72 / (8 / 16))
    rack = _crossing("h800", 72) / _crossing("gb200-nvl72", 72)
    assert rack == pytest.approx(64 / 72 / 40 / (71 / 72 / 900))
    assert _crossing("h800", 9) == pytest.approx(_crossing("h800", 9, bandwidth=160e9 * 8 / 7))
    given = _crossing("h800", 16, bandwidth=40e9) / _crossing("h800", 16)
    assert given == pytest.approx(15 / 8)  # then all that leaves a device takes that one link


@given(st.integers(1, 300), st.sampled_from(["h800", "gb200-nvl72", "a100"]))
def test_every_copy_stays_or_takes_one_link(devices, name):
    found = expert_network.routes(chip(name), devices)
    assert 1 / devices + sum(share for share, _ in found) == pytest.approx(1)
    assert len(found) == (devices > 1) + (devices > chip(name).scale_up.domain)


def test_the_fullest_device_reads_a_whole_expert_of_each_layer_or_its_share_of_more():
    expert = sum(
        storage.matrix_bytes(m, k, "fp8") for m, k in storage.matrices(V3)["routed experts"]
    )
    read = [Deployment(V3, chip("h800"), n, context=1).read_bytes for n in (4, 8, 72, 256)]
    assert read[0] - read[1] == 58 * expert  # of 8 experts touched 2 a device, and 1
    assert read[1] == read[2] == read[3]
    full = Deployment(V3, chip("h800"), 64, context=1, batch=64 * 640)  # all 256 are touched
    alone = replace(full, devices=1, batch=640)
    assert alone.read_bytes - full.read_bytes == pytest.approx(58 * expert * (256 - 4), rel=1e-12)
    parts = [replace(full, devices=n, batch=1, tensor_parallel=True).read_bytes for n in (1, 72)]
    latent = full.sequence_bytes
    assert parts[1] - latent == pytest.approx((parts[0] - latent) / 72)


def test_the_bound_of_the_real_service_lies_above_what_its_users_see():
    served = {n: paper.row(f"serving.{n}").value for n in ("decode_ep", "kv_length")}
    output = paper.row("serving.output_per_node").value / 8
    users = round(output / paper.row("limits.service_rate_high").value)  # of one GPU
    gpus, context = int(served["decode_ep"]), int(served["kv_length"])
    placed = Deployment(V3, chip("h800"), gpus, context=context, batch=users * gpus)
    assert placed.fits and placed.limit == "network"
    assert users == 84
    assert 1.5 < placed.per_user / paper.row("limits.service_rate_high").value < 3


@pytest.mark.parametrize("cache", ["full", "latent", "fp8"])
def test_the_context_that_fits_is_the_longest(cache):
    for devices, batch in ((1, 1), (8, 1), (8, 20)):
        h200 = chip("h200")
        for cfg, weights in ((LITE, "int8"), (QWEN, "fp8"), (V3, None)):
            most = deployment.context_that_fits(cfg, h200, devices, weights, cache, batch)
            form = {"full": "expanded"}.get(cache) if cfg.is_mla else None
            row = storage.cache_row(cfg, "fp8" if cache == "fp8" else "bf16", form)
            room, mine = USABLE * h200.memory_bytes, -(-batch // devices)
            if weights:
                room = Deployment(cfg, h200, devices, weights).room
            if cfg is QWEN:
                room, mine = room * devices, batch
            size = mine * row * cfg.num_hidden_layers
            assert most * size <= room < (most + 1) * size


def test_latents_multiply_the_context_71_times_and_fp8_1_76_times_more():
    full, latent, fp8 = (
        deployment.context_that_fits(V3, chip("h200"), weights=None, cache=cache)
        for cache in ("full", "latent", "fp8")
    )
    assert latent / full == pytest.approx(71.1, abs=0.05)
    assert fp8 / latent == pytest.approx(1152 / 656, rel=1e-4)


def test_where_the_weights_do_not_fit_no_context_does():
    assert deployment.context_that_fits(V3, chip("rtx-4090")) == 0
    assert Deployment(V3, chip("rtx-4090")).max_batch == 0


def test_the_l2_of_a_consumer_gpu_holds_a_thousand_tokens_or_one_layers_cache():
    found = {
        name: (deployment.tokens_in(size, V3), deployment.tokens_in(size, V3, layers=1))
        for name in ("h100-sxm", "rtx-4090", "rtx-5090")
        if (size := chip(name).l2_bytes)
    }
    assert found == {
        "h100-sxm": (746, 45_511),
        "rtx-4090": (1_074, 65_536),
        "rtx-5090": (1_432, 87_381),
    }


def test_batch_times_sequence_times_latent_is_137_times_too_little():
    checklist = V3.kv_lora_rank  # "batch x seq_len x latent_dim", taken as bytes
    assert storage.cache_bytes(V3, "bf16", 1) / checklist == pytest.approx(137.25)


def test_an_fp8_latent_cannot_double_the_speed_at_128_heads():
    bytes_alone = 1152 / 656
    assert deployment.cache_gain(V3, chip("h100-sxm")) == pytest.approx(1.22, abs=0.005)
    assert deployment.cache_gain(V3, chip("h200")) == pytest.approx(1.0)  # arithmetic binds already
    assert deployment.cache_gain(V3, chip("h100-sxm"), queries=2) == pytest.approx(1.0)
    few = ModelConfig.from_dict(
        {**V3.to_dict(), "num_attention_heads": 16, "num_key_value_heads": 16}
    )
    assert deployment.cache_gain(few, chip("h100-sxm")) == pytest.approx(bytes_alone)


def test_a_chip_without_a_format_computes_in_bf16_and_without_a_link_is_refused():
    a100 = Deployment(LITE, chip("a100"), weights="fp8", batch=4)
    wide = Deployment(LITE, chip("a100"), weights="int8", batch=4)
    assert a100.times["compute"] == pytest.approx(wide.times["compute"])
    with pytest.raises(HardwareError, match="no link of a known rate"):
        _ = Deployment(V3, chip("rtx-4090"), 2).times
    given_link = Deployment(V3, chip("rtx-4090"), 2, bandwidth=1e10)
    assert given_link.times["network"] > 0


def test_what_cannot_be_deployed_is_refused():
    with pytest.raises(ValueError, match="nothing holds the model"):
        Deployment(V3, chip("h200"), 0)
    with pytest.raises(ValueError, match="Take weights out of"):
        Deployment(V3, chip("h200"), weights="fp4")
    with pytest.raises(ValueError, match="Give a batch"):
        Deployment(V3, chip("h200"), batch=0)
    with pytest.raises(ValueError, match="no cache 'half'"):
        deployment.context_that_fits(V3, chip("h200"), cache="half")
