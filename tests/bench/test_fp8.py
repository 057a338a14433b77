import json

import pytest
import torch

from dsv3_tutorial import receipts
from dsv3_tutorial.__main__ import benches
from dsv3_tutorial.bench import fp8, fp8_forms, fp8_gpu, fp8_table, machine
from dsv3_tutorial.bench.attention_steps import BenchError
from dsv3_tutorial.bench.fp8_table import BF16, ENGINE, FP32, OURS, POW2, QUANTISED, SCALED_MM
from dsv3_tutorial.bench.timing import cpu_timer
from dsv3_tutorial.fp8 import cpu, engine, quant
from dsv3_tutorial.fp8.linear import Fp8Linear, Scaling

EMULATED = (POW2, *fp8.FORMS)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder and the printed lines of one quick run."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *text, **_: printed.append(" ".join(map(str, text))))
        assert fp8.main(["--quick", "--only", "cpu", "--out", str(folder)]) == 0
    return folder, "\n".join(printed)


# One linear layer in every form


def test_every_form_gives_the_result_and_both_gradients_of_one_layer():
    steps = fp8.linear_steps(32, 48, 160)
    for step in steps.values():
        assert [out.shape for out in step()] == [(32, 48), (32, 160), (48, 160)]
    errors = fp8.linear_errors(steps)
    assert set(errors) == {BF16, *EMULATED}
    assert all(0.02 < error < 0.06 for form in EMULATED for error in errors[form])
    assert all(error < 0.006 for error in errors[BF16])


def test_the_form_with_float32_scales_is_the_layer_that_trains():
    torch.manual_seed(3)
    steps = fp8.linear_steps(24, 40, 130, seed=7)
    y, dx, dw = steps["fp8, float32 scales"]()
    made = torch.Generator().manual_seed(7)
    x, weight, dy = (torch.randn(*s, generator=made) for s in ((24, 130), (40, 130), (24, 40)))
    layer = Fp8Linear(130, 40, bias=False, scaling=Scaling(pow2=False))
    layer.weight.data = weight * 130**-0.5
    x.requires_grad_()
    out = layer(x)
    out.backward(dy)
    assert torch.equal(out, y) and torch.equal(x.grad, dx) and torch.equal(layer.weight.grad, dw)


@pytest.mark.parametrize("hardware", [False, True])
def test_powers_of_two_give_the_same_in_both_formats_but_for_the_last_rounding(
    monkeypatch, hardware
):
    monkeypatch.setattr(cpu, "has_bf16_products", lambda: hardware)
    m, n, k = 24, 40, 130
    got = fp8.linear_steps(m, n, k, seed=1)[POW2]()
    made = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(*s, generator=made) for s in ((m, k), (n, k)))
    a, b = (
        quant.dequantize_tiles(*quant.quantize_tiles(x, pow2=True)),
        quant.dequantize_blocks(*quant.quantize_blocks(weight * k**-0.5, pow2=True)),
    )
    assert got[0].dtype == (torch.bfloat16 if hardware else torch.float32)
    torch.testing.assert_close(got[0].float(), a @ b.T, rtol=2**-8, atol=1e-5)


def test_a_form_that_computes_something_else_is_not_timed():
    steps = fp8.linear_steps(16, 16, 128)
    right = steps[FP32]
    steps["wrong"] = lambda: tuple(1.2 * out for out in right())
    with pytest.raises(BenchError, match=r"wrong: 0\.20"):
        fp8.linear_errors(steps)
    steps["wrong"] = lambda: tuple(out * torch.nan for out in right())
    with pytest.raises(BenchError, match="wrong: nan"):
        fp8.linear_errors(steps)


# The command


def test_the_command_knows_it():
    assert benches()["fp8"] == "dsv3_tutorial.bench.fp8"


