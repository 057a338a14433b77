import json
import statistics
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import (
    inference,
    inference_gpu,
    inference_model,
    inference_receipts,
    inference_rows,
    inference_serve,
    inference_spec,
    inference_table,
    inference_text,
    inference_timing,
    machine,
)
from dsv3_tutorial.bench.attention_gpu import Device
from dsv3_tutorial.bench.attention_steps import BenchError, check_agreement
from dsv3_tutorial.bench.inference_gpu_cells import Sizes
from dsv3_tutorial.bench.inference_model import PEERS, PLAIN, Engines
from dsv3_tutorial.bench.inference_plan import QUICK
from dsv3_tutorial.bench.timing import cpu_timer
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import speculation
from dsv3_tutorial.inference.generate import Generation
from dsv3_tutorial.weights.formats import quantize

TINY = ModelConfig.named("tiny")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder and the printed lines of one quick run."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *text, **_: printed.append(" ".join(map(str, text))))
        assert inference.main(["--quick", "--only", "cpu", "--out", str(folder)]) == 0
    return folder, "\n".join(printed)


@pytest.fixture(scope="module")
def engines():
    return Engines("wide", TINY)


# The engines


def test_every_plain_form_and_transformers_give_the_same_logits(engines):
    if engines.peer_problem is not None:
        pytest.skip(engines.peer_problem)
    with torch.no_grad():
        made = engines.steps(20, 2, (PLAIN, *PEERS))
        assert list(made) == [PLAIN, *PEERS]
        assert check_agreement(made, 1e-4) > 0
        for engine in made.values():
            assert engine.run().shape == (2, TINY.vocab_size)


@pytest.mark.parametrize("form", [PLAIN, "fp8 cache", "int8", *PEERS])
def test_after_a_reset_an_engine_takes_the_same_steps_again(engines, form):
    if form in PEERS and engines.peer_problem is not None:
        pytest.skip(engines.peer_problem)
    with torch.no_grad():
        engine = engines.steps(9, 1, (form,))[form]
        first = [engine.run().clone() for _ in range(3)]
        engine.reset()
        again = [engine.run().clone() for _ in range(3)]
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], first[1])  # another token: other experts


def test_an_engine_says_what_it_holds(engines):
    made = engines.steps(64, 1, (PLAIN, "bf16 cache", "fp8 cache", "int8"))
    held = {form: engine.cache_bytes for form, engine in made.items()}
    assert held["fp8 cache"] < held["bf16 cache"] == held[PLAIN] / 2 == held["int8"] / 2
    assert made["int8"].weight_bytes < made[PLAIN].weight_bytes == made["fp8 cache"].weight_bytes


def test_working_memory_is_at_least_the_largest_tensor_that_a_step_makes():
    def decode(ids: Tensor) -> Tensor:
        return torch.ones(1000, 1000).sum(0)

    engine = inference_timing.Engine(torch.zeros(1, 16).long(), decode, lambda: None, 0, 0)
    assert 4_000_000 <= inference_timing.working_bytes(engine) < 4_100_000
    assert engine.taken == 0


def test_engines_are_timed_in_turn_and_a_burst_begins_behind_an_untimed_step():
    taken = []

    def engine(name: str) -> inference_timing.Engine:
        def decode(ids: Tensor) -> Tensor:
            taken.append((name, int(ids)))
            return ids

        return inference_timing.Engine(torch.arange(16)[None], decode, lambda: None, 0, 0)

    found = inference_timing.compare({"a": engine("a"), "b": engine("b")}, 2, 10.0, burst=2)
    assert taken == [(name, step) for name in "abba" for step in range(3)]
    assert {stats["repeats"] for stats in found.values()} == {2}


def test_without_transformers_our_engines_are_measured_alone(monkeypatch):
    monkeypatch.setattr(inference_model, "peer_problem", lambda: "not here")
    alone = Engines("wide", TINY)
    assert list(alone.steps(4, 1, (PLAIN, *PEERS))) == [PLAIN]


def test_the_wide_model_is_what_the_docstring_says():
    with torch.device("meta"):
        model = inference_model.DeepSeekV3(inference_model.WIDE)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(127e6, rel=0.01)


# Text


