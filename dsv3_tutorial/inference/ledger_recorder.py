"""The mode behind `inference.ledger`: sees every operator, and keeps what it met of the model.

A tensor is known by its storage. Those of weights and caches have an owner; what a step makes by
copying one (a cast, a gather, a widened code) keeps the owner's name, so that a product over the
copy is still told as the owner's.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv3_tutorial.inference.ledger_sizes import Regions, counter, nbytes, rows_read, runs

CACHES = ("latent cache", "key-value cache")
_GATHERS = ("index", "index_select", "gather")  # the owner's rows, at places that are nobody's


@dataclass
class Operator:
    """One operator's calls: FLOP, and bytes that it read and wrote, anew for each call."""

    calls: int = 0
    flops: int = 0
    bytes: int = 0

    def add(self, flops: int, bytes: int) -> None:
        self.calls, self.flops, self.bytes = self.calls + 1, self.flops + flops, self.bytes + bytes


class Recorder(TorchDispatchMode):
    """Passes every operator on. flops: by owner, None for products that have none."""

    def __init__(self, model: nn.Module, caches: Iterable[Any]):
        super().__init__()
        self.flops: Counter[str | None] = Counter()
        self.operators: dict[str, Operator] = {}
        self.owner: dict[int, str] = {}  # storages that are there before the step
        self.copied: dict[int, str] = {}  # storages made in the step
        self.regions: dict[int, Regions] = defaultdict(Regions)
        self.alive: list[Tensor] = []
        held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        self.owner |= {_id(tensor): name.rpartition(".")[0] for name, tensor in held}
        for layer, cache in enumerate(caches):
            kind = CACHES[0] if hasattr(cache, "attend") else CACHES[1]
            kept = {_id(tensor): f"model.layers.{layer}.{kind}" for tensor in _stored(cache)}
            self.owner |= kept

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, flops = kwargs or {}, counter(func)
        if flops is None:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        whole = {id(tensor) for tensor in inputs}
        rows = rows_read(func, args)
        out = func(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and id(t) not in whole]
        self.alive += made  # a storage that is given back would pass its identity on
        if func.is_view:
            return out
        size = sum(self.read(t, rows if rows and rows[0] is t else None) for t in inputs)
        number = int(flops(*args, **kwargs, out_val=out)) if flops else 0
        owners = [self._owner(tensor) for tensor in inputs]
        known = next((name for name in owners if name), None)
        if number:
            self.flops[known] += number
        else:
            self._follow(func.overloadpacket.__name__, inputs, owners, made)
        entry = self.operators.setdefault(func.overloadpacket.__name__, Operator())
        entry.add(number, size + sum(map(nbytes, made)))
        return out

    def _follow(self, name: str, inputs: list, owners: list[str | None], made: list) -> None:
        """Keep the owner's name for what only its numbers went into."""
        if name == "copy_":
            inputs, owners, made = inputs[1:], owners[1:], inputs[:1]
        whose = {owner for owner in owners if owner}
        if len(whose) == 1 and (None not in owners or name in _GATHERS):
            self.copied |= dict.fromkeys(map(_id, made), whose.pop())

    def read(self, tensor: Tensor, rows: tuple[Tensor, list] | None = None) -> int:
        """Note that an operator met a tensor, or only these byte ranges of it: how many bytes."""
        if _id(tensor) not in self.owner:
            return nbytes(tensor)
        met = runs(tensor) if rows is None else rows[1]
        self.regions[_id(tensor)].add(met)
        return sum(stop - start for start, stop in met)

    def sizes(self) -> Counter[str]:
        """Distinct bytes met, by owner."""
        found: Counter[str] = Counter()
        for storage, regions in self.regions.items():
            found[self.owner[storage]] += regions.size()
        return found

    def _owner(self, tensor: Tensor) -> str | None:
        return self.owner.get(_id(tensor)) or self.copied.get(_id(tensor))


def _id(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _stored(cache: Any) -> list[Tensor]:
    """A cache's tensors but for its lengths and row numbers."""
    leaves = tree_leaves(list(vars(cache).values()))
    numbers = (torch.int32, torch.int64, torch.bool)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dtype not in numbers]
