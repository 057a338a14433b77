"""The silicon detective: a miss is answered with a sum, and each hint works as it is written."""

from dataclasses import replace

import pytest

from dsv3_tutorial.fp8 import probe
from dsv3_tutorial.fp8.accumulate import HOPPER, TensorCore
from dsv3_tutorial.fp8.probe import plainest
from dsv3_tutorial.learn.exercises.fp8.detective import DETECTIVE, HINTS, told_apart
from dsv3_tutorial.learn.verdict import NOT_YET, PASSED, RAISED, judge


def by_the_hints(engine):
    low, high = 8, 21
    while high - low > 1:
        j = (low + high) // 2
        if engine.dot([2.0**16, 2.0 ** (16 - j), -(2.0**16)]) != 0:
            low = j
        else:
            high = j
    bits = low
    nearest = engine.dot([2.0**16, 0.75 * 2.0 ** (16 - bits), -(2.0**16)]) != 0
    others = engine.dot([2.0**16, -(2.0**16)] + [2.0**-12] * 254) / 2.0**-12
    group = 256 - int(others)
    last = 2.0 ** (16 - bits)
    stays = engine.dot([2.0**16] + [0.0] * (group - 1) + [last / 4] * group)
    sparse = engine.dot([2.0**16] + [0.0] * 127 + ([last / 4] + [0.0] * 127) * 63)
    gained = int((sparse - 2.0**16) / (last / 4))
    promote = 8192 - 128 * gained if gained else None
    rounding = "nearest" if nearest else "truncate"
    return TensorCore(bits, group, promote, rounding, stays == 2.0**16)


def test_an_answer_made_of_the_hints_own_words_passes():
    verdict = judge(DETECTIVE, by_the_hints)
    assert verdict.status == PASSED, verdict.line


def test_an_answer_that_no_probe_can_tell_from_the_engine_counts_as_right():
    def twin(engine):
        found = probe.identify(engine)
        joint = (not found.joint) if found.promote == found.group else found.joint
        promote = 8192 if found.promote is None else found.promote
        return TensorCore(found.bits, found.group, promote, found.rounding, joint)

    verdict = judge(DETECTIVE, twin)
    assert verdict.status == PASSED, verdict.line


def test_a_miss_is_answered_with_a_sum_and_both_its_values():
    def one_bit_more(engine):
        found = probe.identify(engine)
        return TensorCore(found.bits + 1, *list(vars(found).values())[1:])

    verdict = judge(DETECTIVE, one_bit_more)
    assert verdict.status == NOT_YET
    assert (
        "[65536.0, 64.0, -65536.0] is 64 by your answer, and the engine says 0" in verdict.message
    )


OTHER = {  # a value that the property does not have, and the start of what a miss says of it
    "bits": (lambda core: core.bits - 1 if core.bits > 8 else 20, "Width:"),
    "rounding": (lambda c: "nearest" if c.rounding == "truncate" else "truncate", "Rounding:"),
    "group": (lambda core: core.group * 2 if core.group < 64 else 4, "Group:"),
    "joint": (lambda core: not core.joint, "joint:"),
    "promote": (lambda core: 512 if core.promote == 1024 else 1024, "Promotion:"),
}


@pytest.mark.parametrize("name", OTHER)
def test_one_wrong_property_is_answered_with_a_sum_and_the_hint_about_it(name):
    other, begins = OTHER[name]

    def one_off(engine):
        core = probe.identify(engine)
        return replace(core, **{name: other(core)})

    verdict = judge(DETECTIVE, one_off)
    assert verdict.status == NOT_YET
    assert f"Hint: {begins}" in verdict.message
    assert verdict.message.count("Hint:") == 1 and "by your answer" in verdict.message


@pytest.mark.parametrize("first", HINTS)
def test_of_several_wrong_properties_the_first_has_the_sum_and_the_hint(first):
    core = TensorCore(13, 32, 512, "nearest", False)
    later = list(HINTS)[list(HINTS).index(first) :]
    text = told_apart(replace(core, **{name: OTHER[name][0](core) for name in later}), core)
    alone = told_apart(replace(core, **{first: OTHER[first][0](core)}), core)
    assert OTHER[first][1] in text and text.partition(" is ")[0] == alone.partition(" is ")[0]


@pytest.mark.parametrize("wrong", [None, 13, (13, 32, None, "truncate", True)], ids=str)
def test_an_answer_of_another_type_is_called_that(wrong):
    verdict = judge(DETECTIVE, lambda engine: wrong)
    assert verdict.status == NOT_YET and "expected a TensorCore" in verdict.message


def test_an_accumulator_that_cannot_be_and_a_probe_too_many_are_the_learners_errors():
    verdict = judge(DETECTIVE, lambda engine: TensorCore(bits=0))
    assert verdict.status == RAISED and "bits is 1 to 23" in verdict.message

    def greedy(engine):
        return [engine.dot([1.0]) for _ in range(21)] and HOPPER

    assert "20 probes are used up" in judge(DETECTIVE, greedy).message


def test_no_answer_is_told_from_itself_and_hopper_is_from_all_case_engines():
    for case in DETECTIVE.cases:
        (engine,) = case.make()
        core = probe.hidden_core(engine.seed)
        assert told_apart(core, core) is None
        assert told_apart(HOPPER, core) and plainest(core) != HOPPER
