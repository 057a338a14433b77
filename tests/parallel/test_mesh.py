"""A layout says where each rank stands and who its neighbours are, or everything that is wrong."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.parallel.launch import RankFailed, launch
from dsv3_tutorial.parallel.mesh import Layout

SMALL = ModelConfig.named("small")


def about(problems):
    return [problem.split(" ")[0] for problem in problems]


def test_deepseek_v3s_own_layout_is_possible():
    v3 = ModelConfig.named("deepseek-v3")
    layout = Layout(dp=128, ep=64, pp=16, zero=1)
    assert layout.world == 2048 and layout.check(2048, v3) == []


def test_experts_add_no_ranks():
    assert Layout(dp=8, ep=8).world == Layout(dp=8).world == 8
    assert Layout(dp=2, tp=3, pp=5).world == 30


@pytest.mark.parametrize("way", ["dp", "ep", "tp", "pp"])
@pytest.mark.parametrize("value", [0, -2, 1.0, "two", True])
def test_a_number_that_counts_no_ranks_is_refused_by_name(way, value):
    (problem,) = Layout(**{way: value}).check(1)
    assert problem == f"{way} = {value!r}: it must be a whole number of 1 or more"


def test_everything_that_does_not_fit_is_told_at_once():
    wrong = Layout(dp=6, ep=4, tp=5, pp=99, zero=3).check(4, SMALL)
    assert about(wrong)[:3] == ["dp", "ep", "zero"]
    told = "\n".join(wrong)
    assert "is 2970 ranks, and there are 4" in told
    assert "tp = 5 does not divide num_attention_heads" in told
    assert f"pp = 99: the config has {SMALL.num_hidden_layers} blocks" in told


def test_options_of_the_layout_itself_are_checked_before_the_world():
    wrong = Layout(dp=0, zero=2, schedule="luck").check(7, SMALL)
    assert about(wrong) == ["dp", "zero", "pp_schedule"]


def test_experts_are_split_evenly_or_not_at_all():
    experts = SMALL.n_routed_experts
    assert Layout(dp=experts, ep=experts).check(experts, SMALL) == []
    (problem,) = Layout(dp=3, ep=3).check(3, replace(SMALL, n_routed_experts=8))
    assert "ep = 3 does not divide n_routed_experts = 8" in problem


def test_a_model_without_experts_has_none_to_split():
    dense = replace(SMALL, n_routed_experts=None, num_experts_per_tok=None)
    (problem,) = Layout(dp=2, ep=2).check(2, dense)
    assert "the config has no experts" in problem


@given(*[st.integers(1, 12)] * 4, st.integers(1, 64))
def test_the_world_and_the_replicas_decide_and_nothing_else(dp, ep, tp, pp, world):
    fits = pp * dp * tp == world and dp % ep == 0
    assert (Layout(dp=dp, ep=ep, tp=tp, pp=pp).check(world) == []) == fits


def places(layout):
    """In a rank: its place along each axis, and the world ranks of its group along each."""
    import torch.distributed as dist

    from dsv3_tutorial.parallel.mesh import grid

    made = grid(layout, "cpu")
    axes = ("pp", "dp", "tp", "ep", "outer")
    found = {}
    for axis in axes:
        group = made.group(axis)
        members = [dist.get_rank()] if group is None else dist.get_process_group_ranks(group)
        assert made.size(axis) == len(members) and members[made.index(axis)] == dist.get_rank()
        found[axis] = members
    assert made.mesh.shape == (layout.pp, layout.dp, layout.tp)
    assert made.mesh["dp"].get_local_rank() == made.index("dp")
    assert (made.experts is None) == (layout.ep == 1)
    return {axis: (made.index(axis), members) for axis, members in found.items()}


@pytest.mark.parametrize(
    "layout", [Layout(dp=2, ep=2, tp=2, pp=2), Layout(dp=4, ep=2, tp=2), Layout(dp=8, ep=4)]
)
def test_each_rank_has_one_place_and_its_groups_are_lines_through_it(layout):
    found = launch(places, 8, layout)
    shape = {"pp": layout.pp, "dp": layout.dp, "tp": layout.tp}
    for rank, axes in enumerate(found):
        place = {axis: index for axis, (index, _) in axes.items()}
        inside = place["outer"] * layout.ep + place["ep"]
        assert place["dp"] == inside
        assert rank == (place["pp"] * shape["dp"] + inside) * shape["tp"] + place["tp"]
        for axis, (_, members) in axes.items():
            others = [{a: i for a, (i, _) in found[m].items()} for m in members]
            moved = {"dp": {"dp", "ep", "outer"}, "ep": {"dp", "ep"}, "outer": {"dp", "outer"}}
            free = moved.get(axis, {axis})
            assert all(other[a] == place[a] for other in others for a in place if a not in free)
            assert [other[axis] for other in others] == list(range(len(members)))


def test_a_layout_smaller_than_the_world_is_refused_before_a_rank_waits():
    with pytest.raises(RankFailed, match="dp = 2 times tp = 1 times pp = 1 is 2 ranks"):
        launch(places, 3, Layout(dp=2))