def test_a_token_is_of_the_kind_of_its_first_letter():
    vocabulary = inference_text.Vocabulary(inference_text.folder(), 512)
    text = 'def f(self):\n    """Some  words."""\n    return x1 + 12  # why not\n'
    ids = vocabulary.encode(text)
    names = inference_text.symbol_names()
    kinds = inference_text.kinds([], ids)
    found: dict[str, str] = {}
    for token, kind in zip(ids, kinds, strict=True):
        found[kind] = found.get(kind, "") + names[token].decode().strip()
    assert found["keyword"] == "defreturn" and found["number"] == "12"
    assert found["operator"] == "():+" and found["name"] == "fselfx1"
    assert found["string or comment"].startswith('"""Some') and "why" in found["string or comment"]
    assert set(found) == set(inference_text.KINDS)


def test_what_lies_before_decides_what_a_token_is():
    vocabulary = inference_text.Vocabulary(inference_text.folder(), 512)
    before, after = vocabulary.encode('x = """a docstring '), vocabulary.encode("return 1")
    assert set(inference_text.kinds(before, after)) == {"string or comment"}
    assert set(inference_text.kinds([], after)) == {"keyword", "number"}


def test_prompts_differ_and_are_of_one_length():
    found = inference_text.prompts(6)
    assert {len(prompt) for prompt in found} == {inference_text.PROMPT}
    assert len({tuple(prompt) for prompt in found}) == 6


# Speculation and serving


def test_the_law_is_that_of_the_cost_model():
    seconds = {"1": 2.0, "2": 2.6, "3": 3.0, "draft 1": 0.2, "draft 3": 0.2}
    costs = {name: {"median": value} for name, value in seconds.items()}
    given = speculation.tokens_per_pass(0.9, 2)
    law = speculation.speedup(0.9, 2, 3.0 / 2.0, 0.2 / 2.0)
    assert inference_spec.predicted(costs, given, 2) == pytest.approx(law)
    costs["draft 3"] = {"median": 0.8}  # the first draft reads what the pass before it kept
    assert inference_spec.predicted(costs, given, 2) == pytest.approx(law * 3.4 / 4.0)


def test_tokens_a_pass_are_those_of_a_text_and_not_of_its_batch():
    done = Generation([[0] * 11, [0] * 11], [], 6, 20, 10, 0, 0.0, 0.0, 0.0)
    assert inference_spec.facts(done) == {"acceptance": 0.5, "tokens_per_pass": 2.0, "passes": 6}


def test_other_tokens_are_no_comparison():
    inference_spec.same_output({"plain": [[1, 2]], "other": [[1, 2]]})
    with pytest.raises(BenchError, match="Greedy output of other is not that of plain"):
        inference_spec.same_output({"plain": [[1, 2]], "other": [[1, 3]]})


def test_a_rate_turns_the_quartiles_round():
    found = inference_serve.rate({"median": 2.0, "q1": 1.0, "q3": 4.0, "repeats": 3}, 8.0)
    assert found == {"median": 4.0, "q1": 2.0, "q3": 8.0, "repeats": 3}


@pytest.mark.parametrize("side", [64, 96])
def test_every_path_of_a_product_computes_the_same(side):
    weight, x = torch.randn(side, side), torch.randn(32, side)
    wanted = x @ weight.T
    rounded = quantize(weight, "int8")
    assert rounded.codes.shape == weight.shape
    for name, multiply in inference_rows.multiplies(weight).items():
        off = (multiply(x).float() - wanted).norm() / wanted.norm()
        assert off < (0.2 if name == "int4" else 0.03), name


# The command


def test_a_quick_run_writes_receipts_of_every_kind(quick):
    folder, _ = quick
    rows = receipts.read("inference", folder=folder)
    said = {"decode step", "time per cached token", "generation", "speculation"}
    said |= {"pass cost", "draft cost"}
    said |= {"speculation gain", "law", "acceptance by kind", "product by rows", "batching"}
    assert {r.what for r in rows} == (said | {"phase"}) - {"time per cached token"}  # two contexts
    assert all(name in inference.__doc__ for name in said)
    assert all(r.threads == 1 and r.device_kind == "cpu" for r in rows)
    text = (folder / "inference.jsonl").read_text(encoding="utf-8")
    assert all(json.loads(line)["device"].strip() for line in text.splitlines())


def test_speculation_on_record_is_a_gain_over_the_plain_run_on_record(quick):
    folder, _ = quick
    rates = {
        (r.shapes["batch"], r.shapes["drafts"]): r.value
        for r in receipts.read("inference", folder=folder, what="speculation")
    }
    gains = receipts.read("inference", folder=folder, what="speculation gain")
    assert {r.shapes["drafts"] for r in gains} == {1, 2}
    for r in gains:
        batch, drafts = r.shapes["batch"], r.shapes["drafts"]
        assert r.value == pytest.approx(rates[batch, drafts] / rates[batch, 0])


