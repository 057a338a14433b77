"""The design game: a model for a lab, and a model for a cluster, judged by the planner."""

from collections.abc import Callable
from typing import Any

from dsv3_tutorial.cost import designs
from dsv3_tutorial.learn.exercises.codesign.design_hints import (
    H20_FLOP,
    H20_SERVED,
    LAB_FLOP,
    READ,
    SERVED,
    hints,
)
from dsv3_tutorial.learn.exercises.codesign.handed import cases, comparison, hand_in
from dsv3_tutorial.learn.registry import Exercise, Mutant

V3 = {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "intermediate_size": 18432,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "num_nextn_predict_layers": 1,
    "tokens": 14.8e12,
}


def _without_latent(design: dict, **changes: Any) -> Callable[[], dict]:
    plain = {k: v for k, v in design.items() if k != "kv_lora_rank"}
    return lambda: {**plain, **changes}


def _with(design: dict, **changes: Any) -> Callable[[], dict]:
    return lambda: {**design, **changes}


_LAB, _H20 = designs.lab_design(), designs.cluster_design()

LAB_DESIGN = Exercise(
    name="codesign.lab_design",
    reference="dsv3_tutorial.cost.designs:lab_design",
    cases=cases("lab"),
    hints=[
        "Begin with a small published model, V2-Lite's 2,048 wide and 27 layers deep, and change "
        "one number at a time. model(**fields) makes it; params.count(...) counts it.",
        LAB_FLOP,
        SERVED + " Beside them lie the weights, a byte for each parameter, and 72 GB can be used.",
    ],
    difficulty=3,
    importance=5,
    minutes=8,
    lines=8,
    mutants=[
        Mutant("V3", lambda: dict(V3), "This is DeepSeek-V3: eight GPUs cannot even hold it."),
        Mutant(
            "too many tokens",
            _with(_LAB, tokens=1.5e12),
            "More tokens than two weeks hold: time grows with tokens times activated parameters.",
        ),
        Mutant(
            "too few tokens",
            _with(_LAB, tokens=30e9),
            "Fast, but on too few tokens: there is a floor for them too.",
        ),
        Mutant(
            "no tokens",
            lambda: {k: v for k, v in _LAB.items() if k != "tokens"},
            'Say how much it is trained on as well: the field "tokens".',
        ),
        Mutant(
            "MHA",
            _without_latent(_LAB),
            "Every head's key and value is cached here, seven times as much as a latent.",
        ),
        Mutant(
            "GQA of 8",
            _without_latent(_LAB, num_key_value_heads=8),
            "8 key-value heads cache 2,048 numbers a layer: a latent 576.",
        ),
        Mutant(
            "dense",
            lambda: {
                "hidden_size": 4096,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "intermediate_size": 18432,
                "tokens": 300e9,
            },
            "A dense model activates all its parameters: those that are asked for in total then "
            "cost time with every token.",
        ),
        Mutant(
            "experts too large",
            _with(_LAB, moe_intermediate_size=4096),
            "Experts four times as wide: they take four times the memory, and each token meets "
            "four times as much of them.",
        ),
        Mutant(
            "too many experts",
            _with(_LAB, n_routed_experts=512),
            "Experts that rest cost no time, but memory: a byte a parameter in the service, 14 in "
            "training.",
        ),
        Mutant(
            "hardly a latent",
            _with(_LAB, kv_lora_rank=32),
            "So narrow a latent has not been shown to work: there is a floor for the cache.",
        ),
        Mutant(
            "two key-value heads",
            _without_latent(_LAB, num_key_value_heads=2),
            "2 key-value heads cache as little as a latent, and learn less: V2's authors found "
            "that 8 groups already lose to all heads, and that a latent does not.",
        ),
        Mutant(
            "one routed expert",
            _with(_LAB, num_experts_per_tok=1, n_shared_experts=8),
            "Nearly all that a token meets is shared here: that is a dense model beside experts "
            "that hardly learn.",
        ),
        Mutant(
            "other names",
            lambda: {"hidden_size": 2048, "layers": 24, "heads": 16, "tokens": 360e9},
            "Fields have Hugging Face's names: num_hidden_layers, num_attention_heads.",
        ),
    ],
    compare=comparison(hints(READ, LAB_FLOP)),
    run=hand_in,
)

