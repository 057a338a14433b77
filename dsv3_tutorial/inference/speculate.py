"""Several tokens a pass: the MTP module guesses ahead, the model checks all guesses at once.

B batch, S positions, D hidden_size, V vocab_size, K drafted tokens. What comes out is what plain
decoding gives: the same tokens when greedy, the same distribution when sampled. DeepSeek-V3 report,
sections 2.2 and 5.4.3; "Fast Inference from Transformers via Speculative Decoding"
(arXiv 2211.17192), algorithm 1.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from dsv3_tutorial.inference.requests import Answer, GenerationError
from dsv3_tutorial.inference.sample import Sampling, draw, probabilities, problem_of
from dsv3_tutorial.inference.session import Session
from dsv3_tutorial.inference.speculate_count import Speculation


def mtp_inputs(hidden: Tensor, input_ids: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """What the MTP module reads: each position's hidden state beside the token *after* it.

    hidden (B, S, D) and input_ids (B, S) of the same positions, chosen (B,) the token that follows
    the last one -> hidden (B, S, D), next_ids (B, S). DeepSeek-V3 report, equation 21.
    """
    next_ids = torch.cat([input_ids[:, 1:], chosen[:, None]], dim=1)  # (B, S)
    return hidden, next_ids


def accept(
    drafted: Tensor, draft_probs: Tensor, target_probs: Tensor, uniforms: Tensor
) -> tuple[int, int]:
    """Keep the drafts that the model would have drawn, and draw the token behind them.

    drafted (K,) int64 was drawn from draft_probs (K, V); target_probs (K + 1, V) is the model's
    distribution at each draft and behind the last; uniforms (K + 1,) in [0, 1) -> how many drafts
    are kept, and the next token. Its distribution is the model's, however poor the drafts are.
    Source: arXiv 2211.17192, algorithm 1.
    """
    kept, weights = len(drafted), target_probs[-1]  # all kept: one token more for nothing
    for i, token in enumerate(drafted.tolist()):
        p, q = target_probs[i], draft_probs[i]
        if not uniforms[i] * q[token] < p[token]:  # refused with probability 1 - min(1, p / q)
            residual = (p - q).clamp(min=0)  # what the drafts, being too rare here, leave out
            kept, weights = i, residual if residual.any() else p  # none left: p is q, but rounded
            break
    mass = weights.double().cumsum(dim=-1)  # (V,)
    before = (mass <= uniforms[-1] * mass[-1]) & (mass < mass[-1])
    return kept, int(before.sum())


def accept_greedy(drafted: Sequence[int], best: Sequence[int]) -> tuple[int, int]:
    """`accept` where all mass lies on one token: keep drafts while they are the model's choice.

    drafted: K tokens; best: the model's choice at each of them and behind the last.
    """
    kept = 0
    while kept < len(drafted) and drafted[kept] == best[kept]:
        kept += 1
    return kept, best[kept]


@torch.inference_mode()
def run(
    session: Session,
    tokens: Sequence[int],
    answers: Sequence[Answer],
    sampling: Sampling,
    generators: Sequence[Generator],
    drafts: int,
) -> Speculation:
    """Draft, verify, keep what is right, until every answer has ended -> what it cost.

    The session has read the prompts; `tokens`, one a text, were chosen behind them and are in
    `answers` already. A pass reads up to 1 + `drafts` tokens and gives each text 1 to 1 + `drafts`.
    Texts keep different numbers, so their lengths drift apart. Texts that ended read on unseen.
    Raises GenerationError where the logits of a text that wants tokens are no distribution.
    """
    done, drafter, choose = Speculation(drafts), Drafter(session), _Greedy()
    ends, tokens = session.lengths.tolist(), list(tokens)  # tokens read of each text
    read = list(ends)  # how many of the last call's positions belong to each text
    if not sampling.greedy:
        choose = _Sampled(sampling, generators, drafts)
    while any(answer.left for answer in answers):
        started = time.perf_counter()
        wanted = [max(min(drafts, answer.left - 1), 0) for answer in answers]
        chosen = torch.tensor(tokens, device=session.device)
        choose.begin()
        ids = drafter.draft(read, ends, chosen, max(wanted), choose.guess)  # (B, 1 + K)
        between = time.perf_counter()
        outcomes = choose.verify(session.step(ids)[0], ids, answers, wanted)
        read = [0 if outcome is None else len(outcome) for outcome in outcomes]
        ends = [end + count for end, count in zip(ends, read)]
        if min(read) < ids.shape[1]:
            session.trim(ends)
        tokens = _hand_over(outcomes, tokens, answers)
        done.count(wanted, read, between - started, time.perf_counter() - between)
    return done


def _hand_over(
    outcomes: list[list[int] | None], tokens: list[int], answers: Sequence[Answer]
) -> list[int]:
    """Add each text's new tokens to its answer -> the last one of each, which is read next."""
    for outcome, answer in zip(outcomes, answers):
        for token in outcome or ():
            if not answer.add(token):
                break
    return [outcome[-1] if outcome else token for outcome, token in zip(outcomes, tokens)]


