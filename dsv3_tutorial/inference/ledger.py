"""What a step really computes and reads, counted while it runs: the other side of `cost.bill`.

    book = decode(model, context=128)  # a model in float32; or a config: then on meta tensors
    book.lines == decode_bill(model.cfg, 128, weights="float32", cache="float32")

FLOP are those of matrix products, under the weight or cache that they read. Bytes are the distinct
ones of weights and caches: a row that three operators read is counted once. What operators hand to
each other stands in `operators` only, and so do tables such as the rotation's angles.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dsv3_tutorial.config import ModelConfig
from dsv3_tutorial.cost.bill import PARTS, Line
from dsv3_tutorial.cost.serving import experts_touched
from dsv3_tutorial.inference.ledger_recorder import CACHES, Operator, Recorder
from dsv3_tutorial.model import Caches, DeepSeekV3
from dsv3_tutorial.moe.experts import Experts


@dataclass
class Ledger:
    """What was counted.

    owners: FLOP and distinct bytes by module, a cache under its layer. operators: by operator, the
    inputs and outputs of every call anew. touched: experts read in each MoE layer. other_flops:
    products of what the step itself made, as the weighted sum of experts in some engines.
    """

    owners: dict[str, Line] = field(default_factory=dict)
    operators: dict[str, Operator] = field(default_factory=dict)
    touched: list[int] = field(default_factory=list)
    other_flops: int = 0

    @property
    def lines(self) -> list[Line]:
        """By part, in the bill's order: equal to `cost.bill.decode_bill`, integer by integer."""
        flops, sizes = Counter(), Counter()
        for name, line in self.owners.items():
            flops[part_of(name)] += line.flops
            sizes[part_of(name)] += line.bytes
        return [Line(part, flops[part], sizes[part]) for part in PARTS if part in sizes]


def decode(
    model: DeepSeekV3 | ModelConfig,
    context: int,
    batch: int = 1,
    queries: int = 1,
    dtype: torch.dtype | None = None,
    kind: str | None = None,
    ids: Tensor | None = None,
) -> Ledger:
    """Count one step of `batch` sequences, each `context` tokens long, `queries` of them new.

    model: a real one, its caches as if zeros had been read; or a config, built on meta tensors in
    `dtype` (None: BF16) without a byte of memory. There routing has no data, and each MoE layer is
    taken to touch round(experts_touched(...)) experts; V3 takes a few seconds. kind: the cache's,
    as in `DeepSeekV3.caches`. ids (B, S): the new tokens; None: 0, 1, 2, ..., all different.
    """
    if isinstance(model, ModelConfig):
        with torch.device("meta"):
            model = DeepSeekV3(model).to(dtype or torch.bfloat16)
    if ids is None:
        numbers = torch.arange(batch * queries, device=model.lm_head.weight.device)
        ids = (numbers % model.cfg.vocab_size).view(batch, queries)
    caches = model.caches(len(ids), context, kind=kind)[: model.model.depth]
    for cache in caches:
        cache.shortest = cache.longest = context - ids.shape[1]
        cache.lengths.fill_(cache.longest)
    with torch.no_grad(), count(model, caches) as book:
        model(ids, caches)
    return book


@contextmanager
def count(model: nn.Module, caches: Caches = ()) -> Iterator[Ledger]:
    """Count what `model` does in the block over these caches; the ledger is filled at its end.

    Slows every operator by microseconds. Not seen: a weight that is packed for one CPU kernel, and
    a Triton kernel that is no operator. On CPU with plain weights, and on meta, nothing is hidden.
    """
    book, recorder = Ledger(), Recorder(model, caches)
    with ExitStack() as meanwhile:
        if next(model.parameters()).is_meta:
            _replace_what_needs_data(model, caches, recorder, meanwhile)
        meanwhile.enter_context(recorder)
        yield book
    book.operators, book.other_flops = recorder.operators, recorder.flops.pop(None, 0)
    sizes = recorder.sizes()
    book.owners = {n: Line(n, recorder.flops[n], sizes[n]) for n in sizes.keys() | recorder.flops}
    for name, module in model.named_modules():
        if isinstance(module, Experts) and name in sizes:
            expert = sum(p[0].numel() * p.element_size() for p in module.parameters())
            book.touched.append(sizes[name] // expert)


def part_of(name: str) -> str:
    """The bill's part that a module's weights belong to, or a cache by its name."""
    pieces = name.split(".")
    if pieces[-1] in CACHES:
        return pieces[-1]
    if any("norm" in piece for piece in pieces):
        return "norms"
    return next((part for piece, part in _PARTS.items() if piece in pieces), "other")


_PARTS = {
    **{"embed_tokens": "embedding", "lm_head": "output head", "eh_proj": "draft projection"},
    **{"self_attn": "attention weights", "gate": "gate", "shared_experts": "shared experts"},
    **{"experts": "routed experts", "mlp": "dense MLP"},
}


def _replace_what_needs_data(
    model: nn.Module, caches: Caches, recorder: Recorder, meanwhile: ExitStack
) -> None:
    """On meta: attention over lengths as one operator, experts as many as are expected.

    Both ask tensors for numbers, which meta tensors have not.
    """
    for cache in caches:
        if hasattr(cache, "attend"):
            cache.attend = _attend_without_data(cache)
            meanwhile.callback(delattr, cache, "attend")
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            module.forward = _expected(name, module, recorder)
            meanwhile.callback(delattr, module, "forward")


def _attend_without_data(cache):
    def attend(q: Tensor, scale: float, backend: str | None = None) -> Tensor:
        if hasattr(cache, "packed"):
            how = (cache.lengths, cache.rank, scale, backend, cache.layout.rope_fp8)
            return torch.ops.dsv3.fp8_latent_decode(q, cache.packed, *how)
        how = (cache.lengths, cache.rank, scale, backend)
        return torch.ops.dsv3.latent_decode(q, cache.latent, *how)

    return attend


def _expected(name: str, module: Experts, recorder: Recorder):
    def forward(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        n_experts, (tokens, top_k) = len(module.gate_up_proj), indices.shape
        touched = round(experts_touched(n_experts, top_k, tokens))
        for matrices in module.parameters():
            recorder.read(matrices[:touched])
            recorder.flops[name] += 2 * indices.numel() * matrices[0].numel()
        return torch.empty_like(x)

    return forward
