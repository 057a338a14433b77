"""Hugging Face's `config.json`, read into our field names and written from them.

Two ways of writing positions exist: `rope_theta` and `rope_scaling` (as published), and
`rope_parameters` (transformers 5). Both are read; the first is written, and transformers reads it.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

MODEL_TYPES = ("deepseek_v3", "deepseek_v2", "llama", "qwen2")
ROPE_TYPES = ("yarn", "llama3")
SCORING = ("sigmoid", "softmax")
TOPK = ("noaux_tc", "group_limited_greedy", "greedy")

# Fields that say nothing about the arithmetic of a forward pass.
IGNORED = frozenset(
    ["architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "pretraining_tp", "ep_size", "aux_loss_alpha", "seq_aux", "max_window_layers", "sliding_window", "name_or_path", "_name_or_path", "chunk_size_feed_forward", "id2label", "label2id", "is_encoder_decoder", "output_attentions", "output_hidden_states", "problem_type", "return_dict", "tokenizer_class", "is_decoder", "add_cross_attention", "cross_attention_hidden_size", "finetuning_task", "task_specific_params", "prefix", "qk_head_dim", "router_aux_loss_coef", "moe_layer_freq_comment", "unsloth_version"]
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
# What transformers 5 leaves out because its model class hard-codes it.
IMPLIED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True},
    "deepseek_v2": {"scoring_func": "softmax", "topk_method": "greedy", "rope_interleave": True},
    "llama": {"rope_interleave": False},
    "qwen2": {"rope_interleave": False, "qkv_bias": True},
}


class ConfigError(ValueError):
    """Everything that is wrong with a config, at once. `problems` lists it."""

    def __init__(self, problems: list[str]):
        self.problems = list(dict.fromkeys(problems))
        listed = "\n".join(f"  - {problem}" for problem in self.problems)
        count = len(self.problems)
        what = f"This model config has {count} problem{'s' if count > 1 else ''}:"
        super().__init__(f"{what}\n{listed}\nNo model can be built from it. Mend the fields named.")


def read(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Our fields from a parsed `config.json`, and what in it cannot be honoured."""
    if not isinstance(raw, Mapping):
        return {}, [f"a config is an object of fields, got a {type(raw).__name__}"]
    kind = raw.get("model_type")
    if kind not in MODEL_TYPES:
        return {}, [f"model_type {kind!r} is not one of {MODEL_TYPES}"]
    values = {**IMPLIED[kind], **raw}
    problems = [
        f"{name} = {raw[name]!r} cannot be honoured: only {value!r} is implemented"
        for name, value in FIXED.items()
        if raw.get(name, value) != value
    ]
    if any(layer != "full_attention" for layer in raw.get("layer_types") or []):
        problems.append("layer_types: only 'full_attention' is implemented")
    for name in (*IGNORED, *FIXED, "layer_types"):
        values.pop(name, None)
    if kind == "deepseek_v2" and values.get("norm_topk_prob") is None:
        values["norm_topk_prob"] = False
    if kind.startswith("deepseek"):
        values.pop("head_dim", None)  # transformers keeps the rope dimension under this name
        values.setdefault("kv_lora_rank", None)
    problems += _read_positions(values)
    problems += _read_quantization(values)
    return values, problems


def _read_positions(values: dict[str, Any]) -> list[str]:
    """Fold `rope_parameters` or `rope_scaling` into `rope_theta` and one plain dictionary."""
    rope = values.pop("rope_parameters", None)
    rope = values.get("rope_scaling") if rope is None else rope
    values["rope_scaling"] = None
    if rope is None:
        return []
    if not isinstance(rope, Mapping):
        return [f"rope_scaling must be an object, got {rope!r}"]
    rope = dict(rope)
    kind = rope.pop("type", None)
    kind = rope.pop("rope_type", kind)
    if "rope_theta" in rope:
        values["rope_theta"] = rope.pop("rope_theta")
    for name, neutral in (("attention_factor", None), ("truncate", True)):
        if rope.pop(name, neutral) != neutral:
            return [f"rope {name} cannot be honoured: only {neutral!r} is implemented"]
    if rope.pop("partial_rotary_factor", 1.0) != 1.0:
        return ["rope partial_rotary_factor cannot be honoured: only 1.0 is implemented"]
    if kind in (None, "default"):
        return []
    if kind not in ROPE_TYPES:
        return [f"rope_type {kind!r} cannot be honoured: only {ROPE_TYPES} are implemented"]
    rope.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
    values["rope_scaling"] = {"rope_type": kind, **rope}
    return []


def _read_quantization(values: dict[str, Any]) -> list[str]:
    quantization = values.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return [] if quantization is None else ["quantization_config must be an object"]
    known = ("quant_method", "fmt", "weight_block_size", "activation_scheme")
    kept = {name: quantization[name] for name in known if name in quantization}
    if isinstance(kept.get("weight_block_size"), list):
        kept["weight_block_size"] = tuple(kept["weight_block_size"])
    values["quantization_config"] = kept
    return []


def write(config: Any) -> dict[str, Any]:
    """The config as Hugging Face publishes it: no field that is unset or that its type implies."""
    kind = config.model_type
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    for name in ("qkv_bias",) if kind == "qwen2" else ():
        values.pop(name)
    if values["rope_scaling"] is not None:
        values["rope_scaling"] = _write_scaling(values["rope_scaling"])
    if values["quantization_config"] is not None:
        quantization = asdict(values["quantization_config"])
        quantization["weight_block_size"] = list(quantization["weight_block_size"])
        values["quantization_config"] = quantization
    written = {name: value for name, value in values.items() if value is not None}
    return {"hidden_act": "silu", **written}


def _write_scaling(scaling: Any) -> dict[str, Any]:
    other = ("low_freq_factor", "high_freq_factor")
    yarn = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    left_out = other if scaling.rope_type == "yarn" else yarn
    values = asdict(scaling)
    values["type"] = values["rope_type"]
    return {k: v for k, v in values.items() if k not in left_out and v is not None}
