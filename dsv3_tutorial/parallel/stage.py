"""A model cut into pipeline stages, each with the names that its tensors have in the whole.

B batch, S positions, D hidden_size, V vocab_size. Stage 0 embeds, the last one has the norm, the
head and the modules for multi-token prediction, as DeepSeek-V3 places them: then embedding and
head, which these modules share with the model, need not travel (the report, section 2.2).
"""

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsv3_tutorial.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"


class StageError(ValueError):
    """A model that cannot be cut as asked: what is wrong, why it matters, what to do."""


def deal(layers: int, n_stages: int) -> list[range]:
    """Which layers each stage holds: in order, evenly, and those left over in front.

    The last stage works for the head and the drafts too. Raises StageError where a stage would
    hold no layer.
    """
    if n_stages < 1 or layers < n_stages:
        raise StageError(
            f"{layers} layers cannot be dealt out to {n_stages} stages. A stage without a layer "
            "would wait and pass on, and a rank without a stage has nothing to train. Take from "
            f"1 to {layers} stages."
        )
    share, over = divmod(layers, n_stages)
    begins = [i * share + min(i, over) for i in range(n_stages + 1)]
    return [range(*pair) for pair in pairwise(begins)]


def split(model: nn.Module, n_stages: int, index: int) -> "Stage":
    """One stage of `model`: the modules that it holds, not copied, under the whole model's keys.

    Called on the same model in each of n_stages processes, it leaves each with its own part, and
    their state dicts together are the whole one's. An embedding that the last stage needs as well
    (`shares_embedding`) is then there twice: `hand_over` and `take_copy` make the two one parameter
    again. In one process it is one. Raises StageError for a stage without a layer, and for one that
    there is not.
    """
    dealt = deal(model.cfg.num_hidden_layers, n_stages)
    if index not in range(n_stages):
        raise StageError(
            f"There is no stage {index} of {n_stages}: they are 0 to {n_stages - 1}. A rank would "
            "hold other layers than its neighbours send to. Give this rank's place in the pipeline."
        )
    return Stage(model, n_stages, index, dealt[index])


def shares_embedding(cfg: ModelConfig) -> bool:
    """Whether the last stage needs the embedding too: for drafts, or as the head's own weight."""
    return bool(cfg.num_nextn_predict_layers) or cfg.tie_word_embeddings


class Stage(nn.Module):
    """One stage. forward: input_ids (B, S) on stage 0, else hidden (B, S, D) -> hidden (B, S, D).

    The last gives logits (B, S, V), and with `drafts`, which takes the input_ids as well, logits
    and each MTP module's (B, S - 1 - k, V), as one tuple. `model.layers` holds this stage's blocks
    only, named by their place in the whole.
    """

    def __init__(self, whole: nn.Module, n_stages: int, index: int, layers: range):
        super().__init__()
        self.cfg, self.n_stages, self.index, self.depth = whole.cfg, n_stages, index, len(layers)
        own, of = nn.Module(), whole.model
        if self.first or (self.last and shares_embedding(whole.cfg)):
            own.embed_tokens = of.embed_tokens
        total = len(of.layers) if self.last else layers.stop
        own.layers = nn.ModuleList()
        for place in range(layers.start, total):
            own.layers.add_module(str(place), of.layers[place])
        self.model = own
        if self.last:
            own.norm, self.lm_head = of.norm, whole.lm_head

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index == self.n_stages - 1

    @property
    def copy(self) -> nn.Parameter | None:
        """The embedding that stands on stage 0 as well, if this stage has it a second time."""
        twice = self.last and not self.first and shares_embedding(self.cfg)
        return self.model.embed_tokens.weight if twice else None

    def forward(
        self, x: Tensor, input_ids: Tensor | None = None, drafts: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        x = self.model.embed_tokens(x) if self.first else x  # (B, S, D)
        blocks = list(self.model.layers)
        for block in blocks[: self.depth]:
            x = block(x)
        if not self.last:
            return x
        x = self.model.norm(x)
        logits = [self.lm_head(x)]  # (B, S, V)
        for k, module in enumerate(blocks[self.depth :] if drafts else ()):
            x = module(x[:, :-1], self.model.embed_tokens(input_ids[:, k + 1 :]))
            logits.append(self.lm_head(x))
        return tuple(logits) if drafts else logits[0]


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = torch.empty_like(loss)
        return x.clone()  # a view of x could not be detached in place, which a schedule does

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones_like(ctx.like)


def join(x: Tensor, loss: Tensor) -> Tensor:
    """x with the same values, whose backward also minimises `loss`, a scalar. Any shape.

    So a stage adds a loss of its own, the balance loss of its gates, to one that only the last
    stage knows: gradients add up, and nothing but x travels. Cost: a copy of x.
    """
    return _Joined.apply(x, loss)


@torch.no_grad()
def hand_over(stage: Stage, group: dist.ProcessGroup) -> None:
    """Add the gradient of the embedding's copy to that of stage 0, and forget it on the last.

    Two uses of one parameter: their gradients add up. Called on every rank of `group`, stage 0
    being its first; V x D values go from the last stage to it. After this the copy has no gradient,
    so that a norm over all stages counts the embedding once.
    """
    if stage.copy is not None:
        dist.send(_gradient(stage.copy), group=group, group_dst=0)
        stage.copy.grad = None
    elif stage.first and stage.n_stages > 1 and shares_embedding(stage.cfg):
        gradient = _gradient(stage.model.embed_tokens.weight)
        other = torch.empty_like(gradient)
        dist.recv(other, group=group, group_src=stage.n_stages - 1)
        gradient.add_(other)


@torch.no_grad()
def take_copy(stage: Stage, group: dist.ProcessGroup) -> None:
    """After an update of stage 0's embedding: the same values, bit for bit, in the last's copy."""
    if stage.copy is not None:
        dist.recv(_own(stage.copy.data), group=group, group_src=0)
    elif stage.first and stage.n_stages > 1 and shares_embedding(stage.cfg):
        weight = stage.model.embed_tokens.weight
        dist.send(_own(weight.data), group=group, group_dst=stage.n_stages - 1)


def _gradient(weight: nn.Parameter) -> Tensor:
    """This rank's part of a gradient, laid out as the weight is; zeros where it was not used."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    wanted = getattr(weight, "placements", None)
    if wanted is not None and weight.grad.placements != wanted:
        weight.grad = weight.grad.redistribute(placements=wanted)  # sums over tp, not made yet
    return _own(weight.grad)


def _own(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that tensor parallelism has split, without a copy."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gathered(state: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """The whole model's state dict from the stages': on the group's first rank's CPU, else {}.

    A tensor that two stages hold is taken from the earlier one. Memory: the whole model there.
    """
    first = dist.get_rank(group) == 0
    into = [None] * dist.get_world_size(group) if first else None
    on_cpu = {name: tensor.cpu() for name, tensor in state.items()}
    dist.gather_object(on_cpu, into, group=group, group_dst=0)
    if into is None:
        return {}
    return {name: tensor for part in reversed(into) for name, tensor in part.items()}
