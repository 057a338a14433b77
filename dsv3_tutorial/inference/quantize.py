"""A trained model with its weights in eight or four bits, in memory and as a folder.

What is quantised is what DeepSeek-V3's own files hold in FP8: the projections of attention, MLP and
experts (`checkpoint_layout.is_fp8`). Embedding, head, gates, norms and the MTP module's projection
stay as they are. `kv_b_proj` is rounded too, and kept wide: absorbed attention reads it as numbers
at every step, not as a product.
"""

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dsv3_tutorial import checkpoint
from dsv3_tutorial.checkpoint_codes import CODED, announced_in_vain
from dsv3_tutorial.checkpoint_files import CheckpointError, stored_tensors
from dsv3_tutorial.checkpoint_layout import is_fp8
from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.fp8.checks import QuantizationError
from dsv3_tutorial.inference.quantized_experts import QuantizedExperts
from dsv3_tutorial.model import DeepSeekV3
from dsv3_tutorial.moe.experts import Experts
from dsv3_tutorial.weights.formats import Quantized, check_format, dequantize, quantize
from dsv3_tutorial.weights.layers import QuantizedLinear, QuantizedStack

WIDE = "kv_b_proj"  # rounded, and kept as numbers


def quantized(model: DeepSeekV3, fmt: str) -> DeepSeekV3:
    """The same model with its projections and experts in `fmt`, one of weights.formats.FORMATS.

    A new model; the given one stays, and shares with it what is not quantised. For inference.
    Raises QuantizationError for an unknown format and for a model that is quantised already.
    """
    check_format(fmt)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    made = copy.deepcopy(model, shared).eval()
    for path, module in list(made.named_modules()):
        new = _quantized(path, module, fmt)
        if new is not None:
            _put(made, path, new)
    return made


def load(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    mtp: bool = True,
) -> DeepSeekV3:
    """The model in a folder, its codes kept where it is quantised: what is read stays as small.

    dtype, which the model computes in, device and mtp as in `DeepSeekV3.from_pretrained`, which a
    plain folder is left to. So is FP8 on a CPU: nothing there multiplies it, and dequantising it
    once costs memory, at every step time. Raises ConfigError or CheckpointError.
    """
    published = checkpoint.read_config(folder)
    stored, kind = published.quantization_config, torch.device(device or "cpu").type
    if stored is None or (stored.quant_method == "fp8" and kind == "cpu"):
        return DeepSeekV3.from_pretrained(folder, dtype, device, mtp).eval()
    return load_codes(folder, dtype, device, mtp)


def load_codes(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    mtp: bool = True,
) -> DeepSeekV3:
    """`load` for a quantised folder, FP8 on a CPU included: its products dequantise each time."""
    published = checkpoint.read_config(folder)
    cfg = published if mtp else replace(published, num_nextn_predict_layers=0)
    model = _outline(cfg)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state = checkpoint.load(folder, published, shapes, dtype, device, keep_codes=True)
    codes = {name: state.pop(name) for name in [*state] if isinstance(state[name], Quantized)}
    wanted = dtype or state["model.embed_tokens.weight"].dtype
    for path, module in list(model.named_modules()):
        new = _from_codes(path, module, codes, wanted)
        if new is not None:
            _put(model, path, new)
    model.load_state_dict(state, assign=True, strict=False)
    if cfg.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def quantize_folder(src: str | Path, dst: str | Path, to: str) -> None:
    """Write the checkpoint in `src` to `dst`, its projections and experts as fp8, int8 or int4.

    Tokenizer and other files come along. The folder appears whole or not at all; a checkpoint that
    stands there is never replaced. Memory: the weights once. Raises QuantizationError for an
    unknown format and for a checkpoint that is quantised already; CheckpointError for what cannot
    be read or written, and where dst is src or holds a checkpoint.
    """
    src, dst = Path(src), Path(dst)
    cfg = checkpoint.read_config(src)
    _check_folders(cfg, src, dst, to)
    shapes = {name: tensor.shape for name, tensor in _outline(cfg).state_dict().items()}
    state = checkpoint.load(src, cfg, shapes)
    beside = [path for path in sorted(src.iterdir()) if path.is_file() and not _is_weights(path)]
    checkpoint.save(dst, cfg, state, quantize=to, beside=beside)


