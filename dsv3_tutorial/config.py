"""One flat description of a model, in Hugging Face's field names.

`ModelConfig.from_dict` reads a published `config.json` of DeepSeek-V2/V3, Llama or Qwen2 kind as it
is, and refuses by name whatever would change the arithmetic and is not implemented here. A config
that exists is possible: all that is wrong with it is reported in one ConfigError, before it is made.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

from dsv3_tutorial import huggingface
from dsv3_tutorial.files import data_path
from dsv3_tutorial.huggingface import ConfigError


@dataclass(frozen=True)
class RopeScaling:
    """How positions beyond the trained ones are rotated: `yarn` (DeepSeek) or `llama3` (Llama 3.1)."""

    rope_type: str
    factor: float
    original_max_position_embeddings: int
    # yarn (arXiv 2309.00071): which frequencies are stretched, and how scores are re-scaled
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    # llama3
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def problems(self) -> list[str]:
        found = []
        if self.rope_type not in huggingface.ROPE_TYPES:
            found.append(f"rope_type {self.rope_type!r} is not one of {huggingface.ROPE_TYPES}")
        if self.factor < 1:
            found.append(f"rope factor must be at least 1, got {self.factor}")
        if self.original_max_position_embeddings < 1:
            found.append("rope original_max_position_embeddings must be positive")
        if self.rope_type == "yarn" and self.beta_fast <= self.beta_slow:
            found.append("yarn needs beta_fast > beta_slow")
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            found.append("llama3 needs high_freq_factor > low_freq_factor")
        return found


@dataclass(frozen=True)
class QuantizationConfig:
    """How a checkpoint's weights are stored: FP8 with one scale per block (DeepSeek-V3's own)."""

    quant_method: str = "fp8"
    fmt: str = "e4m3"
    weight_block_size: tuple[int, int] = (128, 128)
    activation_scheme: str = "dynamic"

    def problems(self) -> list[str]:
        if self.quant_method != "fp8" or self.fmt != "e4m3":
            return [f"quantization {self.quant_method}/{self.fmt} is not fp8/e4m3"]
        return []


@dataclass(frozen=True)
class ModelConfig:
    """A model's sizes and choices. Raises ConfigError with every problem at once."""

    # required: the sizes no model lacks
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    model_type: str = "deepseek_v3"
    num_key_value_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # llama, qwen2. None: hidden_size / num_attention_heads
    # mla: kv_lora_rank makes the model an MLA model
    q_lora_rank: int | None = None  # None: queries are not compressed (V2-Lite, Moonlight)
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    # moe: n_routed_experts makes the model an MoE model
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    first_k_dense_replace: int = 0
    n_group: int = 1
    topk_group: int = 1
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 0
    # position
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_interleave: bool = True  # pairs are (0, 1), (2, 3), ...; Llama pairs (0, d/2), ...
    # the rest
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False  # DeepSeek: on the down projections and o_proj; Llama: on all
    qkv_bias: bool = False  # Qwen2: on q, k and v alone
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    quantization_config: QuantizationConfig | None = None

    def __post_init__(self) -> None:
        problems = _type_problems(self)
        problems = problems or [
            *_size_problems(self),
            *_moe_problems(self),
            *_nested_problems(self),
        ]
        if problems:
            raise ConfigError(problems)

    @property
    def is_mla(self) -> bool:
        return self.kv_lora_rank is not None

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Width of one head's key in the plain attentions (Llama, Qwen2)."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key: N + R in MLA, `head_size` otherwise."""
        if self.is_mla:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_size

    @property
    def value_dim(self) -> int:
        return self.v_head_dim if self.is_mla else self.head_size

    @property
    def rope_dim(self) -> int:
        return self.qk_rope_head_dim if self.is_mla else self.head_size

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(qk_head_dim), times YaRN's temperature squared where `mscale_all_dim` asks for it.

        YaRN stretches positions, which flattens the scores; m = 0.1 mscale_all_dim ln(factor) + 1
        multiplies query and key to sharpen them again (arXiv 2309.00071, section 3.4).
        """
        scale, rope = self.qk_head_dim**-0.5, self.rope_scaling
        if not self.is_mla or rope is None or rope.rope_type != "yarn" or not rope.mscale_all_dim:
            return scale
        return scale * (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2

    def is_moe_layer(self, layer: int) -> bool:
        return self.n_routed_experts is not None and layer >= self.first_k_dense_replace

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """A config from the parsed `config.json` of a Hugging Face checkpoint."""
        values, problems = huggingface.read(raw)
        names = {f.name for f in fields(cls)}
        required = [f.name for f in fields(cls) if f.default is MISSING]
        problems += [f"missing field {name!r}" for name in required if name not in values]
        problems += [f"unknown field {name!r}" for name in sorted(set(values) - names)]
        nested = {"rope_scaling": RopeScaling, "quantization_config": QuantizationConfig}
        for name, kind in nested.items():
            values[name], found = _nested(kind, name, values.get(name))
            problems += found
        if problems:
            known = {k: v for k, v in values.items() if k in names}
            raise ConfigError([*problems, *_partial_problems(cls, known, required)])
        return cls(**values)

    @classmethod
    def from_json(cls, path: str | Path) -> "ModelConfig":
        """A config from a `config.json`, or from a folder that holds one."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError([f"there is no file {path.name!r} in {path.parent.name!r}"]) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError([f"{path.name} is not JSON: {error}"]) from None
        if not isinstance(raw, dict):
            raise ConfigError([f"{path.name} holds a {type(raw).__name__}, not an object"])
        return cls.from_dict(raw)

    @classmethod
    def named(cls, name: str) -> "ModelConfig":
        """One of the presets under data/models/."""
        if name not in preset_names():
            raise ConfigError([f"no preset {name!r}; there are {', '.join(preset_names())}"])
        return cls.from_json(data_path("models", f"{name}.json"))

    def to_dict(self) -> dict[str, Any]:
        """The config as Hugging Face writes it: `from_dict` reads it back to an equal config."""
        return huggingface.write(self)


