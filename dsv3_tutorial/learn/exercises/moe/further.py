"""Counting on paper: parameters, combinations of experts, nodes reached, steps of the bias."""

import math
from dataclasses import replace

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _model(name: str):
    return lambda: (ModelConfig.named(name),)


def _no_shared() -> tuple:
    return (replace(ModelConfig.named("small"), n_shared_experts=0),)


def _three_shared() -> tuple:
    return (replace(ModelConfig.named("small"), n_shared_experts=3, moe_intermediate_size=96),)


def _parts(c: ModelConfig) -> tuple[int, int]:
    bias = c.n_routed_experts if c.topk_method == "noaux_tc" else 0
    return 3 * c.hidden_size * c.moe_intermediate_size, c.n_routed_experts * c.hidden_size + bias


def _layer_mutant(total, met, gate=True, bias=True, width=None, matrices=3):
    def count(cfg):
        c = cfg
        expert, whole = _parts(c)
        if width is not None:
            expert = 3 * c.hidden_size * width(c)
        expert = expert * matrices // 3
        extra = whole if gate else 0
        if not bias and c.topk_method == "noaux_tc":
            extra -= c.n_routed_experts
        return tuple(extra + parts(c) * expert for parts in (total, met))

    return count


def _all(c):
    return c.n_routed_experts + c.n_shared_experts


def _met(c):
    return c.num_experts_per_tok + c.n_shared_experts


MOE_LAYER = Exercise(
    name="moe.layer_parameters",
    reference="dsv3_tutorial.cost.params:moe_layer",
    cases=[
        Case("DeepSeek-V3", _model("deepseek-v3")),
        Case("DeepSeek-V2-Lite: no bias, two shared", _model("deepseek-v2-lite")),
        Case("Moonlight", _model("moonlight-16b-a3b"), hidden=True),
        Case("no shared expert", _no_shared, hidden=True),
        Case("three shared", _three_shared, hidden=True),
    ],
    hints=[
        "An expert is three matrices between hidden_size and moe_intermediate_size.",
        "The gate has a row of hidden_size for each routed expert, and with noaux_tc one number.",
        "total: gate, shared and all routed; met: gate, shared and num_experts_per_tok.",
    ],
    difficulty=1,
    importance=4,
    minutes=6,
    lines=5,
    mutants=[
        Mutant(
            "shared forgotten",
            _layer_mutant(lambda c: c.n_routed_experts, lambda c: c.num_experts_per_tok),
            "The shared experts are missing: every token meets them, on top of its routed ones.",
        ),
        Mutant(
            "shared among the chosen",
            _layer_mutant(_all, lambda c: c.num_experts_per_tok),
            "A token meets its shared experts as well as num_experts_per_tok routed ones.",
        ),
        Mutant("no gate", _layer_mutant(_all, _met, gate=False), "The gate is missing, in both."),
        Mutant(
            "no bias",
            _layer_mutant(_all, _met, bias=False),
            'With topk_method "noaux_tc" the gate has a balance bias, one number an expert.',
        ),
        Mutant(
            "dense width",
            _layer_mutant(_all, _met, width=lambda c: c.intermediate_size),
            "An expert is moe_intermediate_size wide; intermediate_size is the dense layers'.",
        ),
        Mutant(
            "two matrices",
            _layer_mutant(_all, _met, matrices=2),
            "An expert has three matrices: gate, up and down.",
        ),
        Mutant(
            "everything is met",
            _layer_mutant(_all, _all),
            "A token does not meet every routed expert: num_experts_per_tok of them.",
        ),
    ],
)

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
            "This draws each expert anew: it cannot be chosen twice (5.25 for V3, not 5.30).",
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

EXERCISES = [MOE_LAYER, COMBINATIONS, EXPECTED_NODES, STEPS_TO_CLOSE]
