"""Hugging Face's `config.json`, read into our field names and written from them.

Two ways of writing positions exist: `rope_theta` and `rope_scaling` (as published), and
`rope_parameters` (transformers 5). Both are read; the first is written, and transformers reads it.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

MODEL_TYPES = ("deepseek_v3", "deepseek_v2", "llama", "qwen2")
SCORING = ("sigmoid", "softmax")
TOPK = ("noaux_tc", "group_limited_greedy", "greedy")
# The fields of each way to stretch positions, beside the two that all of them have.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}
_ALL_ROPE = ("factor", "original_max_position_embeddings")

# Fields that change nothing in the arithmetic of a forward pass: where files and tokens are, how
# transformers runs and reports, how the model was trained, and what follows from other fields.
IGNORED = frozenset(
    (
        *("architectures", "auto_map", "_name_or_path", "transformers_version"),
        *("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id"),
        *("use_cache", "output_attentions", "output_hidden_states", "output_router_logits"),
        *("return_dict", "chunk_size_feed_forward", "is_encoder_decoder", "problem_type"),
        *("id2label", "label2id", "pretraining_tp", "ep_size", "aux_loss_alpha", "seq_aux"),
        *("qk_head_dim", "sliding_window", "max_window_layers"),
    )
)
# Fields that do, with the one value this package computes with.
FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "use_sliding_window": False,
    "moe_layer_freq": 1,
    "partial_rotary_factor": 1.0,
}
# What a model type settles where a config leaves it out: transformers hard-codes it in the class.
IMPLIED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"rope_interleave": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "deepseek_v2": {"rope_interleave": True, "scoring_func": "softmax", "topk_method": "greedy"},
    "llama": {"rope_interleave": False},
    "qwen2": {"rope_interleave": False},
}
_MOE = ("n_shared_experts", "n_group", "topk_group", "scoring_func", "topk_method")
_MOE_VALUES = {"norm_topk_prob": True, "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 0}


class ConfigError(ValueError):
    """Everything that is wrong with a config, at once. `problems` lists it."""

    def __init__(self, problems: list[str]):
        self.problems = list(dict.fromkeys(problems))
        listed = "\n".join(f"  - {problem}" for problem in self.problems)
        count = len(self.problems)
        what = f"This model config has {count} problem{'s' if count > 1 else ''}:"
        super().__init__(f"{what}\n{listed}\nNo model can be built from it. Mend the fields named.")


def settled(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a config may leave open (None) and its model type or its sizes decide."""
    kind = values.get("model_type")
    kind = kind if isinstance(kind, str) else None
    open_fields = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True}
    open_fields |= {"n_group": 1, "topk_group": 1, "n_shared_experts": 0}
    open_fields |= {"norm_topk_prob": kind != "deepseek_v2"}
    open_fields |= IMPLIED.get(kind, {})
    found = {name: value for name, value in open_fields.items() if values.get(name) is None}
    sizes = values.get("first_k_dense_replace"), values.get("num_hidden_layers")
    if values.get("n_routed_experts") is None and all(type(n) is int and n >= 0 for n in sizes):
        # No expert exists: every layer is dense, and this is how a DeepSeek config says so.
        found["first_k_dense_replace"] = values["num_hidden_layers"]
    return found


