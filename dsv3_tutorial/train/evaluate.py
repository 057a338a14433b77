"""What a model is worth on text it has not seen, in bits per byte, whatever its vocabulary."""

import math

import torch
from torch import Tensor, nn

from dsv3_tutorial.parallel.data import Ranks
from dsv3_tutorial.train.corpus import Corpus, windows
from dsv3_tutorial.train.recipe import Recipe
from dsv3_tutorial.train.step import Pipe, draft_nats, nats, predict

AT_ONCE = 8  # windows in one forward pass


def bits_per_byte(nats_per_symbol: float, target: Tensor, symbol_bytes: Tensor) -> float:
    """A mean loss in nats per symbol as bits per byte of the text that `target` stands for.

    symbol_bytes (V,): how many bytes each symbol is. For bytes it is a division by ln 2.
    """
    return nats_per_symbol * target.numel() / symbol_bytes[target].sum().item() / math.log(2)


@torch.no_grad()
def held_out(
    model: nn.Module, corpus: Corpus, recipe: Recipe, ranks: Ranks, pipe: Pipe | None = None
) -> tuple[float, float | None]:
    """Bits per byte of the main head, and of the MTP heads (their mean; None without any).

    Over `evaluate_windows` windows, spread evenly over the held-out text: the same ones each time.
    Every rank reads all of them; where `pipe` joins stages, `model` is this rank's. An MTP head
    knows the symbol before the one it answers for, as the main head does, and stands on one block
    more: it can be the better of the two. The first symbol of a window is the main head's alone.
    """
    data, at_once = corpus.held_out, min(AT_ONCE, recipe.evaluate_windows)
    count = math.ceil(recipe.evaluate_windows / at_once)
    found = []
    for batch in windows(data, at_once, recipe.seq_len, count):
        on_device = batch.to(ranks.device)
        both = _nats(model, on_device) if pipe is None else pipe.held_out(on_device)
        found.append([bits_per_byte(x.item(), batch[:, 1:], corpus.symbol_bytes) for x in both])
    main, mtp = (sum(column) / len(found) for column in zip(*found))
    return main, mtp if model.cfg.num_nextn_predict_layers else None


def _nats(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of the main head and of the MTP heads on (B, S + 1), in nats per symbol."""
    logits, drafts = predict(model, batch[:, :-1], drafts=True)
    return nats(logits, batch[:, 1:]), draft_nats(drafts, batch)
