"""Whatever a learner's function does, it gets one line and the notebook goes on."""

import signal
import sys
import textwrap
import time

import pytest
import torch

from dsv3_tutorial.learn import exercise, notebook, show, verdict
from dsv3_tutorial.learn.registry import Budget, Case, Exercise, Mutant
from dsv3_tutorial.learn.verdict import judge


def _make():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, generator=generator), 2.0


def _make_hidden():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(2, 5, generator=generator), -3.0


def scaled(x, factor):
    """What the toy exercise asks for."""
    return x * factor


def _forgot(x, factor):
    return x.clone()


def _added(x, factor):
    return x + factor


def _transposed(x, factor):
    return x.T @ factor


def toy(**changes):
    values = {
        "name": "toy.scaled",
        "reference": "unused:unused",
        "cases": [Case("small", _make), Case("other", _make_hidden, hidden=True)],
        "hints": ["multiply"],
        "difficulty": 1,
        "importance": 1,
        "minutes": 1,
        "lines": 1,
        "mutants": [
            Mutant("forgot", _forgot, "you forgot the factor."),
            Mutant("added", _added, "you added the factor."),
            Mutant("product", _transposed, "this is a matrix product."),
        ],
        "seconds": 0.4,
    }
    return type("Toy", (Exercise,), {"function": property(lambda self: scaled)})(
        **{**values, **changes}
    )


def written(body, head="def scaled(x, factor):", **names):
    """A function as a cell would define it: from source, in a namespace of its own."""
    space = {"torch": torch, "sys": sys, "time": time, **names}
    exec(f"{head}\n{textwrap.indent(textwrap.dedent(body), '    ')}", space)
    return space["scaled"]


def test_a_right_answer_passes_with_the_number_of_cases():
    assert judge(toy(), written("return factor * x")).line == "[PASSED] 2 cases"


@pytest.mark.parametrize(
    "body",
    [
        *("...", "pass", '"""Says."""', '"""Says."""\n...', "raise NotImplementedError"),
        'raise NotImplementedError("yours to write")',
    ],
)
def test_a_bare_stub_is_not_attempted(body):
    assert judge(toy(), written(body)).status == "not_attempted"


def test_a_stub_whose_source_can_be_read_is_not_attempted_either():
    def stub(x, factor):
        """Scale x."""
        raise NotImplementedError("yours to write")

    def begun(x, factor):
        y = x  # noqa: F841  an assignment is an attempt
        ...

    def empty_return(x, factor):
        return ...

    assert judge(toy(), stub).status == "not_attempted"
    assert judge(toy(), empty_return).status == "not_attempted"
    assert judge(toy(), begun).status == "not_yet"


