"""Exercise 5.11 on the way: whatever is mended first, the verdict counts what is left."""

import textwrap

import pytest
import torch

from dsv3_tutorial.learn import registry
from dsv3_tutorial.learn.exercises.inference import bug_trace, toy
from dsv3_tutorial.learn.exercises.inference.bug import FIND_THE_BUG
from dsv3_tutorial.learn.verdict import NOT_YET, PASSED, judge

LOOP = """
    hidden, p = model.read(prompt)
    tokens = [*prompt, draw(p[-1])]
    while len(tokens) < length:
        q = mtp({state}, {token})
        draft = draw(q)
        hidden, p = model.read([tokens[-1], draft])
        if {keep}:
            {kept}
        else:
            {trim}
            {cut}
            tokens.append(draw({rest}))
    return {result}"""
ASIDE = {
    "state": "hidden[-1]",
    "keep": "uniform() * q[draft] < p[0, draft]",
    "kept": "tokens += [draft, draw(p[1])]",
    "cut": "hidden = hidden[:1]",
    "result": "tokens[:length]",
}
CLAMPED = "(p[0] - q).clamp(min=0)"
RIGHT_REST = f"{CLAMPED} / {CLAMPED}.sum()"
TOKENS = {
    "tokens[-2]": bug_trace.BUGS["token"],
    "int(hidden[-1, 1])": bug_trace.BUGS["token"],
    "tokens[0]": bug_trace.OTHER_TOKEN,
    "tokens[-1]": None,
}
TRIMS = {
    "model.trim(len(tokens) + 1)": bug_trace.BUGS["trim"],
    "pass": bug_trace.BUGS["trim"],
    "model.trim(len(tokens) - 1)": bug_trace.TOO_SHORT,
    "model.trim(len(tokens))": None,
}
RESTS = {
    "p[0]": bug_trace.BUGS["rest"],
    CLAMPED: bug_trace.RESTS["not divided"],
    "(p[0] - q).abs() / (p[0] - q).abs().sum()": bug_trace.RESTS["absolute"],
    "(p[0] - q).softmax(0)": bug_trace.RESTS["other"],
    RIGHT_REST: None,
}
STATES = [(a, b, c) for a in TOKENS for b in TRIMS for c in RESTS]


def verdict(**parts):
    space = {"torch": torch}
    right = {"token": "tokens[-1]", "trim": "model.trim(len(tokens))", "rest": RIGHT_REST}
    body = textwrap.dedent(LOOP).format(**{**ASIDE, **right, **parts})
    exec(f"def answer(prompt, length, model, mtp, draw, uniform):{textwrap.indent(body, '    ')}",
         space)  # fmt: skip
    return judge(registry.find("inference.find_the_bug"), space["answer"])


@pytest.mark.parametrize(("token", "trim", "rest"), STATES, ids=range(len(STATES)))
def test_every_state_on_the_way_has_its_bugs_counted(token, trim, rest):
    parts = [TOKENS[token], TRIMS[trim], RESTS[rest]]
    left = [said for said in parts if said]
    found = verdict(token=token, trim=trim, rest=rest)
    if not left:
        assert found.status == PASSED, found.line
        return
    said = {1: "One bug is left: ", 2: "Two bugs are left", 3: "hree bugs are left"}[len(left)]
    assert found.status == NOT_YET and said in found.message, found.line
    if len(left) == 1:
        assert left[0] in found.message


BESIDE = [
    ({"cut": "pass"}, bug_trace.HIDDEN),
    ({"cut": "hidden = hidden[1:]"}, bug_trace.HIDDEN),
    ({"state": "hidden[0]"}, bug_trace.HIDDEN),
    ({"kept": "tokens += [draft]"}, bug_trace.TEXT),
    ({"kept": "tokens += [draw(p[1])]"}, bug_trace.TEXT),
    ({"kept": "tokens += [draft, draw(p[0])]"}, bug_trace.BONUS),
    ({"keep": "uniform() * p[0, draft] < q[draft]"}, bug_trace.TEXT),
    ({"keep": "uniform() < 2"}, bug_trace.TEXT),
    ({"keep": "uniform() < 0"}, bug_trace.TEXT),
    ({"keep": "draft == int(p[0].argmax())"}, bug_trace.TURN),
    ({"result": "tokens"}, bug_trace.LENGTH),
    ({"result": "tokens[len(prompt):length]"}, bug_trace.TEXT),
    ({"result": "torch.tensor(tokens[:length])"}, "expected a list of tokens"),
]


@pytest.mark.parametrize(("parts", "said"), BESIDE, ids=range(len(BESIDE)))
def test_what_was_right_and_is_now_broken_is_said_as_well(parts, said):
    found = verdict(**parts)
    assert found.status == NOT_YET and said in found.message, found.line


def test_a_loop_that_adds_nothing_ends_in_a_sentence_and_not_in_a_wait():
    found = verdict(kept="draw(p[1])", trim="model.trim(1)", cut="hidden = hidden[:1]")
    assert found.status != PASSED
    assert "200 times" in verdict(kept="draw(p[1])", keep="uniform() < 2").message


@pytest.mark.parametrize("case", FIND_THE_BUG.cases[:2], ids=lambda case: case.name)
def test_the_first_cases_hold_kept_and_refused_drafts(case):
    ran = toy.decode(FIND_THE_BUG.function, *case.make())
    kept = sum(turn.accepted for turn in ran.turns)
    assert kept >= 5 and len(ran.turns) - kept >= 5
