"""Printed sizes of models, of their caches and of a token's FLOPs, counted from their configs."""

from dsv3_tutorial import paper
from dsv3_tutorial.bench.paper_verdict import Reproduced, check, value
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import attention, flops, memory, params, routing

V3 = "deepseek-v3"
CACHED = (V3, "qwen2.5-72b", "llama-3.1-405b")
DEEPSEEK_67B = 2 * 8 * 128 * 95  # cached numbers of a token: 95 layers, 8 key-value heads of 128
FIELDS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "head_dim": "qk_nope_head_dim",
    "kv_rank": "kv_lora_rank",
    "q_rank": "q_lora_rank",
    "rope_dim": "qk_rope_head_dim",
    "shared": "n_shared_experts",
    "routed": "n_routed_experts",
    "top_k": "num_experts_per_tok",
    "expert_width": "moe_intermediate_size",
    "dense_layers": "first_k_dense_replace",
    "nodes": "topk_group",
    "mtp_depth": "num_nextn_predict_layers",
}


def checks() -> list[Reproduced]:
    """All that follows from the shapes of a model."""
    return [*_caches(), *_ratios(), *_flops(), *_sizes(), *_weights(), *_configs(), *_experts()]


def _caches() -> list[Reproduced]:
    sizes = {n: memory.kv_cache_bytes_per_token(ModelConfig.named(n)) / 1e3 for n in CACHED}
    found = [
        check(f"kv_cache.{name}", size, "cached numbers of all layers x 2 bytes", "counted")
        for name, size in sizes.items()
    ]
    misprint = "a misprint: the table's own 516.096 / 70.272 is 7.344"
    for name, size in sizes.items():
        why = misprint if name == "llama-3.1-405b" else ""
        ratio = size / sizes[V3]
        how = "the cache over DeepSeek-V3's"
        found.append(check(f"kv_cache_ratio.{name}", ratio, how, "counted", 0.01, why))
    return found


def _ratios() -> list[Reproduced]:
    v2, v3 = ModelConfig.named("deepseek-v2"), ModelConfig.named(V3)
    cached = memory.kv_elements_per_token_and_layer(v3)  # V2 caches as much a layer
    per_head = 2 * 128
    latent = cached * v2.num_hidden_layers * value("v2.kv_cache_bits")
    heads = "a latent against keys and values of {} heads of 128"
    why = "56 heads of 128 would give the printed 4 %; V2 itself has 128"
    mha = v3.num_attention_heads * per_head
    expanded = attention.cached_elements(v3, "expanded")
    against_16, against_128 = (100 * cached / (n * per_head) for n in (16, 128))
    saving = 100 * (1 - latent / (DEEPSEEK_67B * 16))
    bits = "60 layers x 576 numbers of 6 bits, against DeepSeek-67B's of 16"
    return [
        check("v2.kv_cache_reduction", saving, bits, "counted"),
        check("v2.mla_against_mha_small", against_16, heads.format(16), "counted"),
        check("v2.mla_against_mha_large", against_128, heads.format(128), "counted", 0.6, why),
        check("v2.equal_gqa_groups", cached / per_head, "576 / (2 x 128)", "counted"),
        check("v3.mha_over_mla", mha / cached, "32,768 / 576", "counted"),
        check("v3.expanded_over_mla", expanded / cached, "40,960 / 576", "counted"),
    ]


def _flops() -> list[Reproduced]:
    found, off = [], {"qwen2.5-72b": 0.13, "llama-3.1-405b": 0.011}
    rule = "the dense rows are 72 L D^2 + 6 V D, without attention's products; ours counts all"
    for row in paper.rows("training_compute"):
        name = row.id.removeprefix("training_flops.")
        cfg = ModelConfig.named(name)
        how = "6 x activated parameters and attention's products, half of the square"
        dense = not cfg.n_routed_experts
        ours = flops.training_flops_per_token(cfg) / 1e9
        found.append(check(row.id, ours, how, "counted", off.get(name, 0), rule * dense))
    return found