def test_a_quick_run_writes_receipts_that_can_be_read_and_filtered(quick):
    folder, _ = quick
    rows = receipts.read("fp8", folder=folder)
    timed = {"training linear", "training linear over float32", "training linear error"}
    rest = {"quantiser", "scaled product", "processes that wanted a core"}
    assert {r.what for r in rows} == {*timed, *rest}
    assert all(r.threads == 1 and r.device_kind == "cpu" for r in rows)
    errors = receipts.read("fp8", folder=folder, what="training linear error", form=POW2)
    assert [r.shapes["product"] for r in errors] == ["y", "dx", "dw"]
    assert all(r.repeats == 3 and 0.02 < r.value < 0.06 for r in errors)


def test_the_ratio_on_record_is_that_of_the_times_on_record(quick):
    folder, _ = quick
    times = receipts.read("fp8", folder=folder, what="training linear")
    by_form = {r.shapes["form"]: r.value for r in times}
    for r in receipts.read("fp8", folder=folder, what="training linear over float32"):
        assert r.value == by_form[r.shapes["form"]] / by_form[FP32]
        assert r.spread["q1"] <= r.value <= r.spread["q3"]


def test_the_receipts_name_no_folder_of_this_machine(quick):
    folder, _ = quick
    text = (folder / "fp8.jsonl").read_text(encoding="utf-8")
    assert "/" not in text.replace("values/s", "").replace("FLOP/s", "")
    assert all(json.loads(line)["device"].strip() for line in text.splitlines())


def test_the_tables_name_every_form(quick):
    folder, printed = quick
    rows = receipts.read("fp8", folder=folder)
    for form in {r.shapes["form"] for r in rows if "form" in r.shapes}:
        assert form in printed
    assert "processes wanted the" in printed
    assert "over float32" in printed and "GFLOP/s" in printed and "y 3." in printed


