"""Seven decisions of DeepSeek-V3, each of which can be taken back: what then has to change.

A decision is removed by what a team without it would do instead: plain attention, BF16, a free
choice of nodes, a copy for each expert, a schedule without overlap, no draft module, a loss for
balance. Quality is not priced: nothing here says what the model would then have learnt.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from dsv3_tutorial import paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import params
from dsv3_tutorial.cost.assumptions import Assumptions
from dsv3_tutorial.cost.choices import Choices
from dsv3_tutorial.cost.comm_moe import BF16
from dsv3_tutorial.cost.layout import PlanError
from dsv3_tutorial.cost.serving_target import USUAL, Target
from dsv3_tutorial.hardware import Cluster

DECISIONS = ("mla", "fp8", "node-limit", "dedup", "dualpipe", "mtp", "bias")


@dataclass(frozen=True)
class Variant:
    """A model and how it may be trained and served once some decisions are taken back.

    violation: how much further the busiest expert's load lies above the mean. notes: what was put
    in the place of each decision, in words.
    """

    cfg: ModelConfig
    choices: Choices
    assume: Assumptions
    target: Target
    violation: float = 0.0
    notes: tuple[str, ...] = ()


def made(cfg: ModelConfig, cluster: Cluster | None = None) -> tuple[str, ...]:
    """The decisions that a model has made and that a cluster lets it make: V3 on H800 all seven."""
    experts = cfg.n_routed_experts is not None
    has = {
        "mla": cfg.is_mla,
        "fp8": cluster is None or cluster.chip.rates.get("fp8") is not None,
        "node-limit": experts and cfg.topk_group < cfg.n_group,
        "dedup": experts,
        "dualpipe": True,
        "mtp": cfg.num_nextn_predict_layers > 0,
        "bias": experts and cfg.topk_method == "noaux_tc",
    }
    return tuple(name for name in DECISIONS if has[name])


def without(
    cfg: ModelConfig,
    removed: Collection[str],
    choices: Choices = Choices(),  # noqa: B008 (frozen)
    assume: Assumptions = Assumptions(),  # noqa: B008
    target: Target = USUAL,
    kv_heads: int | None = None,
) -> Variant:
    """The model with some of DECISIONS taken back; nothing removed changes nothing.

    kv_heads: what stands in MLA's place: None as many as heads (MHA), 8 for GQA. Raises PlanError
    for a decision that is unknown, and for one that this model has not.
    """
    _check(cfg, removed)
    variant = Variant(cfg, choices, assume, target)
    for name in DECISIONS:  # in one order, so that the notes do not depend on how they were named
        if name in removed:
            variant = _plain(variant, kv_heads) if name == "mla" else _REMOVE[name](variant)
    return variant


def _check(cfg: ModelConfig, removed: Collection[str]) -> None:
    if unknown := sorted(set(removed) - set(DECISIONS)):
        raise PlanError(
            f"No decision {', '.join(map(repr, unknown))}: what it would change is not known. Take "
            f"out of {', '.join(DECISIONS)}."
        )
    if foreign := [name for name in DECISIONS if name in removed and name not in made(cfg)]:
        raise PlanError(
            f"This model has no {', '.join(foreign)} to take back, so a plan without would be the "
            f"same plan. It is planned with {', '.join(made(cfg))}: take one of these back."
        )


def _noted(variant: Variant, note: str, **changes: object) -> Variant:
    return replace(variant, notes=(*variant.notes, note), **changes)


def _plain(variant: Variant, kv_heads: int | None) -> Variant:
    """Heads of V numbers for query, key and value, and no latents."""
    cfg = variant.cfg
    heads, size = cfg.num_attention_heads, cfg.v_head_dim
    cfg = replace(
        cfg,
        model_type="llama",  # the type whose attention is the plain one; experts stay
        rope_interleave=None,
        head_dim=size,
        num_key_value_heads=kv_heads or heads,
        **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), None),
        **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), None),
    )
    kind = "MHA" if cfg.kv_heads == heads else f"GQA of {cfg.kv_heads} key-value heads"
    more = (params.count(cfg).activated - params.count(variant.cfg).activated) / 1e9
    note = (
        f"mla: {kind}, {heads} heads of {size}; {more:+.1f} billion activated parameters, as "
        "queries, keys, values and outputs are full matrices"
    )
    return _noted(variant, note, cfg=cfg)


def _bf16(variant: Variant) -> Variant:
    sent = replace(variant.target.exchange, dispatch=BF16)
    weights = "bf16" if variant.target.weights == "fp8" else variant.target.weights
    target = replace(variant.target, weights=weights, cache="bf16", exchange=sent)
    note = "fp8: products, dispatch, kept activations and served weights in BF16"
    return _noted(variant, note, choices=variant.choices.only(precisions=("bf16",)), target=target)


def _free_nodes(variant: Variant) -> Variant:
    groups = variant.cfg.n_group
    note = f"node-limit: a token's experts may lie in all {groups} groups, not in "
    note += f"{variant.cfg.topk_group}; decoding sends a copy to each expert and does not notice"
    return _noted(variant, note, cfg=replace(variant.cfg, topk_group=groups))


def _flat(variant: Variant) -> Variant:
    note = "dedup: a copy of a token for each of its experts crosses the network; decoding does so "
    note += "already"
    choices = variant.choices.only(dispatches=("flat",))
    target = replace(variant.target, exchange=replace(variant.target.exchange, scheme="flat"))
    return _noted(variant, note, choices=choices, target=target)


def _no_overlap(variant: Variant) -> Variant:
    left = tuple(s for s in variant.choices.schedules if not s.startswith("dualpipe"))
    left = left or ("1f1b", "zb1p")
    note = f"dualpipe: {' or '.join(left)}; nothing is sent while anything is computed"
    return _noted(variant, note, choices=variant.choices.only(schedules=left))


def _no_drafts(variant: Variant) -> Variant:
    note = "mtp: no module is trained, which is cheaper, and none drafts when serving"
    assume, target = replace(variant.assume, mtp=0.0), replace(variant.target, drafts=0)
    return _noted(variant, note, assume=assume, target=target)


def _by_loss(variant: Variant) -> Variant:
    loss, bias = (
        paper.row(f"loss_free.1b.{kind}.max_violation").value for kind in ("loss", "bias")
    )
    note = (
        f"bias: balance by a loss; the busiest expert's load is {loss:g} above the mean and not "
        f"{bias:g} (1B models), and a GPU's by that over the square root of its experts (assumed: "
        "their loads are independent)"
    )
    return _noted(variant, note, violation=loss - bias)


_REMOVE = {
    "fp8": _bf16,
    "node-limit": _free_nodes,
    "dedup": _flat,
    "dualpipe": _no_overlap,
    "mtp": _no_drafts,
    "bias": _by_loss,
}
