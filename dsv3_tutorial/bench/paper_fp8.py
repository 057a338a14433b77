"""What is printed of FP8: formats, scales, sums and bytes, from our formats and settings."""

import math

from dsv3_tutorial.bench.paper_verdict import Reproduced, check
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import comm_moe, precision, storage
from dsv3_tutorial.cost.memory import TrainingBytes
from dsv3_tutorial.fp8 import logfmt, mxfp8, quant
from dsv3_tutorial.fp8.accumulate import HOPPER, HOPPER_PROMOTED
from dsv3_tutorial.fp8.formats import FORMATS, Format
from dsv3_tutorial.hardware import chip


def checks() -> list[Reproduced]:
    """All rows of fp8.json that nobody had to measure."""
    return [*_bytes(), *_formats(), *_settings()]


def _bytes() -> list[Reproduced]:
    h800, kept = chip("h800"), precision.STORAGE
    tiles, blocks = (100 * kept[name].overhead for name in ("e4m3", "e4m3, blocks"))
    saved = 100 * (1 - comm_moe.FP8 / comm_moe.BF16)
    latent = storage.cache_row(ModelConfig.named("deepseek-v3"), "fp8")
    faster = h800.rate("fp8") / h800.rate("bf16")
    block, tile = "4 bytes a block of 16,384", "4 bytes a tile of 128"
    row = "512 codes, 4 scales and a RoPE key in BF16"
    scales = "the scales, which the paper leaves out, take 1.6 points"
    return [
        check("fp8.weight_scale_overhead", blocks, block, "counted"),
        check("fp8.activation_scale_overhead", tiles, tile, "counted"),
        check("fp8.latent_bytes", latent, row, "counted"),
        check("fp8.dispatch_saving", saved, scales, "counted", 0.04),
        check("fp8.speed_over_bf16", faster, "peak rates of the H800", "counted", 0.001),
    ]


def _formats() -> list[Reproduced]:
    e5m6, ue8m0 = _bits(FORMATS["e5m6"]), _bits(FORMATS["ue8m0"])
    moment = 8 * TrainingBytes().moments / 2
    fp22 = 1 + 8 + HOPPER.bits
    return [
        check("fp8.cached_after_attention_bits", e5m6, "1 + 5 + 6 of E5M6", "counted"),
        check("fp8.blackwell_scale_bits", ue8m0, "8 bits of exponent, no sign", "counted"),
        check("fp8.register_bits", fp22, "1 + 8 + 13", "counted"),
        check("fp8.accumulator_bits", HOPPER.bits + 1, "13 fraction bits, leading 1", "counted"),
        check("fp8.wgmmas", HOPPER_PROMOTED.promote / HOPPER.group, "128 / 32", "counted"),
        check("fp8.moment_bits", moment, "what the optimizer keeps", "setting"),
        check("fp8.combine_bits", 8 * comm_moe.BF16, "what combine sends", "setting"),
    ]


def _bits(format: Format) -> int:
    return format.signed + format.exponent_bits + format.mantissa_bits


def _settings() -> list[Reproduced]:
    ours = {
        "activation_tile": (quant.TILE, "fp8.quant.TILE"),
        "weight_block": (quant.BLOCK[0], "fp8.quant.BLOCK"),
        "fraction_bits": (HOPPER.bits, "fp8.accumulate.HOPPER"),
        "products_aligned": (HOPPER.group, "fp8.accumulate.HOPPER"),
        "promotion_interval": (HOPPER_PROMOTED.promote, "fp8.accumulate.HOPPER_PROMOTED"),
        "logfmt_binades": (logfmt.RANGE / math.log(2), "fp8.logfmt.RANGE"),
        "blackwell_scale_block": (mxfp8.GROUP, "fp8.mxfp8.GROUP"),
        "hopper_scale_bits": (8 * precision.SCALE_BYTES, "float32"),
    }
    return [check(f"fp8.{name}", number, how, "setting") for name, (number, how) in ours.items()]