def test_asking_for_a_gpu_that_is_not_there_is_wrong_usage(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        fp8.main(["--only", "gpu"])
    assert stopped.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err


# The tables


def receipt(what, value, unit="s", kind="gpu", **shapes):
    return receipts.Receipt(
        what=what,
        shapes=shapes,
        value=value,
        unit=unit,
        spread={"q1": value, "q3": value},
        repeats=1,
        **{**machine.here(), "device_kind": kind},
    )


def test_a_ratio_to_float32_is_to_stay_below_its_target():
    at = {"m": 1024, "n": 1024, "k": 2048}
    times = {FP32: 1.0, "fp8, float32 scales": 1.35, POW2: 0.51}
    rows = [receipt("training linear", t, kind="cpu", form=f, **at) for f, t in times.items()]
    said = "\n".join(fp8_table.lines(rows))
    assert "1.35x; target at most 1.35x: reached" in said
    assert "0.51x; target at most 0.5x: not reached" in said


@pytest.mark.parametrize(
    ("m", "k", "judged"),
    [(4096, 7168, True), (8192, 16384, True), (2048, 7168, False), (4096, 512, False)],
)
def test_the_bf16_ceiling_is_the_target_for_many_rows_and_a_long_sum(m, k, judged):
    at = {"m": m, "n": 2048, "k": k}
    rows = [
        receipt("matmul", 800e12, "FLOP/s", dtype="bf16", m=8192, n=8192, k=8192),
        receipt("product", 880e12, "FLOP/s", form=OURS, **at),
        receipt("product", 1000e12, "FLOP/s", form=SCALED_MM, **at),
        receipt("product", 1e-3, "s", form=OURS, **at),
    ]
    said = "\n".join(fp8_table.lines(rows))
    assert ("over the BF16 ceiling: 1.10x; target 1x: reached" in said) == judged
    assert ("over scaled_mm: 0.88x; target 1x: not reached" in said) == (m >= 4096)
    assert "880.0" in said


def test_a_quantiser_is_held_against_a_copy_and_a_linear_against_bf16():
    rows = [
        receipt("quantiser", 3.0e12, "B/s", form="copy", m=8, n=8),
        receipt("quantiser", 2.7e12, "B/s", form="tiles", m=8, n=8),
        receipt("training linear", 1.4, form=BF16, m=8, n=8, k=8),
        receipt("training linear", 1.0, form=OURS, m=8, n=8, k=8),
    ]
    said = "\n".join(fp8_table.lines(rows))
    assert "0.90x; target 0.9x: reached" in said
    assert "bfloat16 over ours: 1.40x; target 1.45x: not reached" in said


def test_a_system_that_keeps_no_load_is_measured_all_the_same(monkeypatch):
    monkeypatch.delattr("os.getloadavg")
    assert list(fp8.load_receipts(fp8.QUICK)) == []


@pytest.mark.parametrize(
    ("amx", "bf16", "said"),
    [
        (True, True, "(its products: BF16, AMX)"),
        (False, True, "the target is one for AMX, which this CPU has not"),
        (False, False, "float32; this CPU has no instruction"),
    ],
)
def test_what_multiplied_the_powers_of_two_is_said_beside_their_target(
    monkeypatch, amx, bf16, said
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(cpu, "has_bf16_products", lambda: bf16)
    row = receipt("training linear", 1.0, kind="cpu", form=POW2, m=8, n=8, k=8)
    assert said in "\n".join(fp8_table.lines([row]))


def test_no_receipts_are_no_lines():
    assert fp8_table.lines([]) == []


# The GPU part's logic, on a CPU: kernels in the interpreter, or the reference in their place

TOY = fp8_gpu.Sizes(((128, 32),), (4, 16), ((16, 128, 32),), ((4, 128),), 0.1, 1, 0.1)


@pytest.fixture(scope="module")
def toy_device():
    return fp8_gpu.Device("cpu", cpu_timer(), machine.measure(0.1, "cpu"))


@pytest.fixture
def no_kernel(monkeypatch):
    """Every backend is the reference: what is tested is what is made of the results."""
    real = fp8_forms.gemm.matmul

    def matmul(*operands, backend=None):
        return real(*operands, backend="reference")

    monkeypatch.setattr(fp8_forms.gemm, "matmul", matmul)


def test_the_gpu_part_keeps_every_cell_as_a_receipt(toy_device, no_kernel, tmp_path, capsys):
    path = fp8_gpu.record(TOY, toy_device, tmp_path)
    rows = receipts.read("fp8", folder=tmp_path)
    assert path == tmp_path / "fp8.jsonl"
    kinds = {"copy", "matmul", "quantiser", "product", "training linear"}
    assert {r.what for r in rows} == kinds
    out = capsys.readouterr().out
    assert f"Transformer Engine: {engine.problem()}" in out
    assert len(out.splitlines()) > len([r for r in rows if r.what not in ("copy", "matmul")])
    linears = [r for r in rows if r.what == "training linear"]
    assert [r.shapes["form"] for r in linears] == [BF16, OURS, f"{OURS}, float32 scales"]


def test_a_product_is_held_against_the_ceiling_of_its_format(toy_device, no_kernel):
    cells = list(fp8_gpu.product_rows(TOY, toy_device))
    assert len(cells) == 2
    found = {(r.shapes["form"], r.unit): r for r in cells[1]}
    assert {form for form, _ in found} >= {BF16, OURS, OURS + QUANTISED, SCALED_MM}
    timed, rate = found[BF16, "s"], found[BF16, "FLOP/s"]
    assert rate.value == pytest.approx(2 * 16 * 128 * 32 / timed.value)
    ceiling = toy_device.ceilings.matrix["bf16"].value
    assert rate.ceiling == "matmul bf16" and rate.fraction == pytest.approx(rate.value / ceiling)
    assert found[OURS, "FLOP/s"].ceiling is None  # no FP8 ceiling on a CPU
    assert "matmul bf16" in fp8_gpu.words(rate)


def test_a_quantisers_bytes_are_those_it_reads_and_writes(toy_device):
    def half_a_second(run):
        run()
        return 0.5

    device = fp8_gpu.Device("cpu", half_a_second, toy_device.ceilings)
    found = {r.shapes["form"]: r for r in fp8_gpu.quantiser_cell(4, 128, TOY, device)}
    values, scales = 4 * 128, {"tiles": 4, "tiles, powers of two": 4, "blocks": 1}
    for form, count in scales.items():
        assert found[form].value == (2 * values + values + 4 * count) / 0.5
        assert found[form].fraction == found[form].value / device.ceilings.copy.value
    assert found["copy"].value == 3 * values / 0.5
    assert set(found) == {*scales, "copy"}


def test_our_kernel_competes_and_scaled_mm_says_why_it_does_not(
    toy_device, triton_interpreter, capsys
):
    cell = fp8_gpu.product_cell(4, 128, 32, TOY, toy_device)
    assert {OURS, OURS + QUANTISED, BF16} <= {r.shapes["form"] for r in cell}
    assert f"{SCALED_MM}: left out, BackendError" in capsys.readouterr().out


def test_what_cannot_run_here_is_left_out_with_its_reason(capsys):
    def broken():
        raise RuntimeError("no such instruction\nand more")

    found = fp8_forms.that_run({"good": lambda: 1, "bad": broken})
    assert list(found) == ["good"] and found["good"][1] == 1
    assert capsys.readouterr().out == "bad: left out, RuntimeError: no such instruction\n"


def test_a_product_that_gives_something_else_is_not_timed(
    toy_device, no_kernel, monkeypatch, capsys
):
    right = fp8_forms.product_forms

    def forms(x, weight):
        return {**right(x, weight), "wrong": lambda: torch.zeros(len(x), len(weight))}

    monkeypatch.setattr(fp8_forms, "product_forms", forms)
    cell = fp8_gpu.product_cell(4, 128, 32, TOY, toy_device)
    assert "wrong" not in {r.shapes["form"] for r in cell}
    assert "wrong: not timed, its result lies 1.00 from BF16's" in capsys.readouterr().out


def test_a_size_that_runs_out_of_memory_is_left_out_with_a_line(toy_device, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(fp8_forms, "product_forms", full)
    assert list(fp8_gpu.product_rows(TOY, toy_device)) == [[], []]
    assert "16 rows times 128 x 32: left out, out of memory" in capsys.readouterr().out


class FakeLayer(torch.nn.Module):
    """Transformer Engine's Linear as far as the benchmark uses it."""

    def __init__(self, in_features, out_features, bias, dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(out_features, in_features, dtype=dtype))
        self.first = []

    def forward(self, x, is_first_microbatch=None):
        self.first.append(is_first_microbatch)
        return x @ self.weight.T


@pytest.fixture
def fake_engine(monkeypatch):
    """The layers that a fake Transformer Engine made."""
    import contextlib

    made = []

    def linear(*sizes, **options):
        made.append(FakeLayer(*sizes, **options))
        return made[-1]

    monkeypatch.setattr(engine, "problem", lambda: None)
    monkeypatch.setattr(engine, "linear", linear)
    monkeypatch.setattr(engine, "autocast", contextlib.nullcontext)
    return made


def test_transformer_engine_competes_where_it_runs(toy_device, no_kernel, fake_engine):
    product = fp8_gpu.product_cell(4, 128, 32, TOY, toy_device)
    assert ENGINE + QUANTISED in {r.shapes["form"] for r in product}
    first, *later = fake_engine[0].first
    assert first is True and later and not any(later)  # the weight was quantised once
    linear = fp8_gpu.linear_cell(4, 128, 32, TOY, toy_device)
    assert ENGINE in {r.shapes["form"] for r in linear}


def test_a_transformer_engine_that_fails_ends_nothing(
    toy_device, no_kernel, fake_engine, monkeypatch, capsys
):
    def broken(*_, **__):
        raise RuntimeError("cuDNN is too old")

    monkeypatch.setattr(engine, "linear", broken)
    product = fp8_gpu.product_cell(4, 128, 32, TOY, toy_device)
    linear = fp8_gpu.linear_cell(4, 128, 32, TOY, toy_device)
    assert product and linear
    assert capsys.readouterr().out.count("left out, RuntimeError: cuDNN is too old") == 2
