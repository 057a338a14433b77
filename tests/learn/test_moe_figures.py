"""Lesson 4's figures: what they draw is what the package computes, and the titles say it."""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import params
from dsv3_tutorial.cost import routing as paper_routing
from dsv3_tutorial.learn.figures import node_copies, routing, sparse_cost

PRESETS = tuple(sparse_cost.PRESETS.values())
DRAWN = {
    "a token meets 36.6: 5.5%": sparse_cost.total_and_activated,
    "1.7x the parameters of Llama 405B and costs 10% of its FLOP": sparse_cost.flops_against_size,
    "expert 6 gets 1 of 8 tokens": lambda: routing.token_route(2, -0.3, 2),
    "experts 12, 13, 14 and 15": lambda: routing.token_route(0, 0.0, 1, "unbiased"),
    "even after 28 steps": lambda: routing.load_over_steps(0.01, 1.0),
    "capped at 4: 3.96, with 99.4% of the affinity": node_copies.affinity_kept,
    "to 1.15x, or to 1.00x when groups may part": node_copies.eplb_gain,
}


@pytest.mark.parametrize("finding", DRAWN)
def test_a_figure_states_its_finding_with_axes_and_finite_data_and_repeats(finding):
    draw = DRAWN[finding]
    made = draw()
    assert isinstance(made, Figure) and finding in str(made)
    assert made.png() == draw().png()
    for axes in made.axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel() or axes.get_yticklabels()[0].get_text()  # named rows
        numbers = [line.get_ydata() for line in axes.lines]
        numbers += [[bar.get_height(), bar.get_width()] for bar in axes.patches]
        assert numbers and all(np.isfinite(np.asarray(each, dtype=float)).all() for each in numbers)


def test_table_2_prints_the_papers_numbers_and_marks_the_two_dense_rows(capsys):
    sparse_cost.isca_table_2()
    _header, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[1] for row in rows] == ["155", "250", "394", "2448"]
    assert [row.split()[2] for row in rows] == ["155.3", "250.5", "444.9", "2473.2"]
    assert ["does not follow" in row for row in rows] == [False, False, True, True]
    assert rows[2].split()[3:6] == ["394.0", "1.58x", "1.78x"]
    assert rows[3].split()[3:6] == ["2447.9", "9.79x", "9.87x"]


@pytest.mark.parametrize("name", PRESETS)
def test_the_parts_table_adds_up_to_what_the_cost_model_counts(name, capsys):
    sparse_cost.parts_table(name)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    columns = [[int(row[at].replace(",", "")) for row in rows] for at in (-2, -1)]
    counted = params.count(ModelConfig.named(name))
    for (*parts, last), expected in zip(columns, (counted.total, counted.activated), strict=True):
        assert sum(parts) == last == expected


def test_the_bars_are_as_long_as_the_parameters_they_stand_for():
    whole, enlarged = sparse_cost.total_and_activated().axes
    counted = params.count(ModelConfig.named("deepseek-v3"))
    widths = [bar.get_width() for bar in whole.patches]
    lengths = [sum(widths[:5]), sum(widths[5:])]
    assert lengths == pytest.approx([counted.total / 1e9, counted.activated / 1e9])
    assert sum(bar.get_width() for bar in enlarged.patches) == pytest.approx(lengths[1])


def test_the_six_models_stand_where_the_dense_line_says_or_below_it():
    ax = sparse_cost.flops_against_size().axes[0]
    line, dense, sparse = (np.column_stack(each.get_data()) for each in ax.lines)
    assert line[:, 1] == pytest.approx(6 * line[:, 0])
    assert len(dense) == 2 and dense[:, 1] == pytest.approx(6 * dense[:, 0], rel=0.05)
    assert len(sparse) == 4 and (6 * sparse[:, 0] > 5 * sparse[:, 1]).all()


def _choice_by_hand(scores: np.ndarray, bias: float, groups: int) -> list[int]:
    """The best four of the best groups, counted over lists."""
    seen = [s + bias * (expert == routing.FAVOURITE) for expert, s in enumerate(scores)]
    parts = [list(range(first, first + 4)) for first in range(0, 16, 4)]
    parts.sort(key=lambda part: -sum(sorted((seen[e] for e in part), reverse=True)[:2]))
    allowed = [expert for part in parts[:groups] for expert in part]
    return sorted(sorted(allowed, key=lambda expert: -seen[expert])[:4])


def test_the_toy_gate_chooses_as_counted_by_hand_and_weighs_without_the_bias():
    scores = routing.toy_scores().numpy()
    for bias, groups in itertools.product((0.0, -0.15, -0.3, -0.6), (1, 2, 3, 4)):
        routed, _ = routing.toy_route(bias, groups)
        for token in range(routing.TOKENS):
            chosen = routed.indices[token].tolist()
            assert sorted(chosen) == _choice_by_hand(scores[token], bias, groups)
            expected = scores[token, chosen] / scores[token, chosen].sum()
            assert routed.weights[token].numpy() == pytest.approx(expected)
            drawn = routing.token_route(token, bias, groups).axes[0] if groups == token else None
            if drawn:  # a weight above each chosen bar, and "kept" over each group that is shaded
                texts = [text.get_text() for text in drawn.texts]
                assert [f"{weight:.2f}" in texts for weight in expected] == [True] * 4
                assert sum("kept" in text for text in texts) == groups


