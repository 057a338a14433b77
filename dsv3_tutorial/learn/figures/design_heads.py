"""How many heads may share a latent: the second game's model, served from two kinds of chip."""

from dsv3_tutorial import hardware
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost import bill, designs, serving_plan
from dsv3_tutorial.cost.design_briefs import BRIEFS
from dsv3_tutorial.cost.design_model import model
from dsv3_tutorial.cost.serving_target import Target
from dsv3_tutorial.hardware import Chip

HEADS = (16, 32, 64, 128)


def heads_table() -> None:
    """Print what the second game's model serves with more and fewer heads, from H20 and from H800.

    A latent is read once for all heads, and each computes on it: so heads add FLOP for each byte.
    """
    brief = BRIEFS["h20"]
    made = [_with_heads(heads) for heads in HEADS]
    print(f"users served at {brief.context:,} tokens, {brief.rate:g} a second; what ends the batch")
    _row("heads on the latent", "", HEADS)
    _row("FLOP for a cached byte", "", [f"{_cache_intensity(cfg):.0f}" for cfg in made])
    for name, chip in (("H20", brief.cluster.chip), ("H800", hardware.chip("h800"))):
        does = f"{chip.rate('bf16') / chip.bandwidth():.0f} FLOP per byte"
        _row(f"{brief.devices} {name}", does, [_served(cfg, chip) for cfg in made])


def _row(what: str, does: str, cells) -> None:
    print(f"{what:24}{does:>18}" + "".join(f"{cell:>14}" for cell in cells))


def _with_heads(heads: int) -> ModelConfig:
    """The second game's worked model with so many heads on its latent."""
    fields = {k: v for k, v in designs.cluster_design().items() if k != "tokens"}
    return model(**fields | {"num_attention_heads": heads})


def _cache_intensity(cfg: ModelConfig) -> float:
    """FLOP that decoding does for each cached byte that it reads, in BF16 and long contexts."""
    cache = next(line for line in bill.decode_bill(cfg, 1 << 20) if line.part == "latent cache")
    return cache.intensity


def _served(cfg: ModelConfig, chip: Chip) -> str:
    brief = BRIEFS["h20"]
    target = Target(brief.context, brief.rate, brief.devices)
    found = serving_plan.serve(cfg, chip, target, brief.devices)
    return f"{found.batch:,} {found.limit}"
