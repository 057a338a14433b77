"""The design game: a cluster, a budget and a service are given, and a model is to be chosen.

A design is a dict of `design_model.FIELDS` and "tokens". `judge` plans its training, on the fastest
layout there is, and its service, and says which demands it does not meet. What is learnt from the
tokens is not priced: floors on parameters and tokens stand in for it.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from dsv3_tutorial.config import ConfigError, ModelConfig
from dsv3_tutorial.cost import memory, params, search, serving_plan
from dsv3_tutorial.cost.assumptions import Assumptions
from dsv3_tutorial.cost.choices import Choices
from dsv3_tutorial.cost.design_briefs import BRIEFS as BRIEFS
from dsv3_tutorial.cost.design_briefs import Brief
from dsv3_tutorial.cost.design_model import model, shape_problems
from dsv3_tutorial.cost.layout import Job, PlanError
from dsv3_tutorial.cost.plan import Plan
from dsv3_tutorial.cost.serving_target import Target

PARTS = ("the model", "the service", "the training run")
# What is left out has not won on these clusters: 1F1B, BF16 products, tensor parallelism.
_CHOICES = Choices(schedules=("zb1p", "dualpipe"), precisions=("fp8",), tps=(1,))


def judge(design: Mapping[str, Any], brief: Brief, part: str | None = None) -> list[str]:
    """The demands of the brief that a design does not meet, a sentence each; [] where all are met.

    part: one of PARTS alone. Each sentence holds both numbers and says what to change. A design is
    planned once: under a second, and nothing when it is asked again.
    """
    key = _key(design)
    return [said for name in PARTS if part in (None, name) for said in _unmet(key, brief, name)]


def lab_design() -> dict[str, float]:
    """A model for eight H100s and two weeks, served to 48 long contexts from one of them.

    Time is tokens times activated parameters; memory is the caches, so the experts that rest are
    nearly free. Plain attention over 16 heads would serve 9 users.
    """
    return {
        "hidden_size": 2048,
        "num_hidden_layers": 24,  # 85 of hidden_size for each, near V2-Lite's 76
        "num_attention_heads": 16,
        "kv_lora_rank": 512,  # 0.9 GB of cache a user, beside 10 GB of weights
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,  # 1.7 of 10 B parameters a token
        "moe_intermediate_size": 1024,
        "tokens": 360e9,
    }


def cluster_design() -> dict[str, float]:
    """A model for 512 H20: they read fast and compute slowly, so the cache must not be computed on.

    An H20 does 37 FLOP in BF16 for each byte that it reads. A latent that 128 heads share asks for
    242, one for 32 heads for 60; with 64 heads arithmetic stops the service at 160 users.
    """
    return {
        "hidden_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,  # a quarter of V3's, over the same latent
        "kv_lora_rank": 512,
        "n_routed_experts": 128,  # 16 on each of the service's 8 GPUs
        "num_experts_per_tok": 8,  # 14 of 147 B parameters a token
        "moe_intermediate_size": 1536,
        "tokens": 2e12,
    }


def _key(design: Mapping[str, Any]) -> tuple[tuple[str, type, Any], ...]:
    """The design as a cache can hold it. Types are part of it: 24.0 layers are refused, 24 not."""
    plain = int | float | str | None
    named = ((str(k), v if isinstance(v, plain) else repr(v)) for k, v in design.items())
    return tuple((k, type(v), v) for k, v in sorted(named, key=lambda pair: pair[0]))


@lru_cache(maxsize=1024)
def _unmet(key: tuple[tuple[str, type, Any], ...], brief: Brief, part: str) -> list[str]:
    fields = {name: value for name, _, value in key}
    tokens = fields.pop("tokens", None)
    try:
        cfg = model(**fields)
    except ConfigError as error:
        first = part == PARTS[0]
        return error.problems if first else [f"there is no model yet: {error.problems[0]}"]
    if part == PARTS[0]:
        return [*shape_problems(cfg), *_too_small(cfg, brief)]
    return _service(cfg, brief) if part == PARTS[1] else _training(cfg, tokens, brief)


def _too_small(cfg: ModelConfig, brief: Brief) -> list[str]:
    counted = params.count(cfg)
    floors = (
        (counted.total, brief.total, "parameters", "more or wider experts"),
        (counted.activated, brief.activated, "activated parameters", "more width, layers or top-k"),
    )
    return [
        f"{have / 1e9:.2f} B {what}, and {least / 1e9:g} B are asked for: take {more}"
        for have, least, what, more in floors
        if have < least
    ]


def _training(cfg: ModelConfig, tokens: Any, brief: Brief) -> list[str]:
    if hopeless := _state(cfg, brief):
        return [hopeless]
    try:
        job = Job(tokens=tokens, sequences=brief.sequences)
        plan = planned(cfg, brief, job)
    except PlanError as error:
        return [str(error)]
    found = []
    if tokens < brief.tokens:
        found.append(
            f"{tokens / 1e9:,.0f} B tokens, and {brief.tokens / 1e9:,.0f} B are asked for: train "
            "on more"
        )
    for have, most, written in (
        (plan.days, brief.days, "{:.1f} days"),
        (plan.cost_usd, brief.budget_usd, "${:,.0f}"),
    ):
        if most is not None and have > most:
            found.append(
                f"training takes {written.format(have)}, {have / most:.2f} times the "
                f"{written.format(most)} that are given: train on fewer tokens or activate less"
            )
    return found


def _state(cfg: ModelConfig, brief: Brief) -> str | None:
    """Where not even an even share of weights, gradients and optimizer fits, before any search."""
    each = memory.TrainingBytes().total
    share = each * params.count(cfg).total / brief.cluster.gpus
    room = Assumptions().usable_memory * brief.cluster.chip.memory_bytes
    if share <= room:
        return None
    return (
        f"training holds {each} bytes for each parameter, {share / 1e9:,.0f} GB on each of "
        f"{brief.cluster.gpus} GPUs, and {room / 1e9:.0f} GB can be used: take fewer parameters"
    )


def planned(cfg: ModelConfig, brief: Brief, job: Job) -> Plan:
    """The fastest plan of a model on a brief's cluster. Raises PlanError where none fits."""
    return search.best(cfg, brief.cluster, job, Assumptions(rent=brief.rent), _CHOICES).plan


def _service(cfg: ModelConfig, brief: Brief) -> list[str]:
    experts = cfg.n_routed_experts
    if experts and experts % brief.devices:
        return [
            f"{experts} experts do not divide by the {brief.devices} GPUs of the service: some "
            f"would hold more than others, so take a multiple of {brief.devices}"
        ]
    target = Target(brief.context, brief.rate, brief.devices)
    served = serving_plan.serve(cfg, brief.cluster.chip, target, brief.devices)
    if served.batch >= brief.users:
        return []
    if not served.batch:
        return [f"not one of {brief.users} users is served: {served.reason}"]
    return [
        f"{served.batch} users are served at {brief.context:,} tokens and {brief.rate:g} tokens/s "
        f"each, and {brief.users} are asked for: {_ADVICE[served.limit]}"
    ]


_ADVICE = {
    "memory": "memory binds, so cache less for each token or hold fewer parameters",
    "bandwidth": "reading binds, so cache less for each token or activate less",
    "compute": "arithmetic binds, so take fewer heads on the cache or activate less",
    "network": "messages bind, so take fewer experts a token or fewer layers",
}
