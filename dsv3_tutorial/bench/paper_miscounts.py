"""Printed counts of caches, parameters, FLOPs and tokens a second that do not add up."""

from dataclasses import replace

from dsv3_tutorial.bench.paper_model import DEEPSEEK_67B, V3
from dsv3_tutorial.bench.paper_verdict import Inconsistency, value
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import flops, limits, memory, params
from dsv3_tutorial.hardware import chip


def miscounts() -> list[Inconsistency]:
    """Those of models, of their arithmetic and of the bound of decoding."""
    return [*_models(), *_compute(), *_pace(), *_speed()]


def _models() -> list[Inconsistency]:
    caches = [memory.kv_cache_bytes_per_token(ModelConfig.named(n)) for n in ("llama-3.1-405b", V3)]
    latent = ModelConfig.named("deepseek-v2").num_hidden_layers * 576
    saved = 100 * (1 - latent / DEEPSEEK_67B)
    counted = params.count(ModelConfig.named(V3))
    both = (counted.activated + counted.by_part["embedding"]) / 1e9
    return [
        Inconsistency(
            "Llama's cache over V3's",
            "ISCA, table 1",
            "7.28x",
            "516.096 / 70.272 KB, the table's own numbers",
            f"{caches[0] / caches[1]:.2f}x",
        ),
        Inconsistency(
            "the cache that MLA saves",
            "V2 report, abstract",
            "93.3 %",
            "MLA alone, 60 x 576 against 95 x 2,048 numbers; the rest is a cache of 6 bits",
            f"{saved:.1f} %",
        ),
        Inconsistency(
            "MLA's cache in share of MHA's, large model",
            "V2 report, appendix D.2",
            "4 %",
            "576 / (2 x 128 x 128) with V2's 128 heads; 4 % asks for 56",
            f"{100 * 576 / (2 * 128 * 128):.2f} %",
        ),
        Inconsistency(
            "activated parameters, embedding and head included",
            "README_WEIGHTS",
            "36.7 billion",
            f"counted with both; with the head alone {counted.activated / 1e9:.2f}",
            f"{both:.2f} billion",
        ),
    ]


def _compute() -> list[Inconsistency]:
    trained = {
        name: flops.training_flops_per_token(ModelConfig.named(name)) / 1e9
        for name in (V3, "qwen2.5-72b", "llama-3.1-405b")
    }
    dense = ("qwen2.5-72b", "llama-3.1-405b")
    ours = [f"{trained[name]:,.0f}" for name in dense]
    times = [f"{trained[name] / trained[V3]:.2f}x" for name in dense]
    printed = [
        f"{value(f'training_flops.{n}') / value('training_flops.deepseek-v3'):.2f}x" for n in dense
    ]
    return [
        Inconsistency(
            "training FLOPs of the dense models",
            "ISCA, table 2",
            "394 and 2448 GFLOP",
            "counted as the table's MoE rows are; theirs are 72 L D^2 + 6 V D",
            " and ".join(ours) + " GFLOP",
        ),
        Inconsistency(
            "V3 needs an order of magnitude less",
            "ISCA, section 2.2.1",
            " and ".join(printed),
            "the same count for all: true of the 405B model alone",
            " and ".join(times),
        ),
    ]


def _pace() -> list[Inconsistency]:
    a_second = value("step_time.mpft.tokens_per_day") * 1e9 / 86_400
    work = value("training_cost.gpus") * value("step_time.mpft.tflops_causal") * 1e12 / a_second
    fp8 = value("step_time.mpft.tflops_causal") * 1e12 / chip("h800").rate("fp8")
    return [
        Inconsistency(
            "the unit of table 2",
            "ISCA, table 2",
            "GFLOPS/token, a rate",
            "2,048 GPUs x 385 TFLOP/s / tokens a second: an amount of work",
            f"{work / 1e9:.1f} GFLOP/token",
        ),
        Inconsistency(
            "FLOPs of a token with multi-token prediction",
            "ISCA, tables 2 and 4",
            "250 GFLOP",
            "one module and the head again are trained too, and counted nowhere",
            f"{with_mtp() / 1e9:.1f} GFLOP",
        ),
        Inconsistency(
            "utilisation of GPUs that multiply in FP8",
            "ISCA, table 4",
            "38.94 %",
            "385 over the FP8 peak of 1,979 TFLOP/s; the table divides by the BF16 peak",
            f"{100 * fp8:.1f} %",
        ),
    ]


def with_mtp() -> float:
    """FLOP of a trained token, V3's module for multi-token prediction included; causal, 4,096."""
    cfg = ModelConfig.named(V3)
    main, depth = flops.training_flops_per_token(cfg), cfg.num_nextn_predict_layers
    met = params.mtp(cfg) - depth * params.routed_resting(cfg)
    met += depth * cfg.vocab_size * cfg.hidden_size  # the shared head, once more
    scores = depth * 4096 / 2 * 2 * cfg.num_attention_heads * (cfg.qk_head_dim + cfg.value_dim)
    return main + 3 * (2 * met + scores)


def _speed() -> list[Inconsistency]:
    printed = limits.infiniband()
    real = replace(printed, hidden=ModelConfig.named(V3).hidden_size)
    slower = limits.effective(real)
    experts = ModelConfig.named(V3).n_routed_experts + 1
    rack = replace(limits.nvl72(), experts_per_device=experts / 72)
    return [
        Inconsistency(
            "hidden size in the bound of decoding",
            "ISCA, section 2.3.2",
            "7K: 14.76 ms",
            "the results need 7000; with the model's 7168",
            f"{real.per_token * 1e3:.2f} ms, {real.tokens_per_second:.1f} tokens/s",
        ),
        Inconsistency(
            "tokens a second of that bound",
            "ISCA, section 2.3.2",
            "67 tokens/s",
            "1 / 14.757 ms, cut and not rounded",
            f"{printed.tokens_per_second:.1f} tokens/s",
        ),
        Inconsistency(
            "the network's rate in that bound",
            "ISCA, sections 2.3.2 and 4.3",
            "50 and 40 GB/s",
            "section 4.3 has 40 as what is reached; with it, and 7168",
            f"{slower.tokens_per_second:.1f} tokens/s",
        ),
        Inconsistency(
            "one expert a device, in a rack of 72",
            "ISCA, section 2.3.2",
            "0.82 ms, 1200 tokens/s",
            f"72 hold {experts / 72:.1f} of {experts} experts each: {rack.tokens} tokens a device "
            f"still give 0.82 ms, but experts as busy as with one a device ask for "
            f"{experts / 72:.1f} times the tokens",
            f"{rack.per_token * 1e3:.1f} ms, {rack.tokens_per_second:.0f} tokens/s",
        ),
    ]