def read(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Our fields from a parsed `config.json`, and what in it cannot be honoured."""
    if not isinstance(raw, Mapping):
        return {}, [f"a config is an object of fields, got a {type(raw).__name__}"]
    kind = raw.get("model_type")
    values = {name: value for name, value in raw.items() if isinstance(name, str)}
    problems = [f"field names are text, got {name!r}" for name in raw if name not in values]
    problems += [
        f"{name} = {raw[name]!r} cannot be honoured: only {value!r} is implemented"
        for name, value in FIXED.items()
        if raw.get(name, value) != value
    ]
    layer_types = values.pop("layer_types", None) or []
    if not isinstance(layer_types, list) or set(map(str, layer_types)) - {"full_attention"}:
        problems.append("layer_types cannot be honoured: only 'full_attention' is implemented")
    for name in (*IGNORED, *FIXED):
        values.pop(name, None)
    if str(kind).startswith("deepseek"):
        values.pop("head_dim", None)  # transformers keeps the rope dimension under this name
    problems += _read_positions(values)
    problems += _read_quantization(values)
    return values, problems


def _read_positions(values: dict[str, Any]) -> list[str]:
    """Fold `rope_parameters` or `rope_scaling` into `rope_theta` and one plain dictionary."""
    new, old = values.pop("rope_parameters", None), values.pop("rope_scaling", None)
    rope = old if new is None else new
    values["rope_scaling"] = None
    if rope is None:
        return []
    if not isinstance(rope, Mapping):
        return [f"rope_scaling must be an object, got {rope!r}"]
    if new is not None and old is not None and new != old:
        return ["rope_parameters and rope_scaling disagree: keep one of them"]
    rope = dict(rope)
    kinds = {rope.pop(name) for name in ("type", "rope_type") if isinstance(rope.get(name), str)}
    kind = kinds.pop() if len(kinds) == 1 else "default" if not kinds else f"one of {kinds}"
    if "rope_theta" in rope:
        values["rope_theta"] = rope.pop("rope_theta")
    problems = [
        f"rope_scaling.{name} cannot be honoured: only {neutral!r} is implemented"
        for name, neutral in _NEUTRAL_ROPE.items()
        if rope.pop(name, neutral) != neutral
    ]
    if kind != "default" and kind not in ROPE_TYPES:
        kinds = tuple(ROPE_TYPES)
        return [*problems, f"rope_type {kind!r} cannot be honoured: only {kinds} are implemented"]
    known = () if kind == "default" else (*_ALL_ROPE, *ROPE_TYPES[kind])
    unknown = sorted(str(name) for name in rope if name not in known)
    problems += [f"rope_scaling.{name} is not understood for {kind!r}" for name in unknown]
    if kind != "default":
        rope.setdefault(_ALL_ROPE[1], values.get("max_position_embeddings"))
        values["rope_scaling"] = {"rope_type": kind, **{k: rope[k] for k in known if k in rope}}
    return problems


_NEUTRAL_ROPE = {"attention_factor": None, "truncate": True, "partial_rotary_factor": 1.0}


def _read_quantization(values: dict[str, Any]) -> list[str]:
    """Keep DeepSeek-V3's own FP8; refuse by name any other method and any field not understood."""
    raw = values.get("quantization_config")
    values["quantization_config"] = None
    if raw is None:
        return []
    if not isinstance(raw, Mapping):
        return [f"quantization_config must be an object, got {raw!r}"]
    method, fmt = raw.get("quant_method"), raw.get("fmt", "e4m3")
    if method == "compressed-tensors":
        fmt = next((fmt for fmt in COMPRESSED if _is_compressed(raw, fmt)), None)
        values["quantization_config"] = fmt and {"quant_method": method, "fmt": fmt}
        return [] if fmt else [_NOT_COMPRESSED]
    if (method, fmt) != ("fp8", "e4m3"):
        what = repr(method) if method != "fp8" else f"'fp8' with fmt {fmt!r}"
        only = "only 'fp8' with fmt 'e4m3' is implemented"
        return [f"quantization_config: {what} cannot be honoured, {only}"]
    kept = {"quant_method": method, "fmt": fmt}
    for name in ("weight_block_size", "activation_scheme"):
        if name in raw:
            kept[name] = tuple(raw[name]) if isinstance(raw[name], list) else raw[name]
    values["quantization_config"] = kept
    left = sorted(str(name) for name in raw if name not in kept and raw[name] not in (None, []))
    return [f"quantization_config.{name} = {raw[name]!r} cannot be honoured" for name in left]


# Integer weights on disk, as the library compressed-tensors names them. INT8 tells whoever runs it
# to quantise each token's inputs as well, which is what makes its products integer products.
_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
COMPRESSED: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel", "group_size": None}, _TOKENS),
    "int4": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 128}, None),
}
_NOT_COMPRESSED = (
    "quantization_config: this kind of 'compressed-tensors' cannot be honoured, only symmetric "
    "integers: 'int-quantized' with 8 bits by channel, 'pack-quantized' with 4 bits by group of 128"
)


