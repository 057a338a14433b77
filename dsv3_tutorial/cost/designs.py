"""The design game: a cluster, a budget and a service are given, and a model is to be chosen.

A design is a dict of `design_model.FIELDS` and "tokens". `judge` plans its training, on the fastest
layout there is, and its service, and says which demands it does not meet. What is learnt from the
tokens is not priced: floors on parameters and tokens stand in for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dsv3_tutorial.config import ConfigError, ModelConfig
from dsv3_tutorial.cost import memory, params, search, serving_plan
from dsv3_tutorial.cost.assumptions import Assumptions
from dsv3_tutorial.cost.choices import Choices
from dsv3_tutorial.cost.deployment import USABLE
from dsv3_tutorial.cost.design_briefs import BRIEFS as BRIEFS
from dsv3_tutorial.cost.design_briefs import Brief
from dsv3_tutorial.cost.design_model import model, shape_problems
from dsv3_tutorial.cost.layout import Job, PlanError
from dsv3_tutorial.cost.plan import Plan
from dsv3_tutorial.cost.serving_target import Target

PARTS = ("the model", "the service", "the training run")
# What is left out has not won on these clusters: 1F1B, BF16 products, tensor parallelism.
_CHOICES = Choices(schedules=("zb1p", "dualpipe"), precisions=("fp8",), tps=(1,))


@dataclass(frozen=True)
class Missed:
    """A demand that is not met: one sentence with both numbers that says what to change.

    kind: "fields" (there is no model), "shape", "size", "tokens", "time", "experts" (that do not
    divide), or what ends the service: "memory", "bandwidth", "compute", "network".
    """

    kind: str
    said: str


def judge(design: Mapping[str, Any], brief: Brief, part: str | None = None) -> list[str]:
    """The demands of the brief that a design does not meet, a sentence each; [] where all are met.

    part: one of PARTS alone. Each sentence holds both numbers and says what to change. A design is
    planned once: under a second, and nothing when it is asked again.
    """
    return [one.said for one in missed(design, brief, part)]


def missed(design: Mapping[str, Any], brief: Brief, part: str | None = None) -> list[Missed]:
    """The same with the kind of each. Where there is no model, only what it lacks is said."""
    key, found = design_key(design), []
    for name in PARTS:
        if part in (None, name):
            found += _unmet(key, brief, name)
            if part is None and any(one.kind == "fields" for one in found):
                return found
    return found


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


def design_key(design: Mapping[str, Any]) -> tuple[tuple[str, type, Any], ...]:
    """The design as a cache can hold it. Types are part of it: 24.0 layers are refused, 24 not."""
    plain = int | float | str | None
    named = ((str(k), v if isinstance(v, plain) else repr(v)) for k, v in design.items())
    return tuple((k, type(v), v) for k, v in sorted(named, key=lambda pair: pair[0]))


@lru_cache(maxsize=1024)
def _unmet(key: tuple[tuple[str, type, Any], ...], brief: Brief, part: str) -> list[Missed]:
    fields = {name: value for name, _, value in key}
    tokens = fields.pop("tokens", None)
    try:
        cfg = model(**fields)
    except ConfigError as error:
        first = part == PARTS[0]
        said = error.problems if first else [f"there is no model yet: {error.problems[0]}"]
        return [Missed("fields", one) for one in said]
    if part == PARTS[0]:
        shape = [Missed("shape", said) for said in shape_problems(cfg)]
        return [*shape, *_too_small(cfg, brief)]
    return _service(cfg, brief) if part == PARTS[1] else _training(cfg, tokens, brief)


def _too_small(cfg: ModelConfig, brief: Brief) -> list[Missed]:
    counted = params.count(cfg)
    floors = (
        (counted.total, brief.total, "parameters", "more or wider experts"),
        (counted.activated, brief.activated, "activated parameters", "more width, layers or top-k"),
    )
    return [
        Missed(
            "size", f"{have / 1e9:.2f} B {what}, and {least / 1e9:g} B are asked for: take {more}"
        )
        for have, least, what, more in floors
        if have < least
    ]


def _training(cfg: ModelConfig, tokens: Any, brief: Brief) -> list[Missed]:
    if tokens is None:
        return [Missed("tokens", "'tokens' is missing: on how many is it trained, as 1e12?")]
    try:
        job = Job(tokens=tokens, sequences=brief.sequences)
    except PlanError as error:
        said = str(error).removeprefix("This job cannot be: ")
        return [Missed("tokens", said.partition(". ")[0])]
    found = []
    if tokens < brief.tokens:
        found.append(
            Missed(
                "tokens",
                f"{tokens / 1e9:,.4g} B tokens, and {brief.tokens / 1e9:,.0f} B are asked for: "
                "train on more",
            )
        )
    if hopeless := _state(cfg, brief):
        return [*found, Missed("memory", hopeless)]
    try:
        return [*found, *_too_long(planned(cfg, brief, job), brief, cfg)]
    except PlanError:
        most = Assumptions().usable_memory * brief.cluster.chip.memory_bytes / 1e9
        said = (
            f"no layout of the training run fits into the {most:.0f} GB that can be used on each "
            f"of {brief.cluster.gpus} GPUs: take fewer parameters or layers"
        )
        return [*found, Missed("memory", said)]


def _too_long(plan: Plan, brief: Brief, cfg: ModelConfig) -> list[Missed]:
    uneven = (cfg.n_routed_experts or 0) % 8  # they are dealt out over a server of 8, or less well
    also = ", or a multiple of 8 experts" if uneven else ""
    asked = (
        (plan.days, brief.days, "{:.1f} days"),
        (plan.cost_usd, brief.budget_usd, "${:,.0f}"),
    )
    return [
        Missed(
            "time",
            f"training takes {written.format(have)}, {have / most:.2f} times the "
            f"{written.format(most)} that are given: train on fewer tokens or activate "
            f"less{also}",
        )
        for have, most, written in asked
        if most is not None and have > most
    ]


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


@lru_cache(maxsize=256)
def planned(cfg: ModelConfig, brief: Brief, job: Job) -> Plan:
    """The fastest plan of a model on a brief's cluster. Raises PlanError where none fits."""
    return search.best(cfg, brief.cluster, job, Assumptions(rent=brief.rent), _CHOICES).plan


