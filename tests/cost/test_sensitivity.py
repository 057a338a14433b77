"""More of a resource: each gain is two plans, none is larger than what was added."""

import pytest

from dsv3_tutorial import hardware
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost.assumptions import Assumptions
from dsv3_tutorial.cost.choices import Choices
from dsv3_tutorial.cost.layout import Job, Layout, PlanError
from dsv3_tutorial.cost.plan import plan
from dsv3_tutorial.cost.scaled import RESOURCES, scaled
from dsv3_tutorial.cost.search import best
from dsv3_tutorial.cost.sensitivity import bottleneck, gains
from dsv3_tutorial.hardware import Cluster

V3, H800 = ModelConfig.named("deepseek-v3"), hardware.cluster("h800:2048")
THEIRS = plan(V3, H800, Job(), Layout.read("deepseek-v3"))
SHOWN = ["arithmetic", "memory bandwidth", "memory", "scale up", "scale out"]


def on(**factors):
    """V3 in the report's layout on a chip with some numbers multiplied."""
    return plan(V3, Cluster(scaled(H800.chip, **factors), 2048), Job(), THEIRS.layout)


@pytest.mark.parametrize("by", [1.1, 2.0])
def test_each_gain_is_one_less_the_ratio_of_two_plans(by):
    found = gains(THEIRS, by)
    assert list(found) == [*SHOWN, "GPUs"]
    for name, shown in zip(RESOURCES, SHOWN):
        assert found[shown] == 1 - on(**{name: by}).step_time_s / THEIRS.step_time_s


def test_no_resource_saves_more_than_its_share_and_all_together_save_all():
    found = gains(THEIRS, 1.1)
    assert all(-1e-3 < share <= 1 - 1 / 1.1 + 1e-9 for share in found.values())
    assert found["memory"] == 0  # in a given layout memory fits, or does not
    together = on(**dict.fromkeys(RESOURCES, 1.1))
    # all but the links' latencies, which no bandwidth shortens
    assert 1 - together.step_time_s / THEIRS.step_time_s == pytest.approx(1 - 1 / 1.1, rel=1e-3)


def test_more_gpus_as_the_next_number_that_divides_gives_them():
    """dp = 192 of 15,360 sequences is the next after 128; DualPipe wants an even number each."""
    larger = plan(
        V3, Cluster(H800.chip, 3072), Job(), Layout.read({**vars(THEIRS.layout), "dp": 192})
    )
    expected = 1 - larger.step_time_s / THEIRS.step_time_s
    assert gains(THEIRS, 1.5)["GPUs"] == pytest.approx(expected)
    assert gains(THEIRS, 1.1)["GPUs"] < 1 - 1 / 1.1


def test_a_cluster_that_cannot_grow_has_no_such_gain():
    tiny = plan(ModelConfig.named("tiny"), Cluster(H800.chip, 1), Job(sequences=1), Layout())
    assert "GPUs" not in gains(tiny)


def test_the_bottleneck_is_what_is_scarce():
    assert bottleneck(THEIRS) == max(SHOWN, key=gains(THEIRS).get)
    assert bottleneck(on(scale_out=0.02)) == "scale out"
    assert bottleneck(on(memory_bandwidth=0.05)) == "memory bandwidth"
    assert bottleneck(on(arithmetic=0.05)) == "arithmetic"
    assert bottleneck(on(memory=0.5)) == "memory"


def test_with_a_search_the_layout_may_change_and_memory_is_worth_something():
    lite, cluster = ModelConfig.named("deepseek-v2-lite"), Cluster(H800.chip, 16)
    job, allowed = (
        Job(tokens=1e12, sequences=64),
        Choices(tps=(1,), zeros=(1,), precisions=("fp8",)),
    )
    tight = Assumptions(usable_memory=0.25)
    won = best(lite, cluster, job, tight, allowed, explain=False).plan
    found = gains(won, 2.0, search=True, choices=allowed)
    roomy = Cluster(scaled(H800.chip, memory=2.0), 16)
    expected = best(lite, roomy, job, tight, allowed, explain=False).plan.step_time_s
    assert found["memory"] == 1 - expected / won.step_time_s > 0
    assert all(share >= 0 for share in found.values())


@pytest.mark.parametrize("by", [1, 0.9, float("nan"), float("inf")])
def test_less_of_a_resource_is_no_gain(by):
    with pytest.raises(PlanError, match="above 1"):
        gains(THEIRS, by)
