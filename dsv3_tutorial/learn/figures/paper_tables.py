"""Printed numbers beside ours, as text: what agrees, what does not, and against which base."""

from collections.abc import Callable

from dsv3_tutorial import paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import attention as cost
from dsv3_tutorial.cost import memory

# The base of the V2 report's 93.3 %, as its published config.json has it.
DEEPSEEK_67B = ModelConfig(
    *(102400, 8192, 22016, 95, 64), model_type="llama", num_key_value_heads=8, attention_bias=False
)
TABLE_1 = ("deepseek-v3", "qwen2.5-72b", "llama-3.1-405b")


def isca_table_1(bytes_per_token: Callable[[ModelConfig], float]) -> None:
    """Print ISCA's table 1 beside what `bytes_per_token` gives, in KB of 1000 bytes."""
    base = bytes_per_token(ModelConfig.named(TABLE_1[0]))
    print(f"{'KB a token, BF16':18}{'printed':>10}{'ours':>10}   {'printed':>9}{'ours':>8}")
    for name in TABLE_1:
        ours = bytes_per_token(ModelConfig.named(name))
        size, ratio = paper.row(f"kv_cache.{name}"), paper.row(f"kv_cache_ratio.{name}")
        sizes = f"{size.value:>10.3f}{ours / 1000:>10.3f}"
        agrees = abs(ratio.value - ours / base) < 0.01
        verdict = "" if agrees else "   does not add up"
        print(f"{name:18}{sizes}   {ratio.value:>8.2f}x{ours / base:>7.3f}x{verdict}")


def mla_ratios() -> None:
    """Print the ratios that circulate for MLA, ours beside them, each with its base named."""
    v2, v3 = ModelConfig.named("deepseek-v2"), ModelConfig.named("deepseek-v3")
    latent = cost.cached_elements(v3, "absorbed")
    mha = 2 * v3.num_attention_heads * 128
    v2_token = memory.kv_cache_bytes_per_token(v2)
    dense = memory.kv_cache_bytes_per_token(DEEPSEEK_67B)
    bits = paper.row("v2.kv_cache_bits").value
    rows = [
        ("57x less", f"{mha / latent:.1f}x", "V3 against MHA with its 128 heads of 128"),
        (
            "71x less",
            f"{cost.cached_elements(v3, 'expanded') / latent:.1f}x",
            "V3 against its own heads, expanded (keys 192, values 128)",
        ),
        ("93.3 % less", f"{1 - v2_token / dense:.1%}", "V2 against DeepSeek-67B, which has GQA"),
        ("", f"{1 - v2_token * bits / 16 / dense:.1%}", f"... with V2's cache at {bits:g} bits"),
        ("14 %", f"{latent / (2 * 16 * 128):.1%}", "of MHA with 16 heads (the report's 16B pair)"),
        ("4 %", f"{latent / (2 * 56 * 128):.1%}", "of MHA with 56 heads (fits its 250B pair)"),
        ("", f"{latent / (2 * 128 * 128):.1%}", "of MHA with 128 heads, which V2 and V3 have"),
    ]
    print(f"{'said':14}{'computed':>9}   base")
    for said, computed, base in rows:
        print(f"{said:14}{computed:>9}   {base}")


def cache_per_gpu(bytes_per_gpu: Callable[[ModelConfig, int], float]) -> None:
    """Print a token's cache on each GPU when attention is split by heads over 1 to 8 GPUs."""
    gpus = (1, 2, 4, 8)
    print(f"{'KB a token and GPU':20}" + "".join(f"{f'TP {n}':>9}" for n in gpus))
    for name in TABLE_1[::-1]:
        cfg = ModelConfig.named(name)
        sizes = "".join(f"{bytes_per_gpu(cfg, n) / 1000:>9.1f}" for n in gpus)
        print(f"{name:20}{sizes}")
