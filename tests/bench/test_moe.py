import json
import time

import pytest
import torch

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import machine, moe, moe_gpu, moe_layer, moe_model, moe_table
from dsv3_tutorial.bench.attention_steps import BenchError, check_agreement
from dsv3_tutorial.bench.moe_layer import DENSE, ENGINES, PEERS, Layer, Size
from dsv3_tutorial.bench.timing import cpu_timer
from dsv3_tutorial.config import ModelConfig

SIZE = Size(8, 2, 24, 32, 16)
TINY = ModelConfig.named("tiny")
ON_CPU = tuple(engine for engine in ENGINES if engine != "triton")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder and the printed lines of one quick run."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *text, **_: printed.append(" ".join(map(str, text))))
        assert moe.main(["--quick", "--only", "cpu", "--out", str(folder)]) == 0
    return folder, "\n".join(printed)


# One layer's experts


def test_every_form_of_a_layer_computes_the_same_with_the_same_gradients():
    layer = Layer(SIZE)
    forms = layer.forms((*ENGINES, *PEERS))
    assert forms[: len(ON_CPU)] == list(ON_CPU)
    assert layer.peer_problem is not None or set(PEERS) <= set(forms)
    runs = {form: layer.both(form) for form in forms}
    assert moe_layer.check_agreement(runs, 1e-5) > 0
    assert [out.shape for out in runs["loop"]()] == [
        layer.grad.shape,
        *(leaf.shape for leaf in layer.leaves),
    ]


def test_transformers_own_choice_is_asked_for_by_name():
    layer = Layer(SIZE)
    if layer.peer_problem is not None:
        pytest.skip(layer.peer_problem)
    for form in PEERS:
        assert layer._peer(form).config._experts_implementation == form.split()[1]


@pytest.mark.parametrize("part", ["result", "gradient"])
def test_a_form_that_computes_something_else_is_not_timed(part):
    layer = Layer(SIZE)
    right = layer.both("sorted")

    def wrong():
        out, *gradients = right()
        return (out * 1.01, *gradients) if part == "result" else (out, *gradients[:-1], 0 * out)

    def short():
        out, grad_x, *_ = right()
        return out, grad_x * 1.01

    pair = {"sorted": right, "wrong": wrong}
    if part == "gradient":
        pair = {"sorted": lambda: right()[:2], "wrong": short}
    with pytest.raises(BenchError, match=r"wrong: 1\.0e-02"):
        moe_layer.check_agreement(pair, 1e-3)


def test_a_gradient_of_nan_is_no_agreement():
    layer = Layer(SIZE)
    right = layer.both("sorted")
    runs = {"sorted": right, "wrong": lambda: tuple(out * torch.nan for out in right())}
    with pytest.raises(BenchError, match="wrong: nan"):
        moe_layer.check_agreement(runs, 1e-3)


def test_a_copy_of_weights_for_every_row_is_made_for_tiny_inputs_only():
    assert PEERS[2] not in Layer(Size(16, 4, 2048)).forms(PEERS)
    few = Layer(Size(16, 4, 16, 256, 32))
    assert few.peer_problem is not None or PEERS[2] in few.forms(PEERS)


def test_the_dense_mlp_does_the_same_arithmetic():
    layer = Layer(SIZE)
    assert layer.forward(DENSE)().shape == layer.x.shape
    dense = layer.dense_up.numel() + layer.dense_down.numel()
    assert 2 * dense * SIZE.tokens == SIZE.flops


