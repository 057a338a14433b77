"""The prober finds what an engine hides, and what it cannot find no sum can."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_tutorial.fp8 import probe
from dsv3_tutorial.fp8.accumulate import HOPPER, HOPPER_PROMOTED, TensorCore, matmul_emulated
from dsv3_tutorial.fp8.probe import CHOICES, Chip, Engine, ProbeError, identify, plainest

ANY_CORE = st.builds(TensorCore, **{name: st.sampled_from(it) for name, it in CHOICES.items()})


def chip(core):
    return Chip(lambda a, b: matmul_emulated(a, b, core))


def test_99_of_100_engines_are_identified_within_20_probes():
    found = 0
    for seed in range(500):
        engine = Engine(seed)
        same = plainest(identify(engine)) == plainest(probe.hidden_core(seed))
        found += same and engine.used <= probe.PROBES
    assert found >= 0.99 * 500


def test_five_probes_read_every_width_rounding_group_alignment_and_interval():
    few = CHOICES | {"bits": (8, 20), "group": (4, 128), "promote": (None, 128, 4096)}
    for values in itertools.product(*few.values()):
        core = TensorCore(*values)
        asked = chip(core)
        assert plainest(identify(asked)) == plainest(core)
        assert asked.used == 5


@pytest.mark.parametrize("core", [HOPPER, HOPPER_PROMOTED, TensorCore(bits=22, group=16)])
def test_hopper_is_read_as_it_is_stated(core):
    assert identify(chip(core)) == core


def test_a_float32_sum_is_read_as_23_bits_rounded_to_nearest():
    def matmul(a, b):  # one product after the other, each sum rounded to float32
        total = torch.zeros(len(a), len(b))
        for left, right in zip(a.T, b.T, strict=True):
            total = total + left[:, None] * right
        return total

    found = identify(Chip(matmul))
    assert (found.bits, found.rounding, found.promote) == (23, "nearest", None)


def test_the_classes_of_twins_are_the_two_that_are_explained():
    classes = probe.twins()
    assert len(classes) == 338
    for first, *others in classes:
        for other in others:
            late = {first.promote, other.promote} == {None, 8192}
            always = first.promote == other.promote == first.group == other.group
            assert late != (always and first.joint != other.joint)
            assert replace(first, promote=other.promote, joint=other.joint) == other
    cores = probe.every_core()
    assert len(cores) == len(set(cores)) == 2496
    assert len({plainest(core) for core in cores}) == 2496 - sum(len(c) - 1 for c in classes)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(probe.twins()), st.integers(0, 2**31), st.sampled_from([300, 2048, 8192]))
def test_twins_give_the_same_sum_of_anything(twins, seed, k):
    draw = torch.Generator().manual_seed(seed)
    spread = torch.randint(-6, 9, (2, k), generator=draw).float().exp2()  # E4M3's whole range
    sign = torch.randint(0, 3, (2, k), generator=draw) - 1
    a, b = (spread * sign)[:, None]
    results = [matmul_emulated(a, b, core) for core in twins]
    assert all(torch.equal(results[0], other) for other in results[1:])


@settings(max_examples=150, deadline=None)
@given(ANY_CORE, st.sampled_from(list(CHOICES)), st.data())
def test_accumulators_with_one_difference_are_told_apart_unless_they_are_twins(core, name, data):
    other = replace(core, **{name: data.draw(st.sampled_from(CHOICES[name]))})
    products = probe.tell_apart(core, other)
    assert (products is None) == (plainest(core) == plainest(other))
    if products:
        assert probe.answer(core, products) != probe.answer(other, products)
        assert products == eval(probe.written(products))


def test_any_two_accumulators_are_told_apart_unless_they_are_twins():
    draw, cores = random.Random(0), probe.every_core()
    for one, other in [draw.sample(cores, 2) for _ in range(100)]:
        assert (probe.tell_apart(one, other) is None) == (plainest(one) == plainest(other))


@pytest.mark.parametrize(
    "strange",
    [
        TensorCore(bits=None),
        TensorCore(bits=3),
        TensorCore(group=10**12),
        TensorCore(group=7),
        TensorCore(group=33),
        TensorCore(group=1, promote=131),
        TensorCore(promote=192),
    ],
    ids=str,
)
def test_answers_that_no_engine_can_be_are_told_from_hopper_too(strange):
    products = probe.tell_apart(strange, HOPPER)
    assert products and len(products) <= probe.LONGEST
    assert probe.answer(strange, products) != probe.answer(HOPPER, products)


def test_an_engine_counts_each_dot_product_and_stops_at_its_limit():
    engine = Engine(3)
    ones = torch.ones(3, 4)
    engine.matmul(ones, torch.ones(6, 4))
    assert engine.used == 18 and repr(engine) == "Engine(3), 18 probes used"
    engine.dot([1.0])
    engine.dot([2.0, -1.0])
    with pytest.raises(ProbeError, match="20 probes are used up"):
        engine.dot([1.0])


def test_an_engine_is_the_same_for_the_same_seed_and_hides_its_accumulator():
    one, other = Engine(5), Engine(5)
    one.dot([1.0])
    assert one == other and hash(one) == hash(other) and one != Engine(6)
    assert identify(one) == identify(other)
    assert not any(isinstance(value, TensorCore) for value in vars(one).values())
    drawn = [probe.hidden_core(seed) for seed in range(300)]
    assert all({getattr(c, name) for c in drawn} == set(it) for name, it in CHOICES.items())


def test_products_are_split_into_two_e4m3_values():
    wanted = [0.0, 2.0**16, -(2.0**-12), 0.75, -5.0, 448.0 * 448.0, 2.0**-18]
    a, b = probe.operands(wanted)
    assert (a * b)[0].tolist() == wanted and a.shape == b.shape == (1, 7)
    for x in (a, b):
        assert torch.equal(x.to(torch.float8_e4m3fn).float(), x)
    normal = (a.abs() >= 2**-6) & (b.abs() >= 2**-6)
    assert normal[0].tolist() == [False, True, True, True, True, True, False]


def test_a_product_that_two_e4m3_values_cannot_make_is_refused():
    with pytest.raises(ProbeError, match=r"^0\.3 is not a product of two E4M3 values"):
        Engine(0).dot([1.0, 0.3])


def test_a_sum_of_more_than_8192_products_is_refused_however_it_is_asked():
    with pytest.raises(ProbeError, match="at most 8192 products, got 8193"):
        Engine(0).dot([1.0] * 8193)
    with pytest.raises(ProbeError, match="got 9000"):
        Engine(0).matmul(torch.ones(1, 9000), torch.ones(1, 9000))


@pytest.mark.parametrize(
    ("products", "text"),
    [
        ([1.0, 0.0, 0.0, 2.0, 3.0], "[1.0] + [0.0] * 2 + [2.0, 3.0]"),
        ([0.0] * 4, "[0.0] * 4"),
        ([65536.0, 8.0, -65536.0], "[65536.0, 8.0, -65536.0]"),
        ([1.0, 1.0, 2.0, 2.0], "[1.0] * 2 + [2.0] * 2"),
    ],
)
def test_a_sum_is_written_in_few_characters(products, text):
    assert probe.written(products) == text