def _sizes() -> list[Reproduced]:
    found = []
    # In whole billions 405.85 is the 405 of a name; V2-Lite's 2.45 B is cut to 2.4.
    loose = {"deepseek-v2-lite.activated": 0.025, "llama-3.1-405b.total": 0.003}
    for name in (V3, "deepseek-v2", "deepseek-v2-lite", "qwen2.5-72b", "llama-3.1-405b"):
        counted = params.count(ModelConfig.named(name))
        for what, how in (("total", "every parameter"), ("activated", "met by a token, head in")):
            id = f"size.{name}.{what}"
            if any(row.id == id for row in paper.rows("sizes")):
                ours, off = getattr(counted, what) / 1e9, loose.get(f"{name}.{what}", 0)
                found.append(check(id, ours, how, "counted", off))
    cfg = ModelConfig.named("moonlight-16b-a3b")
    counted, one = params.count(cfg), cfg.vocab_size * cfg.hidden_size
    inner = {"total": counted.total - 2 * one, "activated": counted.activated - one}
    return found + [
        check(f"size.moonlight-16b-a3b.{what}", n / 1e9, "embedding and head out", "counted")
        for what, n in inner.items()
    ]


def _weights() -> list[Reproduced]:
    counted = params.count(ModelConfig.named(V3))
    embedding = counted.by_part["embedding"]
    files = counted.mtp + 2 * embedding
    both = counted.activated + embedding
    ratio = counted.total / params.count(ModelConfig.named("deepseek-v2")).total
    why = "with both it is 37.55; with the head alone 36.63, as another copy of the page has it"
    found = {
        "mtp": (counted.mtp, "a block, the matrix that joins two inputs, norms", 0.01, ""),
        "mtp_files": (files, "the module, embedding and head", 0.04, ""),
        "checkpoint": (counted.total + files, "both together", 0.001, ""),
        "activated_weights": (both, "met by a token, embedding and head in", 0.03, why),
        "embedding": (embedding, "129,280 x 7168", 0, ""),
        "head": (counted.by_part["head"], "129,280 x 7168", 0, ""),
    }
    rows = [
        check(f"size.{V3}.{name}", n / 1e9, how, "counted", off, why)
        for name, (n, how, off, why) in found.items()
    ]
    return [*rows, check("size.v3_over_v2", ratio, "V3's parameters over V2's", "counted", 0.06)]


def _configs() -> list[Reproduced]:
    found = []
    for name in (V3, "deepseek-v2"):
        cfg, printed = ModelConfig.named(name), {row.id for row in paper.rows("sizes")}
        for short, field in FIELDS.items():
            if f"config.{name}.{short}" in printed:
                how = f"{field} of its config.json"
                ours = getattr(cfg, field)
                found.append(check(f"config.{name}.{short}", ours, how, "config"))
    cfg = ModelConfig.named(V3)
    why = "the file's 0.02 is its library's default; the report says what V3 was trained with"
    id, how = f"config.{V3}.init_std", "initializer_range of its config.json"
    vocabulary = cfg.vocab_size / 1e3
    return [
        *found,
        check(id, cfg.initializer_range, how, "config", 2.5, why),
        check(f"config.{V3}.vocabulary", vocabulary, "129,280 entries", "config", 0.011),
    ]


def _experts() -> list[Reproduced]:
    cfg = ModelConfig.named(V3)
    fine = routing.expert_combinations(16, 2, split=4)
    return [
        check(
            "remark.combinations_coarse", routing.expert_combinations(16, 2), "C(16, 2)", "counted"
        ),
        check("remark.combinations_fine", fine, "C(64, 8)", "counted"),
        check("remark.experts_of_a_node", cfg.n_routed_experts / cfg.n_group, "256 / 8", "counted"),
        check("remark.experts_of_a_gpu", cfg.n_routed_experts / 64, "256 / 64", "counted"),
    ]