class Drafter:
    """The session's first MTP module and its cache, which lies one pass behind the model's."""

    def __init__(self, session: Session):
        self.session, self.model = session, session.model
        self.module, self.cache = session.model.mtp[0], session.draft_caches[0]

    def draft(
        self,
        read: Sequence[int],
        ends: Sequence[int],
        chosen: Tensor,
        count: int,
        guess: Callable[[Tensor, int], Tensor],
    ) -> Tensor:
        """What to read next: each text's chosen token and `count` guesses behind it, (B, 1 + K).

        read: how many positions of the session's last call each text keeps; ends: tokens read of
        each; chosen (B,). guess(logits (B, V), i) -> (B,) picks draft i. The first comes of the
        model's own hidden states, the others of the module's output, an imitation of them: their
        rows leave its cache again, and the next call writes the true ones.
        """
        ids = [chosen]
        if count:
            hidden = self._catch_up(read, ends, chosen)  # (B, D)
        for place in range(count):
            if place:
                hidden = self._read(hidden[:, None], ids[-1][:, None])[:, 0]  # (B, D)
            ids.append(guess(self.model.lm_head(hidden), place))
        if count > 1:
            self.cache.trim(ends)
        return torch.stack(ids, dim=1)

    def _catch_up(self, read: Sequence[int], ends: Sequence[int], chosen: Tensor) -> Tensor:
        """Read what the model read in its last call -> each text's last output (B, D).

        A text's chosen token takes the place of the drafts that it refused, or of its padding: all
        that lies behind is forgotten.
        """
        most, texts = max(read), range(len(read))
        ids = self.session.input_ids[:, :most]
        if min(read) < most:
            short = [text for text in texts if read[text] < most]
            ids = ids.clone()
            ids[short, [read[text] for text in short]] = chosen[short]
        hidden, next_ids = mtp_inputs(self.session.hidden[:, :most], ids, chosen)
        out = self._read(hidden, next_ids)  # (B, S, D)
        if min(read) == most:
            return out[:, -1]
        self.cache.trim(ends)
        return out[list(texts), [count - 1 for count in read]]

    def _read(self, hidden: Tensor, next_ids: Tensor) -> Tensor:
        embedded = self.model.model.embed_tokens(next_ids)  # (B, S, D)
        return self.module(hidden, embedded, cache=self.cache)


class _Greedy:
    """Draft and keep the likeliest. One look at the device a pass."""

    def begin(self) -> None:
        """Nothing is drawn."""

    def guess(self, logits: Tensor, index: int) -> Tensor:
        """The module's choice: logits (B, V) -> (B,)."""
        return logits.argmax(dim=-1)

    def verify(
        self, logits: Tensor, ids: Tensor, answers: Sequence[Answer], wanted: list[int]
    ) -> list[list[int] | None]:
        """What each text gets of logits (B, 1 + K, V) after ids (B, 1 + K): None if it ended."""
        best, tokens = logits.max(dim=-1)
        tokens = torch.where(best.isfinite(), tokens, -1)
        outcomes = []
        for text, (read, found) in enumerate(torch.stack([ids, tokens], dim=1).tolist()):
            drafted = read[1 : 1 + wanted[text]]
            kept, token = accept_greedy(drafted, found)
            if token < 0 and answers[text].left:
                raise GenerationError(f"Text {text}: {problem_of(logits[text, kept])}")
            outcomes.append([*drafted[:kept], token] if answers[text].left else None)
        return outcomes


class _Sampled:
    """Draw drafts from the module's distribution, and accept or redraw them by `accept`.

    A text takes 2 K + 1 numbers from its own generator each turn, whether it needs them or not:
    what it gets never depends on how many drafts its neighbours still want.
    """

    def __init__(self, sampling: Sampling, generators: Sequence[Generator], drafts: int):
        self.sampling, self.generators, self.drafts = sampling, generators, drafts

    def begin(self) -> None:
        """Draw this turn's numbers, (B, 2 K + 1)."""
        count = 2 * self.drafts + 1
        drawn = [torch.rand(count, generator=g, dtype=torch.float64) for g in self.generators]
        self.uniforms, self.draft_probs = torch.stack(drawn), []

    def guess(self, logits: Tensor, index: int) -> Tensor:
        """A draw from the module's distribution: logits (B, V) -> (B,)."""
        self.draft_probs.append(probabilities(logits, self.sampling))
        return draw(self.draft_probs[-1], self.uniforms[:, index].to(logits.device))

    def verify(
        self, logits: Tensor, ids: Tensor, answers: Sequence[Answer], wanted: list[int]
    ) -> list[list[int] | None]:
        """As `_Greedy.verify`, by comparing the two distributions; one text after the other."""
        outcomes = []
        for text, answer in enumerate(answers):
            if not answer.left:
                outcomes.append(None)
                continue
            try:
                target = probabilities(logits[text, : 1 + wanted[text]], self.sampling)
            except GenerationError as problem:
                raise GenerationError(f"Text {text}: {problem}") from None
            drafted = ids[text, 1 : 1 + wanted[text]]
            rows = [probs[text] for probs in self.draft_probs[: wanted[text]]]
            draft_probs = torch.stack(rows) if rows else target[:0]
            uniforms = self.uniforms[text, self.drafts :][: 1 + wanted[text]].to(logits.device)
            kept, token = accept(drafted, draft_probs, target, uniforms)
            outcomes.append([*drafted[:kept].tolist(), token])
        return outcomes
