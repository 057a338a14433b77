"""The command: it learns real text, writes what it says, and stops without losing what it had."""

import json
import zlib

import pytest
import torch

from dsv3_tutorial import __main__ as cli
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.parallel.data import join
from dsv3_tutorial.train import corpus, evaluate, log, run, sealed, step
from dsv3_tutorial.train.options import parser, plan

QUICK = ("--batch", "8", "--seq-len", "32", "--peak-lr", "1e-2", "--warmup", "3", "--alpha", "0")


@pytest.fixture
def train(tmp_path, text_folder):
    """Run the command with the small config on the small text; its status. `train.out`: where."""

    def command(*options, out="run"):
        where = ("--config", tmp_path / "moe.json", "--text", text_folder)
        given = where if "--resume" not in options else ()
        argv = ["train", *given, "--out", tmp_path / out, *options]
        return cli.main([str(a) for a in argv])

    command.out = tmp_path / "run"
    return command


def rows(folder):
    """The log without what a clock wrote."""
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in log.read(folder)]


def held_out_of(model, text_folder, recipe):
    return evaluate.held_out(model, corpus.load(text_folder), recipe, join("cpu"))


def test_the_command_learns_and_leaves_the_model_that_its_log_describes(train, text_folder, capsys):
    assert train(*QUICK, "--steps", "30", "--csv", "--evaluate-every", "10") == 0
    logged, said = log.read(train.out), capsys.readouterr()
    assert [row["step"] for row in logged] == list(range(1, 31))
    assert logged[0]["bits_per_byte"] == pytest.approx(8, rel=0.05)
    assert logged[-1]["held_out"] < 4 and logged[-1]["bits_per_byte"] < 4
    assert [row["step"] for row in logged if "held_out" in row] == [10, 20, 30]
    assert said.out.count("bits per byte") == 3 and "tokens/s" in said.out
    assert "step" not in said.err  # no progress bar where there is no terminal
    recipe = plan(parser().parse_args(["--out", str(train.out), "--resume"])).recipe
    model = DeepSeekV3.from_pretrained(train.out / "model")
    main, ahead = held_out_of(model, text_folder, recipe)
    assert (main, ahead) == (logged[-1]["held_out"], logged[-1]["held_out_mtp"])
    columns = {"loss", "mtp_loss", "grad_norm", "lr", "max_violation", "max_violation_worst"}
    assert columns | {"tokens_per_s", "bits_per_byte"} <= set(logged[0])
    assert (train.out / "log.csv").read_text().count("\n") == 31


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(train, monkeypatch, capsys):
    options = (*QUICK, "--steps", "12", "--save-every", "4", "--evaluate-every", "6")
    assert train(*options, out="whole") == 0
    monkeypatch.setattr(run, "train_step", interrupting(at=7))
    assert train(*options) == 130
    monkeypatch.undo()
    assert [row["step"] for row in log.read(train.out)] == [1, 2, 3, 4, 5, 6, 7]
    assert train("--resume") == 0 and "resumed after step 4" in capsys.readouterr().out
    assert rows(train.out) == rows(train.out.parent / "whole")
    same = [(train.out.parent / name / "model/model.safetensors").read_bytes() for name in NAMES]
    assert same[0] == same[1]


def test_a_run_in_fp8_learns_and_its_model_is_worth_what_its_log_says(train, text_folder):
    options = ("--steps", "15", "--evaluate-every", "5", "--evaluate-windows", "8")
    assert train(*QUICK, *options, "--precision", "fp8") == 0
    held_out = [row["held_out"] for row in log.read(train.out) if "held_out" in row]
    assert held_out[0] > held_out[1] > held_out[2] and held_out[2] < 5
    model = DeepSeekV3.from_pretrained(train.out / "model")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    recipe = plan(parser().parse_args(["--out", str(train.out), "--resume"])).recipe
    main, _ = held_out_of(model, text_folder, recipe)  # in float32
    assert main == pytest.approx(held_out[2], rel=5e-3)


def test_an_interrupted_run_in_fp8_goes_on_bit_for_bit(train, monkeypatch, capsys):
    options = (*QUICK, "--steps", "6", "--save-every", "2", "--evaluate-every", "3")
    options += ("--precision", "fp8", "--micro-batches", "2", "--evaluate-windows", "4")
    assert train(*options, out="whole") == 0
    monkeypatch.setattr(run, "train_step", interrupting(at=5))
    assert train(*options) == 130
    monkeypatch.undo()
    assert train("--resume") == 0 and "resumed after step 4" in capsys.readouterr().out
    assert rows(train.out) == rows(train.out.parent / "whole")
    folders = [train.out.parent / name for name in NAMES]
    same = [(folder / "model/model.safetensors").read_bytes() for folder in folders]
    assert same[0] == same[1]
    facts = [sealed.verify(folder / "checkpoints/step-00000006") for folder in folders]
    assert facts[0]["tensors"] == facts[1]["tensors"] and facts[0]["files"] == facts[1]["files"]
    moments = [t for name, t in facts[0]["tensors"].items() if name.endswith((".exp_avg", "_sq"))]
    assert moments and {dtype for dtype, _ in moments} == {"bfloat16"}


