"""Counting what is cached: by the token, and by the GPU."""

from dataclasses import replace

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _model(name: str, bytes_per_element: int = 2):
    return lambda: (ModelConfig.named(name), bytes_per_element)


def _other_heads() -> tuple:
    return replace(ModelConfig.named("qwen2.5-72b"), num_key_value_heads=4, head_dim=96), 2


def _cache_mutant(mla, plain, scale=lambda b: b):
    def mutant(cfg, bytes_per_element=2):
        elements = mla(cfg) if cfg.is_mla else plain(cfg)
        return elements * cfg.num_hidden_layers * scale(bytes_per_element)

    return mutant


def _latent(c: ModelConfig) -> int:
    return c.kv_lora_rank + c.qk_rope_head_dim


def _both(c: ModelConfig) -> int:
    return 2 * c.kv_heads * c.head_size


def _heads_everywhere(cfg, bytes_per_element=2):
    return 2 * cfg.kv_heads * cfg.head_size * cfg.num_hidden_layers * bytes_per_element


def _latent_per_head(cfg, bytes_per_element=2):
    whole = _latent(cfg) * cfg.num_attention_heads if cfg.is_mla else _both(cfg)
    return whole * cfg.num_hidden_layers * bytes_per_element


def _kilobytes(cfg, bytes_per_element=2):
    whole = _latent(cfg) if cfg.is_mla else _both(cfg)
    return whole * cfg.num_hidden_layers * bytes_per_element / 1000


def _one_layer(cfg, bytes_per_element=2):
    return (_latent(cfg) if cfg.is_mla else _both(cfg)) * bytes_per_element


CACHE_BYTES = Exercise(
    name="attention.cache_bytes",
    reference="dsv3_tutorial.cost.memory:kv_cache_bytes_per_token",
    cases=[
        Case("Qwen2.5 72B, GQA", _model("qwen2.5-72b")),
        Case("DeepSeek-V3, MLA", _model("deepseek-v3")),
        Case("DeepSeek-V3 at one byte a number", _model("deepseek-v3", 1)),
        Case("another GQA model", _model("llama-3.1-405b", 4), hidden=True),
        Case("another MLA model", _model("deepseek-v2-lite"), hidden=True),
        Case("a small MLA model, 6 bits", _model("tiny", 0.75), hidden=True),
        Case("other heads", _other_heads, hidden=True),
    ],
    hints=[
        "Work out the numbers one layer keeps for one token; then layers, then bytes.",
        "Plain attention keeps a key AND a value: 2 * kv_heads * head_size numbers a layer.",
        "MLA keeps kv_lora_rank + qk_rope_head_dim numbers a layer, once, not once a head.",
    ],
    difficulty=1,
    importance=5,
    minutes=5,
    lines=5,
    mutants=[
        Mutant(
            "keys only",
            _cache_mutant(_latent, lambda c: c.kv_heads * c.head_size),
            "Keys are counted, values are not: plain attention keeps both.",
        ),
        Mutant(
            "every query head",
            _cache_mutant(_latent, lambda c: 2 * c.num_attention_heads * c.head_size),
            "Every query head is counted; only the kv_heads are cached.",
        ),
        Mutant(
            "no rotary key",
            _cache_mutant(lambda c: c.kv_lora_rank, _both),
            "The rotary key is missing: MLA keeps qk_rope_head_dim numbers beside the latent.",
        ),
        Mutant(
            "latent twice",
            _cache_mutant(lambda c: 2 * _latent(c), _both),
            "The latent is counted twice: keys and values come from the same one.",
        ),
        Mutant(
            "bytes fixed",
            _cache_mutant(_latent, _both, scale=lambda b: 2),
            "bytes_per_element is not used: two bytes are not the only choice.",
        ),
        Mutant(
            "no MLA",
            _heads_everywhere,
            "MLA is counted like plain attention: where cfg.is_mla, neither heads nor head_size "
            "count, but the latent and the rotary key, once.",
        ),
        Mutant(
            "latent per head",
            _latent_per_head,
            "The latent is counted for every head: one latent and one rotary key serve them all.",
        ),
        Mutant("kilobytes", _kilobytes, "This is a thousand times too small: return bytes."),
        Mutant("one layer", _one_layer, "This is one layer's share: every layer has its own."),
    ],
)


