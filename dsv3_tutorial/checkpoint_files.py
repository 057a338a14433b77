"""The files of a checkpoint folder, told apart from what only looks like them.

`stored_tensors` says which tensors lie in which file, from the headers alone: no weight is read, no
pickle is ever opened, and no name in an index leads out of the folder.
"""

import json
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from dsv3_tutorial.checkpoint_layout import grouped

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
FP8 = "F8_E4M3"
DTYPES[FP8] = torch.float8_e4m3fn

_HEADER_LIMIT = 100_000_000  # bytes; safetensors' own
_FETCH = "fetch the file again"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or written, whole. `problems` lists all that was found."""

    def __init__(self, folder: Path, problems: list[str], doing: str = "load"):
        self.problems = problems
        shown = problems[:_SHOWN]
        if len(problems) > _SHOWN:
            shown = [*shown, f"and {len(problems) - _SHOWN} more (the error's .problems has all)"]
        listed = "\n".join(f"  - {problem}" for problem in shown)
        super().__init__(
            f"{_HEADS[doing].format(folder.name or str(folder))}\n{listed}\n{_TAILS[doing]}"
        )


_SHOWN = 40
_HEADS = {
    "load": "The checkpoint in {!r} cannot be loaded:",
    "save": "No checkpoint was written to {!r}:",
}
_TAILS = {
    "load": "Nothing of it was loaded: a model with wrong or missing weights computes without "
    "complaint. Mend or fetch again what is named, then load the folder again.",
    "save": "Half a checkpoint would be worse than none, so what stood there before still does. "
    "Mend what is named, then save again.",
}


class Stored(NamedTuple):
    """Where a tensor lies, and what its file's header says of it."""

    file: Path
    dtype: str  # safetensors' name: F32, BF16, F16, F8_E4M3, ...
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor in a checkpoint's files. Raises CheckpointError with all that is wrong."""
    if not folder.is_dir():
        raise CheckpointError(folder, ["there is no such folder: name the one with config.json"])
    weight_map = _weight_map(folder)
    names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
    missing = [name for name in names if not (folder / name).is_file()]
    problems = [f"missing files, named in {INDEX}: {', '.join(missing)}"] if missing else []
    found: dict[str, Stored] = {}
    for name in names:
        if name in missing:
            continue
        try:
            tensors = _header(folder / name)
        except _Damaged as error:
            problems.append(f"{name} {error}")
            continue
        twice = [key for key in tensors if key in found]
        problems += [f"in two shards, {name} and an earlier one: {key}" for key in grouped(twice)]
        found |= tensors
    if problems:
        raise CheckpointError(folder, problems)
    if weight_map is not None:
        _compare_with_index(folder, weight_map, found)
    return found


def _compare_with_index(folder: Path, weight_map: dict[str, str], found: dict[str, Stored]) -> None:
    lost = [k for k, name in weight_map.items() if k not in found or found[k].file.name != name]
    unnamed = [key for key in found if key not in weight_map]
    problems = [f"not in the file that {INDEX} names for it: {key}" for key in grouped(lost)]
    problems += [f"in a file, and not in {INDEX}: {key}" for key in grouped(unnamed)]
    if problems:
        raise CheckpointError(folder, problems)


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name, checked, or None where the model is one file."""
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        weight_map, problems = _read_index(index)
        if single.is_file() and SINGLE not in weight_map.values():
            problems.append(f"{INDEX} and {SINGLE} both stand here: two models; remove one of them")
        if problems:
            raise CheckpointError(folder, problems)
        return weight_map
    if single.is_file():
        return None
    pickles = sorted({path.name for kind in _PICKLES for path in folder.glob(kind)})
    if pickles:
        what = f"{', '.join(pickles)}: a pickle runs the code in it when it is read, so none is"
        raise CheckpointError(folder, [f"{what}; convert it to safetensors where you trust it"])
    raise CheckpointError(folder, [f"there is neither {SINGLE} nor {INDEX} in it"])


def _read_index(path: Path) -> tuple[dict[str, str], list[str]]:
    try:
        index = json.loads(path.read_bytes(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        return {}, [f"{INDEX} is not JSON: {_file_kind(path) or error}; {_FETCH}"]
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        return {}, [f"{INDEX} is not an object with a weight_map (tensor name -> file); {_FETCH}"]
    unsafe = sorted({str(name) for name in weight_map.values() if not _plain_name(name)})
    why = "a shard is a .safetensors file in this very folder, and no other file is opened"
    problems = [f"{INDEX} names the file {name!r}: {why}" for name in unsafe]
    return weight_map, problems


def _plain_name(name: Any) -> bool:
    """A shard's name and nothing that could lead elsewhere, on any system."""
    return isinstance(name, str) and bool(re.fullmatch(r"\w[\w.+=-]*\.safetensors", name, re.ASCII))


class _Damaged(Exception):
    """What is wrong with one file, as the end of a sentence that begins with its name."""


def _header(path: Path) -> dict[str, Stored]:
    """The tensors that one safetensors file says it holds."""
    wrong = _file_kind(path)
    if wrong:
        raise _Damaged(wrong)
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, _HEADER_LIMIT)), object_pairs_hook=_unique)
        with safe_open(path, framework="pt"):  # safetensors checks sizes, offsets and types
            pass
    except _TwiceError as error:
        raise _Damaged(f"{error}; {_FETCH}") from None
    except (struct.error, ValueError, RecursionError, SafetensorError, OSError) as error:
        raise _Damaged(f"is truncated or damaged ({error}); {_FETCH}") from None
    header.pop("__metadata__", None)
    return {
        key: Stored(path, entry["dtype"], tuple(entry["shape"])) for key, entry in header.items()
    }


class _TwiceError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object as a dictionary; json and safetensors would keep one of two equal names."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _TwiceError(f"names {twice} twice, and only one of the two could be read")
    return made


def _file_kind(path: Path) -> str | None:
    """What a file is instead of a checkpoint's, from its first bytes; None: nothing known."""
    with open(path, "rb") as file:
        start = file.read(512)
    text = start.lstrip().lower()
    if not start:
        return f"is empty; {_FETCH}"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the file itself: git lfs pull brings the file"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"is a web page, perhaps a log-in or an error page, saved under that name; {_FETCH}"
    # protocol 2 and later, or the zip archive of torch.save; a header's length may begin so as well
    if start[8:9] != b"{" and re.match(rb"\x80[\x02-\x05]|PK\x03\x04", start):
        return "is a pickle, which runs code when it is read, so it is not; convert it elsewhere"
    return None
