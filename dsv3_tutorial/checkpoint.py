"""Public checkpoints, in Hugging Face's layout: a folder on disk <-> tensors by name, validated.

A load checks everything before it gives anything back; a save appears whole or not at all. Weights
in FP8 (DeepSeek-V3's: blocks of 128 x 128), INT8 and INT4 are read and written: `checkpoint_codes`.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dsv3_tutorial import checkpoint_codes as codes
from dsv3_tutorial import checkpoint_layout as layout
from dsv3_tutorial.checkpoint_files import INDEX, CheckpointError, stored_tensors
from dsv3_tutorial.checkpoint_folder import replaced
from dsv3_tutorial.checkpoint_layout import Names, grouped
from dsv3_tutorial.checkpoint_plan import Plan
from dsv3_tutorial.checkpoint_reader import Reader
from dsv3_tutorial.config import ModelConfig, QuantizationConfig
from dsv3_tutorial.weights.formats import Quantized

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
    keep_codes: bool = False,
) -> dict[str, Tensor | Quantized]:
    """Read the tensors that a model needs, all of them right, or none.

    expected: the names and shapes of the model's state_dict -> the same names, fresh tensors on
    `device`. dtype None keeps what is stored, codes as bfloat16; e_score_correction_bias is float32
    always. With keep_codes a tensor whose parts are all stored in eight or four bits is given as
    these, Quantized, each under its name on disk. Experts are read one by one or fused. Of an MTP
    module that `cfg` announces and `expected` leaves out, nothing is read. Memory: the tensors, and
    one of them once more.
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
        reader = Reader(plan, torch.device(device or "cpu"), files)
        try:
            loaded = reader.read_all(dtype, keep_codes)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                folder, [f"a file could not be read to its end: {error}"]
            ) from None
    if reader.problems():
        raise CheckpointError(folder, reader.problems())
    return loaded


def save(
    folder: str | Path,
    cfg: ModelConfig,
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    max_shard_size: int | str = "5GB",
    beside: Iterable[Path] = (),
) -> None:
    """Write a model's state_dict as a public checkpoint: config.json, safetensors, an index.

    dtype None keeps each tensor's own. quantize="fp8" stores the projections of attention, MLP and
    experts in FP8 with a scale a block, as DeepSeek-V3's own files do, a quarter of float32's
    bytes; "int8" and "int4" as compressed-tensors does. `beside` are files to copy along. Larger
    than max_shard_size: several files. Memory: one shard more.
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
        others = {path.name: path for path in beside}
        is_ours = lambda name: name in others or bool(_OURS.fullmatch(name))  # noqa: E731
        with replaced(folder, is_ours) as new:
            for name, path in others.items():
                shutil.copyfile(path, new / name)
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
        self.coded = {name for name in self.parts if quantize and layout.is_fp8(name)}
        self.piece_of = {piece: name for name in self.coded for piece in self._outlines(name)}

    def outlines(self) -> dict[str, Tensor]:
        """Every tensor without its values, in the order of the files."""
        made = {}
        for name, part in self.parts.items():
            plain = torch.empty(part.shape, dtype=self._dtype(part.source), device="meta")
            made |= self._outlines(name) if name in self.coded else {name: plain}
        return made

    def _outlines(self, name: str) -> dict[str, Tensor]:
        return codes.outlines(self.quantize, name, self.parts[name].shape)

    def tensor(self, name: str) -> Tensor:
        weight = self.piece_of.get(name, name)
        source, where, _ = self.parts[weight]
        value = self.state[source].detach()[where]
        if name in self.piece_of:
            return codes.encode(self.quantize, weight, value)[name]
        # a copy: safetensors refuses tensors that share their memory
        return value.to("cpu", self._dtype(source), copy=True).contiguous()

    def _dtype(self, source: str) -> torch.dtype:
        return layout.target_dtype(source, [self.state[source].dtype], self.dtype)

    def config(self) -> dict:
        stored = QuantizationConfig.of(self.quantize) if self.quantize else None
        dtype = str(self._dtype("model.embed_tokens.weight")).removeprefix("torch.")
        named = {"architectures": [_CLASSES[self.cfg.model_type]], "torch_dtype": dtype}
        return named | replace(self.cfg, quantization_config=stored).to_dict()


def _unfit(cfg: ModelConfig, state: Mapping, dtype: torch.dtype | None, quantize) -> list[str]:
    """Why a save would give a checkpoint that no load accepts."""
    floats = (torch.float32, torch.bfloat16, torch.float16)
    problems = []
    if quantize not in (None, *codes.CODED):
        problems.append(f"quantize={quantize!r} is not implemented: {codes.CODED} or None")
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