def test_missing_transformers_says_what_to_install(monkeypatch):
    monkeypatch.setattr(moe_layer.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'transformers" in moe_layer.peer_problem()
    layer = Layer(SIZE)
    assert layer.forms((*ENGINES, *PEERS)) == list(ON_CPU)


def test_the_live_cell_has_every_engine_at_every_size_and_keeps_its_time():
    started, before = time.perf_counter(), torch.random.get_rng_state()
    times = moe.engine_times([1, 4], 0.5, SIZE)
    assert time.perf_counter() - started < 20  # a hang, not a busy neighbour
    assert torch.equal(torch.random.get_rng_state(), before)
    assert list(times) == [*ON_CPU, DENSE]
    assert all(list(by_rows) == [1, 4] for by_rows in times.values())
    assert all(seconds > 0 for by_rows in times.values() for seconds in by_rows.values())


@pytest.mark.parametrize("rows", moe.Plan().rows)
def test_a_number_of_rows_is_made_of_whole_tokens(rows):
    for size in moe.Plan().crossed:
        assert moe._with_rows(size, rows).rows_per_expert == rows


def test_the_cells_whose_growth_is_told_route_equally_many_rows():
    for plan in (moe.Plan(), moe.QUICK):
        assert len({size.tokens * size.top_k for size in plan.layers[:3]}) == 1


# Whole models


@pytest.fixture(scope="module")
def pair():
    found = moe_model.Pair(TINY)
    if found.peer_problem is not None:
        pytest.skip(found.peer_problem)
    return found


def test_a_decode_step_of_the_model_gives_transformers_logits(pair):
    with torch.no_grad():
        steps = pair.decode_steps(40, 2)
        assert list(steps) == [moe_model.OURS, *moe_model.PEERS]
        assert check_agreement(steps, 1e-4) > 0


@pytest.mark.parametrize("form", [moe_model.OURS, moe_model.PEERS[0]])
def test_a_repeat_after_a_reset_is_the_same_decode_step(pair, form):
    with torch.no_grad():
        step = pair.decode_steps(17)[form]
        first = step().clone()
        step.reset()
        again = step().clone()
        step.reset()
    assert torch.equal(first, again)


def test_a_training_step_has_the_same_loss_every_time_and_in_every_form(pair):
    steps = pair.training_steps(2, 16)
    assert list(steps) == [moe_model.OURS, *moe_model.TRAINED]
    losses = {form: [float(step()) for _ in range(2)] for form, step in steps.items()}
    for first, second in losses.values():
        assert first == second
        assert first == pytest.approx(losses[moe_model.OURS][0], abs=1e-5)
    assert all(p.grad is None for p in pair.ours.parameters())


def test_losses_that_differ_are_not_timed():
    with pytest.raises(BenchError, match=r"theirs: 2\.5"):
        moe._check_losses({"ours": 2.0, "theirs": 2.5})


def test_without_transformers_the_model_is_measured_alone(monkeypatch):
    monkeypatch.setattr(moe_model, "peer_problem", lambda: "not here")
    alone = moe_model.Pair(TINY)
    assert list(alone.decode_steps(3)) == list(alone.training_steps(1, 4)) == [moe_model.OURS]


# The command


def test_a_quick_run_writes_receipts_that_can_be_read_and_filtered(quick):
    folder, _ = quick
    rows = receipts.read("moe", folder=folder)
    kinds = {"experts", "cost growth", "experts by rows", "model decode step"}
    assert {r.what for r in rows} == {*kinds, "model training step"}
    assert all(r.threads == 1 and r.device_kind == "cpu" for r in rows)
    sizes = receipts.read("moe", folder=folder, what="experts", form="sorted", experts=8)
    assert {r.shapes["pass"] for r in sizes} == {"forward", "forward and backward"}
    by_rows = receipts.read("moe", folder=folder, what="experts by rows", form=DENSE)
    assert {r.shapes["rows_per_expert"] for r in by_rows} == set(moe.QUICK.rows)


def test_the_growth_on_record_is_that_of_the_times_on_record(quick):
    folder, _ = quick
    grown = receipts.read("moe", folder=folder, what="cost growth")
    assert grown
    for r in grown:
        same = {name: r.shapes[name] for name in ("form", "pass")}
        times = {
            experts: receipts.read("moe", folder=folder, what="experts", experts=experts, **same)
            for experts in (r.shapes["from"], r.shapes["to"])
        }
        ((few,), (many,)) = times.values()
        assert r.value == many.value / few.value
        assert r.spread["q1"] <= r.value <= r.spread["q3"]


def test_the_receipts_name_no_folder_of_this_machine(quick):
    folder, _ = quick
    text = (folder / "moe.jsonl").read_text(encoding="utf-8")
    assert "/" not in text.replace("tokens/s", "")
    assert all(json.loads(line)["device"].strip() for line in text.splitlines())


def test_the_tables_name_every_form_and_transformers_beside_ours(quick):
    folder, printed = quick
    for form in {r.shapes["form"] for r in receipts.read("moe", folder=folder)}:
        assert f"\n  {form} " in printed
    assert "What more experts cost" in printed and "us by rows per expert" in printed


def receipt(what, value, unit="s", **shapes):
    return receipts.Receipt(
        what=what,
        shapes=shapes,
        value=value,
        unit=unit,
        spread={"q1": value, "q3": value},
        repeats=1,
        **machine.here(),
    )


def test_a_target_is_reached_from_its_own_ratio_on():
    at = {"experts": 64, "top_k": 8, "tokens": 1024, "pass": moe_table.BOTH}
    times = {moe_table.SERVED: 1.0, moe_table.EAGER: 12.0, moe_table.GROUPED: 0.94}
    rows = [receipt("experts", t, form=form, **at) for form, t in times.items()]
    said = "\n".join(moe_table.lines(rows))
    assert "12.00x; target 12x: reached" in said
    assert "0.94x; target 0.95x: not reached" in said


def test_growth_is_to_stay_below_its_target():
    at = {"form": moe_table.SERVED, "pass": moe_table.BOTH, "from": 16, "to": 64}
    for value, reached in ((1.25, ": reached"), (1.26, "not reached")):
        (*_, line) = moe_table.lines([receipt("cost growth", value, "x", **at)])
        assert line.endswith(f"target at most 1.25x: {reached.removeprefix(': ')}")


def test_the_best_of_transformers_is_the_one_to_beat():
    at = {"config": "small", "context": 2048}
    times = {"ours": 1.0, moe_model.PEERS[0]: 9.0, moe_model.PEERS[1]: 5.0}
    rows = [receipt("model decode step", t, form=form, **at) for form, t in times.items()]
    *_, line = moe_table.lines(rows)
    assert f"{moe_model.PEERS[1]} over ours: 5.00x; target 5x: reached" in line


def test_asking_for_a_gpu_that_is_not_there_is_wrong_usage(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        moe.main(["--only", "gpu"])
    assert stopped.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err


# The GPU part's logic, on a CPU: the sorted loop in the kernel's place


@pytest.fixture(scope="module")
def toy_device():
    return moe_gpu.Device("cpu", cpu_timer(), machine.measure(0.1, "cpu"))


@pytest.fixture
def no_kernel(monkeypatch):
    from dsv3_tutorial.moe.grouped import grouped_mm, sorted_matmul

    pairs = [(moe_gpu.TRITON, sorted_matmul), (moe_gpu.TORCH, grouped_mm)]
    monkeypatch.setattr(moe_gpu, "_multiplies", lambda x: iter(pairs))


TOY = moe_gpu.Sizes((2, 4), ((32, 16),), (1, 8), 64, (Size(4, 2, 16, 32, 16),), 2, 1.0)


def test_the_gpu_part_measures_products_against_the_ceiling(toy_device, no_kernel):
    cells = list(moe_gpu.product_rows(TOY, toy_device))
    assert [len(cell) for cell in cells] == [2 * 2 * len(moe_gpu.PASSES)] * 4
    timed, rate = cells[-1][:2]
    assert rate.value == pytest.approx(2 * 8 * 4 * 32 * 16 / timed.value)
    assert rate.fraction == pytest.approx(rate.value / toy_device.ceilings.matrix["bf16"].value)
    assert "4 experts" in moe_gpu.words(rate) and "of measured matmul bf16" in moe_gpu.words(rate)


def test_the_gpu_part_keeps_every_cell_as_a_receipt(toy_device, no_kernel, tmp_path, capsys):
    path = moe_gpu.record(TOY, toy_device, tmp_path)
    rows = receipts.read("moe", folder=tmp_path)
    assert path == tmp_path / "moe.jsonl"
    assert {r.what for r in rows} == {"grouped product", "experts"}
    assert len(capsys.readouterr().out.splitlines()) >= len(rows)


def test_a_size_that_runs_out_of_memory_is_left_out_with_a_line(toy_device, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(moe_gpu, "product_cell", full)
    assert list(moe_gpu.product_rows(TOY, toy_device)) == [[]] * 4
    assert "8 rows each: left out, out of memory" in capsys.readouterr().out
