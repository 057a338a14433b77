import json
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import attention, attention_gpu, attention_steps, attention_table, machine
from dsv3_tutorial.bench.attention_steps import CONFIGS, OURS, PEERS, SMALL, Layer
from dsv3_tutorial.bench.timing import cpu_timer
from dsv3_tutorial.config import ModelConfig

TINY = ModelConfig.named("tiny")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder and the printed lines of one quick run."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *text, **_: printed.append(" ".join(map(str, text))))
        assert attention.main(["--quick", "--only", "cpu", "--out", str(folder)]) == 0
    return folder, "\n".join(printed)


@pytest.fixture(scope="module")
def small_layer():
    return Layer(SMALL)


@pytest.mark.parametrize("context", [1, 200, 2100])  # 2100: filled and read in three pieces
def test_every_form_computes_the_same(small_layer, context):
    steps = small_layer.steps(context, 2, (*OURS, attention_steps.REBUILT))
    assert attention_steps.check_agreement(steps, 1e-5) > 0
    assert set(steps) == {*OURS, attention_steps.REBUILT}


def test_transformers_computes_the_same_over_the_same_cache(small_layer):
    pytest.importorskip("transformers", reason="transformers is not installed")
    steps = small_layer.steps(200, 2, attention_steps.FORMS)
    assert set(steps) == {*OURS, *PEERS}
    attention_steps.check_agreement(steps, 1e-5)


def test_a_form_that_reads_another_cache_is_refused(small_layer):
    steps = {"absorbed": small_layer.steps(40, 1, OURS)["absorbed"]}
    steps["shorter"] = small_layer.steps(39, 1, OURS)["absorbed"]
    with pytest.raises(attention_steps.BenchError, match="shorter"):
        attention_steps.check_agreement(steps, 1e-5)


@pytest.mark.parametrize("form", attention_steps.FORMS)
def test_a_repeat_after_a_reset_is_the_same_step(small_layer, form):
    steps = small_layer.steps(33, 2, [form])
    if form not in steps:
        pytest.skip(small_layer.peer_problem)
    step = steps[form]
    first = step().clone()
    with pytest.raises(AssertionError):  # without a reset the step is another one, or impossible
        torch.testing.assert_close(_run(step), first, rtol=0, atol=0)
    step.reset()
    torch.testing.assert_close(step(), first, rtol=0, atol=0)


def _run(step):
    try:
        return step()
    except ValueError as error:  # the cache is full
        raise AssertionError from error


def test_resetting_is_not_timed(small_layer):
    now = [0.0]

    def clock():
        return now[0]

    def spend(seconds):
        now[0] += seconds

    step = attention_steps.Step(lambda: spend(1.0), lambda: spend(100.0), 0)
    found = attention_steps.compare({"a": step}, cpu_timer(clock), 3, 10.0)
    assert (found["a"]["median"], now[0]) == (1.0, 303.0)


def test_memory_is_given_out_in_order_and_never_beyond_the_limit():
    per_token = 4 * (SMALL.kv_lora_rank + SMALL.qk_rope_head_dim + SMALL.num_attention_heads)
    enough = per_token * 1024 * 8
    chosen = attention_steps.fitting(SMALL, 1024, 8, attention_steps.FORMS, enough)
    assert chosen == ["absorbed"]
    assert attention_steps.fitting(SMALL, 1024, 8, attention_steps.FORMS, enough - 1) == []
    everything = attention_steps.fitting(SMALL, 1024, 8, attention_steps.FORMS, 2**40)
    assert everything == list(attention_steps.FORMS)


def test_the_largest_cell_leaves_out_one_form_only():
    largest = CONFIGS["v3-like"], 16384, 8
    left = attention_steps.fitting(*largest, attention_steps.FORMS, attention.Plan().limit)
    assert set(attention_steps.FORMS) - set(left) == {"expanded"}


def test_the_live_cell_has_every_form_at_every_context_and_keeps_its_time():
    started = time.perf_counter()
    times = attention.decode_step_times([16, 48], 0.5, TINY, batch=2)
    assert time.perf_counter() - started < 20  # a hang, not a busy neighbour
    assert list(times) == ["expanded", "reexpanded", "absorbed"]
    assert all(list(by_context) == [16, 48] for by_context in times.values())
    assert all(seconds > 0 for by_context in times.values() for seconds in by_context.values())


