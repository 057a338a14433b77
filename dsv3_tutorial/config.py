"""One flat description of a model, in Hugging Face's field names.

`ModelConfig.from_dict` reads a published `config.json` of DeepSeek-V2/V3, Llama or Qwen2 kind as it
is, and refuses by name whatever would change the arithmetic and is not implemented here. A config
that exists is possible: all that is wrong with it is told in one ConfigError, before it is made.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from dsv3_tutorial import config_checks, huggingface
from dsv3_tutorial.files import data_path
from dsv3_tutorial.huggingface import ConfigError

__all__ = ["ConfigError", "ModelConfig", "QuantizationConfig", "RopeScaling", "preset_names"]


@dataclass(frozen=True)
class RopeScaling:
    """How positions beyond the trained ones are rotated: `yarn` (DeepSeek) or `llama3` (Llama)."""

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
        found = config_checks.type_problems(vars(self), get_type_hints(RopeScaling))
        return found or config_checks.rope_problems(self)


@dataclass(frozen=True)
class QuantizationConfig:
    """How a checkpoint's weights are stored: FP8 with one scale per block (DeepSeek-V3's own).

    `compressed-tensors` with fmt "int8" has one scale per output, with "int4" one per group of 128;
    the block sizes then say nothing.
    """

    quant_method: str = "fp8"
    fmt: str = "e4m3"
    weight_block_size: tuple[int, int] = (128, 128)
    activation_scheme: str = "dynamic"

    @classmethod
    def of(cls, fmt: str) -> "QuantizationConfig":
        """The one for a weight format that a folder can hold: fp8, int8 or int4."""
        return cls() if fmt == "fp8" else cls("compressed-tensors", fmt)

    def problems(self) -> list[str]:
        found = config_checks.type_problems(vars(self), get_type_hints(QuantizationConfig))
        return found or config_checks.quantization_problems(self)


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
    # moe: n_routed_experts makes the model an MoE model. None: as the model type has it
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    first_k_dense_replace: int = 0  # without experts: all layers
    n_group: int | None = None
    topk_group: int | None = None
    scoring_func: str | None = None
    topk_method: str | None = None
    norm_topk_prob: bool | None = None
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 0
    # position
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_interleave: bool | None = None  # True: pairs are (0, 1), (2, 3), ...; Llama: (0, d/2), ...
    # the rest
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False  # DeepSeek: on the down projections and o_proj; Llama: on all
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    quantization_config: QuantizationConfig | None = None

    def __post_init__(self) -> None:
        for name, value in huggingface.settled(vars(self)).items():
            object.__setattr__(self, name, value)  # frozen from here on, open only until now
        problems = _problems(vars(self))
        if problems:
            raise ConfigError(problems)

    @property
    def is_mla(self) -> bool:
        return self.kv_lora_rank is not None

    @property
    def qkv_bias(self) -> bool:
        """Qwen2 has a bias on q, k and v, and none on the output."""
        return self.model_type == "qwen2"

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
        """What scores are multiplied by before the softmax, YaRN's temperature included."""
        # DeepSeek's modelling code for V2 and V3 does this, and so do transformers' V3 and, since
        # its pull request 47435 of July 2026, V2: before it transformers gave V2 no temperature.
        # DeepSeek's inference code takes `mscale` instead, and only past the original length; in
        # every published config the two fields are equal.
        rope = self.rope_scaling
        if not self.is_mla or rope is None or rope.rope_type != "yarn" or not rope.mscale_all_dim:
            return self.qk_head_dim**-0.5
        return yarn_softmax_scale(self.qk_head_dim, rope.factor, rope.mscale_all_dim)

    def is_moe_layer(self, layer: int) -> bool:
        return self.n_routed_experts is not None and layer >= self.first_k_dense_replace

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """A config from the parsed `config.json` of a Hugging Face checkpoint."""
        values, problems = huggingface.read(raw)
        if not isinstance(raw, Mapping):
            raise ConfigError(problems)
        defaults = {f.name: f.default for f in fields(cls)}
        required = [name for name, default in defaults.items() if default is MISSING]
        required.insert(0, "model_type")  # without it no other field has a sure meaning
        problems += [f"missing field {name!r}" for name in required if name not in values]
        problems += [f"unknown field {name!r}" for name in sorted(set(values) - set(defaults))]
        for name, kind in (
            ("rope_scaling", RopeScaling),
            ("quantization_config", QuantizationConfig),
        ):
            values[name], found = _nested(kind, name, values[name])
            problems += found
        known = {name: values[name] for name in defaults if name in values}
        if problems:
            optional = {k: v for k, v in defaults.items() if k not in required}
            rest = {**optional, **known}
            raise ConfigError([*problems, *_problems({**rest, **huggingface.settled(rest)})])
        return cls(**known)

    @classmethod
    def from_json(cls, path: str | Path) -> "ModelConfig":
        """A config from a `config.json`, or from a folder that holds one."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError([f"there is no file {path.name!r} in {path.parent.name!r}"]) from None
        except OSError as error:
            raise ConfigError([f"{path.name} cannot be read: {error.strerror}"]) from None
        except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError
            raise ConfigError([f"{path.name} is not JSON: {error}"]) from None
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


def yarn_softmax_scale(qk_head_dim: int, factor: float, mscale_all_dim: float) -> float:
    """1 / sqrt(qk_head_dim), times YaRN's temperature squared.

    YaRN stretches positions, which flattens the scores; m = 0.1 mscale_all_dim ln(factor) + 1
    multiplies query and key to sharpen them again (arXiv 2309.00071, section 3.4).
    """
    temperature = 0.1 * mscale_all_dim * math.log(factor) + 1.0
    return qk_head_dim**-0.5 * temperature**2


def preset_names() -> list[str]:
    """The names that `ModelConfig.named` knows."""
    return sorted(path.stem for path in data_path("models").glob("*.json"))


def _problems(values: Mapping[str, Any]) -> list[str]:
    found = config_checks.problems(values, get_type_hints(ModelConfig))
    for name, kind in (("rope_scaling", RopeScaling), ("quantization_config", QuantizationConfig)):
        if isinstance(values.get(name), kind):
            found += [f"{name}: {problem}" for problem in values[name].problems()]
    return found


def _nested(kind: type, name: str, raw: Mapping[str, Any] | None) -> tuple[Any, list[str]]:
    """The nested config `kind` made from its dictionary, or None and which fields it lacks."""
    if raw is None:
        return None, []
    missing = [f.name for f in fields(kind) if f.default is MISSING and raw.get(f.name) is None]
    made = kind(
        **{**raw, **dict.fromkeys(missing, 1)}
    )  # 1 passes every check: the rest still speaks
    if not missing:
        return made, []
    lacks = [f"{name}.{field} is missing" for field in missing]
    return None, lacks + [f"{name}: {problem}" for problem in made.problems()]