def test_a_checkpoint_with_other_moments_is_refused_and_one_from_before_there_were_any_is_not(
    train, capsys
):
    assert train(*QUICK, "--steps", "2") == 0
    written = (train.out / "run.json").read_text()
    begun = json.loads(written)
    begun["recipe"]["moments"] = "bf16"
    (train.out / "run.json").write_text(json.dumps(begun))
    assert train("--resume", "--steps", "3") == 1
    assert "moments ('absent' in the checkpoint, 'bf16' now)" in capsys.readouterr().err
    (train.out / "run.json").write_text(written)
    assert train("--resume", "--steps", "3") == 0


NAMES = ("run", "whole")


def interrupting(at):
    def train_step(state, *rest):
        if state.step == at:
            raise KeyboardInterrupt
        return step.train_step(state, *rest)

    return train_step


def test_a_loss_that_is_none_keeps_the_checkpoint_before_it_and_writes_no_model(
    train, monkeypatch, capsys
):
    def spoiled(state, *rest):
        if state.step == 5:
            state.model.lm_head.register_forward_hook(lambda module, args, out: out / 0)
        return step.train_step(state, *rest)

    monkeypatch.setattr(run, "train_step", spoiled)
    assert train(*QUICK, "--steps", "9", "--save-every", "2") == 1
    said = capsys.readouterr().err
    assert said.startswith("Step 6 stopped the run") and "Traceback" not in said
    assert "the output of lm_head." in said and ".txt + " in said
    assert sealed.whole_steps(train.out / "checkpoints") == [2, 4]
    assert [row["step"] for row in log.read(train.out)] == [1, 2, 3, 4, 5]
    assert not (train.out / "model").exists()


def test_weights_that_are_not_finite_are_never_saved_over_good_ones(train, monkeypatch, capsys):
    def spoiled(state, *rest):
        update = step.train_step(state, *rest)
        if state.step == 4:
            with torch.no_grad():
                state.model.model.norm.weight[0] = float("inf")
        return update

    monkeypatch.setattr(run, "train_step", spoiled)
    assert train(*QUICK, "--steps", "9", "--save-every", "2") == 1
    assert "the weight model.norm.weight is not finite" in capsys.readouterr().err
    assert sealed.whole_steps(train.out / "checkpoints") == [2]


def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(train, capsys):
    assert train(*QUICK, "--steps", "2") == 0
    before = {p: p.read_bytes() for p in train.out.rglob("*") if p.is_file()}
    assert train(*QUICK, "--steps", "3") == 1
    assert "a run is there already" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in train.out.rglob("*") if p.is_file()}


def test_more_steps_can_be_asked_for_when_a_run_is_taken_up(train):
    assert train(*QUICK, "--steps", "3") == 0
    assert train("--resume", "--steps", "5") == 0
    assert [row["step"] for row in log.read(train.out)] == [1, 2, 3, 4, 5]
    assert json.loads((train.out / "run.json").read_text())["recipe"]["steps"] == 5


def test_a_profiled_run_prints_where_its_time_went_and_leaves_a_trace(train, capsys):
    assert train(*QUICK, "--steps", "6", "--profile", "--recompute", "--precision", "bf16") == 0
    said = capsys.readouterr().out
    for phase in ("data", "forward", "backward", "optimizer", "checkpoint", "the rest"):
        assert f"\n{phase} " in said
    events = json.loads((train.out / "profile/trace.json").read_text())["traceEvents"]
    assert {"forward", "backward", "optimizer"} <= {event.get("name") for event in events}


def test_a_learned_vocabulary_goes_with_the_model_and_with_the_run(train):
    options = ("--tokenizer", "bpe", "--vocab-size", "300")
    assert train(*QUICK, *options, "--steps", "4", "--save-every", "2") == 0
    learned = (train.out / "tokenizer.json").read_bytes()
    assert (train.out / "model/tokenizer.json").read_bytes() == learned
    assert train("--resume", "--steps", "5") == 0
    assert (train.out / "tokenizer.json").read_bytes() == learned
    first = log.read(train.out)[0]
    assert first["bits_per_byte"] < 0.9 * first["loss"] / torch.tensor(2.0).log().item()


def test_another_text_is_another_run(train, text_folder, capsys):
    assert train(*QUICK, "--steps", "2") == 0
    (text_folder / "new.txt").write_bytes(zlib.compress(b"something else"))
    assert train("--resume", "--steps", "4") == 1
    assert "text" in capsys.readouterr().err
    assert [row["step"] for row in log.read(train.out)] == [1, 2]


def test_an_option_that_does_not_exist_is_wrong_usage(train, capsys):
    with pytest.raises(SystemExit) as end:
        train("--frobnicate")
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m dsv3_tutorial train")
