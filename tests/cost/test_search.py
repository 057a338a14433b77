"""A search is exhaustive: nothing that it may try is faster, and it says why the winner won."""

import re
from dataclasses import fields, replace
from itertools import product

import pytest

from dsv3_tutorial import hardware
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import cluster_file
from dsv3_tutorial.cost.assumptions import Assumptions
from dsv3_tutorial.cost.choices import Choices, divisors
from dsv3_tutorial.cost.layout import Job, Layout, PlanError
from dsv3_tutorial.cost.plan import plan
from dsv3_tutorial.cost.search import FIELDS, best
from dsv3_tutorial.cost.search_space import NO_ROOM, SLOWER, Space, above_mean, order
from dsv3_tutorial.hardware import Cluster

V3, LITE = ModelConfig.named("deepseek-v3"), ModelConfig.named("deepseek-v2-lite")
SMALL = ModelConfig.named("small")
H800 = hardware.cluster("h800:2048")
JOB = Job(tokens=1e12, seq_len=4096, sequences=48)
FEW = Choices(
    schedules=("zb1p", "dualpipe"), tps=(1, 2), micro_batches=(1, 2), zeros=(1, 2), eps=(1, 4, 16)
)


def every_layout(gpus, choices):
    """All of a space, by counting and not by the search's own loops."""
    sizes = [(pp, dp, tp) for pp, dp, tp in product(*[range(1, gpus + 1)] * 3)]
    rest = (choices.micro_batches, choices.schedules, choices.zeros, choices.precisions)
    for (pp, dp, tp), ep in product(sizes, choices.eps):
        if pp * dp * tp == gpus and tp in choices.tps:
            for values in product(*rest, choices.recomputes, choices.dispatches):
                yield Layout(pp, dp, ep, tp, *values)


@pytest.mark.parametrize(("chip", "gpus", "memory"), [("h800", 16, 1.0), ("a100", 12, 0.5)])
def test_nothing_that_divides_and_fits_is_faster(chip, gpus, memory):
    """Priced one by one, with memory scarce or not, and on a chip without FP8."""
    cluster = Cluster(hardware.chip(chip), gpus)
    assume = Assumptions(usable_memory=0.9 * memory)
    found = best(LITE, cluster, JOB, assume, FEW, explain=False)
    tried = []
    for layout in every_layout(gpus, FEW):
        if not layout.problems(LITE, cluster, JOB):
            tried.append(plan(LITE, cluster, JOB, layout, assume))
    fitting = [one for one in tried if one.fits]
    assert 0 < len(fitting) < len(tried)
    assert found.plan.step_time_s == min(one.step_time_s for one in fitting)
    assert found.plan in fitting
    assert found.examined < len(tried)


def test_v3_is_never_slower_than_in_the_reports_layout_and_memory_is_what_rules_others_out():
    found = best(V3, H800, Job(), explain=False)
    theirs = plan(V3, H800, Job(), Layout.read("deepseek-v3"))
    assert found.plan.fits
    assert found.plan.step_time_s <= theirs.step_time_s
    assert found.examined < 10_000
    assert found.refused[NO_ROOM] > 0 and found.refused[SLOWER] > 0
    assert found.plan == plan(V3, H800, Job(), found.plan.layout)


def test_the_links_of_the_winner_have_time_for_all_that_it_hides():
    """A card sends one byte at a time: what is hidden is no more than the step has seconds."""
    for zeros in ((1,), (2,), (3,)):
        allowed = Choices(zeros=zeros, tps=(1,), micro_batches=(1,), pps=(2, 4), eps=(64, 128))
        won = best(V3, H800, Job(), choices=allowed, explain=False).plan
        assert sum(won.hidden.values()) <= won.step_time_s


def test_two_searches_find_the_same():
    one, two = (best(SMALL, Cluster(H800.chip, 16), JOB) for _ in range(2))
    assert one == two


def test_a_runner_up_of_each_kind_and_a_sentence_with_its_seconds():
    found = best(LITE, Cluster(H800.chip, 16), JOB, choices=FEW)
    won = found.plan
    assert list(found.runners_up) == sorted(found.runners_up, key=order)
    assert all(other.fits and other.step_time_s >= won.step_time_s for other in found.runners_up)
    assert [line.split()[0] for line in found.why] == list(FIELDS)
    for name, line in zip(FIELDS, found.why):
        assert line.startswith(f"{name} {getattr(won.layout, name)}: ")
        allowed = {getattr(o.layout, name): o.step_time_s for o in reversed(found.runners_up)}
        allowed.pop(getattr(won.layout, name), None)
        lost = re.search(r"takes (\d+\.\d+) s more", line)
        assert lost is None or float(lost[1]) == pytest.approx(
            min(allowed.values()) - won.step_time_s, abs=0.006
        )


