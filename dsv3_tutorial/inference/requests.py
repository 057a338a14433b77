"""What is asked of a model, checked before anything is computed, and what has come of it so far."""

import operator
from collections.abc import Callable, Iterable, Sequence

from dsv3_tutorial.config import ModelConfig


class GenerationError(ValueError):
    """A request that cannot be served, or a model whose output is no distribution."""


def check_prompts(
    cfg: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """The prompts as lists of int: GenerationError unless each can be read and continued."""
    if _length(prompts, "The prompts are", "Give a list of prompts, each a list of ids") == 0:
        raise GenerationError(
            "There is no prompt: a batch of 0 texts has nothing to continue. Give a list of one "
            "or more prompts, each a list of token ids."
        )
    return [
        check_prompt(cfg, prompt, max_new_tokens, f"Prompt {index}")
        for index, prompt in enumerate(prompts)
    ]


def check_prompt(
    cfg: ModelConfig, prompt: Sequence[int], max_new_tokens: int, name: str = "The prompt"
) -> list[int]:
    """The prompt as a list of int: GenerationError unless it and `max_new_tokens` more fit.

    prompt: a sequence, a tensor or an array (S,) of integers.
    """
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise GenerationError(
            f"max_new_tokens is {max_new_tokens!r}: nothing would be generated. Ask for an integer "
            "of 1 or more."
        )
    length = _length(prompt, f"{name} is", "Give a list of token ids")
    if length == 0:
        raise GenerationError(
            f"{name} is empty: the first new token is predicted from a token before it. Give one "
            "token or more, such as the text's beginning."
        )
    tokens = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    known = [_known(cfg, token) for token in tokens]
    if None in known:
        raise GenerationError(
            f"{name} holds {tokens[known.index(None)]!r}, and this model knows the tokens 0 to "
            f"{cfg.vocab_size - 1}: any other has no row in its embedding. Encode the text with "
            "the tokenizer that lies beside the checkpoint."
        )
    wanted, limit = length + max_new_tokens, cfg.max_position_embeddings
    if wanted > limit:
        raise GenerationError(
            f"{name} has {length} tokens and {max_new_tokens} more are wanted, {wanted} in "
            f"all; this model has {limit} positions and was never trained beyond them. Shorten "
            f"the prompt, or ask for {max(limit - length, 0)} tokens."
        )
    return known


def check_stop(cfg: ModelConfig, stop: Iterable[int]) -> frozenset[int]:
    """The tokens that end an answer. Raises GenerationError for one that can never come."""
    tokens = stop.tolist() if hasattr(stop, "tolist") else list(stop)
    known = [_known(cfg, token) for token in tokens]
    if None in known:
        raise GenerationError(
            f"stop holds {tokens[known.index(None)]!r}, and this model makes the tokens 0 to "
            f"{cfg.vocab_size - 1}: an answer would never end there. Give token ids; stop strings "
            "are the command's."
        )
    return frozenset(known)


def check_speculation(cfg: ModelConfig, drafts: int) -> None:
    """Raise GenerationError unless this model can draft `drafts` tokens a pass."""
    if type(drafts) is not int or drafts < 0:
        raise GenerationError(
            f"speculate is {drafts!r}: it is how many tokens are drafted before each pass. Give "
            "an integer, 0 for plain decoding."
        )
    if drafts and not cfg.num_nextn_predict_layers:
        raise GenerationError(
            f"speculate is {drafts}, and this model has no MTP module: there is nothing to draft "
            "with. Load the checkpoint with mtp=True, or pass speculate=0."
        )


class Answer:
    """The tokens that came for one prompt, and why no more will.

    `reason` is None while more are wanted, then "length" or "stop". The stop token itself is not
    kept. on_token(token) is called for each one kept; if it gives True, the answer ends there.
    """

    def __init__(
        self,
        max_new_tokens: int,
        stop: Iterable[int] = (),
        on_token: Callable[[int], bool | None] | None = None,
    ):
        self.limit, self.stop, self.on_token = max_new_tokens, frozenset(stop), on_token
        self.tokens: list[int] = []
        self.reason: str | None = None

    @property
    def left(self) -> int:
        """How many more tokens it may get: 0 once it ended."""
        return 0 if self.reason else self.limit - len(self.tokens)

    def add(self, token: int) -> bool:
        """Take one token in; whether more are wanted. What comes after the end is ignored."""
        if self.reason is not None:
            return False
        if token in self.stop:
            self.reason = "stop"
            return False
        self.tokens.append(token)
        if self.on_token is not None and self.on_token(token):
            self.reason = "stop"
        elif len(self.tokens) >= self.limit:
            self.reason = "length"
        return self.reason is None


def _length(found: Sequence, what: str, remedy: str) -> int:
    """len(found), also of a tensor or an array, whose truth would be one of its numbers'."""
    try:
        return len(found)
    except TypeError:
        raise GenerationError(
            f"{what} {found!r}, which is no sequence: there is no order to read it in. {remedy}."
        ) from None


def _known(cfg: ModelConfig, token: object) -> int | None:
    """The token as an int, NumPy's and a tensor's too; None where the model has none such."""
    try:
        number = operator.index(token)
    except TypeError:
        return None
    return number if 0 <= number < cfg.vocab_size and not isinstance(token, bool) else None