def test_the_live_cell_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    attention.decode_step_times([4], 0.01, TINY)
    assert torch.equal(torch.random.get_rng_state(), before)


@given(
    st.lists(st.integers(1, 10**5), min_size=2, max_size=6, unique=True),
    st.floats(1e-9, 1e-3),
    st.floats(0, 1),
)
def test_the_slope_of_a_straight_line_is_its_own(contexts, per_token, fixed):
    found = attention_table.slope({t: fixed + per_token * t for t in contexts})
    tolerance = 1e-14 / min(abs(a - b) for a in contexts for b in contexts if a != b)
    tolerance += 1e-9 * per_token
    for value in (found.value, found.low, found.high):
        assert value == pytest.approx(per_token, rel=0, abs=max(tolerance, 1e-14))


@settings(deadline=None)
@given(st.dictionaries(st.integers(1, 10**5), st.floats(1e-6, 10), min_size=2, max_size=6))
def test_a_slope_lies_between_those_of_its_pieces(times):
    found = attention_table.slope(times)
    assert found.low <= found.value <= found.high


def test_a_slope_needs_two_points():
    with pytest.raises(ValueError, match="two contexts"):
        attention_table.slope({1024: 1.0})


def test_a_crossing_lies_where_two_lines_meet():
    sizes = (16, 64, 256, 1024)
    ours = {t: 5.0 + 0.01 * t for t in sizes}
    other = {t: 1.0 + 0.05 * t for t in sizes}
    found = attention_table.crossing(ours, other)
    assert (found.value, found.low, found.high) == (pytest.approx(100), 64, 256)
    assert attention_table.crossing(other, ours) == found
    assert attention_table.crossing(ours, {t: 2 * y for t, y in ours.items()}) is None


def test_a_quick_run_writes_receipts_that_can_be_read_and_filtered(quick):
    folder, _ = quick
    rows = receipts.read("attention", folder=folder)
    assert {r.what for r in rows} >= {"decode step", "time per cached token", "many queries"}
    assert all(r.threads == 1 and r.device_kind == "cpu" for r in rows)
    step = receipts.read(
        *("attention",), folder=folder, what="decode step", config="small", form="absorbed", batch=1
    )
    assert {r.shapes["context"] for r in step} == {
        *attention.QUICK.contexts,
        *attention.QUICK.short,
    }
    element = 4 * (SMALL.kv_lora_rank + SMALL.qk_rope_head_dim)
    assert all(r.shapes["cache_bytes"] == element * (r.shapes["context"] + 1) for r in step)


def test_the_slopes_on_record_are_those_of_the_steps_on_record(quick):
    folder, _ = quick
    for r in receipts.read("attention", folder=folder, what="time per cached token"):
        same = {name: r.shapes[name] for name in ("config", "form", "batch")}
        steps = receipts.read("attention", folder=folder, what="decode step", **same)
        times = {s.shapes["context"]: s.value for s in steps}
        fitted = attention_table.slope({t: times[t] for t in r.shapes["contexts"]})
        assert (r.value, r.spread["min"]) == (fitted.value, fitted.low)


def test_the_receipts_name_no_folder_of_this_machine(quick):
    folder, _ = quick
    text = (folder / "attention.jsonl").read_text(encoding="utf-8")
    assert "/" not in text.replace("B/s", "")
    assert all(json.loads(line)["device"].strip() for line in text.splitlines())


def test_the_table_puts_the_targets_beside_what_was_reached(quick):
    _, printed = quick
    for form in OURS:
        assert printed.count(f"\n{form}") == len(CONFIGS) * len(attention.QUICK.batches)
    if Layer(TINY).peer_problem is None:
        assert "target 35x: " in printed and "target 60x: " in printed


def receipt(what, form, seconds, **shapes):
    return receipts.Receipt(
        what=what,
        shapes={"config": "small", "form": form, "batch": 1, **shapes},
        value=seconds,
        unit="s",
        spread={"min": seconds, "max": seconds},
        repeats=1,
        **machine.here(),
    )


def slope_of(form, seconds):
    shapes = {"contexts": [16, 32], "cache_bytes_per_token": 640}
    return receipt("time per cached token", form, seconds, **shapes)