def test_a_runner_up_is_what_a_search_without_the_winners_value_finds():
    cluster = Cluster(H800.chip, 16)
    found = best(LITE, cluster, JOB, choices=FEW)
    other = {"zb1p": "dualpipe", "dualpipe": "zb1p"}[found.plan.layout.schedule]
    alone = best(LITE, cluster, JOB, choices=FEW.only(schedules=(other,)), explain=False).plan
    # without a pipeline a schedule is a name only
    assert alone.layout.pp == 1 or alone in found.runners_up or alone == found.plan


@pytest.mark.parametrize(
    ("model", "gpus", "assume", "said"),
    [
        (V3, 64, Assumptions(), r"dealt out evenly, are \d+\.\d GB on each"),
        (LITE, 16, Assumptions(usable_memory=0.2), r"smallest of \d+ holds \d+\.\d GB on a GPU"),
    ],
)
def test_what_does_not_fit_names_the_gpus_and_the_memory_that_would_do(model, gpus, assume, said):
    allowed = Choices(tps=(1,), micro_batches=(1,), schedules=("1f1b",), zeros=(1,))
    job = Job(sequences=15360)
    with pytest.raises(PlanError, match=said) as told:
        best(model, Cluster(H800.chip, gpus), job, assume, allowed)
    enough = int(re.search(r"(\d+) GPUs would do", str(told.value))[1])
    assert best(model, Cluster(H800.chip, enough), job, assume, allowed).plan.fits
    with pytest.raises(PlanError):
        best(model, Cluster(H800.chip, enough // 2), job, assume, allowed)
    if "smallest" in said:  # the other is a bound, and activations come on top
        need = int(re.search(r"chips of (\d+) GB", str(told.value))[1])
        roomy = replace(H800.chip, memory_bytes=need * 10**9)
        assert best(model, Cluster(roomy, gpus), job, assume, allowed).plan.fits


def test_without_known_links_no_larger_cluster_is_promised():
    with pytest.raises(PlanError, match="joined by a link of unknown rate"):
        best(LITE, Cluster(hardware.chip("rtx-4090"), 1), JOB)


def test_what_does_not_divide_names_numbers_of_gpus_that_do():
    allowed = Choices(tps=(1,), pps=(1,), micro_batches=(1,))
    job = Job(sequences=6)
    with pytest.raises(PlanError, match=r"divides on 5 .*Take (\d+) or (\d+) GPUs") as told:
        best(SMALL, Cluster(H800.chip, 5), job, choices=allowed)
    for gpus in map(int, re.findall(r"\d+", re.search(r"Take (.*) GPUs", str(told.value))[1])):
        assert best(SMALL, Cluster(H800.chip, gpus), job, choices=allowed).plan.fits


def test_uneven_experts_weigh_more_the_fewer_of_them_a_gpu_holds():
    assert above_mean(V3, 64, 0.68) == pytest.approx(0.34)
    assert above_mean(V3, 256, 0.68) == pytest.approx(0.68)
    space = Space(V3, H800, Job(), Assumptions(), Choices(), violation=0.68)
    layout = Layout.read("deepseek-v3")
    load = Assumptions().expert_load + 0.34
    assert space.price(layout) == plan(V3, H800, Job(), layout, Assumptions(expert_load=load))


def test_a_dense_model_is_searched_too():
    dense = ModelConfig.named("qwen2.5-72b")
    found = best(dense, hardware.cluster("h100-sxm:128"), Job(tokens=1e12, sequences=512))
    assert found.plan.layout.ep == 1 and found.plan.fits
    assert "ep 1: no layout with another ep" in found.why[1]


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("schedules", (), "schedules is empty"),
        ("schedules", ("fastest",), "schedules has 'fastest'"),
        ("tps", (0,), "tps has 0"),
        ("pps", (1.5,), "pps has 1.5"),
        ("zeros", (4,), "zeros has 4"),
    ],
)
def test_choices_that_leave_nothing_are_refused_by_name(field, value, named):
    with pytest.raises(PlanError, match=named):
        Choices(**{field: value})


def test_divisors_and_the_fields_that_are_searched():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert {f.name for f in fields(Layout)} == {*FIELDS, "dp"}


def test_a_number_that_a_chip_lacks_is_asked_for_and_a_huge_cluster_answered():
    mine = {"title": "mine", "rates": {"bf16": 1e15}, "memory_bytes": 80e9}
    with pytest.raises(PlanError, match=r"mine has no memory_bandwidth: .* cluster file"):
        best(SMALL, cluster_file.from_dict({"chip": mine, "gpus": 8}), JOB)
    with pytest.raises(PlanError, match="No layout of this model divides on 1000000000000000000 "):
        best(SMALL, Cluster(H800.chip, 10**18), JOB)
