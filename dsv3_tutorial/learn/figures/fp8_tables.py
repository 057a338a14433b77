"""FP8's printed numbers beside ours, as text, and what is only quoted, with where it stands."""

from dsv3_tutorial import paper
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import params
from dsv3_tutorial.cost.precision import STORAGE
from dsv3_tutorial.fp8.latent import latent_bytes

KEPT_WIDE = ("embedding", "head", "gate", "norms")
LATENT_IN_VLLM = "656"  # docs.vllm.ai, v0.11, attention backend flashmla_sparse
CHECKPOINT_GB = "688.6"  # 688,586,727,753 bytes: the .safetensors files of DeepSeek-V3's release
HOPPER = (
    ("fp8.accumulator_bits", "kept by a sum of FP8 products"),
    ("fp8.fraction_bits", "of them behind the leading 1"),
    ("fp8.register_bits", "the register that sums go to: FP22"),
    ("fp8.products_aligned", "aligned to the largest and added at once"),
    ("fp8.promotion_interval", "after which DeepSeek moves sums to float32 (N_C)"),
    ("fp8.hopper_scale_bits", "a scale; multiplied in outside the tensor cores"),
)
BLACKWELL = (
    ("fp8.blackwell_scale_block", "share a scale that the tensor cores multiply in"),
    ("fp8.blackwell_scale_bits", "such a scale: a power of two"),
)
TRAINED = (
    ("fp8.loss_against_bf16", "of BF16's loss, at most"),
    ("fp8.accumulation_error", "nearly: FP8 sums without promotion, inputs not named"),
    ("fp8.block_dgrad_diverged", "after which 128 x 128 blocks for gradients diverged"),
    ("fp8.moment_bits", "each of AdamW's moments"),
    ("fp8.combine_bits", "a number that experts send back"),
    ("fp8.logfmt_overhead_low", "more time for LogFMT's encoding, fused, at least"),
    ("fp8.logfmt_overhead_high", "and at most: it was not deployed"),
)


def bytes_table() -> None:
    """Print what FP8 stores in DeepSeek-V3, counted, and beside it what is printed elsewhere."""
    print(f"{'DeepSeek-V3':40}{'printed':>8}{'ours':>10}   from")
    for what, printed, ours, base in _byte_rows():
        print(f"{what:40}{printed:>8}{ours:>10}   {base}")
    print("printed: dispatch in ISCA 2025, section 3.2; E5M6 in the report, section 3.3.3;")
    print("  the latent in vLLM's documentation (FlashMLA's FP8 cache); the checkpoint: its files")


def _byte_rows() -> list[tuple[str, str, str, str]]:
    cfg = ModelConfig.named("deepseek-v3")
    tile, block, after = STORAGE["e4m3"], STORAGE["e4m3, blocks"], STORAGE["e5m6"]
    bf16 = STORAGE["bf16"].bits_per_value
    latent = latent_bytes(cfg.kv_lora_rank, cfg.qk_rope_head_dim)
    wide = 2 * (cfg.kv_lora_rank + cfg.qk_rope_head_dim)
    sent = cfg.hidden_size * tile.bits_per_value / 8
    heads = cfg.num_attention_heads * cfg.v_head_dim
    return [
        ("scales of weights", _printed("weight_scale_overhead", "%"), f"{block.overhead:.3%}",
         "4 bytes a block of 128 x 128"),
        ("scales of activations", _printed("activation_scale_overhead", "%"),
         f"{tile.overhead:.1%}", "4 bytes a tile of 128"),
        ("KV latent, bytes a token and layer", LATENT_IN_VLLM, f"{latent:,}",
         f"512 + 4 x 4 + 2 x 64; {wide:,} in BF16"),
        ("dispatch, bytes a token and copy", "-", f"{sent:,.0f}",
         f"{2 * cfg.hidden_size:,} in BF16"),
        ("... saved", _printed("dispatch_saving", "%"),
         f"{1 - tile.bits_per_value / bf16:.1%}", "with the scales"),
        ("input of the layer behind attention,", "", "", f"kept for Wgrad, {heads:,} values"),
        ("... bits a value, E5M6", _printed("cached_after_attention_bits"),
         f"{after.bits_per_value:g}", "with the scales"),
        ("... bytes a token and layer", "-", f"{heads * after.bits_per_value / 8:,.0f}",
         f"{2 * heads:,} in BF16, {heads * tile.bits_per_value / 8:,.0f} in E4M3"),
        ("weights in FP8", "-", f"{_share_in_fp8(cfg):.1%}",
         "of 671 billion: not embedding, head, gates, norms"),
        ("checkpoint, GB", CHECKPOINT_GB, f"{checkpoint_bytes(cfg) / 1e9:.1f}",
         "FP8 and scales, the rest BF16, with multi-token prediction"),
    ]  # fmt: skip


def _printed(name: str, unit: str = "") -> str:
    """A number as the papers have it; a dash where the row is our own arithmetic."""
    row = paper.row(f"fp8.{name}")
    return "-" if row.confidence == "derived" else f"{row.value:g}{unit}"


def checkpoint_bytes(cfg: ModelConfig) -> float:
    """The released weights: FP8 with a float32 scale a block; gates, norms and the like in BF16.

    The prediction modules M_k (D, 2 D) are in BF16 and hold copies of embedding and head. Missing:
    names and shapes of 92 thousand tensors, 12 MB in 689 GB.
    """
    counted, modules = params.count(cfg), cfg.num_nextn_predict_layers
    copies = counted.by_part["embedding"] + counted.by_part["head"]
    layer = params.layer_parts(cfg, moe=True)
    wide = sum(counted.by_part[part] for part in KEPT_WIDE)
    beside = layer["gate"] + layer["norms"] + 2 * cfg.hidden_size**2 + 3 * cfg.hidden_size
    stored = counted.total + counted.mtp + modules * copies
    wide += modules * (copies + beside)
    bits = STORAGE["e4m3, blocks"].bits_per_value
    return ((stored - wide) * bits + wide * STORAGE["bf16"].bits_per_value) / 8


def _share_in_fp8(cfg: ModelConfig) -> float:
    counted = params.count(cfg)
    return 1 - sum(counted.by_part[part] for part in KEPT_WIDE) / counted.total


def hopper_and_blackwell() -> None:
    """Print what Hopper's FP8 sums lack and what Blackwell added: quoted, with the source."""
    print("Hopper")
    _quote(HOPPER)
    print("Blackwell")
    _quote(BLACKWELL)


def training_facts() -> None:
    """Print the papers' findings about training in FP8: quoted, with the source."""
    _quote(TRAINED)


def _quote(rows: tuple[tuple[str, str], ...]) -> None:
    for id, meaning in rows:
        row = paper.row(id)
        number = f"{row.value:g}{'' if row.unit == '%' else ' '}{row.unit}"
        where = f"{row.paper.split(',')[0]}, {row.where}"
        print(f"  {number:21}{meaning:53}{where}")