def _split(name: str, gpus: int, bytes_per_element: int = 2):
    return lambda: (ModelConfig.named(name), gpus, bytes_per_element)


def _divided(cfg, tensor_parallel, bytes_per_element=2):
    whole = _latent(cfg) if cfg.is_mla else _both(cfg)
    return whole * cfg.num_hidden_layers * bytes_per_element / tensor_parallel


def _latent_divided(cfg, tensor_parallel, bytes_per_element=2):
    heads = -(-cfg.kv_heads // tensor_parallel)
    plain = 2 * heads * cfg.head_size if not cfg.is_mla else _latent(cfg) / tensor_parallel
    return plain * cfg.num_hidden_layers * bytes_per_element


def _below_one_head(cfg, tensor_parallel, bytes_per_element=2):
    plain = _latent(cfg) if cfg.is_mla else _both(cfg) / tensor_parallel
    return plain * cfg.num_hidden_layers * bytes_per_element


def _emptiest(cfg, tensor_parallel, bytes_per_element=2):
    heads = max(1, cfg.kv_heads // tensor_parallel)
    whole = _latent(cfg) if cfg.is_mla else 2 * heads * cfg.head_size
    return whole * cfg.num_hidden_layers * bytes_per_element


def _never_divided(cfg, tensor_parallel, bytes_per_element=2):
    return (_latent(cfg) if cfg.is_mla else _both(cfg)) * cfg.num_hidden_layers * bytes_per_element


CACHE_PER_GPU = Exercise(
    name="attention.cache_per_gpu",
    reference="dsv3_tutorial.cost.memory:cache_bytes_per_gpu",
    cases=[
        Case("Llama 3.1 405B on 4 GPUs", _split("llama-3.1-405b", 4)),
        Case("Llama 3.1 405B on 16 GPUs", _split("llama-3.1-405b", 16)),
        Case("DeepSeek-V3 on 8 GPUs", _split("deepseek-v3", 8)),
        Case("Qwen2.5 72B on 3 GPUs", _split("qwen2.5-72b", 3)),
        Case("three GPUs, one byte", _split("llama-3.1-405b", 3, 1), hidden=True),
        Case("another latent", _split("deepseek-v2-lite", 4, 1), hidden=True),
        Case("one GPU", _split("qwen2.5-72b", 1), hidden=True),
        Case("another split", _split("qwen2.5-72b", 8, 1), hidden=True),
    ],
    hints=[
        "Plain attention deals its kv_heads out over the GPUs. What if there are more GPUs?",
        "A GPU holds at least one key-value head: -(-kv_heads // tensor_parallel) rounds up.",
        "The latent serves all heads, so a GPU with any head needs the whole of it.",
    ],
    difficulty=3,
    importance=4,
    minutes=8,
    lines=6,
    mutants=[
        Mutant("all divided", _divided, "The latent is divided too: every head reads all of it."),
        Mutant(
            "latent divided",
            _latent_divided,
            "The latent is split over the GPUs: every head reads all of it, so each GPU needs it.",
        ),
        Mutant(
            "fractions of a head",
            _below_one_head,
            "With more GPUs than kv_heads a GPU would hold less than one head; it is replicated.",
        ),
        Mutant(
            "rounded down", _emptiest, "8 heads on 3 GPUs: the fullest holds 3 of them; round up."
        ),
        Mutant("nothing divided", _never_divided, "Plain attention's heads are not dealt out."),
    ],
)

EXERCISES = [CACHE_BYTES, CACHE_PER_GPU]
