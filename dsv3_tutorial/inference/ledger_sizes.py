"""Which bytes of its storage a tensor is, which rows an operator reads of it, and its FLOP."""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

Run = tuple[int, int]  # bytes of a storage, from and up to


class Regions:
    """Byte ranges of one storage, each byte counted once however often it was met."""

    def __init__(self) -> None:
        self._runs: set[Run] = set()

    def add(self, runs: list[Run]) -> None:
        self._runs.update(runs)

    def size(self) -> int:
        """Distinct bytes."""
        counted = reached = 0
        for start, stop in sorted(self._runs):
            counted += max(0, stop - max(start, reached))
            reached = max(reached, stop)
        return counted


def nbytes(tensor: Tensor) -> int:
    """Bytes that a tensor's elements take, whether stored or only repeated."""
    return tensor.numel() * tensor.element_size()


def runs(tensor: Tensor) -> list[Run]:
    """The byte ranges of its storage that a tensor covers: one for a dense one, else its rows."""
    if not tensor.numel():
        return []
    block, apart = 1, []
    sides = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted((s, n) for s, n in sides if n > 1 and s > 0):
        if stride == block:
            block *= size
        else:
            apart.append(range(0, stride * size, stride))
    width, first = tensor.element_size(), tensor.storage_offset()
    starts = [first + sum(steps) for steps in product(*apart)]
    return [(width * start, width * (start + block)) for start in starts]


def rows_read(func: Any, args: tuple) -> tuple[Tensor, list[Run]] | None:
    """The tensor that an operator reads in part, and which bytes; None: all of every input."""
    name = func.overloadpacket.__name__
    if name == "embedding":
        return args[0], _rows(args[0], args[1])
    if name == "index_select" and args[1] == 0:
        return args[0], _rows(args[0], args[2])
    if name == "index" and args[1][0] is not None and args[1][0].dtype != torch.bool:
        return args[0], _rows(args[0], args[1][0])
    if name == "index_put_":
        return args[0], []  # written only: the rows are met where they are read
    if name in ("_grouped_mm", "grouped_mm") and len(args) > 2 and args[2] is not None:
        counts = args[2].diff(prepend=args[2].new_zeros(1))
        return args[1], _rows(args[1], counts.nonzero().flatten())
    return None


def _rows(tensor: Tensor, places: Tensor) -> list[Run]:
    """Of the outermost axis; on meta, where places have no values, as many as there are places."""
    if places.is_meta:
        chosen = range(min(places.numel(), len(tensor)))
    else:
        chosen = {place % len(tensor) for place in places.flatten().tolist()}
    return [run for place in chosen for run in runs(tensor[place])]


def counter(func: Any) -> Callable[..., int] | None:
    """What counts an operator's FLOP from its arguments, or None where it multiplies nothing."""
    known = _FLOPS.get(func.overloadpacket.__name__)
    return known or flop_registry.get(func.overloadpacket)


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _latent(q: Tensor, rows: Tensor, lengths: Tensor, rank: int, *_: Any, **__: Any) -> int:
    """Every query against all cached rows: as keys in all their width, as values in C."""
    seen = len(q) * rows.shape[1] if lengths.is_meta else int(lengths.sum())
    return 2 * q.shape[1] * q.shape[2] * seen * (q.shape[3] + rank)


def _grouped(rows: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * rows.numel() * weight.shape[-1]


_FLOPS: dict[str, Callable[..., int]] = {
    "mv": lambda matrix, *_, **__: 2 * matrix.numel(),
    "dot": lambda vector, *_, **__: 2 * vector.numel(),
    **dict.fromkeys(("addmv", "addmv_"), lambda _, matrix, *__, **___: 2 * matrix.numel()),
    **dict.fromkeys(("_grouped_mm", "grouped_mm"), _grouped),
    **dict.fromkeys(("latent_decode", "fp8_latent_decode"), _latent),
    **{
        f"_scaled_dot_product_{kernel}": _attention
        for kernel in (
            *("flash_attention", "flash_attention_for_cpu", "efficient_attention"),
            *("cudnn_attention", "fused_attention_overrideable"),
        )
    },
}
