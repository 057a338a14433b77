"""Planned tensors, read one by one onto a device, and all that their values have against them."""

from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dsv3_tutorial import checkpoint_codes as codes
from dsv3_tutorial import checkpoint_layout as layout
from dsv3_tutorial.checkpoint_files import DTYPES
from dsv3_tutorial.checkpoint_layout import Part, grouped
from dsv3_tutorial.checkpoint_plan import Plan
from dsv3_tutorial.fp8.quant import BLOCK, dequantize_blocks
from dsv3_tutorial.weights.formats import Quantized, dequantize


class Reader:
    """Reads planned tensors onto one device, and keeps in mind which values cannot be right."""

    def __init__(self, plan: Plan, device: torch.device, files: ExitStack):
        self.plan, self.device, self.files = plan, device, files
        self.open: dict[Path, safe_open] = {}
        self.bad_scales: list[str] = []
        self.not_finite: list[str] = []
        self.unlike: list[str] = []

    def read_all(self, dtype: torch.dtype | None, keep_codes: bool) -> dict:
        by_source: dict[str, list[tuple[str, Part]]] = {}
        for name, part in self.plan.parts.items():
            by_source.setdefault(part.source, []).append((name, part))
        loaded, kept = {}, {}
        for source, found in by_source.items():
            if keep_codes and self.plan.block == BLOCK and self._all_coded(found):
                kept |= {name: self._codes(name) for name, _ in found}
            else:
                loaded[source] = self._source(source, found, dtype)
        if self.plan.cfg.tie_word_embeddings:
            loaded["lm_head.weight"] = loaded["model.embed_tokens.weight"]
        for copy, source in self.plan.copies.items():
            if not torch.equal(self._tensor(copy, loaded[source].dtype), loaded[source]):
                self.unlike.append(f"{copy} differs from {source}, which it is a copy of")
        return {name: loaded[name] for name in self.plan.expected if name in loaded} | kept

    def _all_coded(self, found: list[tuple[str, Part]]) -> bool:
        return all(name in self.plan.coded for name, _ in found)

    def problems(self) -> list[str]:
        found = [f"not positive and finite: {key}" for key in grouped(self.bad_scales)]
        found += [f"NaN or infinite values in: {key}" for key in grouped(self.not_finite)]
        return found + self.unlike

    def _source(
        self, source: str, found: list[tuple[str, Part]], dtype: torch.dtype | None
    ) -> Tensor:
        coded, stored = torch.float8_e4m3fn, self.plan.stored
        stored = [coded if n in self.plan.coded else DTYPES[stored[n].dtype] for n, _ in found]
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
        fmt, q = self.plan.coded.get(name), None
        if fmt is not None:
            q = self._codes(name)
        if fmt is None:
            value = self._raw(name).to(self.device, dtype, copy=True)
        elif q is None:
            return torch.zeros(self.plan.shapes[name], dtype=dtype, device=self.device)
        elif fmt == "fp8":
            value = dequantize_blocks(q.codes, q.scale, dtype, self.plan.block)
        else:
            value = dequantize(q, dtype)
        if not value.isfinite().all():  # after the cast: a value too large for dtype counts
            self.not_finite.append(name)
        return value

    def _codes(self, name: str) -> Quantized | None:
        """A coded weight as it is stored; None, and noted, where its scales cannot be right."""
        fmt, shape = self.plan.coded[name], tuple(self.plan.shapes[name])
        found = {
            piece: self._raw(piece).to(self.device, copy=True) for piece in self.plan.pieces(name)
        }
        q = codes.decode(fmt, name, found, shape)
        if q is None:
            self.bad_scales.append(next(piece for piece in found if "_scale" in piece))
        elif fmt == "fp8" and not q.codes.float().isfinite().all():
            self.not_finite.append(name)
        return q

    def _raw(self, name: str) -> Tensor:
        path = self.plan.stored[name].file
        if path not in self.open:
            self.open[path] = self.files.enter_context(safe_open(path, framework="pt"))
        return self.open[path].get_tensor(name)
