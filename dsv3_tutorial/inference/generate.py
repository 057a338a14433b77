"""Continue texts: the prompts are read once, then one token a text and step, over the latent cache.

B batch, V vocab_size.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from dsv3_tutorial.inference import speculate as speculation
from dsv3_tutorial.inference.requests import (
    Answer,
    GenerationError,
    check_prompts,
    check_speculation,
    check_stop,
)
from dsv3_tutorial.inference.sample import GREEDY, Sampling, next_tokens, problem_of
from dsv3_tutorial.inference.session import Session
from dsv3_tutorial.model import DeepSeekV3


@dataclass(frozen=True)
class Generation:
    """What came of some prompts: new tokens only, without the stop token, and what they cost.

    `passes` of the model after the prompts were read; `drafted` and `accepted` tokens of all texts.
    `cache_bytes` were held, for all layers and texts, `row_bytes` of them for a token and layer;
    seconds are of the wall clock.
    """

    sequences: list[list[int]]
    reasons: list[str]  # "length" or "stop"
    passes: int
    drafted: int
    accepted: int
    cache_bytes: int
    row_bytes: float
    prefill_s: float
    decode_s: float

    @property
    def decoded(self) -> int:
        """Tokens that the passes made: the first of each text is the prefill's."""
        return sum(max(len(sequence) - 1, 0) for sequence in self.sequences)


@torch.inference_mode()
def generate(
    model: DeepSeekV3,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stop: Iterable[int] = (),
    cache: str | None = None,
    speculate: int = 0,
    on_token: Callable[[int, int], bool | None] | None = None,
    compiled: bool = False,
) -> Generation:
    """Continue each prompt by up to `max_new_tokens` tokens, or to a token of `stop`.

    prompts: token ids, lists, tensors or arrays, of any lengths. cache: "bf16", "fp8", "fp8-rope"
    (its RoPE part narrow too) or None, the model's own dtype. speculate: tokens drafted by the MTP
    module before each pass; what comes is the same. on_token(text, token) is called as tokens come;
    if it gives True, that text ends. compiled: as `Session`. Text i draws with seed + i: up to
    rounding its tokens do not depend on its neighbours. One that ended goes on unseen until all
    have. "The same" is up to rounding too: float32 holds it but for exact ties; in BF16, and where
    `weights.cpu` rounds inputs to BF16 or INT8, two nearly as likely tokens may swap, about one
    text in 40 of 40 tokens with INT8.
    Raises GenerationError before anything is computed for a request that cannot be served to its
    end, and where a text's logits are no distribution.
    """
    prompts = check_prompts(model.cfg, prompts, max_new_tokens)
    check_speculation(model.cfg, speculate)
    stop = check_stop(model.cfg, stop)
    answers = [Answer(max_new_tokens, stop, _told(on_token, i)) for i in range(len(prompts))]
    capacity = max(map(len, prompts)) + max_new_tokens + speculate
    session = Session(model, len(prompts), capacity, cache, speculate > 0, compiled)
    generators = sampling.generators(len(prompts))
    started = time.perf_counter()
    tokens = take(session.prefill(prompts), answers, sampling, generators)
    session.prepare(1 + speculate)
    between = time.perf_counter()  # the device was waited for: its tokens are here
    state = session, tokens, answers, sampling, generators
    done = speculation.run(*state, speculate) if speculate else _decode(*state)
    return Generation(
        [answer.tokens for answer in answers],
        [answer.reason for answer in answers],
        done.passes,
        done.drafted,
        done.accepted,
        session.nbytes,
        session.row_bytes,
        between - started,
        time.perf_counter() - between,
    )


def take(
    logits: Tensor, answers: Sequence[Answer], sampling: Sampling, generators: Sequence[Generator]
) -> list[int]:
    """Choose a token for each text and add it to its answer: logits (B, V) -> what was chosen.

    Raises GenerationError where the logits of a text that still wants tokens are no distribution.
    """
    tokens = next_tokens(logits, [sampling] * len(answers), generators)
    for index, (token, answer) in enumerate(zip(tokens, answers, strict=True)):
        if token is None and not answer.reason:
            raise GenerationError(f"Text {index}: {problem_of(logits[index])}")
        answer.add(0 if token is None else token)
    return [token or 0 for token in tokens]


@dataclass
class _Plain:
    """How many passes plain decoding took; nothing is drafted."""

    passes: int = 0
    drafted: int = 0
    accepted: int = 0


def _decode(
    session: Session,
    tokens: list[int],
    answers: Sequence[Answer],
    sampling: Sampling,
    generators: Sequence[Generator],
) -> _Plain:
    """Step until every answer has ended."""
    done = _Plain()
    while any(answer.left for answer in answers):
        ids = torch.tensor(tokens, device=session.device)[:, None]  # (B, 1)
        logits = session.step(ids)[0][:, -1]  # (B, V)
        tokens = take(logits, answers, sampling, generators)
        done.passes += 1
    return done


def _told(
    on_token: Callable[[int, int], bool | None] | None, index: int
) -> Callable[[int], bool | None] | None:
    return None if on_token is None else lambda token: on_token(index, token)