def preset_names() -> list[str]:
    """The names that `ModelConfig.named` knows."""
    return sorted(path.stem for path in data_path("models").glob("*.json"))


def _accepts(annotation: Any, value: Any) -> bool:
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    if value is None:
        return NoneType in kinds
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return any(
        isinstance(value, kind) or (kind is float and isinstance(value, int))
        for kind in (getattr(kind, "__origin__", kind) for kind in kinds)
    )


def _type_problems(config: Any) -> list[str]:
    hints = get_type_hints(type(config))
    return [
        f"{name} must be {getattr(hint, '__name__', hint)}, got {getattr(config, name)!r}"
        for name, hint in hints.items()
        if not _accepts(hint, getattr(config, name))
    ]


def _nested(kind: type, name: str, raw: Mapping[str, Any] | None) -> tuple[Any, list[str]]:
    """The nested config `kind` made from its dictionary, or None and why not."""
    if raw is None:
        return None, []
    known = {f.name for f in fields(kind)}
    missing = [f.name for f in fields(kind) if f.default is MISSING and f.name not in raw]
    problems = [f"{name}.{key} is not understood" for key in sorted(set(raw) - known)]
    problems += [f"{name}.{key} is missing" for key in missing]
    if problems:
        return None, problems
    made = kind(**raw)
    return made, [f"{name}: {problem}" for problem in _type_problems(made)]


def _partial_problems(cls: type, known: dict[str, Any], required: list[str]) -> list[str]:
    """What is wrong with the fields that could be read, when others could not."""
    if any(name not in known for name in required):
        return []
    try:
        cls(**known)
    except ConfigError as error:
        return error.problems
    return []


def _nested_problems(c: ModelConfig) -> list[str]:
    parts = (c.rope_scaling, c.quantization_config)
    return [
        problem for part in parts if part for problem in _type_problems(part) or part.problems()
    ]


def _size_problems(c: ModelConfig) -> list[str]:
    from_one = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "q_lora_rank", "kv_lora_rank"),
        *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings"),
        *("rms_norm_eps", "rope_theta", "initializer_range"),
    )
    found = [
        f"{name} must be positive, got {value}"
        for name in from_one
        if (value := getattr(c, name)) is not None and value <= 0
    ]
    if c.model_type not in huggingface.MODEL_TYPES:
        found.append(f"model_type {c.model_type!r} is not one of {huggingface.MODEL_TYPES}")
    if c.is_mla:
        needed = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        found += [f"kv_lora_rank is set, so {n} is needed" for n in needed if getattr(c, n) is None]
    elif c.model_type.startswith("deepseek"):
        found.append(f"model_type {c.model_type!r} is MLA, so kv_lora_rank is needed")
    if found:
        return found  # what follows divides by these sizes
    if not c.is_mla and c.head_dim is None and c.hidden_size % c.num_attention_heads:
        found.append(
            f"hidden_size {c.hidden_size} does not divide by {c.num_attention_heads} heads"
        )
    elif c.rope_dim % 2:
        found.append(f"rotary positions need an even dimension, got {c.rope_dim}")
    if c.num_attention_heads % c.kv_heads:
        heads = f"{c.num_attention_heads} heads do not divide by {c.kv_heads}"
        found.append(f"{heads} key-value heads")
    return found


def _moe_problems(c: ModelConfig) -> list[str]:
    found = []
    if not 0 <= c.first_k_dense_replace <= c.num_hidden_layers:
        found.append(f"first_k_dense_replace must be 0 to {c.num_hidden_layers} (the layers)")
    if c.num_nextn_predict_layers < 0:
        found.append(
            f"num_nextn_predict_layers must be 0 or more, got {c.num_nextn_predict_layers}"
        )
    if c.n_routed_experts is None:
        return found
    needed = ("num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group")
    for name in ("n_routed_experts", *needed):
        value = getattr(c, name)
        if value is None:
            found.append(f"n_routed_experts is set, so {name} is needed")
        elif value <= 0:
            found.append(f"{name} must be positive, got {value}")
    if c.n_shared_experts is not None and c.n_shared_experts < 0:
        found.append(f"n_shared_experts must be 0 or more, got {c.n_shared_experts}")
    if c.scoring_func not in huggingface.SCORING:
        found.append(f"scoring_func {c.scoring_func!r} is not one of {huggingface.SCORING}")
    if c.topk_method not in huggingface.TOPK:
        found.append(f"topk_method {c.topk_method!r} is not one of {huggingface.TOPK}")
    return found or _group_problems(c)


def _group_problems(c: ModelConfig) -> list[str]:
    found = []
    if c.num_experts_per_tok > c.n_routed_experts:
        found.append(
            f"{c.num_experts_per_tok} experts a token, but only {c.n_routed_experts} exist"
        )
    if c.n_routed_experts % c.n_group:
        found.append(f"{c.n_routed_experts} experts do not divide into {c.n_group} groups")
    elif c.topk_group > c.n_group:
        found.append(f"topk_group {c.topk_group} is more than the {c.n_group} groups")
    elif c.num_experts_per_tok > c.topk_group * (c.n_routed_experts // c.n_group):
        found.append(
            f"{c.num_experts_per_tok} experts a token do not fit in {c.topk_group} groups "
            f"of {c.n_routed_experts // c.n_group}"
        )
    return found
