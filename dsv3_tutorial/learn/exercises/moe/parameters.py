"""What a layer of experts holds, and what of it a token meets."""

from dataclasses import replace

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _model(name: str):
    return lambda: (ModelConfig.named(name),)


def _no_shared() -> tuple:
    return (replace(ModelConfig.named("small"), n_shared_experts=0),)


def _three_shared() -> tuple:
    return (replace(ModelConfig.named("small"), n_shared_experts=3, moe_intermediate_size=96),)


def _sigmoid_without_bias() -> tuple:
    groups = {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
    return (replace(ModelConfig.named("small"), **groups),)


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
        Case("a sigmoid without a bias", _sigmoid_without_bias, hidden=True),
        Case("three shared", _three_shared, hidden=True),
    ],
    hints=[
        "An expert is three matrices between hidden_size and moe_intermediate_size; norms are not "
        "counted.",
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

EXERCISES = [MOE_LAYER]
