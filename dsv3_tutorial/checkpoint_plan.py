"""Which stored tensors become which tensors in memory, and all that stands against it.

Judged from names, shapes and dtypes alone, before a single weight is read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from dsv3_tutorial import checkpoint_codes as codes
from dsv3_tutorial import checkpoint_layout as layout
from dsv3_tutorial.checkpoint_files import DTYPES, Stored
from dsv3_tutorial.checkpoint_layout import Names, Part, grouped
from dsv3_tutorial.config import ModelConfig, QuantizationConfig


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
        found = {name: codes.format_of(name, self.stored) for name in self.shapes}
        self.coded = {name: fmt for name, fmt in found.items() if fmt is not None}

    def key_problems(self) -> list[str]:
        prefixes = layout.mtp_prefixes(self.cfg)
        left_out = tuple(p for p in prefixes if not any(k.startswith(p) for k in self.expected))
        modules = tuple(p for p in prefixes if p not in left_out)
        missing = [k for k in self.parts if k not in self.stored and k not in self.coded]
        problems = []
        if modules and not any(key.startswith(modules) for key in self.stored):
            missing = [key for key in missing if not key.startswith(modules)]
            problems = [
                f"config.json announces {len(modules)} module(s) for multi-token prediction, and "
                "the files have none of their tensors: load with mtp=False to go without"
            ]
        problems += [f"missing: {key}" for key in grouped(missing)]
        for fmt in codes.CODED:
            lacking = [k for k, kind in self.coded.items() if kind == fmt and self._lacks(k)]
            what = f"{fmt.upper()} without its scale" + " or its shape" * (fmt == "int4")
            problems += [f"{what}: {key}" for key in grouped(lacking)]
        known = {*self.shapes, *(piece for key in self.coded for piece in self.pieces(key))}
        unexpected = [
            key
            for key in self.stored
            if key not in known
            and not layout.IGNORED.fullmatch(key)
            and not key.startswith(left_out)
        ]
        return [*problems, *(f"unexpected: {key}" for key in grouped(unexpected))]

    def pieces(self, name: str) -> codes.Pieces:
        """The stored tensors that a coded weight is made of; none where it is no matrix."""
        shape = self.shapes[name]
        return codes.pieces(self.coded[name], name, shape, self.block) if len(shape) > 1 else {}

    def _lacks(self, name: str) -> bool:
        return any(piece not in self.stored for piece in self.pieces(name))

    def shape_problems(self) -> list[str]:
        """All that is wrong with shapes and dtypes of what is there, names of a kind together."""
        found: dict[str, list[str]] = {}
        vain = codes.announced_in_vain(self.cfg.quantization_config, self.stored)
        if self.coded and self.cfg.quantization_config is None:
            kinds = ", ".join(fmt.upper() for fmt in codes.CODED if fmt in self.coded.values())
            to_say = "to give the block size" if kinds == "FP8" else "to say how they are meant"
            found[f"{kinds}, and config.json has no quantization_config {to_say}"] = [*self.coded]
        for name in self.shapes:
            for what, key in self._coded(name) if name in self.coded else self._plain(name):
                found.setdefault(what, []).append(key)
        named = [f"{what}: {key}" for what, names in found.items() for key in grouped(names)]
        return ([vain] if vain else []) + named

    def _plain(self, name: str) -> Iterator[tuple[str, str]]:
        if name in self.stored:
            has, shape = self.stored[name], tuple(self.shapes[name])
            if has.dtype not in DTYPES:
                yield f"stored as {has.dtype}, and a weight is {', '.join(DTYPES)}", name
            if has.shape != shape:
                yield f"shape {has.shape}, not {shape}", name

    def _coded(self, name: str) -> Iterator[tuple[str, str]]:
        if not self.pieces(name):
            yield f"{self.coded[name].upper()}, and no matrix", name
        for piece, (kinds, shape) in self.pieces(name).items():
            has = self.stored.get(piece)
            if has is None or (has.dtype in kinds and has.shape == shape):
                continue
            if piece == name:
                yield f"shape {has.shape}, not {shape}", name
                return  # its scale cannot fit either
            yield f"{has.dtype} {has.shape}, not {' or '.join(kinds)} {shape}", piece

    @property
    def block(self) -> tuple[int, int]:
        return (self.cfg.quantization_config or QuantizationConfig()).weight_block_size