def test_a_target_is_reached_from_its_own_ratio_on():
    ratios = {"absorbed": 1.0, "transformers sdpa": 35.0, "transformers eager": 34.0}
    said = "\n".join(attention_table.lines([slope_of(*pair) for pair in ratios.items()]))
    assert "transformers sdpa takes 35.0x" in said and "35x: reached" in said
    assert "transformers eager takes 34.0x" in said and "35x: not reached" in said


@pytest.mark.parametrize(
    "late, said", [(3.0, "faster at every size measured, 16 to 32"), (1.0, "")]
)
def test_no_crossover_is_claimed_to_be_missing_unless_it_is(late, said):
    times = {"absorbed": (1.0, 2.0), "expanded": (2.0, late)}
    rows = [slope_of("absorbed", 1.0)]
    for form, (near, far) in times.items():
        rows += [receipt("decode step", form, t, context=c) for c, t in ((16, near), (32, far))]
    lines = [line for line in attention_table.lines(rows) if "against" in line]
    assert len(lines) == bool(said) and said in "".join(lines)


def test_asking_for_a_gpu_that_is_not_there_is_wrong_usage(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        attention.main(["--only", "gpu"])
    assert stopped.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.fixture(scope="module")
def toy_device():
    """The GPU part's logic on a CPU: the reference in the kernel's place."""
    return attention_gpu.Device("cpu", cpu_timer(), machine.measure(0.1, "cpu"), "reference")


TOY = attention_gpu.Sizes((2, 4), (1, 3), (16, 40), (16, 40), 3, 1.0)


def test_the_gpu_part_measures_the_kernel_against_the_ceilings(toy_device):
    cells = list(attention_gpu.kernel_rows(TINY, TOY, toy_device))
    assert len(cells) == 8
    ours, sdpa, bandwidth, rate = cells[-1]
    assert [r.unit for r in cells[-1]] == ["s", "s", "B/s", "FLOP/s"]
    assert sdpa.shapes["form"] == attention_gpu.SDPA
    width, rank, (heads, batch, context) = TINY.kv_lora_rank + TINY.rope_dim, 96, (4, 3, 40)
    assert TINY.kv_lora_rank == rank
    moved = 2 * batch * (context * width + heads * (width + rank))
    assert bandwidth.value == pytest.approx(moved / ours.value)
    assert bandwidth.fraction == pytest.approx(bandwidth.value / toy_device.ceilings.copy.value)
    assert rate.value == pytest.approx(2 * batch * context * heads * (width + rank) / ours.value)
    assert "4 heads" in attention_gpu.words(rate)


def test_the_gpu_part_measures_the_whole_layer(toy_device):
    cells = list(attention_gpu.layer_rows(TINY, TOY, toy_device))
    assert [r.shapes["context"] for cell in cells for r in cell[:1]] == [16, 40]
    assert {r.shapes["form"] for r in cells[0]} >= set(OURS)


def test_the_gpu_part_keeps_every_cell_as_a_receipt(toy_device, tmp_path, capsys):
    path = attention_gpu.record(TINY, TOY, toy_device, tmp_path)
    rows = receipts.read("attention", folder=tmp_path)
    assert path == tmp_path / "attention.jsonl"
    assert len([r for r in rows if r.what == "decode kernel"]) == 8 * 4
    assert len([r for r in rows if r.what == "decode step"]) >= 2 * len(OURS)
    assert len(capsys.readouterr().out.splitlines()) >= len(rows)


def test_a_size_that_runs_out_of_memory_is_left_out_with_a_line(toy_device, monkeypatch, capsys):
    def kernel(q, latent, lengths, rank, scale, backend):
        if latent.shape[1] == 40:
            raise torch.OutOfMemoryError
        return attention_gpu.latent_decode_reference(q, latent, lengths, rank, scale)

    monkeypatch.setattr(attention_gpu, "latent_decode", kernel)
    cells = list(attention_gpu.kernel_rows(TINY, TOY, toy_device))
    assert [len(cell) for cell in cells] == [4, 0] * 4
    assert "40 tokens: left out, out of memory" in capsys.readouterr().out


def test_a_kernel_that_is_wrong_is_not_timed(toy_device, monkeypatch):
    monkeypatch.setattr(attention_gpu, "latent_decode", lambda q, *_, **__: q[..., :96])
    with pytest.raises(attention_steps.BenchError, match="latent_decode"):
        next(attention_gpu.kernel_rows(TINY, TOY, toy_device))
