"""The cache on each GPU when a group of them serves together: TP beside DP, GQA beside MLA."""

from dataclasses import replace

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _served(name: str, tokens: int, tp: int, dp: int, *bytes_per_element: float):
    return lambda: (ModelConfig.named(name), tokens, tp, dp, *bytes_per_element)


def _other_heads() -> tuple:
    heads = {"num_attention_heads": 66, "num_key_value_heads": 6, "head_dim": 96}
    return replace(ModelConfig.named("qwen2.5-72b"), **heads), 1000, 4, 3, 1


def _other_latent() -> tuple:
    widths = {"kv_lora_rank": 384, "qk_rope_head_dim": 32}
    return replace(ModelConfig.named("deepseek-v3"), **widths), 640, 4, 2


def _latent(cfg: ModelConfig, tp: int) -> float:
    return cfg.kv_lora_rank + cfg.qk_rope_head_dim


def _heads(cfg: ModelConfig, tp: int) -> float:
    return 2 * -(-cfg.kv_heads // tp) * cfg.head_size


def _open(
    mla=_latent, plain=_heads, share=lambda tokens, dp: -(-tokens // dp), layers=True, b=None
):
    """`sharded_cache_bytes` with its parts open to be got wrong."""

    def cache(cfg, tokens, tp, dp, bytes_per_element=2):
        elements = (mla if cfg.is_mla else plain)(cfg, tp)
        elements *= cfg.num_hidden_layers if layers else 1
        return share(tokens, dp) * elements * (bytes_per_element if b is None else b)

    return cache


def _over_all_gpus(cfg, tokens, tp, dp, bytes_per_element=2):
    return _open(plain=lambda cfg, tp: 2 * cfg.kv_heads * cfg.head_size)(
        cfg, tokens, tp, dp * tp, bytes_per_element
    )


CACHE_PER_GPU = Exercise(
    name="parallel.cache_per_gpu",
    reference="dsv3_tutorial.cost.sharding:sharded_cache_bytes",
    cases=[
        Case("Llama 3.1 405B, TP 8", _served("llama-3.1-405b", 65536, 8, 1)),
        Case("DeepSeek-V3, TP 8", _served("deepseek-v3", 65536, 8, 1)),
        Case("DeepSeek-V3, TP 1, DP 8", _served("deepseek-v3", 65536, 1, 8)),
        Case("Qwen2.5 72B, TP 16, DP 2", _served("qwen2.5-72b", 4096, 16, 2)),
        Case("one byte a number", _served("deepseek-v3", 4096, 4, 2, 1)),
        Case("tokens that do not divide", _served("deepseek-v3", 1001, 2, 8)),
        Case("another GQA model", _served("llama-3.1-405b", 2048, 2, 4, 4), hidden=True),
        Case("another latent", _served("deepseek-v2-lite", 999, 2, 8, 1), hidden=True),
        Case("a latent of another width", _other_latent, hidden=True),
        Case("heads that do not divide", _other_heads, hidden=True),
        Case("one GPU", _served("qwen2.5-72b", 7, 1, 1), hidden=True),
    ],
    hints=[
        "Who holds what of one token? In MLA each GPU of its replica holds the whole latent and "
        "rotary key, kv_lora_rank + qk_rope_head_dim numbers a layer; else a share of the heads.",
        "A GPU has -(-cfg.kv_heads // tp) key-value heads: rounded up, so at least one. Each keeps "
        "a key and a value of head_size numbers.",
        "A replica holds -(-tokens // dp) tokens; times cfg.num_hidden_layers and the bytes.",
    ],
    difficulty=2,
    importance=5,
    minutes=4,
    lines=5,
    mutants=[
        Mutant(
            "V3's latent",
            _open(mla=lambda cfg, tp: 576),
            "576 is V3's latent and rotary key; read kv_lora_rank and qk_rope_head_dim from cfg.",
        ),
        Mutant(
            "latent divided",
            _open(mla=lambda cfg, tp: _latent(cfg, tp) / tp),
            "The latent is divided by tp: it serves all heads, so every GPU needs the whole of it.",
        ),
        Mutant(
            "over all GPUs",
            _over_all_gpus,
            "Everything is divided by tp x dp; tp divides only heads, and only until each GPU has "
            "one.",
        ),
        Mutant(
            "fractions of a head",
            _open(plain=lambda cfg, tp: 2 * cfg.kv_heads * cfg.head_size / tp),
            "With tp above kv_heads a GPU would hold less than one head: heads are copied then.",
        ),
        Mutant(
            "no head left",
            _open(plain=lambda cfg, tp: 2 * (cfg.kv_heads // tp) * cfg.head_size),
            "More GPUs than heads: each still holds one, so round up, not down.",
        ),
        Mutant(
            "rounded down",
            _open(plain=lambda cfg, tp: 2 * max(1, cfg.kv_heads // tp) * cfg.head_size),
            "Where the heads do not divide, the fullest GPU holds one more: round up.",
        ),
        Mutant(
            "dp ignored",
            _open(share=lambda tokens, dp: tokens),
            "dp is not used: each replica holds its own share of the tokens.",
        ),
        Mutant(
            "tokens rounded down",
            _open(share=lambda tokens, dp: tokens // dp),
            "Tokens do not divide: the fullest replica holds one more.",
        ),
        Mutant(
            "tokens in fractions",
            _open(share=lambda tokens, dp: tokens / dp),
            "A token is cached whole: the fullest replica holds tokens / dp, rounded up.",
        ),
        Mutant(
            "tp ignored",
            _open(plain=lambda cfg, tp: 2 * cfg.kv_heads * cfg.head_size),
            "tp is not used: it deals plain attention's heads out.",
        ),
        Mutant(
            "every query head",
            _open(plain=lambda cfg, tp: 2 * -(-cfg.num_attention_heads // tp) * cfg.head_size),
            "Query heads are counted; only the kv_heads are cached.",
        ),
        Mutant(
            "keys only",
            _open(plain=lambda cfg, tp: -(-cfg.kv_heads // tp) * cfg.head_size),
            "Keys are counted, values are not: plain attention keeps both.",
        ),
        Mutant(
            "latent per head",
            _open(mla=lambda cfg, tp: _latent(cfg, tp) * -(-cfg.num_attention_heads // tp)),
            "The latent is counted for every head of the GPU: one latent serves them all.",
        ),
        Mutant("one layer", _open(layers=False), "This is one layer's share: count them all."),
        Mutant("bytes fixed", _open(b=2), "bytes_per_element is not used."),
    ],
)
