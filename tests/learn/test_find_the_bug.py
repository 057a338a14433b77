"""Exercise 3.11 on the way: whatever is mended first, the verdict counts what is left."""

import textwrap

import pytest
import torch

from dsv3_tutorial.learn import registry
from dsv3_tutorial.learn.exercises.parallel import gradient_bugs
from dsv3_tutorial.learn.verdict import NOT_YET, PASSED, judge

STEP = """
    replicated, expert = all_reduce(replicated) / world, {expert}
    norm = ({norm}).sqrt()
    shrink = (max_norm / norm).clamp(max=1.0)
    counts = {counts}.to(bias.dtype)
    bias = bias + gamma * torch.sign(counts.mean() - counts)
    return replicated * shrink, expert * shrink, bias"""
EXPERTS = {
    "all_reduce(expert) / world": (1, "other experts"),
    "all_reduce(expert)": (1, "other experts"),
    "expert": (1, gradient_bugs.HALF),
    "expert / world ** 2": (1, gradient_bugs.OTHER_EXPERT),
    "expert / world": (0, None),
}
SQUARES = "replicated.square().sum()", "expert.square().sum()"
NORMS = {
    "{} + {}".format(*SQUARES): (1, "each rank clips by a norm of its own"),
    "all_reduce({} + {})".format(*SQUARES): (1, gradient_bugs.NORMS["replicated by each"]),
    "all_reduce({}) + {}".format(*SQUARES): (1, gradient_bugs.NORMS["the other way round"]),
    "all_reduce({1})".format(*SQUARES): (1, gradient_bugs.NORMS["replicated forgotten"]),
    "({} + {}) * 2".format(*SQUARES): (1, gradient_bugs.OTHER_NORM),
    "{} + all_reduce({})".format(*SQUARES): (0, None),
}
COUNTS = {"counts": (1, "each rank moves the bias"), "all_reduce(counts)": (0, None)}
STATES = [(e, n, c) for e in EXPERTS for n in NORMS for c in COUNTS]


def verdict(body):
    head = "replicated, expert, counts, bias, gamma, max_norm, world, all_reduce"
    space = {"torch": torch}
    exec(f"def answer({head}):\n" + textwrap.indent(textwrap.dedent(body), "    "), space)
    return judge(registry.find("parallel.find_the_bug"), space["answer"])


@pytest.mark.parametrize(("expert", "norm", "counts"), STATES, ids=range(len(STATES)))
def test_every_state_on_the_way_has_its_bugs_counted(expert, norm, counts):
    parts = [EXPERTS[expert], NORMS[norm], COUNTS[counts]]
    left = sum(wrong for wrong, _ in parts)
    found = verdict(STEP.format(expert=expert, norm=norm, counts=counts))
    if not left:
        assert found.status == PASSED
        return
    said = {1: "One bug is left: ", 2: "Two bugs are left", 3: "hree bugs are left"}[left]
    assert found.status == NOT_YET and said in found.message, found.line
    if left == 1:
        assert next(text for wrong, text in parts if wrong) in found.message
    if EXPERTS[expert][0]:
        assert "max_norm that nothing reaches" in found.message and "expert: " in found.message