CLUSTER_DESIGN = Exercise(
    name="codesign.cluster_design",
    reference="dsv3_tutorial.cost.designs:cluster_design",
    cases=cases("h20"),
    hints=[
        "Begin with your lab's model and make it wider and deeper until the floors are met; then "
        "look at the service.",
        H20_SERVED,
        "At 40 heads arithmetic fills the step, but only beyond 240 users; at 32 memory is full "
        "first, though arithmetic still takes longer than reading. " + SERVED,
    ],
    difficulty=4,
    importance=5,
    minutes=7,
    lines=8,
    mutants=[
        Mutant(
            "V3",
            lambda: dict(V3),
            "This is DeepSeek-V3: 8 of these GPUs do not hold it, and it costs twenty times "
            "the budget.",
        ),
        Mutant(
            "the lab's",
            lambda: dict(_LAB),
            "This is the lab's model: it is far smaller than what is asked for.",
        ),
        Mutant(
            "V3's heads",
            _with(_H20, num_attention_heads=128),
            "128 heads on one latent are right for an H800; an H20 has a seventh of its "
            "arithmetic, and would compute on caches all day.",
        ),
        Mutant(
            "64 heads",
            _with(_H20, num_attention_heads=64),
            "64 heads still do 121 FLOP for each byte of cache, and an H20 has 37.",
        ),
        Mutant(
            "MHA",
            _without_latent(_H20),
            "Every head's key and value is cached here: 14 times as much as a latent.",
        ),
        Mutant(
            "GQA of 8",
            _without_latent(_H20, num_key_value_heads=8),
            "8 key-value heads cache 2,048 numbers a layer: a latent 576.",
        ),
        Mutant(
            "two key-value heads",
            _without_latent(_H20, num_attention_heads=64, num_key_value_heads=2),
            "2 key-value heads cache as little as a latent, and learn less: no published model "
            "here has fewer than 8.",
        ),
        Mutant(
            "few layers, very wide",
            _without_latent(
                {**_H20, "hidden_size": 2400, "num_hidden_layers": 15, "n_routed_experts": 144},
                num_key_value_heads=8,
                moe_intermediate_size=8192,
            ),
            "With 15 layers plain attention's cache fits, but 31 times hidden_size in each "
            "feed-forward is no shape that anybody has trained.",
        ),
        Mutant(
            "too many tokens",
            _with(_H20, tokens=14.8e12),
            "V3's tokens, but not V3's budget: money grows with tokens times activated parameters.",
        ),
        Mutant(
            "dense",
            lambda: {
                "hidden_size": 8192,
                "num_hidden_layers": 80,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "intermediate_size": 60000,
                "tokens": 1.8e12,
            },
            "A dense model activates all its parameters: it is far too dear to train, and reads "
            "all of them in each step of the service.",
        ),
        Mutant(
            "experts that do not divide",
            _with(_H20, n_routed_experts=130),
            "130 experts on 8 GPUs: some would hold 17 and some 16, and the fullest decides.",
        ),
        Mutant(
            "too many experts a token",
            _with(_H20, num_experts_per_tok=16),
            "16 experts a token instead of 8: nearly twice the FLOP, for the same total.",
        ),
        Mutant(
            "flat and wide",
            _with(_H20, num_hidden_layers=12, hidden_size=16384),
            "Few layers make a small cache, but no published model is so flat.",
        ),
    ],
    compare=comparison(hints(H20_SERVED, H20_FLOP)),
    run=hand_in,
)
