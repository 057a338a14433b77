"""Public checkpoints, in Hugging Face's layout: a folder on disk <-> tensors by name, validated.

A load checks everything before it gives anything back; a save appears whole or not at all. FP8
weights (DeepSeek-V3's: blocks of 128 x 128, a scale each) are read and written.
"""

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsv3_tutorial import checkpoint_layout as layout
from dsv3_tutorial.checkpoint_files import DTYPES, INDEX, CheckpointError, stored_tensors
from dsv3_tutorial.checkpoint_folder import replaced
from dsv3_tutorial.checkpoint_layout import SCALE, Names, Part, grouped
from dsv3_tutorial.checkpoint_plan import Plan
from dsv3_tutorial.config import ModelConfig, QuantizationConfig
from dsv3_tutorial.fp8.quant import dequantize_blocks, quantize_blocks, scale_shape

__all__ = ["CheckpointError", "load", "read_config", "save"]

_CLASSES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
_OURS = re.compile(r"config\.json|model.*\.safetensors|model\.safetensors\.index\.json")


def read_config(folder: str | Path) -> ModelConfig:
    """The config of a checkpoint. Raises ConfigError where it is no model of ours."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        here = "holds no config.json" if path.parent.is_dir() else "is no folder"
        raise CheckpointError(path.parent, [f"it {here}: name the folder that config.json is in"])
    return ModelConfig.from_json(path)


def load(
    folder: str | Path,
    cfg: ModelConfig,
    expected: Names,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Read the tensors that a model needs, all of them right, or none.

    expected: the names and shapes of the model's state_dict -> the same names, fresh tensors on
    `device`. dtype None keeps what is stored, FP8 as bfloat16; e_score_correction_bias is float32
    always. Experts are read one by one or fused. Of an MTP module that `cfg` announces and
    `expected` leaves out, nothing is read. Memory: the tensors, and one of them once more.
    Raises CheckpointError with everything that is wrong: first names and shapes, from the headers,
    then values.
    """
    folder = Path(folder)
    stored = stored_tensors(folder)
    plan = Plan(cfg, expected, stored)
    problems = [*plan.key_problems(), *plan.shape_problems()]
    if problems:
        raise CheckpointError(folder, problems)
    with ExitStack() as files:
        reader = _Reader(plan, torch.device(device or "cpu"), files)
        try:
            loaded = reader.read_all(dtype)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                folder, [f"a file could not be read to its end: {error}"]
            ) from None
    if reader.problems():
        raise CheckpointError(folder, reader.problems())
    return loaded


