"""`python -m dsv3_tutorial probe`: what it says without a GPU, and what it asks of one."""

import json

import pytest
import torch

from dsv3_tutorial import __main__ as cli
from dsv3_tutorial import receipts
from dsv3_tutorial.bench import probe
from dsv3_tutorial.fp8.accumulate import HOPPER, HOPPER_PROMOTED, TensorCore, matmul_emulated

FACTS = {
    "device": "NVIDIA H100 80GB HBM3",
    "device_kind": "gpu",
    "versions": {"torch": "2.11.0"},
    "date": "2026-11-22",
    "threads": 1,
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short sums to measure the error of, and a narrow product."""
    monkeypatch.setattr(probe, "SIDE", 16)
    real = probe.inputs
    monkeypatch.setattr(probe, "inputs", lambda kind: real(kind, k=512, rows=4))


@pytest.fixture
def hopper(monkeypatch):
    """A GPU whose scaled_mm is the emulation, and as strict about its operands as the real one."""

    def scaled_mm(a, b, *, scale_a, scale_b, out_dtype, use_fast_accum):
        assert a.dtype == b.dtype == torch.float8_e4m3fn and out_dtype == torch.float32
        assert a.is_contiguous() and b.t().is_contiguous()  # row-major and column-major
        assert not any(side % 16 for side in (*a.shape, *b.shape))
        assert float(scale_a) == float(scale_b) == 1.0
        core = HOPPER if use_fast_accum else HOPPER_PROMOTED
        return matmul_emulated(a, b.t(), core)

    real = probe.scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(probe, "scaled_mm", lambda fast: real(fast, side=16, device="cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: FACTS["device"])
    monkeypatch.setattr(probe.machine, "here", lambda place: FACTS)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_it_says_so_and_reads_the_emulated_hopper(no_gpu, tmp_path, capsys):
    assert cli.main(["probe", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("No CUDA GPU is here")
    assert "So the emulation is asked" in printed
    assert printed.count("13 fraction bits are kept; the rest is cut off") == 2
    assert printed.count("32 products are summed at once, aligned together with") == 2
    assert "promoted to float32: never" in printed
    assert "promoted to float32: every 128 products" in printed
    assert not list(tmp_path.iterdir())  # an emulation is no measurement


def test_json_holds_the_same_and_the_reason(no_gpu, capsys):
    assert cli.main(["probe", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["emulated"] and "No CUDA GPU" in found["reason"]
    cores = [TensorCore(**reading["core"]) for reading in found["readings"]]
    assert cores == [HOPPER, HOPPER_PROMOTED]
    assert all(len(reading["answers"]) == 5 for reading in found["readings"])


def test_an_ampere_gpu_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    assert probe.why_not().startswith("NVIDIA A100 is SM80; tensor cores multiply FP8 from SM89")


def test_a_torch_that_cannot_multiply_fp8_is_a_reason_too(hopper, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    assert (
        probe.why_not()
        == f"PyTorch {torch.__version__} does not multiply FP8 here: no kernel image"
    )


def test_on_a_gpu_both_ways_are_read_and_kept_as_receipts(hopper, tmp_path, capsys):
    assert cli.main(["probe", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(FACTS["device"])
    kept = receipts.read(probe.NAME, folder=tmp_path, what="accumulator")
    assert [(r.value, r.shapes["promote"]) for r in kept] == [(13, None), (13, 128)]
    assert [r.shapes["matmul"][-5:] for r in kept] == ["=True", "False"]
    errors = receipts.read(probe.NAME, folder=tmp_path, what="error of a long sum")
    assert len(errors) == 2 * len(probe.INPUTS)
    assert all(r.value == pytest.approx(r.shapes["emulated"]) for r in errors)
    assert all(r.device_kind == "gpu" for r in kept + errors)


def test_answers_that_fit_no_accumulator_are_printed_as_they_are_and_not_called_one(capsys):
    reading = probe.read("odd", lambda a, b: torch.zeros(len(a), len(b)))
    assert reading.core is None and "There is no such accumulator" in reading.problem
    text = "\n".join(probe.lines([reading], "a reason"))
    assert "no accumulator of ours answers so" in text and "answers: 0, 0, 0" in text
    kept = probe.as_receipts([reading])
    assert {r.what for r in kept} == {"error of a long sum"}
    assert kept[0].value == 1.0


def test_a_sum_of_any_length_and_number_fits_the_gpus_sixteens(hopper):
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(x, 50, generator=draw).to(torch.float8_e4m3fn).float() for x in (3, 21))
    got = probe.scaled_mm(True)(a, b)
    assert torch.equal(got, matmul_emulated(a, b, HOPPER))


def test_an_accumulator_as_wide_as_float32_is_called_that():
    assert "all that float32 can show" in probe.described(TensorCore(bits=23))[0]


def test_inputs_are_e4m3_values_of_their_kind():
    for kind in probe.INPUTS:
        a, b = probe.inputs(kind)
        assert torch.equal(a, a.to(torch.float8_e4m3fn).float()) and not torch.equal(a, b)
        zeros, negative = float((a == 0).float().mean()), bool((a < 0).any())
        assert (zeros > 0.4, negative) == (kind == "half zero", kind == "zero-mean")
