"""Which stored tensors become which tensors in memory, and all that stands against it.

Judged from names, shapes and dtypes alone, before a single weight is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dsv3_tutorial import checkpoint_layout as layout
from dsv3_tutorial.checkpoint_files import DTYPES, FP8, Stored
from dsv3_tutorial.checkpoint_layout import SCALE, Names, Part, grouped
from dsv3_tutorial.config import ModelConfig, QuantizationConfig
from dsv3_tutorial.fp8.quant import scale_shape


@dataclass
class Plan:
    """What of the stored tensors becomes which tensor in memory."""

    cfg: ModelConfig
    expected: Names
    stored: Mapping[str, Stored]
    parts: dict[str, Part] = field(init=False)
    copies: dict[str, str] = field(init=False)  # may be stored, and must then equal the other

    def __post_init__(self) -> None:
        fused = {name for name in self.expected if name in self.stored}
        split = layout.parts({k: v for k, v in self.expected.items() if k not in fused})
        self.parts = split | {k: layout.whole(k, self.expected[k]) for k in fused}
        copies = layout.mtp_copies(self.cfg, self.expected)
        if self.cfg.tie_word_embeddings and self.parts.pop("lm_head.weight", None):
            copies["lm_head.weight"] = "model.embed_tokens.weight"
        self.copies = {copy: source for copy, source in copies.items() if copy in self.stored}
        self.shapes = {name: part.shape for name, part in self.parts.items()}
        self.shapes |= {copy: tuple(self.expected[of]) for copy, of in self.copies.items()}
        self.fp8 = [k for k in self.shapes if k in self.stored and self.stored[k].dtype == FP8]

    def key_problems(self) -> list[str]:
        prefixes = layout.mtp_prefixes(self.cfg)
        left_out = tuple(p for p in prefixes if not any(k.startswith(p) for k in self.expected))
        modules = tuple(p for p in prefixes if p not in left_out)
        missing = [key for key in self.parts if key not in self.stored]
        problems = []
        if modules and not any(key.startswith(modules) for key in self.stored):
            missing = [key for key in missing if not key.startswith(modules)]
            problems = [
                f"config.json announces {len(modules)} module(s) for multi-token prediction, and "
                "the files have none of their tensors: load with mtp=False to go without"
            ]
        problems += [f"missing: {key}" for key in grouped(missing)]
        problems += [f"FP8 without its scale: {key}" for key in grouped(self._without_scale())]
        known = {*self.shapes, *(key + SCALE for key in self.fp8)}
        unexpected = [
            key
            for key in self.stored
            if key not in known
            and not layout.IGNORED.fullmatch(key)
            and not key.startswith(left_out)
        ]
        return [*problems, *(f"unexpected: {key}" for key in grouped(unexpected))]

    def _without_scale(self) -> list[str]:
        return [key for key in self.fp8 if key + SCALE not in self.stored]

    def shape_problems(self) -> list[str]:
        """All that is wrong with shapes and dtypes of what is there, names of a kind together."""
        found: dict[str, list[str]] = {}
        if self.fp8 and self.cfg.quantization_config is None:
            found["FP8, and config.json has no quantization_config to give the block size"] = (
                self.fp8
            )
        for name, shape in self.shapes.items():
            if name not in self.stored:
                continue
            has = self.stored[name]
            if has.dtype not in DTYPES:
                found.setdefault(
                    f"stored as {has.dtype}, and a weight is {', '.join(DTYPES)}", []
                ).append(name)
            if has.shape != tuple(shape):
                found.setdefault(f"shape {has.shape}, not {tuple(shape)}", []).append(name)
            elif name in self.fp8 and name + SCALE in self.stored and len(shape) > 1:
                scale, wanted = self.stored[name + SCALE], scale_shape(shape, self.block)
                if (scale.dtype, scale.shape) != ("F32", wanted):
                    what = f"{scale.dtype} {scale.shape}, not F32 {wanted}"
                    found.setdefault(what, []).append(name + SCALE)
            elif name in self.fp8 and len(shape) < 2:
                found.setdefault("FP8, and no matrix", []).append(name)
        return [f"{what}: {key}" for what, names in found.items() for key in grouped(names)]

    @property
    def block(self) -> tuple[int, int]:
        return (self.cfg.quantization_config or QuantizationConfig()).weight_block_size
