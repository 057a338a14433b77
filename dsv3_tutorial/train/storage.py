"""How torch.distributed.checkpoint writes and reads one sealed folder.

The writer seals in `finish`, which runs once, on rank 0, when every rank's bytes are on the disk.
The reader builds only the classes of DCP's own table of contents, whatever its pickle asks for.
"""

import contextlib
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from dsv3_tutorial.train import sealed
from dsv3_tutorial.train.contents import described

_DCP = "torch.distributed.checkpoint."
_NEEDED = {
    (_DCP + "metadata", "Metadata"),
    (_DCP + "metadata", "MetadataIndex"),
    (_DCP + "metadata", "TensorStorageMetadata"),
    (_DCP + "metadata", "TensorProperties"),
    (_DCP + "metadata", "ChunkStorageMetadata"),
    (_DCP + "metadata", "StorageMeta"),
    (_DCP + "metadata", "_MEM_FORMAT_ENCODING"),
    (_DCP + "filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}


class Writer(dcp.FileSystemWriter):
    """Writes into `temporary`, one synced file a rank; the last act gives it its final name."""

    def __init__(self, temporary: Path, final: Path, facts: dict[str, Any], keep: int):
        super().__init__(temporary)
        self.temporary, self.final, self.facts, self.keep = temporary, final, facts, keep

    def storage_meta(self) -> StorageMeta:
        """Nothing: the folder's path would say where it was trained."""
        return StorageMeta()

    def finish(self, metadata: Metadata, results: list) -> None:
        """Seal the folder with a list of its tensors, then remove the oldest beyond `keep`."""
        super().finish(metadata, results)
        tensors = {n: _entry(m) for n, m in metadata.state_dict_metadata.items()}
        sealed.seal(self.temporary, self.final, {**self.facts, "tensors": tensors})
        with contextlib.suppress(OSError):  # one too many is no failure; the next save tries again
            sealed.prune(self.final.parent, self.keep)


class Reader(dcp.FileSystemReader):
    """Reads a verified folder. Raises StateError where its table asks for a class of no table."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table of contents, from the few classes that one is made of."""
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _TableUnpickler(file).load()
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class _TableUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _NEEDED or is_dtype:
            return super().find_class(module, name)
        raise sealed.StateError(
            f"A checkpoint's .metadata asks for {module}.{name}, which no checkpoint needs. "
            "Building it could run someone's code. Use a checkpoint that you wrote yourself."
        )


def _entry(metadata: Any) -> list:
    if not isinstance(metadata, TensorStorageMetadata):
        raise TypeError("A checkpoint holds tensors only: a plain value belongs in its manifest.")
    return described(metadata.properties.dtype, metadata.size)
