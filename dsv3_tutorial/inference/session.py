"""One batch of texts in a model: its caches, how far each text has come, what was seen last.

B batch, S new positions, D hidden_size, V vocab_size. Plain decoding and speculation both run on
it: read the prompts, read on, and forget tokens that were guessed wrongly.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from dsv3_tutorial.inference.compiled import GraphStep
from dsv3_tutorial.model import DeepSeekV3


class Session:
    """A model, a cache for each of its layers, and the hidden states of the last call.

    `caches` are the main model's, `draft_caches` those of its MTP modules (empty without
    `drafts`). Each call reads on where the last one ended. `trim` cuts the main model's caches;
    whoever drafts trims the others. compiled: steps are CUDA graphs (`GraphStep`).
    Costs `nbytes` of cache, reserved at once for `capacity` tokens a text, whatever they come to.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        batch: int,
        capacity: int,
        cache: str | None = None,
        drafts: bool = False,
        compiled: bool = False,
    ):
        self.model, self.batch, self.capacity = model, batch, capacity
        made = model.caches(batch, capacity, **({} if cache is None else {"kind": cache}))
        depth = model.model.depth
        self.caches, self.draft_caches = made[:depth], made[depth:] if drafts else []
        self.compiled = GraphStep(model.model, self.caches) if compiled else None
        self.hidden: Tensor | None = None  # (B, S, D) of the last call, after the final norm
        self.input_ids: Tensor | None = None  # (B, S) that it read

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @property
    def lengths(self) -> Tensor:
        """Tokens read of each text, (B,) int64."""
        return self.caches[0].lengths

    @property
    def nbytes(self) -> int:
        """The bytes that the caches really hold, MTP modules' included, used or not."""
        return sum(cache.nbytes for cache in (*self.caches, *self.draft_caches))

    @property
    def row_bytes(self) -> float:
        """The bytes of one token in one layer's cache."""
        held = len(self.caches) + len(self.draft_caches)
        return self.nbytes / (held * self.batch * self.capacity)

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read one prompt a text, of any lengths -> logits (B, V) behind each one's last token.

        Short ones are padded on the right and the padding forgotten: causal attention never read
        it. Afterwards `hidden` (B, S, D) and `input_ids` (B, S) are the padded prompts'.
        """
        lengths = [len(prompt) for prompt in prompts]
        padded = [[*prompt, *[0] * (max(lengths) - len(prompt))] for prompt in prompts]
        ids = torch.tensor(padded, device=self.device)  # (B, S)
        self.hidden, self.input_ids = self.model.model(ids, self.caches), ids
        if min(lengths) < max(lengths):
            self.trim(lengths)
        return self.model.lm_head(self.last_hidden(lengths))  # one position's, not the prompt's

    @torch.inference_mode()
    def step(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Read ids (B, S) behind each text -> logits (B, S, V), hidden (B, S, D)."""
        run = self.compiled or partial(self.model.model, caches=self.caches)
        self.hidden, self.input_ids = run(ids), ids
        return self.model.lm_head(self.hidden), self.hidden

    @torch.inference_mode()
    def prepare(self, count: int) -> None:
        """Record the step of `count` tokens, where steps are replayed: the first need not wait."""
        if self.compiled is not None:
            self.compiled.prepare(count)

    def last_hidden(self, lengths: Sequence[int] | Tensor) -> Tensor:
        """The last call's hidden state at each text's `lengths[b]`-th token: (B, D)."""
        at = torch.as_tensor(lengths, device=self.hidden.device) - 1  # (B,)
        return self.hidden[torch.arange(self.batch, device=at.device), at]

    def trim(self, lengths: Sequence[int] | Tensor) -> None:
        """Keep the first `lengths[b]` tokens of text b in the main model's caches."""
        for cache in self.caches:
            cache.trim(lengths)