ATTACKS = {
    "raises": ("raise KeyError('k')", "[YOUR CODE RAISED] KeyError on line 2: 'k'"),
    "type error": ("y = 1\nreturn x + 'a'", "[YOUR CODE RAISED] TypeError on line 3:"),
    "endless loop": ("while True: pass", "did not finish within 0.4 s"),
    "bare except loop": ("while True:\n  try: 1/0\n  except: pass", "did not finish"),
    "nested try": (
        "while True:\n  try:\n    try:\n      while True: pass\n    except: pass\n"
        "    try:\n      while True: pass\n    finally: continue\n  except: pass",
        "did not finish",
    ),
    "recursion within try": (
        "try:\n  return scaled(x, factor)\nexcept BaseException:\n  return scaled(x, factor)",
        "did not finish",
    ),
    "catches the alarm and returns": (
        "try:\n  while True: pass\nexcept BaseException:\n  return x * factor",
        "did not finish",
    ),
    "sleeps": ("time.sleep(30)", "did not finish"),
    "exits": ("sys.exit(3)", "[YOUR CODE RAISED] SystemExit on line 2"),
    "interrupts": ("raise KeyboardInterrupt", "[YOUR CODE RAISED] KeyboardInterrupt"),
    "recurses": ("return scaled(x, factor)", "RecursionError on line 2"),
    "returns nothing": ("y = x * factor", "returned None, expected a tensor of shape (3, 4)"),
    "returns text": ("return 'x'", "returned text, expected a tensor"),
    "returns dots": ("y = 1\nreturn ...", "is a ... left in the code"),
    "NaN": ("return x * float('nan')", "NaN or infinity in 12 of 12 places"),
    "infinity": ("return x / 0", "NaN or infinity in 12 of 12 places"),
    "dtype": ("return (x * factor).double()", "dtype float64, expected float32"),
    "shape": ("return (x * factor).T", "shape (4, 3), expected (3, 4)"),
    "values": ("return x * factor * 3", "case 1 (small): values differ by up to "),
    "changes its input": ("x *= factor\nreturn x", "the input x was changed"),
    "only the hidden case": (
        "return x * factor if factor > 0 else x * 9",
        "a hidden case: values differ",
    ),
    "generator": ("yield x * factor", "holds a yield"),
    "prints without end": ("while True: print('again')", "did not finish"),
    "shadows names": ("global torch\ntorch = None\nreturn x * factor", "[PASSED] 2 cases"),
    "an object that fights back": (
        "class Odd:\n  def __eq__(s, o): raise ValueError\n  def __len__(s): 1/0\nreturn Odd()",
        "returned a Odd, expected a tensor",
    ),
    "an error that cannot be shown": (
        "class Odd(Exception):\n  def __str__(s): 1/0\nraise Odd()",
        "cannot be shown",
    ),
    "requires grad": ("return x * torch.tensor(factor, requires_grad=True)", "[PASSED] 2 cases"),
    "warns": ("import warnings\nwarnings.simplefilter('always')\nreturn x * factor", "[PASSED]"),
}


@pytest.mark.parametrize(("body", "says"), ATTACKS.values(), ids=ATTACKS)
def test_an_attack_gets_its_line(body, says, capsys):
    start = time.monotonic()
    found = judge(toy(), written(body))
    assert says in found.line
    assert time.monotonic() - start < 4
    assert capsys.readouterr() == ("", "")
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_loop_that_swallows_every_alarm_ends_each_time():
    body = "while True:\n  try:\n    try: 1/0\n    except: pass\n  except: pass"
    for _ in range(10):
        assert "did not finish" in judge(toy(seconds=0.05), written(body)).line


def test_what_is_no_plain_function_is_told_apart():
    async_function = written("return x", head="async def scaled(x, factor):")
    assert "async" in judge(toy(), async_function).line
    assert judge(toy(), lambda x, factor: x * factor).status == "passed"
    assert "a class" in judge(toy(), type("scaled", (), {})).line
    assert "write a function" in judge(toy(), None).line
    assert "write a function" in judge(toy(), torch.mul).line
    other = written("return 1", head="def scaled(x):")
    assert "must take (x, factor)" in judge(toy(), other).line


def test_a_known_mistake_is_named_and_an_unknown_one_gets_the_first_hint():
    assert "Hint: you forgot the factor." in judge(toy(), written("return x + 0")).line
    assert "Hint: you added the factor." in judge(toy(), written("return factor + x")).line
    raised = judge(toy(), written("return x.T @ factor"))
    assert raised.status == "raised"
    assert "this is a matrix product." in raised.line
    assert "Hint: multiply" in judge(toy(), written("return x * 77")).line


def test_an_exercise_can_say_what_an_error_of_no_known_mistake_means():
    def rows(error, arguments):
        return f"x has {len(arguments[0])} rows." if isinstance(error, IndexError) else None

    too_far = judge(toy(raised=rows), lambda x, factor: x[9])
    assert too_far.status == "raised" and too_far.message.endswith("Hint: x has 3 rows.")
    assert "Hint" not in judge(toy(raised=rows), lambda x, factor: x.nothing).message
    assert "Hint" not in judge(toy(), lambda x, factor: x[9]).message


