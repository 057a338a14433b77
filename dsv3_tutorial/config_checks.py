"""What makes a model config impossible: every rule, applied to whatever fields can be read.

A field that is missing or of the wrong type is reported once and then treated as unknown: the
rules that need it are skipped and all the others still speak, so one error lists everything.
"""

import math
from collections.abc import Mapping
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, get_args, get_origin

from dsv3_tutorial.huggingface import COMPRESSED, MODEL_TYPES, ROPE_TYPES, SCORING, TOPK

_POSITIVE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "q_lora_rank", "kv_lora_rank"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings"),
    *("rms_norm_eps", "rope_theta", "initializer_range", "routed_scaling_factor"),
    *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"),
)
_NOT_NEGATIVE = ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers")
_CHOICES = {"model_type": MODEL_TYPES, "scoring_func": SCORING, "topk_method": TOPK}


def problems(values: Mapping[str, Any], hints: Mapping[str, Any]) -> list[str]:
    """All that is wrong with a model's fields; `hints` are the types they must have."""
    found = type_problems(values, hints)
    known = {name: v if accepts(hints[name], v) else None for name, v in values.items()}
    found += _range_problems(known)
    c = SimpleNamespace(**dict.fromkeys(hints) | known)
    given = {name for name, value in values.items() if value is not None}
    return found + _kind_problems(c, given) + _head_problems(c) + _expert_problems(c, given)


def accepts(hint: Any, value: Any) -> bool:
    """Is value of the annotated type: a bool is no int, an int may be a float, a NaN is nothing."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if value is None:
        return NoneType in kinds
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, float) and not math.isfinite(value):
        return False
    kinds = tuple(get_origin(kind) or kind for kind in kinds)
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


def type_problems(values: Mapping[str, Any], hints: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} must be {getattr(hints[name], '__name__', hints[name])}, got {value!r}"
        for name, value in values.items()
        if not accepts(hints[name], value)
    ]


def rope_problems(rope: Any) -> list[str]:
    found = [
        f"{name} must be positive, got {getattr(rope, name)}"
        for name in ("original_max_position_embeddings", "beta_slow", "low_freq_factor")
        if getattr(rope, name) <= 0
    ]
    if rope.rope_type not in ROPE_TYPES:
        found.append(f"rope_type {rope.rope_type!r} is not one of {tuple(ROPE_TYPES)}")
    if rope.factor < 1:
        found.append(f"factor must be at least 1, got {rope.factor}")
    for kind, (low, high) in _RAMPS.items():
        if rope.rope_type == kind and getattr(rope, high) <= getattr(rope, low):
            found.append(f"{kind} needs {high} > {low}")
    return found


_RAMPS = {"yarn": ("beta_slow", "beta_fast"), "llama3": ("low_freq_factor", "high_freq_factor")}


def quantization_problems(quantization: Any) -> list[str]:
    method, fmt = quantization.quant_method, quantization.fmt
    found = []
    known = {("fp8", "e4m3"), *(("compressed-tensors", fmt) for fmt in COMPRESSED)}
    if (method, fmt) not in known:
        found.append(f"{method!r} with fmt {fmt!r} is not 'fp8' with fmt 'e4m3'")
    sides = quantization.weight_block_size
    if len(sides) != 2 or not all(accepts(int, side) and side > 0 for side in sides):
        found.append(f"weight_block_size must be two positive sides, got {list(sides)}")
    if quantization.activation_scheme != "dynamic":
        found.append(f"activation_scheme {quantization.activation_scheme!r} is not 'dynamic'")
    return found


def _range_problems(known: dict[str, Any]) -> list[str]:
    """Values outside their range; they become unknown, for other rules divide by them."""
    found = []
    for names, least, what in ((_POSITIVE, 0, "positive"), (_NOT_NEGATIVE, -1, "0 or more")):
        for name in names:
            value = known.get(name)
            if value is not None and value <= least:
                found.append(f"{name} must be {what}, got {value}")
                known[name] = None
    for name, choices in _CHOICES.items():
        if known.get(name) is not None and known[name] not in choices:
            found.append(f"{name} {known[name]!r} is not one of {choices}")
            known[name] = None
    return found


def _kind_problems(c: Any, given: set[str]) -> list[str]:
    """Fields that this model type needs, or has no place for."""
    found, needed = [], ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    is_deepseek = (c.model_type or "").startswith("deepseek")
    if "kv_lora_rank" in given:
        found += [
            f"kv_lora_rank is set, so {name} is needed" for name in needed if name not in given
        ]
        if c.model_type is not None and not is_deepseek:
            found.append(f"kv_lora_rank is set, but model_type {c.model_type!r} is not MLA")
        if "head_dim" in given:
            found.append("head_dim has no meaning in MLA: its head is nope + rope wide")
    elif is_deepseek:
        found.append(f"model_type {c.model_type!r} is MLA, so kv_lora_rank is needed")
    if c.model_type == "qwen2" and c.attention_bias:
        found.append("attention_bias cannot be honoured: qwen2 has its bias on q, k and v alone")
    if c.model_type in ("llama", "qwen2") and c.rope_interleave:
        found.append(f"rope_interleave cannot be honoured: {c.model_type} pairs (0, d/2), ...")
    if c.model_type == "deepseek_v2" and c.rope_interleave is False:
        found.append("rope_interleave = False cannot be honoured: deepseek_v2 pairs (0, 1), ...")
    return found


def _head_problems(c: Any) -> list[str]:
    found, heads, kv_heads = [], c.num_attention_heads, c.num_key_value_heads
    rope_dim = c.qk_rope_head_dim if c.kv_lora_rank else c.head_dim
    if rope_dim is None and heads and c.hidden_size and not c.kv_lora_rank:
        if c.hidden_size % heads:
            found.append(f"hidden_size {c.hidden_size} does not divide by {heads} heads")
        else:
            rope_dim = c.hidden_size // heads
    if rope_dim is not None and rope_dim % 2:
        found.append(f"rotary positions need an even dimension, got {rope_dim}")
    if heads and kv_heads and c.kv_lora_rank and heads != kv_heads:
        found.append(f"MLA has a key for each of its {heads} heads, not {kv_heads}")
    elif heads and kv_heads and heads % kv_heads:
        found.append(f"{heads} heads do not divide by {kv_heads} key-value heads")
    return found


def _expert_problems(c: Any, given: set[str]) -> list[str]:
    if "n_routed_experts" not in given:
        return []
    needed = ("num_experts_per_tok", "moe_intermediate_size")
    found = [
        f"n_routed_experts is set, so {name} is needed" for name in needed if name not in given
    ]
    experts, chosen = c.n_routed_experts, c.num_experts_per_tok
    if experts and chosen and chosen > experts:
        found.append(f"{chosen} experts a token, but only {experts} exist")
    return found + _group_problems(c, experts, chosen) if experts and c.n_group else found


def _group_problems(c: Any, experts: int, chosen: int | None) -> list[str]:
    groups, kept = c.n_group, c.topk_group
    if experts % groups:
        return [f"{experts} experts do not divide into {groups} groups"]
    found, size = [], experts // groups
    if kept and kept > groups:
        found.append(f"topk_group {kept} is more than the {groups} groups")
    elif (
        kept and chosen and chosen <= experts and chosen > kept * size and c.topk_method != "greedy"
    ):
        found.append(f"{chosen} experts a token do not fit in {kept} groups of {size}")
    if c.topk_method == "noaux_tc" and size < 2:
        found.append(f"noaux_tc scores a group by its best two experts, but groups have {size}")
    return found