class _Reader:
    """Reads planned tensors onto one device, and keeps in mind which values cannot be right."""

    def __init__(self, plan: Plan, device: torch.device, files: ExitStack):
        self.plan, self.device, self.files = plan, device, files
        self.open: dict[Path, safe_open] = {}
        self.bad_scales: list[str] = []
        self.not_finite: list[str] = []
        self.unlike: list[str] = []

    def read_all(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        by_source: dict[str, list[tuple[str, Part]]] = {}
        for name, part in self.plan.parts.items():
            by_source.setdefault(part.source, []).append((name, part))
        loaded = {source: self._source(source, found, dtype) for source, found in by_source.items()}
        if self.plan.cfg.tie_word_embeddings:
            loaded["lm_head.weight"] = loaded["model.embed_tokens.weight"]
        for copy, source in self.plan.copies.items():
            if not torch.equal(self._tensor(copy, loaded[source].dtype), loaded[source]):
                self.unlike.append(f"{copy} differs from {source}, which it is a copy of")
        return {name: loaded[name] for name in self.plan.expected}

    def problems(self) -> list[str]:
        found = [f"not positive and finite: {key}" for key in grouped(self.bad_scales)]
        found += [f"NaN or infinite values in: {key}" for key in grouped(self.not_finite)]
        return found + self.unlike

    def _source(
        self, source: str, found: list[tuple[str, Part]], dtype: torch.dtype | None
    ) -> Tensor:
        stored = [DTYPES[self.plan.stored[name].dtype] for name, _ in found]
        dtype = layout.target_dtype(source, stored, dtype)
        if len(found) == 1 and not found[0][1].where:
            return self._tensor(found[0][0], dtype)
        shape = self.plan.expected[source]
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        for name, part in found:
            tensor[part.where] = self._tensor(name, dtype)
        return tensor

    def _tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """One stored tensor, its own memory and no part of the file's."""
        raw = self._raw(name)
        if name in self.plan.fp8:
            scale = self._raw(name + SCALE)
            if not (scale.isfinite() & (scale > 0)).all():
                self.bad_scales.append(name + SCALE)
                return torch.zeros(raw.shape, dtype=dtype, device=self.device)
            raw, scale = raw.to(self.device), scale.to(self.device)
            value = dequantize_blocks(raw, scale, dtype, self.plan.block)
        else:
            value = raw.to(self.device, dtype, copy=True)
        if not value.isfinite().all():  # after the cast: a value too large for dtype counts
            self.not_finite.append(name)
        return value

    def _raw(self, name: str) -> Tensor:
        path = self.plan.stored[name].file
        if path not in self.open:
            self.open[path] = self.files.enter_context(safe_open(path, framework="pt"))
        return self.open[path].get_tensor(name)


def save(
    folder: str | Path,
    cfg: ModelConfig,
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a model's state_dict as a public checkpoint: config.json, safetensors, an index.

    dtype None keeps each tensor's own. quantize="fp8" stores the projections of attention, MLP and
    experts in FP8 with a scale a block, as DeepSeek-V3's own files do, a quarter of float32's
    bytes. Larger than max_shard_size: several files. Memory: one shard more.
    The folder appears whole: until then what stood there stands (`checkpoint_folder`). Raises
    CheckpointError for values that no load would accept, and for what the disk refuses.
    """
    folder = Path(folder)
    problems = _unfit(cfg, state, dtype, quantize)
    if problems:
        raise CheckpointError(folder, problems, "save")
    planned = _Written(cfg, state, dtype, quantize)
    split = split_torch_state_dict_into_shards(planned.outlines(), max_shard_size=max_shard_size)
    try:
        with replaced(folder, lambda name: bool(_OURS.fullmatch(name))) as new:
            for file, names in split.filename_to_tensors.items():
                shard = {name: planned.tensor(name) for name in names}
                save_file(shard, new / file, metadata={"format": "pt"})
            if split.is_sharded:
                index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
                _write_json(new / INDEX, index)
            _write_json(new / "config.json", planned.config())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(folder, [f"it cannot be written there: {error}"], "save") from error


class _Written:
    """What a save puts on disk, made one tensor at a time."""

    def __init__(self, cfg: ModelConfig, state: Mapping, dtype: torch.dtype | None, quantize):
        self.cfg, self.state, self.dtype, self.quantize = cfg, state, dtype, quantize
        self.parts = layout.on_disk(cfg, {name: tuple(t.shape) for name, t in state.items()})

    def outlines(self) -> dict[str, Tensor]:
        """Every tensor without its values, in the order of the files."""
        made = {}
        for name, part in self.parts.items():
            fp8 = self.quantize and layout.is_fp8(name)
            dtype = torch.float8_e4m3fn if fp8 else self._dtype(part.source)
            made[name] = torch.empty(part.shape, dtype=dtype, device="meta")
            if fp8:
                made[name + SCALE] = torch.empty(scale_shape(part.shape), device="meta")
        return made

    def tensor(self, name: str) -> Tensor:
        weight = name if name in self.parts else name.removesuffix(SCALE)
        source, where, _ = self.parts[weight]
        value = self.state[source].detach()[where]
        if self.quantize and layout.is_fp8(weight):
            value = quantize_blocks(value)[0 if name == weight else 1]
            return value.cpu()
        # a copy: safetensors refuses tensors that share their memory
        return value.to("cpu", self._dtype(source), copy=True).contiguous()

    def _dtype(self, source: str) -> torch.dtype:
        return layout.target_dtype(source, [self.state[source].dtype], self.dtype)

    def config(self) -> dict:
        stored = QuantizationConfig() if self.quantize else None
        dtype = str(self._dtype("model.embed_tokens.weight")).removeprefix("torch.")
        named = {"architectures": [_CLASSES[self.cfg.model_type]], "torch_dtype": dtype}
        return named | replace(self.cfg, quantization_config=stored).to_dict()


def _unfit(cfg: ModelConfig, state: Mapping, dtype: torch.dtype | None, quantize) -> list[str]:
    """Why a save would give a checkpoint that no load accepts."""
    floats = (torch.float32, torch.bfloat16, torch.float16)
    problems = []
    if quantize not in (None, "fp8"):
        problems.append(f"quantize={quantize!r} is not implemented: 'fp8' or None")
    if dtype not in (None, *floats):
        problems.append(f"dtype={dtype} is not one that weights are kept in: {floats} or None")
    kept = {name: t.dtype if dtype is None else dtype for name, t in state.items()}
    wrong = [k for k, t in state.items() if not t.is_floating_point() or kept[k] not in floats]
    problems += [f"neither float32, bfloat16 nor float16: {key}" for key in grouped(wrong)]
    bad = [k for k, t in state.items() if k not in wrong and not t.to(kept[k]).isfinite().all()]
    problems += [f"NaN or infinite values in: {key}" for key in grouped(bad)]
    modules = layout.mtp_prefixes(cfg)
    lacking = [p for p in modules if not any(name.startswith(p) for name in state)]
    problems += [f"the config announces an MTP module at {p}*, and it is missing" for p in lacking]
    return problems


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
