"""A model from a few fields, and the shapes that published models keep to.

Fields have Hugging Face's names. What a designer does not say is taken as DeepSeek-V3 has it: heads
128 wide, rotary keys of 64, one shared expert, one dense layer first, a vocabulary of 129,280.
"""

import difflib
import math
from collections.abc import Mapping
from typing import Any

from dsv3_tutorial.config import ConfigError, ModelConfig
from dsv3_tutorial.cost import memory

REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL = (
    *("num_key_value_heads", "kv_lora_rank", "q_lora_rank", "intermediate_size"),
    *("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts"),
    *("first_k_dense_replace", "n_group", "topk_group", "num_nextn_predict_layers"),
)
FIELDS = (*REQUIRED, *OPTIONAL)
VOCABULARY, HEAD, ROPE = 129_280, 128, 64

# Edges that the published models under data/models keep to, most of them with room. They keep a
# design from winning by a shape of which no model here has shown that it learns.
ASPECT = 160  # hidden_size a layer, at the most
QUERIES = 0.5  # numbers of all heads' queries for one of hidden_size, at the least
CACHE = 1 / 16  # numbers that a token caches in a layer, for one of hidden_size, at the least
KV_HEADS = 8  # without a latent, at the least: V2's trials found that few of them learn less
RANK = 1 / 8  # q_lora_rank, where given, for one of hidden_size, at the least
DENSE = (1 / 10, 3)  # dense layers before experts: this share of all and so many, at the most
EXPERT = 1 / 8  # an expert's width for one of hidden_size, at the least
MET = 2  # routed experts of a token, at the least, and shared ones at most as many as those
WIDTH = 8  # feed-forward width that a token meets for one of hidden_size, at the most
LARGEST = {"num_hidden_layers": 200, "n_routed_experts": 2048}  # more takes long to plan
_MEANT = {  # what people write, where the nearest spelling is another field
    **{"top_k": "num_experts_per_tok", "topk": "num_experts_per_tok"},
    **{"heads": "num_attention_heads", "n_heads": "num_attention_heads"},
    **{"experts": "n_routed_experts", "n_experts": "n_routed_experts"},
    **{"num_experts": "n_routed_experts", "latent": "kv_lora_rank"},
    **{"d_model": "hidden_size", "intermediate": "intermediate_size"},
}

_DENSE = ": a model without n_routed_experts is dense and needs it"


