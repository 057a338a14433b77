"""Which tensor stands under which name on disk: the layout of the public DeepSeek checkpoints.

In memory a layer's experts are two tensors (`mlp.experts.gate_up_proj`, `.down_proj`); on disk each
expert has three. The multi-token prediction module L carries its own copies of embedding and head.
E experts, D hidden, F expert width.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from dsv3_tutorial.config import ModelConfig

Names = Mapping[str, tuple[int, ...]]  # tensor name -> shape

SCALE = "_scale_inv"  # after a weight's name; DeepSeek: what the stored FP8 is multiplied with
BIAS = "e_score_correction_bias"  # float32 whatever the rest is: its steps of 0.001 are too small

# Stored by old DeepSeek-V2 and Llama code, and computed from the config by everybody.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
# FP8 in DeepSeek-V3's own files: all projections of attention, MLP and experts. Embedding, head,
# norms, the gate and the MTP module's eh_proj are BF16 there.
_FP8 = re.compile(
    r"\.(q_proj|k_proj|v_proj|o_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj"
    r"|gate_proj|up_proj|down_proj)\.weight$"
)
_FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")


class Part(NamedTuple):
    """A tensor on disk: the tensor in memory that it is, or is part of, and where in it."""

    source: str
    where: tuple[int | slice, ...]
    shape: tuple[int, ...]


def parts(names: Names) -> dict[str, Part]:
    """Names in memory -> names on disk, every expert by itself."""
    made = {}
    for source, shape in names.items():
        fused = _FUSED.fullmatch(source)
        made |= _expert_parts(*fused.groups(), shape) if fused else {source: whole(source, shape)}
    return made


def whole(source: str, shape: tuple[int, ...]) -> Part:
    """A tensor that is the same on disk and in memory."""
    return Part(source, (), tuple(shape))


def _expert_parts(prefix: str, kind: str, shape: tuple[int, ...]) -> dict[str, Part]:
    """gate_up_proj (E, 2 F, D), its first F rows the gate, or down_proj (E, D, F), by expert."""
    experts, rows, columns = shape
    cuts = {"down_proj": slice(0, rows)}
    if kind == "gate_up_proj":
        cuts = {"gate_proj": slice(0, rows // 2), "up_proj": slice(rows // 2, rows)}
    return {
        f"{prefix}.{e}.{name}.weight": Part(
            f"{prefix}.{kind}", (e, cut), (cut.stop - cut.start, columns)
        )
        for e in range(experts)
        for name, cut in cuts.items()
    }


def mtp_copies(cfg: ModelConfig, names: Iterable[str]) -> dict[str, str]:
    """Names on disk of the MTP modules' embedding and head -> the one in memory that they equal."""
    copies = {}
    for prefix in mtp_prefixes(cfg):
        if any(name.startswith(prefix) for name in names):
            copies[f"{prefix}embed_tokens.weight"] = "model.embed_tokens.weight"
            copies[f"{prefix}shared_head.head.weight"] = "lm_head.weight"
    return copies


def mtp_prefixes(cfg: ModelConfig) -> list[str]:
    """`model.layers.61.` for DeepSeek-V3: the modules stand after the layers."""
    first = cfg.num_hidden_layers
    return [f"model.layers.{first + i}." for i in range(cfg.num_nextn_predict_layers)]


def on_disk(cfg: ModelConfig, names: Names) -> dict[str, Part]:
    """All that a save writes for these names in memory, FP8 scales apart. Tied: without a head."""
    made = parts(names)
    if cfg.tie_word_embeddings:
        made.pop("lm_head.weight", None)
    for copy, source in mtp_copies(cfg, names).items():
        made[copy] = whole(source, names[source])
    # layer after layer, as published: what is read together lies together
    return dict(sorted(made.items(), key=lambda item: _numbered(item[0])))


def _numbered(name: str) -> list[tuple[int, str]]:
    """A key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def is_fp8(name: str) -> bool:
    """Whether DeepSeek stores the weight of this name on disk in FP8."""
    return bool(_FP8.search(name))


def target_dtype(name: str, stored: Iterable[torch.dtype], wanted: torch.dtype | None):
    """What a tensor is loaded as: `wanted`, or else as stored, and FP8 as bfloat16."""
    if name.endswith(BIAS):
        return torch.float32
    if wanted is not None:
        return wanted
    kinds = {torch.bfloat16 if kind == torch.float8_e4m3fn else kind for kind in stored}
    dtype = kinds.pop()
    for other in kinds:  # the experts of one tensor, stored differently: the wider
        dtype = torch.promote_types(dtype, other)
    return dtype


def grouped(names: Iterable[str]) -> list[str]:
    """Names that differ in numbers only, as one: `layers.{3..7}.up_proj (5 keys)`."""
    patterns: dict[tuple[str, ...], set[tuple[int, ...]]] = {}
    for name in names:
        pieces = re.split(r"(?<=\.)(0|[1-9][0-9]{0,8})(?=\.)", name)
        numbers = tuple(int(piece) for piece in pieces[1::2])
        patterns.setdefault(tuple(pieces[::2]), set()).add(numbers)
    return [_written(pattern, box) for pattern, found in patterns.items() for box in _boxes(found)]


def _boxes(found: set[tuple[int, ...]]) -> list[list[list[int]]]:
    """Tuples of numbers as few products of sets, so that a group names nothing else."""
    axes = [sorted(set(axis)) for axis in zip(*found)]
    if math.prod(len(axis) for axis in axes) == len(found):
        return [axes]
    rest: dict[int, set[tuple[int, ...]]] = {}
    for first, *others in found:
        rest.setdefault(first, set()).add(tuple(others))
    same: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for first in sorted(rest):
        same.setdefault(frozenset(rest[first]), []).append(first)
    return [[firsts, *box] for others, firsts in same.items() for box in _boxes(set(others))]


def _written(pattern: tuple[str, ...], box: list[list[int]]) -> str:
    text = pattern[0] + "".join(_range(axis) + after for axis, after in zip(box, pattern[1:]))
    count = math.prod(len(axis) for axis in box)
    return f"{text} ({count} keys)" if count > 1 else text


def _range(numbers: list[int]) -> str:
    """[3, 4, 5, 9] -> {3..5, 9}; a single number as it is."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [str(a) if a == b else f"{a}..{b}" for a, b in runs]
    return texts[0] if len(numbers) == 1 else "{" + ", ".join(texts) + "}"