def test_two_mistakes_alike_in_one_case_are_told_apart_by_the_others():
    twice = Mutant("twice", lambda x, factor: x * 3.0, "always three.")
    thrice = Mutant("thrice", lambda x, factor: x * (factor + 1), "one too many.")
    one = toy(mutants=[twice, thrice])
    assert "one too many." in judge(one, written("return x * (1 + factor)")).line
    assert "always three." in judge(one, written("return 3 * x")).line


def test_a_right_answer_over_its_budget_is_not_yet():
    spent = Budget(lambda function, x, factor: x.numel(), 11, "steps")
    found = judge(toy(budget=spent), written("return x * factor"))
    assert "the values are right, but it costs 12 steps, the budget is 11" in found.line
    spent = Budget(lambda function, x, factor: x.numel(), 12, "steps")
    assert judge(toy(budget=spent), written("return x * factor")).status == "passed"


def test_globals_and_torch_settings_are_as_before():
    body = """
        global torch, made, scaled
        torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False); torch.rand(1)
        torch, made, scaled = None, 1, 5
        return x * factor
    """
    function = written(body)
    space, state = function.__globals__, torch.get_rng_state()
    judge(toy(), function)
    assert space["torch"] is torch
    assert "made" not in space
    assert space["scaled"] is function
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


def test_recursion_reaches_the_learners_own_function():
    body = """
        if x.shape[0] == 1:
            return x * factor
        return torch.cat([scaled(row, factor) for row in x.split(1)])
    """
    function = written(body)
    function.__globals__["scaled"] = None  # as in a cell, where the name is bound only afterwards
    assert judge(toy(), function).status == "passed"
    assert function.__globals__["scaled"] is None


def test_prints_are_kept_aside_and_their_first_lines_shown():
    found = judge(toy(), written("for i in range(40): print('line', i)\nreturn x * factor"))
    assert found.printed.splitlines()[:2] == ["line 0", "line 1"]
    assert found.printed.splitlines()[-1] == "... and more lines (75)"
    assert "line" not in found.message


def test_messages_hold_no_addresses_or_folders():
    found = judge(toy(), written("raise OSError(f'{object()} in /home/someone/file.py')"))
    assert found.line.endswith("<object object at 0x...> in file.py")


@pytest.fixture
def toy_declared(monkeypatch):
    monkeypatch.setattr(notebook, "find", lambda name: toy())


def test_the_decorator_gives_the_learners_function_if_right_and_the_packages_if_not(
    toy_declared, capsys
):
    right, wrong = written("return x * factor"), written("return x")
    assert exercise("toy.scaled")(right) is right
    assert exercise("toy.scaled")(wrong) is scaled
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[PASSED] 2 cases"
    assert lines[1].startswith("[NOT YET] case 1 (small): values differ")


def test_strict_mode_raises_for_anything_but_passed(toy_declared, monkeypatch):
    monkeypatch.setenv("DSV3_STRICT", "1")
    exercise("toy.scaled")(written("return x * factor"))
    with pytest.raises(notebook.NotPassed, match="NOT ATTEMPTED"):
        exercise("toy.scaled")(written("..."))


def test_a_wrong_use_of_the_decorator_gets_a_sentence(capsys):
    function = written("return x")
    assert exercise(function) is function
    assert exercise("nothing.here")(function) is function
    out = capsys.readouterr().out
    assert '@exercise("name")' in out
    assert "There is no exercise 'nothing.here'" in out


def test_a_message_of_several_lines_keeps_them_in_the_box(monkeypatch):
    shown = []
    monkeypatch.setattr(show, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    show.show_verdict(verdict.Verdict("toy.scaled", "not_yet", "two:\n- a < b\n- c"))
    assert shown[0]["text/plain"] == "[NOT YET] two:\n- a < b\n- c"
    assert "</b> two:<br>- a &lt; b<br>- c</div>" in shown[0]["text/html"]


def test_every_status_has_a_label():
    statuses = {verdict.PASSED, verdict.NOT_YET, verdict.RAISED, verdict.NOT_ATTEMPTED}
    assert set(verdict.LABELS) == statuses
