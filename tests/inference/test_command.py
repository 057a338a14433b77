import io
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer

from dsv3_tutorial import __main__ as cli
from dsv3_tutorial.checkpoint import CheckpointError
from dsv3_tutorial.inference import command
from dsv3_tutorial.inference.generate import generate
from dsv3_tutorial.inference.quantize import load, quantize_folder
from dsv3_tutorial.inference.requests import GenerationError
from dsv3_tutorial.model import DeepSeekV3


@pytest.fixture
def ask(small, capsys):
    """ask("--prompt", ...) runs the command on the trained model -> its output, and its errors."""

    def run(*options, tokens=16):
        argv = [
            str(small),
            "--max-new-tokens",
            str(tokens),
            "--dtype",
            "float32",
            "--device",
            "cpu",
        ]
        assert command.main([*argv, *map(str, options)]) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def greedy(trained, small):
    """Greedy text behind a prompt, by the library alone."""

    def text(prompt, count=16):
        tokenizer = Tokenizer.from_file(str(small / "tokenizer.json"))
        return tokenizer.decode(
            generate(trained, [tokenizer.encode(prompt).ids], count).sequences[0]
        )

    return text


def test_the_new_text_alone_is_on_standard_output(ask, greedy):
    assert ask("--prompt", "def ") == (greedy("def "), "")


def test_speculation_writes_the_same_text(ask, greedy):
    assert ask("--prompt", "import ", "--speculate", 2)[0] == greedy("import ")


def test_the_prompt_can_come_from_standard_input(ask, greedy, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("class A:\n    é"))
    assert ask("--prompt", "-")[0] == greedy("class A:\n    é")


def test_a_seed_repeats_and_another_writes_another_text(ask):
    def drawn(seed):
        options = "--temperature", 0.9, "--top-k", 100, "--top-p", 0.95, "--seed", seed
        return ask("--prompt", "def ", *options)[0]

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_stop_string_ends_the_text_and_is_not_shown(ask, greedy):
    whole = greedy("def ")
    stop = whole[5:8]
    assert ask("--prompt", "def ", "--stop", stop)[0] == whole[: whole.index(stop)]


def test_bench_says_on_standard_error_how_fast_it_was(ask, greedy):
    text, said = ask("--prompt", "def ", "--bench", "--speculate", 1, "--cache", "bf16")
    assert text == greedy("def ")
    for told in ("ms,", "tokens a second", "tokens a pass", "accepted:", "256 a token and layer"):
        assert told in said, told
    assert "16, ended by length" in said and "float32 on cpu, 1 thread(s)" in said


def test_bench_of_one_token_has_no_pace_to_tell(ask):
    assert "none was decoded" in ask("--prompt", "def ", "--bench", tokens=1)[1]


def test_text_comes_as_it_is_made(monkeypatch):
    shown, flushed = [], []
    stream = io.StringIO()
    monkeypatch.setattr(stream, "write", shown.append)
    monkeypatch.setattr(stream, "flush", lambda: flushed.append(len(shown)))
    output = command.Output(stream, command.StopText(["END"]))
    assert [output.write(piece) for piece in ("ab", "", "cE", "f", "gEN")] == [False] * 5
    output.end()
    assert shown == ["ab", "c", "Ef", "g", "EN"] and flushed == [1, 2, 3, 4, 5]


def test_a_terminals_next_line_is_left_free(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    command.Output(stream, command.StopText()).end()
    assert stream.getvalue() == "\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt", ""], "The prompt is empty|Prompt 0 is empty"),
        (["--prompt", "x" * 5000], "4096 positions"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "a", "--stop", ""], "stop string is empty"),
        (["--prompt", "a", "--speculate", "-1"], "speculate is -1"),
    ],
    ids=["empty", "too long", "temperature", "stop", "drafts"],
)
def test_a_request_that_cannot_be_served_is_refused_with_the_reason(ask, options, said):
    with pytest.raises(GenerationError, match=said):
        ask(*options)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        command.main([str(tmp_path), "--prompt", "a", "--max-new-tokens", "1"])


@pytest.mark.parametrize(
    "options",
    [[], ["--max-new-tokens", "one"], ["--cache", "fp4"], ["--top-k", "5"]],
    ids=["nothing", "no number", "no such cache", "nothing drawn"],
)
def test_wrong_usage_shows_the_usage_and_exits_2(options, capsys):
    complete = ["folder", "--prompt", "a", "--max-new-tokens", "3"]
    argv = [*complete, *options] if options else []
    with pytest.raises(SystemExit) as end:
        command.main(argv)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m dsv3_tutorial generate")


def test_an_error_is_its_message_and_exits_1(small, capsys):
    assert cli.main(["generate", str(small), "--prompt", "", "--max-new-tokens", "1"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "is empty" in err and "Traceback" not in err


def test_who_reads_no_further_ends_it_quietly(small):
    argv = [str(small), "--prompt", "def ", "--max-new-tokens", "300", "--dtype", "float32"]
    started = subprocess.Popen(
        [sys.executable, "-m", "dsv3_tutorial", "generate", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert started.stdout.read(1)
    started.stdout.close()
    assert started.stderr.read() == b"" and started.wait(60) == 0
    started.stderr.close()


def test_the_default_dtype_is_the_stored_one(small, capsys):
    argv = [str(small), "--prompt", "def ", "--max-new-tokens", "2", "--bench", "--device", "cpu"]
    assert command.main(argv) == 0
    assert "bfloat16 on cpu" in capsys.readouterr().err
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("to", [None, "int8"], ids=str)
def test_a_model_of_bytes_needs_no_tokenizer_and_a_quantised_folder_is_read(
    to, cfg, tmp_path, capsys
):
    torch.manual_seed(5)
    folder = tmp_path / "plain"
    DeepSeekV3(replace(cfg, vocab_size=256)).save_pretrained(folder)
    if to is not None:
        quantize_folder(folder, tmp_path / to, to)
        folder = tmp_path / to
    argv = [str(folder), "--prompt", "aé", "--max-new-tokens", "20", "--speculate", "1"]
    assert command.main([*argv, "--device", "cpu"]) == 0
    expected = bytes(generate(load(folder), [list("aé".encode())], 20).sequences[0])
    shown = capsys.readouterr().out  # a letter that is not whole at the end is not
    assert len(shown) > 4 and expected.decode(errors="replace").startswith(shown)