def model(**fields: Any) -> ModelConfig:
    """The model with these fields. kv_lora_rank makes it MLA, n_routed_experts MoE.

    Without kv_lora_rank num_key_value_heads are cached, as many as heads where it is not given.
    intermediate_size is the dense layers' width; beside experts it is that of all a token meets.
    Raises ConfigError with everything that is wrong, unknown fields with the nearest known one.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    if problems := [*_wrong_names(fields), *_too_large(fields)]:
        raise ConfigError(problems)
    made = ModelConfig(**{**_defaults(fields), **fields})
    if made.n_routed_experts and not made.is_moe_layer(made.num_hidden_layers - 1):
        raise ConfigError(
            [
                f"first_k_dense_replace is {made.first_k_dense_replace} of "
                f"{made.num_hidden_layers} layers, so no layer has the experts"
            ]
        )
    return made


def shape_problems(cfg: ModelConfig) -> list[str]:
    """Where a model leaves the shapes that published ones keep to, each with both numbers."""
    found, d, layers = [], cfg.hidden_size, cfg.num_hidden_layers
    queries = cfg.num_attention_heads * cfg.qk_head_dim
    cached = memory.kv_elements_per_token_and_layer(cfg)
    if d > ASPECT * layers:
        found.append(
            f"hidden_size is {d / layers:,.0f} for each layer, and no published model here goes "
            f"beyond {ASPECT}: add layers or make them narrower"
        )
    if queries < QUERIES * d:
        found.append(
            f"the heads' queries are {queries:,} numbers wide and hidden_size is {d:,}: at least "
            f"half of it is asked for, so take more heads"
        )
    kv_heads = cfg.num_key_value_heads or cfg.num_attention_heads
    if cfg.kv_lora_rank is None and kv_heads < KV_HEADS:
        found.append(
            f"{kv_heads} key-value heads, and no published model here has fewer "
            f"than {KV_HEADS}: take {KV_HEADS} or more, or a latent (kv_lora_rank)"
        )
    elif cached < CACHE * d:
        found.append(
            f"a token caches {cached:,} numbers in a layer, and 1/16 of hidden_size is "
            f"{CACHE * d:,.0f}: take a larger kv_lora_rank or more num_key_value_heads"
        )
    if cfg.q_lora_rank is not None and cfg.q_lora_rank < RANK * d:
        found.append(
            f"q_lora_rank is {cfg.q_lora_rank:,}, and 1/8 of hidden_size is {RANK * d:,.0f}: take "
            "a larger one, or leave it out"
        )
    return [*found, *_feed_forward_problems(cfg)]


def _feed_forward_problems(cfg: ModelConfig) -> list[str]:
    found, d, width = [], cfg.hidden_size, cfg.moe_intermediate_size
    met, shared = cfg.num_experts_per_tok, cfg.n_shared_experts or 0
    widest = cfg.intermediate_size
    if width is not None:
        found += _dense_problems(cfg)
        widest = max(widest, (met + shared) * width)
        if width < EXPERT * d:
            found.append(
                f"an expert is {width:,} wide, and 1/8 of hidden_size is {EXPERT * d:,.0f}: "
                "products so narrow run far below the rates assumed, so take fewer and wider "
                "experts"
            )
        if met < MET or shared > met:
            found.append(
                f"a token meets {met} routed and {shared} shared experts: at least {MET} routed "
                "ones are asked for, and at most as many shared ones as routed ones"
            )
    if widest > WIDTH * d:
        found.append(
            f"the feed-forward that a token meets is {widest:,} wide, {widest / d:.1f} times "
            f"hidden_size, and {WIDTH} times is the most: add layers instead"
        )
    return found


def _dense_problems(cfg: ModelConfig) -> list[str]:
    dense, layers, (share, more) = cfg.first_k_dense_replace, cfg.num_hidden_layers, DENSE
    if dense <= share * layers + more:
        return []
    return [
        f"first_k_dense_replace is {dense} of {layers} layers, and a tenth of them and {more} are "
        f"at most {math.floor(share * layers + more)}: give more layers experts"
    ]


def _defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 163_840}
    if "kv_lora_rank" in fields:
        found |= {"model_type": "deepseek_v3", "qk_rope_head_dim": ROPE}
        found |= {"qk_nope_head_dim": HEAD, "v_head_dim": HEAD}
    else:
        found |= {"model_type": "llama", "head_dim": HEAD}
    if "n_routed_experts" not in fields:
        return found
    found |= {"n_shared_experts": 1, "first_k_dense_replace": 1, "topk_method": "noaux_tc"}
    met, width = fields.get("num_experts_per_tok"), fields.get("moe_intermediate_size")
    shared = fields.get("n_shared_experts", 1)
    if all(type(number) is int for number in (met, width, shared)):
        found["intermediate_size"] = max(1, (met + shared) * width)
    else:
        found["intermediate_size"] = 1  # what is missing or no number is told by the config
    return found


def _unknown(fields: Mapping[str, Any]) -> dict[str, str]:
    """Each name that is no field, with the field that is most likely meant."""
    found = {}
    for name in sorted(set(fields) - set(FIELDS), key=str):
        near = difflib.get_close_matches(str(name), FIELDS, 1, 0.3) or FIELDS[:1]
        found[name] = _MEANT.get(name, near[0])
    return found


def _wrong_names(fields: Mapping[str, Any]) -> list[str]:
    """Unknown and missing fields: one that is only misspelt is not missing as well."""
    unknown, needed = _unknown(fields), list(REQUIRED)
    given = {*fields, *unknown.values()}
    if "n_routed_experts" not in given:
        needed.append("intermediate_size")
    said = [
        f"there is no field {name!r}; the nearest is {near!r}" for name, near in unknown.items()
    ]
    return said + [
        f"the field {name!r} is missing" + (_DENSE if name == "intermediate_size" else "")
        for name in needed
        if name not in given
    ]


def _too_large(fields: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is {fields[name]:,} and at most {most:,} are planned here"
        for name, most in LARGEST.items()
        if isinstance(fields.get(name), int | float) and fields[name] > most
    ]
