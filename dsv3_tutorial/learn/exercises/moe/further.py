"""Counted on paper: combinations of experts, nodes reached, steps that the bias needs."""

import math

from dsv3_tutorial.learn.registry import Case, Exercise, Mutant

COMBINATIONS = Exercise(
    name="moe.expert_combinations",
    reference="dsv3_tutorial.cost.routing:expert_combinations",
    cases=[
        Case("2 of 16", lambda: (16, 2)),
        Case("each cut in four: 8 of 64", lambda: (16, 2, 4)),
        Case("V3: 8 of 256", lambda: (256, 8, 1)),
        Case("other sizes", lambda: (12, 3, 2), hidden=True),
        Case("all chosen", lambda: (4, 4, 3), hidden=True),
    ],
    hints=[
        "math.comb(n, k) counts the sets of k out of n.",
        "Cut in `split`, there are split times more experts, and split times more are chosen.",
    ],
    difficulty=1,
    importance=3,
    minutes=4,
    lines=1,
    mutants=[
        Mutant(
            "not split",
            lambda n_experts, top_k, split=1: math.comb(n_experts, top_k),
            "split is not used: both numbers grow with it.",
        ),
        Mutant(
            "experts only",
            lambda n_experts, top_k, split=1: math.comb(n_experts * split, top_k),
            "split times more are chosen too: otherwise the FLOPs would fall.",
        ),
        Mutant(
            "order counts",
            lambda n_experts, top_k, split=1: math.perm(n_experts * split, top_k * split),
            "A set has no order: math.comb, not math.perm.",
        ),
        Mutant(
            "power",
            lambda n_experts, top_k, split=1: (n_experts * split) ** (top_k * split),
            "An expert cannot be chosen twice, and a set has no order: math.comb.",
        ),
        Mutant(
            "split outside",
            lambda n_experts, top_k, split=1: math.comb(n_experts, top_k) ** split,
            "The small experts are chosen freely, not each from its own share of the old ones.",
        ),
    ],
)


def _drawn_again(n_experts, top_k, nodes):
    return nodes * (1 - (1 - 1 / nodes) ** top_k)


def _one_node(n_experts, top_k, nodes):
    rest = n_experts - n_experts // nodes
    return 1 - math.comb(rest, top_k) / math.comb(n_experts, top_k)


def _missed(n_experts, top_k, nodes):
    rest = n_experts - n_experts // nodes
    return nodes * math.comb(rest, top_k) / math.comb(n_experts, top_k)


def _node_chosen(n_experts, top_k, nodes):
    return nodes * (1 - math.comb(nodes - 1, min(top_k, nodes - 1)) / math.comb(nodes, top_k))


EXPECTED_NODES = Exercise(
    name="moe.expected_nodes",
    reference="dsv3_tutorial.cost.routing:expected_nodes",
    cases=[
        Case("V3: 8 of 256 over 8 nodes", lambda: (256, 8, 8)),
        Case("one expert", lambda: (64, 1, 8)),
        Case("two nodes", lambda: (8, 2, 2)),
        Case("other sizes", lambda: (160, 6, 20), hidden=True),
        Case("more chosen than a node holds", lambda: (16, 10, 4), hidden=True),
    ],
    hints=[
        "By symmetry it is nodes times the chance that one given node gets the token.",
        "That node is missed when all chosen experts are among the other nodes' experts.",
        "The chance of that is math.comb(rest, top_k) / math.comb(n_experts, top_k).",
    ],
    difficulty=3,
    importance=3,
    minutes=8,
    lines=3,
    tolerance=1e-9,
    mutants=[
        Mutant(
            "drawn again",
            _drawn_again,
            "This draws each expert anew: it cannot be chosen twice (5.25 for V3, not 5.29).",
        ),
        Mutant(
            "all different",
            lambda n_experts, top_k, nodes: float(min(top_k, nodes)),
            "Two chosen experts may share a node: that copy is sent once.",
        ),
        Mutant(
            "even share",
            lambda n_experts, top_k, nodes: top_k / nodes,
            "This is how many of its experts a token has on one node.",
        ),
        Mutant("one node", _one_node, "This is one node's chance: there are `nodes` of them."),
        Mutant("missed", _missed, "These are the nodes missed: subtract them from all."),
    ],
)

STEPS_TO_CLOSE = Exercise(
    name="moe.steps_to_close",
    reference="dsv3_tutorial.cost.routing:steps_to_close",
    cases=[
        Case("a gap of 0.3 at 0.001", lambda: (0.3, 0.001)),
        Case("the same at 0.1", lambda: (0.3, 0.1)),
        Case("no gap", lambda: (-0.2, 0.01)),
        Case("an odd one", lambda: (0.25, 0.04), hidden=True),
        Case("a small one", lambda: (0.001, 0.01), hidden=True),
    ],
    hints=[
        "The idle expert rises by gamma a step. What does its overloaded rival do?",
        "Two gammas a step; a step is whole, so round up; a gap below zero is closed already.",
    ],
    difficulty=2,
    importance=4,
    minutes=4,
    lines=1,
    mutants=[
        Mutant(
            "one side",
            lambda gap, gamma: max(0, math.ceil(gap / gamma)),
            "Only one of the two moves here: the overloaded expert falls as fast.",
        ),
        Mutant(
            "rounded down",
            lambda gap, gamma: max(0, int(gap / (2 * gamma))),
            "Rounded down: after that many steps the gap is still open.",
        ),
        Mutant(
            "not whole",
            lambda gap, gamma: max(0.0, gap / (2 * gamma)),
            "Steps are whole: round up.",
        ),
        Mutant(
            "below zero",
            lambda gap, gamma: math.ceil(gap / (2 * gamma)),
            "A gap below zero is closed already: never less than 0 steps.",
        ),
        Mutant(
            "multiplied",
            lambda gap, gamma: max(0, math.ceil(gap * 2 * gamma)),
            "A smaller gamma takes more steps: divide by it.",
        ),
    ],
)

EXERCISES = [COMBINATIONS, EXPECTED_NODES, STEPS_TO_CLOSE]