def _service(cfg: ModelConfig, brief: Brief) -> list[Missed]:
    experts = cfg.n_routed_experts
    if experts and experts % brief.devices:
        said = (
            f"{experts} experts do not divide by the {brief.devices} GPUs of the service: some "
            f"would hold more than others, so take a multiple of {brief.devices}"
        )
        return [Missed("experts", said)]
    target = Target(brief.context, brief.rate, brief.devices)
    served = serving_plan.serve(cfg, brief.cluster.chip, target, brief.devices)
    if served.batch >= brief.users:
        return []
    if not served.batch:
        return [_none_served(served, brief)]
    said = (
        f"{served.batch} users are served at {brief.context:,} tokens and {brief.rate:g} tokens/s "
        f"each, and {brief.users} are asked for: {_ADVICE[served.limit]}"
    )
    return [Missed(served.limit, said)]


def _none_served(served: serving_plan.Serving, brief: Brief) -> Missed:
    """Not one user: the chips and the promise are given here, so the model is what can change."""
    placed, nobody = served.deployment, f"not one of {brief.users} users is served: "
    weights = f"{placed.weight_bytes / 1e9:.1f} GB of weights on a GPU"
    if placed.room <= 0:
        usable = USABLE * brief.cluster.chip.memory_bytes / 1e9
        why = f"{weights}, of whose memory {usable:.1f} GB can be used: hold fewer parameters"
        return Missed("memory", nobody + why)
    if not placed.max_batch:
        why = (
            f"{weights} leave {placed.room / 1e9:.1f} GB, and one of {brief.context:,} tokens "
            f"caches {placed.sequence_bytes / 1e9:.1f} GB: cache less or hold fewer parameters"
        )
        return Missed("memory", nobody + why)
    slow = f"alone one is slower than {brief.rate:g} tokens/s; {_ADVICE[placed.limit]}"
    return Missed(placed.limit, nobody + slow)


_ADVICE = {
    "memory": "memory binds, so cache less for each token or hold fewer parameters",
    "bandwidth": "reading binds, so cache less for each token or activate less",
    "compute": "arithmetic binds, so take fewer heads on the cache or activate less",
    "network": "messages bind, so take fewer experts a token or fewer layers",
}
