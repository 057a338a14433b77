import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dsv3_tutorial import __main__ as cli
from dsv3_tutorial.config import ConfigError
from dsv3_tutorial.receipts import Receipt


@pytest.fixture
def bench(monkeypatch):
    """Put a benchmark of our own behind the name "machine"; gives what it was called with."""
    calls = []

    def install(body=lambda: None):
        def main(argv):
            calls.append(argv)
            body()

        monkeypatch.setitem(sys.modules, "dsv3_tutorial.bench.machine", SimpleNamespace(main=main))
        monkeypatch.setattr(cli, "benches", lambda: {"machine": "dsv3_tutorial.bench.machine"})
        return calls

    return install


def raising(error):
    def body():
        raise error

    return body


def test_help_is_quick_because_it_loads_neither_torch_nor_numpy():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['dsv3_tutorial', '--help']\n"
        "try: runpy.run_module('dsv3_tutorial', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = "doctor", "bench", "train", "generate", "quantize", "plan", "paper", "grade"
    assert all(command in done.stdout for command in commands)


@pytest.mark.parametrize("argv", [[], ["frobnicate"], ["bench", "nope"], ["grade"]], ids=str)
def test_wrong_usage_shows_the_usage_and_exits_2(argv, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m dsv3_tutorial")


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("train", "train.run"),
        ("generate", "inference.command"),
        ("quantize", "bench.quantize_report"),
        ("plan", "cost.plan_command"),
        ("paper", "bench.paper"),
    ],
)
def test_a_command_is_handed_its_own_options_as_they_are(command, module, monkeypatch):
    calls = []
    fake = SimpleNamespace(main=lambda argv: calls.append(argv) or 3)
    package, _, name = module.partition(".")
    monkeypatch.setitem(sys.modules, f"dsv3_tutorial.{module}", fake)
    parent = importlib.import_module(f"dsv3_tutorial.{package}")
    monkeypatch.setattr(parent, name, fake, raising=False)
    given = ["my run", "--steps", "3", "--prompt", "def x", "out", "--to=fp8", "-", "--help"]
    assert cli.main([command, *given]) == 3
    assert calls == [given]


def test_an_interrupt_exits_130_without_a_traceback(bench, capsys):
    bench(raising(KeyboardInterrupt()))
    assert cli.main(["bench"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_error_of_our_own_is_its_message_and_exits_1(bench, capsys):
    bench(raising(ConfigError(["n_heads is 0"])))
    assert cli.main(["bench"]) == 1
    printed = capsys.readouterr().err
    assert "n_heads is 0" in printed and "Traceback" not in printed


def test_a_plain_value_error_raised_in_our_code_is_its_message_too(bench, capsys):
    from dsv3_tutorial.bench import machine

    bench(lambda: machine.measure(-1))
    assert cli.main(["bench"]) == 1
    assert "no time to measure" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("not ours"), KeyError("bug"), TypeError("bug")])
def test_a_bug_keeps_its_traceback(bench, error):
    bench(raising(error))
    with pytest.raises(type(error)):
        cli.main(["bench"])


def test_a_bug_in_our_own_code_keeps_its_traceback_too(bench):
    from dsv3_tutorial.bench import machine

    bench(lambda: machine._product("fp3", 4, None))
    with pytest.raises(KeyError, match="fp3"):
        cli.main(["bench"])


def test_bench_hands_its_folder_on_and_runs_what_was_named(bench):
    calls = bench()
    assert cli.main(["bench"]) == 0
    assert cli.main(["bench", "machine", "--out", "here"]) == 0
    assert calls == [[], ["--out", "here"]]


def test_the_list_holds_benchmarks_that_exist_and_runs_none(capsys, monkeypatch):
    monkeypatch.setitem(cli.BENCHES, "absent", "dsv3_tutorial.bench.no_such_module")
    assert cli.main(["bench", "--list"]) == 0
    listed = capsys.readouterr().out.split()
    assert "machine" in listed and "absent" not in listed


def test_doctor_passes_its_flags_and_its_exit_status_on(monkeypatch):
    from dsv3_tutorial.bench import doctor

    calls = []
    monkeypatch.setattr(doctor, "main", lambda argv: calls.append(argv) or 1)
    assert cli.main(["doctor", "--json", "--quick"]) == 1
    assert cli.main(["doctor"]) == 1
    assert calls == [["--json", "--quick"], []]


def test_grade_passes_its_files_on(monkeypatch):
    import dsv3_tutorial.learn as learn

    calls = []
    fake = SimpleNamespace(main=lambda argv: calls.append(argv) or 3)
    monkeypatch.setitem(sys.modules, "dsv3_tutorial.learn.grade", fake)
    monkeypatch.setattr(learn, "grade", fake, raising=False)
    assert cli.main(["grade", "a.ipynb", "b.ipynb", "--csv"]) == 3
    assert calls == [["a.ipynb", "b.ipynb", "--csv"]]


def test_a_receipt_that_cannot_be_kept_is_an_error_of_our_own(bench, capsys):
    bench(lambda: Receipt(*[None] * 11))
    assert cli.main(["bench"]) == 1
    assert "This receipt cannot be kept" in capsys.readouterr().err


def test_one_benchmark_takes_its_own_options_and_two_do_not(bench, capsys):
    calls = bench()
    assert cli.main(["bench", "machine", "--seeds", "0", "1", "--out", "there"]) == 0
    assert calls == [["--seeds", "0", "1", "--out", "there"]]
    for wrong in (["bench", "--seeds", "0"], ["doctor", "--seeds", "0"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(wrong)
        assert stopped.value.code == 2
    assert "unrecognized arguments: --seeds" in capsys.readouterr().err
