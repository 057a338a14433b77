import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import machine

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ceilings():
    return machine.measure(0.2, device="cpu")


def rates(found):
    return [found.copy, *found.matrix.values()]


def test_the_ceilings_are_positive_and_finite_and_lie_within_their_quartiles(ceilings):
    assert set(ceilings.matrix) == {"fp32", "bf16"}
    for rate in rates(ceilings):
        assert 0 < rate.low <= rate.value <= rate.high < math.inf
        assert rate.repeats >= 1


def test_measuring_comes_to_an_end():
    start = time.perf_counter()
    machine.measure(0.5, device="cpu")
    assert time.perf_counter() - start < 60  # a hang, not a busy neighbour


def test_a_copy_counts_every_byte_read_and_written():
    size = 4 * 2**20
    rate = machine.copy_rate(CPU, lambda run: run() is None or 0.5, 0.01, size)
    assert (rate.value, rate.size) == (2 * size / 0.5, size)


def test_a_copy_really_copies():
    copied = []
    machine.copy_rate(CPU, lambda run: copied.append(run()) or 1.0, 0.01, 2**20)
    assert copied and all(it.numel() == 2**20 and it.unique().numel() > 200 for it in copied)


@pytest.mark.parametrize(("took", "side"), [(10.0, 128), (0.02, 128), (0.005, 4096)])
def test_the_matrices_grow_only_while_the_next_would_fit(took, side):
    rate = machine.matrix_rate("fp32", CPU, lambda run: took, 0.3)
    assert (rate.size, rate.value) == (side, pytest.approx(2 * side**3 / took))


def test_a_product_multiplies_random_square_matrices_in_its_format():
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        out = machine._product(name, 64, CPU)()
        assert (out.shape, out.dtype) == ((64, 64), dtype)
        assert out.isfinite().all() and out.float().std() > 4  # near sqrt(64): not zeros, not ones


def test_a_format_the_device_cannot_multiply_is_named_and_the_others_are_measured(monkeypatch):
    product = machine._product

    def refuse(name, side, place):
        if name == "bf16":
            raise RuntimeError("no such instruction\nstack follows")
        return product(name, side, place)

    monkeypatch.setattr(machine, "_product", refuse)
    found = machine.measure(0.1, device="cpu")
    assert found.missing == {"bf16": "no such instruction"}
    assert set(found.matrix) == {"fp32"}
    assert any("no such instruction" in line for line in machine.lines(found))


def test_measuring_leaves_the_random_numbers_of_a_notebook_alone():
    before = torch.get_rng_state()
    machine.measure(0.05, device="cpu")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_no_time_to_measure_is_an_error(seconds):
    with pytest.raises(ValueError, match="no time to measure"):
        machine.measure(seconds)


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(2**25, 2**42), st.integers(2**18, 2**31))
def test_a_copys_buffers_leave_the_cache_and_fit_the_memory(memory, cache):
    size = machine._buffer_bytes(memory, cache)
    assert size % 2**20 == 0
    assert 2**20 <= size <= max(memory // 16, 2**20)
    if memory >= 2**34 and cache <= 2**28:
        assert 2 * size >= 4 * cache


def test_the_ceilings_become_receipts_that_can_be_kept_and_read(ceilings, tmp_path):
    kept = machine.as_receipts(ceilings)
    receipts.append("machine", kept, folder=tmp_path)
    assert receipts.read("machine", folder=tmp_path) == kept
    assert [it.what for it in kept] == ["copy", "matmul", "matmul"]
    assert [it.value for it in kept] == [rate.value for rate in rates(ceilings)]
    (bf16,) = receipts.latest("machine", folder=tmp_path, dtype="bf16", unit="FLOP/s")
    assert bf16.shapes["m"] == bf16.shapes["n"] == bf16.shapes["k"]


def test_the_ceilings_become_a_chip_of_the_cost_model(ceilings):
    chip = ceilings.chip()
    assert chip.rate("bf16") == ceilings.matrix["bf16"].value
    assert chip.bandwidth() == ceilings.copy.value
    assert chip.rates["fp8"] is None and chip.l2_bytes == ceilings.cache_bytes


def test_eight_bit_products_are_those_of_the_rounded_numbers():
    out = machine._product("fp8", 64, CPU)()  # the call that a GPU is timed with
    a, b = (
        torch.randn(64, 64, generator=generator).to(torch.float8_e4m3fn).double()
        for generator in [torch.Generator().manual_seed(0)] * 2
    )
    torch.testing.assert_close(out.double(), a @ b.T, rtol=2**-7, atol=2**-7)


def test_the_circumstances_name_the_thread_count_and_no_patch_version():
    facts = machine.here()
    assert facts["threads"] == torch.get_num_threads()
    assert facts["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert facts["versions"]["python"].count(".") == 1


def test_the_command_prints_the_ceilings_and_writes_where_it_is_told(tmp_path, capsys):
    assert machine.main(["--out", str(tmp_path), "--seconds", "0.1", "--device", "cpu"]) == 0
    assert len(receipts.read("machine", folder=tmp_path)) == 3
    printed = capsys.readouterr().out
    assert "GB/s" in printed and "bf16" in printed and str(tmp_path / "machine.jsonl") in printed


@pytest.mark.gpu
def test_on_a_gpu_every_format_has_a_rate_or_a_reason():
    found = machine.measure(2.0, device="cuda")
    assert set(found.matrix) | set(found.missing) == set(machine.ON_GPU)
    assert "fp32" in found.matrix
    assert all(0 < rate.value < math.inf for rate in rates(found))
    if torch.cuda.get_device_capability() >= (9, 0):
        assert found.matrix["fp8"].value > found.matrix["bf16"].value > found.matrix["fp32"].value