def nbytes(model: nn.Module) -> int:
    """Bytes of a model's weights as they lie in memory, codes and scales counted as such."""
    plain: dict[int, int] = {p.data_ptr(): p.nbytes for p in model.parameters()}
    coded = 0
    for module in model.modules():
        if isinstance(module, QuantizedStack) and module.apart:
            continue  # each of its matrices is a module
        if isinstance(module, QuantizedLinear | QuantizedStack):
            coded += module.nbytes
        kept = {k: t for k, t in module.named_buffers(recurse=False) if k not in ("codes", "scale")}
        transient = module._non_persistent_buffers_set
        plain |= {t.data_ptr(): t.nbytes for k, t in kept.items() if k not in transient}
    return coded + sum(plain.values())


def _quantized(path: str, module: nn.Module, fmt: str) -> nn.Module | None:
    if isinstance(module, QuantizedLinear | QuantizedExperts):
        raise QuantizationError(
            f"{path} is quantised already. Rounded a second time, it would lose more than either "
            "format does. Load the plain checkpoint, and quantise that."
        )
    if type(module) is Experts:
        return QuantizedExperts.of(module, fmt)
    if type(module) is nn.Linear and is_fp8(f"{path}.weight"):
        if path.endswith(WIDE):
            return _wide(module.weight, quantize(module.weight.detach(), fmt), module.weight.dtype)
        return QuantizedLinear.of(module, fmt)
    return None


def _from_codes(
    path: str, module: nn.Module, codes: dict[str, Quantized], dtype: torch.dtype
) -> nn.Module | None:
    """The module that stored codes make of this one; None where it has none."""
    if type(module) is Experts and f"{path}.0.gate_proj.weight" in codes:
        names = [f"{path}.{{}}.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
        experts = range(len(module.gate_up_proj))
        stacks = [_stacked([codes.pop(name.format(e)) for e in experts]) for name in names]
        return QuantizedExperts(*stacks, dtype, module.engine)
    if f"{path}.weight" not in codes:
        return None
    q = codes.pop(f"{path}.weight")
    if path.endswith(WIDE):
        return _wide(module.weight, q, dtype)
    return QuantizedLinear(q, module.bias, dtype)


def _wide(weight: Tensor, q: Quantized, dtype: torch.dtype) -> nn.Linear:
    """A plain layer with the numbers that the codes stand for."""
    layer = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    layer.weight = nn.Parameter(dequantize(q, dtype), requires_grad=False)
    return layer


def _stacked(every: list[Quantized]) -> Quantized:
    codes = torch.stack([q.codes for q in every])
    scale = torch.stack([q.scale for q in every])
    return Quantized(every[0].fmt, codes, scale, (len(every), *every[0].shape))


def _put(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def _outline(cfg: ModelConfig) -> DeepSeekV3:
    with torch.device("meta"):
        return DeepSeekV3(cfg)


def _is_weights(path: Path) -> bool:
    name = path.name
    return name == "config.json" or (name.startswith("model") and ".safetensors" in name)


def _check_folders(cfg: ModelConfig, src: Path, dst: Path, to: str) -> None:
    if to not in CODED:
        raise QuantizationError(
            f"No folder can be written in the format {to!r}: nobody would know how to read it. "
            f"Name one of {', '.join(CODED)}."
        )
    if cfg.quantization_config is not None:
        vain = announced_in_vain(cfg.quantization_config, stored_tensors(src))
        if vain:
            raise CheckpointError(src, [vain])
        raise QuantizationError(
            f"The checkpoint in {src.name!r} is quantised already "
            f"({cfg.quantization_config.quant_method}). Rounded a second time, it would lose more "
            "than either format does. Start from the plain checkpoint."
        )
    if src.resolve() == dst.resolve():
        raise CheckpointError(
            dst, ["it is the folder that is read: name another for the quantised one"], "save"
        )
    there = (
        [path.name for path in sorted(dst.iterdir()) if _is_weights(path)] if dst.is_dir() else []
    )
    if there:
        what = f"a checkpoint stands there already ({', '.join(there[:3])}), which would be lost"
        raise CheckpointError(dst, [f"{what}: name a new folder, or remove that one"], "save")