def test_a_line_through_the_steps_has_their_slope_and_fit():
    def step(context: int, seconds: float):
        shapes = {"model": "wide", "form": PLAIN, "batch": 1, "context": context}
        stats = {"median": seconds, "q1": seconds, "q3": seconds, "repeats": 1}
        return inference_receipts._receipt("decode step", shapes, stats, "s")

    straight = [step(n, 0.01 + 1e-6 * n) for n in (256, 512, 2048, 8192)]
    (line,) = inference_receipts.line_receipts(straight)
    assert line.value == pytest.approx(1e-6) and line.shapes["r2"] == pytest.approx(1)
    assert line.shapes["fixed_s"] == pytest.approx(0.01)
    assert not list(inference_receipts.line_receipts(straight[:3]))


def test_the_law_has_an_r2_of_one_where_it_is_right_and_of_none_where_the_mean_is_as_good():
    right = inference_receipts._law("a", [(1.0, 1.0), (2.0, 2.0)])
    mean = inference_receipts._law("a", [(1.5, 1.0), (1.5, 2.0)])
    assert (right.value, mean.value) == (1, 0)


def test_the_tables_name_every_form_and_the_targets(quick):
    folder, printed = quick
    rows = receipts.read("inference", folder=folder)
    for form in {r.shapes["form"] for r in rows if "form" in r.shapes}:
        assert f"\n  {form} " in printed
    assert "one draft at batch 1" in printed and "target 1.5x" in printed


def test_targets_are_judged_by_the_best_of_transformers():
    def step(form: str, context: int, seconds: float):
        shapes = {"model": "wide", "form": form, "batch": 1, "context": context}
        shapes |= dict.fromkeys(("weight_bytes", "cache_bytes", "working_bytes"), 1)
        stats = {"median": seconds, "q1": seconds, "q3": seconds, "repeats": 1}
        return inference_receipts._receipt("decode step", shapes, stats, "s")

    best, other, *_ = PEERS
    rows = [step("int8", 256, 1.0), step(PLAIN, 256, 2.0)]
    rows += [step("int8", 2048, 1.0), step(best, 2048, 4.6), step(other, 2048, 9.0)]
    said = "\n".join(inference_table.lines(rows))
    assert "float32 over int8 behind 256: 2.00x; target 2.1x: not reached" in said
    assert f"{best}, the best, over int8 behind 2,048: 4.60x; target 4.5x: reached" in said


def test_asking_for_a_gpu_that_is_not_there_is_wrong_usage(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        inference.main(["--only", "gpu"])
    assert stopped.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err


# The GPU part's logic, on a CPU: the reference in the kernels' place

TOY = Sizes((40,), (4,), ((2, 24),), ((256, 256),), (1, 3), ("int8", "int4"), ((1, 4),), 2, 0.5)


def test_the_gpu_part_compares_equal_outputs_and_keeps_every_cell(tmp_path, capsys):
    device = Device("cpu", cpu_timer(), machine.measure(0.1, "cpu"), "reference")
    narrow = replace(TINY, kv_lora_rank=128)
    path = inference_gpu.record(narrow, TOY, device, tmp_path)
    rows = receipts.read("inference", folder=tmp_path)
    assert path == tmp_path / "inference.jsonl"
    kinds = {"attention core", "latent decode", "weight product", "gpu generation"}
    assert {r.what for r in rows} == kinds
    assert all(r.shapes["same"] == 1 for r in rows if r.what == "gpu generation")
    assert {r.ceiling for r in rows if r.unit == "B/s"} == {"copy"}
    assert len(capsys.readouterr().out.splitlines()) >= len(rows)


@pytest.mark.gpu
def test_the_gpu_part_runs_on_a_gpu(tmp_path):
    inference_gpu.run(tmp_path, quick=True)
    rows = receipts.read("inference", folder=tmp_path)
    assert any(r.shapes["form"] == "absorbed, graph" for r in rows if r.what == "attention core")
    assert statistics.mean(r.value for r in rows if r.what == "gpu generation") > 0


def test_a_plan_of_the_quick_run_has_every_part():
    assert list(inference_receipts.parts(QUICK)) == list(inference.PARTS)
