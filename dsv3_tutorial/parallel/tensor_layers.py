"""Layers whose weights lie over several ranks: what is put in front of the layers' own classes.

A layer keeps its class and its code, which reads `self.weight` and finds this rank's part: heads or
features, fewer than before. Its parameters, under their old names, are DTensors, so checkpoints
gather them and FSDP2 can shard them again. What is added here is where ranks meet.

DTensor's own ColwiseParallel and RowwiseParallel would do for a plain MLP. They reduce the gradient
of x once for gate and again for up, and a layer that reads a weight itself, as absorbed MLA does,
or writes a cache, would meet DTensors where it computes.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dsv3_tutorial.attention.cache import Cache, FullCache, LatentCache
from dsv3_tutorial.parallel import tensor_exchange as exchange
from dsv3_tutorial.parallel.tensor_exchange import Group

_computing: ContextVar[bool] = ContextVar("computing", default=False)


@dataclass(frozen=True)
class Between:
    """The ranks that share a layer. sequence: between layers, each holds its own tokens only."""

    group: Group
    sequence: bool = False

    def into_parts(self, x: Tensor) -> Tensor:
        """The input of products that each rank does a part of."""
        return (exchange.gathered if self.sequence else exchange.copied)(x, self.group)

    def out_of_parts(self, x: Tensor) -> Tensor:
        """Their partial sums, summed."""
        return (exchange.scattered if self.sequence else exchange.summed)(x, self.group)

    def into_whole(self, x: Tensor) -> Tensor:
        """The input of work that every rank does alike."""
        return exchange.joined(x, self.group) if self.sequence else x

    def out_of_whole(self, x: Tensor) -> Tensor:
        """What every rank has, cut to what it passes on."""
        return exchange.split(x, self.group) if self.sequence else x

    def before_blocks(self, _: nn.Module, args: tuple) -> tuple:
        """A hook in front of the first block: from here on a rank has its own tokens."""
        return self.out_of_whole(args[0]), *args[1:]

    def behind_blocks(self, _: nn.Module, __: tuple, out: Tensor) -> Tensor:
        """A hook behind the last norm: for the head every rank has all tokens."""
        return self.into_whole(out)


def wrap(kind: type, module: nn.Module, between: Between) -> nn.Module:
    """Put `kind` in front of a layer's own class, in place."""
    module.__class__ = _wrapped(kind, type(module))
    module.between = between
    return module


@cache
def _wrapped(kind: type, own: type) -> type:
    return type(f"{kind.__name__}{own.__name__}", (kind, own), {})


class Computing:
    """While this layer runs, it and what is inside it read their parameters as this rank's part.

    At all other times they are the DTensors, as optimizers, checkpoints and FSDP2 expect them.
    """

    def forward(self, *args, **kwargs) -> Tensor:
        before = _computing.set(True)
        try:
            return super().forward(*args, **kwargs)
        finally:
            _computing.reset(before)


class Local(Computing):
    """Reads its parameters as this rank's part of them.

    `apart`: ranks see other tokens, or use other rows, so that the gradients of what they hold
    whole must be summed.
    `rows`: which rows of a weight that every rank holds whole are its own; None: all.
    """

    apart: bool = False
    rows: slice | None = None

    @property
    def weight(self) -> Tensor:
        return self._read("weight")

    @property
    def bias(self) -> Tensor | None:
        return self._read("bias")

    def _read(self, name: str) -> Tensor | None:
        return self._part(name) if _computing.get() else self._parameters.get(name)

    def _part(self, name: str) -> Tensor | None:
        held = self._parameters.get(name)
        if not isinstance(held, DTensor):
            return held
        own = held.to_local()
        if self.apart and not any(placement.is_shard() for placement in held.placements):
            own = exchange.copied(own, self.between.group)
        return own if self.rows is None else own[self.rows]


class Column(Local):
    """A linear layer of this rank's output features, alone in reading its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.between.into_parts(x))


class Row(Local):
    """A linear layer of this rank's input features: a sum over ranks, and then the bias, once."""

    @property
    def bias(self) -> nn.Parameter | None:
        """None while it runs: every rank would add it to its product."""
        return None if _computing.get() else self._parameters.get("bias")

    def forward(self, x: Tensor) -> Tensor:
        out, bias = self.between.out_of_parts(super().forward(x)), self._part("bias")
        return out if bias is None else out + bias


class Features(Computing):
    """An MLP of this rank's features of the hidden width."""

    def forward(self, x: Tensor) -> Tensor:
        return self.between.out_of_parts(super().forward(self.between.into_parts(x)))


class Heads(Computing):
    """Plain attention of this rank's heads."""

    def forward(self, x: Tensor, cache: FullCache | None = None) -> Tensor:
        return super().forward(self.between.into_parts(x), cache)


class LatentHeads(Computing):
    """MLA of this rank's heads. The latents are made whole on every rank, and cached whole.

    So the ranks meet behind the latents in backward: Q + C + R numbers a token, not D.
    """

    def forward(self, x: Tensor, cache: Cache | None = None, absorb: bool | None = None) -> Tensor:
        return super().forward(self.between.into_whole(x), cache, absorb)

    def compressed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c_kv, k_rope = super().compressed(x)
        both = exchange.copied(torch.cat([c_kv, k_rope], dim=-1), self.between.group)
        return both[..., : c_kv.shape[-1]], both[..., c_kv.shape[-1] :]


class Whole:
    """A layer that every rank runs on all tokens: a mixture of experts under sequence parallel."""

    def forward(self, x: Tensor) -> Tensor:
        return self.between.out_of_whole(super().forward(self.between.into_whole(x)))


class Model:
    """The whole model: its caches are those of a rank."""

    def caches(
        self, batch: int, length: int, dtype: torch.dtype | None = None
    ) -> list[LatentCache] | list[FullCache]:
        """As the model's own; heads of which a rank has a part are cached in part."""
        kind, weight = LatentCache if self.cfg.is_mla else FullCache, self.lm_head.weight
        where = dtype or weight.dtype, weight.device
        layers = self.model.layers
        return [kind.for_config(each.self_attn.cfg, batch, length, *where) for each in layers]
