"""Every exercise of the course, whoever adds it: solvable, hard to fool, and self-contained."""

import __future__

import ast
import functools
import inspect
import math
import re

import pytest
import torch
import torch.nn.functional as F

from dsv3_tutorial.learn import registry
from dsv3_tutorial.learn.compare import difference
from dsv3_tutorial.learn.verdict import NOT_ATTEMPTED, PASSED, judge

EXERCISES = registry.every_exercise()
NAMED = {one.name: one for one in EXERCISES}
MUTANTS = [(one, mutant) for one in EXERCISES for mutant in one.mutants]
each = pytest.mark.parametrize("one", EXERCISES, ids=lambda one: one.name)


def from_source(source, needs=None):
    """The function that a solution's source defines with only torch, math and F at hand."""
    names = {"torch": torch, "math": math, "F": F, **(needs or {})}
    flags = __future__.annotations.compiler_flag  # a stub in a notebook carries no annotations
    exec(compile(source, "<solution>", "exec", flags=flags, dont_inherit=True), names)
    return names[ast.parse(source).body[0].name]


def needed(one):
    return {name: one.function.__globals__[name] for name in one.needs}


@functools.cache
def judged(name, function):
    """The first verdict on a mutant: two tests read it, and judging is what they take long for."""
    return judge(NAMED[name], function)


@each
def test_the_reference_passes(one):
    verdict = judge(one, one.function)
    assert verdict.status == PASSED, verdict.line


@each
def test_the_reference_pasted_as_source_passes_with_only_torch_and_math(one):
    verdict = judge(one, from_source(one.source, needed(one)))
    assert verdict.status == PASSED, verdict.line


@each
def test_the_solution_is_at_most_fifteen_lines_beside_its_docstring(one):
    body = ast.parse(one.source).body[0].body
    has_docstring = ast.get_docstring(ast.parse(one.source).body[0]) is not None
    first = body[1 if has_docstring else 0]
    assert body[-1].end_lineno - first.lineno + 1 <= 15


@each
def test_an_exercise_has_three_mutants_hints_and_a_hidden_case(one):
    assert len(one.mutants) >= 3
    assert len(one.hints) >= 2
    assert any(case.hidden for case in one.cases)
    assert any(not case.hidden for case in one.cases)
    assert len({case.name for case in one.cases}) == len(one.cases)
    assert 1 <= one.difficulty <= 5
    assert 1 <= one.importance <= 5
    assert one.minutes > 0
    assert one.lines > 0


@each
def test_a_case_gives_the_same_arguments_each_time_and_shares_none(one):
    for case in one.cases:
        first, second = case.make(), case.make()
        assert difference(first, second, 0.0) is None
        for a, b in zip(first, second, strict=True):
            assert not isinstance(a, torch.Tensor | list | dict) or a is not b


@pytest.mark.parametrize(("one", "mutant"), MUTANTS, ids=lambda x: x.name)
def test_every_mutant_fails_with_the_message_that_names_its_mistake(one, mutant):
    verdict = judged(one.name, mutant.function)
    assert verdict.status not in (PASSED, NOT_ATTEMPTED)
    assert mutant.message in verdict.message
    others = [m.message for m in one.mutants if m.message != mutant.message]
    assert not [text for text in others if text in verdict.message]


@pytest.mark.parametrize(("one", "mutant"), MUTANTS, ids=lambda x: x.name)
def test_a_verdict_reads_the_same_twice_and_holds_no_address_or_path(one, mutant):
    first = judged(one.name, mutant.function)
    torch.manual_seed(1)  # another state of the random numbers than the first verdict began with
    assert judge(one, mutant.function) == first
    assert not re.search(r"0x[0-9a-f]{4}|(/\w+){2}", first.line)


@each
def test_a_stub_with_the_reference_signature_is_not_attempted(one):
    parameters = inspect.signature(one.function)
    bare = parameters.replace(
        parameters=[p.replace(annotation=p.empty) for p in parameters.parameters.values()],
        return_annotation=inspect.Signature.empty,
    )
    stub = from_source(f"def {one.function.__name__}{bare}:\n    ...", needed(one))
    assert registry.same_signature(stub, one)
    assert judge(one, stub).status == NOT_ATTEMPTED


def test_another_parameter_name_is_another_signature():
    one = registry.find("start.time_s")
    assert not registry.same_signature(lambda flops, bytes, chip, format="bf16": 0, one)


def test_an_unknown_name_is_refused_with_the_closest_ones():
    with pytest.raises(registry.UnknownExercise, match=r"start\.time_s"):
        registry.find("start.times")


def test_names_are_unique_and_begin_with_their_concept():
    names = [one.name for one in EXERCISES]
    assert len(set(names)) == len(names)
    assert all(one.name in registry.load(one.concept) for one in EXERCISES)
