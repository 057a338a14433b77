"""The planner's efficiencies, computed from published rates of single kernels.

None of these rows is a training step. DeepGEMM's were measured on the very products of DeepSeek-V3
in one layer, on an H800; attention's on an H100, whose arithmetic is the same.
"""

from dsv3_tutorial import hardware, paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import params

BF16 = ("wide", "q_a_kv_a")


def fp8_products(earlier: bool = False) -> float:
    """Share of the FP8 peak that V3's products reach: their FLOPs over their times, one MoE layer.

    Two thirds at the rates of forward shapes, which the gradient of the input is taken to reach
    too, and a third at those of weight gradients. earlier: divided by what DeepGEMM gained on the
    authors' CUTLASS kernels, as V3 was trained before it was there.
    """
    work = layer_flops(ModelConfig.named("deepseek-v3"))
    seconds = sum(flop * _seconds_per_flop(name, earlier) for name, flop in work.items())
    return sum(work.values()) / seconds / hardware.chip("h800").rate("fp8")


def _seconds_per_flop(name: str, earlier: bool) -> float:
    gained = (_value(f"fp8_speedup.{name}"), _value("fp8_weight_speedup")) if earlier else (1, 1)
    outputs = gained[0] / _rate(f"fp8.{name}")
    return (2 * outputs + gained[1] / _rate(f"fp8_weight.{name}")) / 3


def layer_flops(cfg: ModelConfig) -> dict[str, float]:
    """FLOP of a token in the products of one MoE layer, by their rows' names."""
    d, heads, q, c = cfg.hidden_size, cfg.num_attention_heads, cfg.q_lora_rank, cfg.kv_lora_rank
    expert = 2 * params.expert(cfg)
    up, down = 2 / 3 * expert, expert / 3
    return {
        "q_a_kv_a": 2 * d * (q + c + cfg.qk_rope_head_dim),
        "q_b": 2 * q * heads * cfg.qk_head_dim,
        "kv_b": 2 * c * heads * (cfg.qk_nope_head_dim + cfg.v_head_dim),
        "o": 2 * heads * cfg.v_head_dim * d,
        "shared_up": cfg.n_shared_experts * up,
        "shared_down": cfg.n_shared_experts * down,
        "routed_up": cfg.num_experts_per_tok * up,
        "routed_down": cfg.num_experts_per_tok * down,
    }


def bf16_products() -> float:
    """Share of the BF16 peak that cuBLAS reaches, by equal FLOPs of two shapes."""
    rates = [_rate(f"bf16.{name}") for name in BF16]
    return len(rates) / sum(1 / rate for rate in rates) / _h100()


def attention_forward() -> float:
    """Share of the BF16 peak in MLA's forward: the mean of two kernels, causal FLOPs."""
    rates = [_rate(f"attention.forward.{name}") for name in ("fa4", "tilelang")]
    return sum(rates) / len(rates) / _h100()


def attention_backward() -> float:
    """The same backward: H100's at heads of 128, times what 192 and 128 lose on a B200."""
    ratio = _rate("attention.backward.192") / _rate("attention.backward.128")
    return _rate("attention.backward.fa3") * ratio / _h100()


def memory_bandwidth() -> float:
    """Share of the memory bandwidth that a kernel bound by it reached."""
    reached = _value("memory.flash_mla") * 1e9
    return reached / hardware.chip("h800").bandwidth()


def links() -> float:
    """Share of its peak that each of the H800's links is said to reach: 160 / 200, 40 / 50."""
    chip = hardware.chip("h800")
    shares = [link.effective / link.bandwidth for link in (chip.scale_up, chip.scale_out)]
    return sum(shares) / len(shares)


def _value(name: str) -> float:
    return paper.row(f"kernels.{name}").value


def _rate(name: str) -> float:
    return _value(name) * 1e12


def _h100() -> float:
    return hardware.chip("h100-sxm").rate("bf16")