def _is_compressed(raw: Mapping[str, Any], fmt: str) -> bool:
    """Whether all weights are said to be stored as `fmt`, and no input by a fixed scale."""
    layout, weights, _ = COMPRESSED[fmt]
    groups = raw.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, Mapping) else []
    if raw.get("format") != layout or len(groups) != 1 or not isinstance(groups[0], Mapping):
        return False
    has, inputs = groups[0].get("weights"), groups[0].get("input_activations")
    plain = {**weights, "type": "int", "symmetric": True}
    return (
        isinstance(has, Mapping)
        and all(has.get(name) == value for name, value in plain.items())
        and (inputs is None or (isinstance(inputs, Mapping) and inputs.get("dynamic") is True))
    )


def _write_compressed(fmt: str) -> dict[str, Any]:
    layout, weights, inputs = COMPRESSED[fmt]
    weights = {**weights, "type": "int", "symmetric": True, "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    ignore = ["lm_head", r"re:.*\.mlp\.gate$", r"re:.*\.eh_proj$", r"re:.*\.shared_head\.head$"]
    how = {"quant_method": "compressed-tensors", "format": layout}
    how |= {"quantization_status": "compressed", "ignore": ignore}
    return {**how, "config_groups": {"group_0": {**group, "output_activations": None}}}


def write(config: Any) -> dict[str, Any]:
    """The config as Hugging Face publishes it: no field that is unset or that its type implies."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    if config.rope_scaling is not None:
        values["rope_scaling"] = _write_scaling(config.rope_scaling)
    if config.quantization_config is not None:
        values["quantization_config"] = _write_quantization(config.quantization_config)
    for name in _implied_fields(config):
        del values[name]
    # null says "queries are not compressed" and "as many as heads"; left out, transformers would
    # take the 671B model's
    kept = ("q_lora_rank", "num_key_value_heads") if config.is_mla else ()
    written = {k: v for k, v in values.items() if v is not None or k in kept}
    return {"hidden_act": "silu", **written}


def _write_quantization(stored: Any) -> dict[str, Any]:
    if stored.quant_method == "compressed-tensors":
        return _write_compressed(stored.fmt)
    return {**asdict(stored), "weight_block_size": list(stored.weight_block_size)}


def _implied_fields(config: Any) -> list[str]:
    """Fields that say nothing about this model: a dense model's routing, a plain model's layout."""
    if config.n_routed_experts is not None:
        return []
    layers = config.num_hidden_layers
    empty = {"model_type": config.model_type, "num_hidden_layers": layers}
    empty["first_k_dense_replace"] = 0
    implied = {name: value for name, value in settled(empty).items() if name in _MOE}
    implied |= {**_MOE_VALUES, "norm_topk_prob": config.model_type != "deepseek_v2"}
    if not config.is_mla:
        implied |= settled(empty)
    else:
        del implied["num_nextn_predict_layers"]
    return [name for name, value in implied.items() if getattr(config, name) == value]


def _write_scaling(scaling: Any) -> dict[str, Any]:
    names = (*_ALL_ROPE, *ROPE_TYPES[scaling.rope_type])
    values = {name: getattr(scaling, name) for name in names}
    kind = {"type": scaling.rope_type, "rope_type": scaling.rope_type}
    return {**kind, **{name: value for name, value in values.items() if value is not None}}