def test_every_token_likes_the_favourite_until_the_bias_takes_it_away():
    words = [routing.token_route_in_words(3, bias, 4) for bias in (0.0, -0.6)]
    assert "is chosen; it gets 8 of the 8 tokens" in words[0]
    assert "is not chosen; it gets 0 of the 8 tokens" in words[1]
    assert "group 1 is kept" in routing.token_route_in_words(2, 0.0, 1)
    outlined, plain = (
        len(routing.token_route(1, -0.2, 2, show).axes[0].patches)
        for show in ("biased", "unbiased")
    )
    assert outlined == plain + routing.EXPERTS


def test_a_small_gamma_is_too_slow_and_a_large_one_swings():
    slow, right, wild = (routing.simulate(gamma, 1.0) for gamma in (0.001, 0.01, 0.3))
    assert [routing.steps_until_even(run) is None for run in (slow, right, wild)] == [1, 0, 1]
    ends = [run.violation[-routing.TAIL :].mean() for run in (slow, right, wild)]
    assert ends[1] < 0.25 < min(ends[0], ends[2])
    assert ends[0] < 0.6 * slow.violation[0]  # on its way, where the other is not
    assert ends[2] > 0.8 * wild.violation[0]
    assert routing.undone(slow) < 0.4 < routing.undone(right) < 0.7 < routing.undone(wild)


def test_the_steps_needed_fall_as_gamma_grows():
    travelled = [g * routing.steps_until_even(routing.simulate(g, 0.5)) for g in (0.001, 0.01)]
    assert travelled[0] == pytest.approx(travelled[1], rel=0.15)


def test_the_simulation_loses_no_token_and_without_a_bias_stays_as_it_is():
    still = routing.simulate(0.0, 1.0)
    assert (still.loads.sum(axis=1) == routing.BATCH * routing.TOP_K).all()
    assert still.violation == pytest.approx(still.loads.max(axis=1) / 128 - 1)
    assert still.violation.min() > 1.5 and routing.undone(still) < 0.2


def test_the_load_explorer_says_when_and_how_far():
    assert "below 0.2 after 28 steps" in routing.load_over_steps_in_words(0.01, 1.0)
    assert "never falls below 0.2 in 200 steps" in routing.load_over_steps_in_words(0.3, 1.0)
    assert "after 4 steps" in routing.load_over_steps_in_words(0.1, 1.0, "proportional")
    with pytest.raises(ValueError, match="Give one of sign, proportional"):
        routing.load_over_steps(0.01, 1.0, "by hand")


def test_a_free_choice_reaches_as_many_nodes_as_the_closed_form_says():
    reached, kept = node_copies.measured(node_copies.NODES, tokens=node_copies.MANY)
    expected = paper_routing.expected_nodes(256, 8, 8)
    assert reached == pytest.approx(expected, abs=3 / node_copies.MANY**0.5)  # spread below 1
    assert kept == 1


def test_the_copies_table_prints_what_the_learners_function_gives(capsys):
    node_copies.copies_table(paper_routing.expected_nodes)
    rows = capsys.readouterr().out.splitlines()
    assert "8.00       57,344" in rows[1] and "5.29       37,952" in rows[2]
    assert "3.96" in rows[4] and "at most 4" in rows[4]
    node_copies.copies_table(lambda experts, top_k, nodes: experts / top_k / nodes)
    assert "4.00       28,672" in capsys.readouterr().out


def test_the_affinity_kept_is_that_of_a_cap_counted_in_numpy():
    scores = node_copies.drawn_scores(node_copies.FEW, 0.2).numpy()
    best = -np.sort(-scores.reshape(-1, 8, 32), axis=2)
    nodes = np.argsort(-best[:, :, :2].sum(axis=2), axis=1)[:, :2]
    allowed = np.take_along_axis(best[:, :, :8], nodes[:, :, None], axis=1).reshape(-1, 16)
    share = -np.sort(-allowed, axis=1)[:, :8].sum() / -np.sort(-scores, axis=1)[:, :8].sum()
    assert node_copies.affinity_share(2, 0.2) == pytest.approx(abs(share), rel=1e-12)


def test_a_wider_cap_keeps_more_and_alike_experts_need_fewer_nodes():
    reached, kept = zip(*(node_copies.measured(cap) for cap in range(1, 9)), strict=True)
    assert list(kept) == sorted(kept) and kept[-1] == 1 and kept[0] < 0.95
    assert all(nodes <= cap for nodes, cap in zip(reached, range(1, 9), strict=True))
    assert node_copies.affinity_share(1, 1.0) == pytest.approx(1)
    assert "5.27 nodes" in node_copies.affinity_kept_in_words()
    assert "1.69 nodes" in node_copies.affinity_kept_in_words(0.9)
    with pytest.raises(ValueError, match="nothing in common"):
        node_copies.drawn_scores(4, 1.5)


def _even_nodes(groups: np.ndarray) -> float:
    """The busiest of four nodes over the mean, at best: every way to give each two groups."""
    splits = itertools.permutations(range(8))
    pairs = {tuple(sorted(tuple(sorted(p[i : i + 2])) for i in (0, 2, 4, 6))) for p in splits}
    return min(max(groups[list(pair)].sum() for pair in split) for split in pairs) * 4


def test_replicas_even_the_load_out_and_never_below_what_is_possible():
    loads = node_copies.skewed_loads().numpy()
    loads = loads / loads.sum(axis=1, keepdims=True)
    assert node_copies.busiest_gpu(0, hierarchical=False) > 32 * loads.max()
    assert node_copies.busiest_gpu(32, hierarchical=False) < 1.01
    nodes = np.mean([_even_nodes(row.reshape(8, 32).sum(axis=1)) for row in loads])
    for extra in (32, 128):
        held = node_copies.busiest_gpu(extra, hierarchical=True)
        assert nodes * (1 - 1e-9) <= held < 1.1 * nodes
