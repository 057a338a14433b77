"""Which of the bugs in a speculative loop are left, read off what it asked of its model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv3_tutorial.learn.compare import describe, difference
from dsv3_tutorial.learn.exercises.inference.toy import Ran, Turn

BUGS = {
    "token": "the MTP module gets a hidden state beside that state's own token, not the one after",
    "trim": "a refused draft stays in the cache, and all that follows attends to it",
    "rest": "after a refusal the next token is drawn from p, in which the draft has had its chance "
    "already; what is left is max(p - q, 0), over its sum",
}
TOO_SHORT = "too much is trimmed: the token before the draft belongs to the text"
RESTS = {
    "not divided": "max(p - q, 0) is drawn from without being divided by its sum",
    "absolute": "|p - q| is drawn from: where the draft says more than the model nothing is left",
    "turned": "max(q - p, 0) is drawn from: it is what the model says more often, p - q",
    "the draft's": "after a refusal the next token is drawn from q, which was refused",
    "other": "after a refusal the next token is drawn neither from p nor from max(p - q, 0)",
}
OTHER_TOKEN = "the MTP module gets another token than the one that the model reads next"
RIGHT, AS_IT_WAS = "right", "as it was"
NOT_RIGHT = "the tokens are drawn and kept in order, but not yet from what they should be"
HIDDEN = "the MTP module gets the hidden state of another token than the one before the last"
BONUS = "behind a draft that is kept the next token is drawn from p[1]"
TURN = "a turn asks mtp once, draws the draft, reads two tokens, takes one uniform and draws once"
LENGTH = "a draft that is kept can make the text one token too long: cut it, tokens[:length]"
TEXT = "a kept draft and the token behind it join the text, or after a refusal one token"


def counted(left: Sequence[str], half: dict[str, str]) -> str:
    """How many bugs are left; about the last one, or what is half mended, what is wrong."""
    count = ("One bug is left", "Two bugs are left", "Three bugs are left")[len(left) - 1]
    if len(left) == 1:
        return f"{count}: {half.get(left[0]) or BUGS[left[0]]}."
    if half:
        return f"{count}; half mended: {', and '.join(half.values())}."
    return "All three bugs are left." if len(left) == 3 else f"{count}."


def compare(got: Ran, expected: Ran) -> str | None:
    """What is wrong with a loop, or None. It shows that itself: the expected run is not needed."""
    if not isinstance(got.result, list):
        return f"returned {describe(got.result)}, expected a list of tokens"
    if not all(_whole(turn) for turn in got.turns):
        return f"the calls do not make turns. Hint: {TEXT if _bonus_lost(got.turns) else TURN}"
    if len(got.result) != got.length and got.result == _text(got):
        return f"{len(got.result)} tokens, expected {got.length}. Hint: {LENGTH}"
    if got.result != _text(got)[: got.length] or len(got.result) != got.length:
        return f"the tokens are not what was kept and drawn. Hint: {TEXT}"
    found = {"token": _token(got.turns), "trim": _trim(got), "rest": _rest(got.turns)}
    left = [name for name, said in found.items() if said != RIGHT]
    if left:
        half = {name: found[name] for name in left if found[name] != AS_IT_WAS}
        return f"{NOT_RIGHT}. Hint: {counted(left, half).removesuffix('.')}"
    return _else(got)


def _whole(turn: Turn) -> bool:
    parts = (len(turn.read), len(turn.uniforms), len(turn.drawn))
    return parts == (2, 1, 2) and turn.p is not None


def _bonus_lost(turns: list[Turn]) -> bool:
    """Whether nothing is drawn behind drafts that are kept, and all else is there."""
    odd = [turn for turn in turns if not _whole(turn)]
    alone = (turn.p is not None and len(turn.uniforms) == len(turn.drawn) == 1 for turn in odd)
    return all(alone) and all(turn.accepted for turn in odd)


def _token(turns: list[Turn]) -> str:
    if all(turn.token == turn.read[0] for turn in turns):
        return RIGHT
    own = all(turn.token == int(turn.hidden[1]) for turn in turns)
    return AS_IT_WAS if own else OTHER_TOKEN


def _trim(ran: Ran) -> str:
    wanted = len(ran.prompt)
    for turn in ran.turns:
        if turn.before != wanted:
            return AS_IT_WAS if turn.before > wanted else TOO_SHORT
        wanted += 1 + turn.accepted
    return RIGHT


def _rest(turns: list[Turn]) -> str:
    refused = [turn for turn in turns if not turn.accepted]
    ways = {
        RIGHT: lambda p, q: (p - q).clamp(min=0) / (p - q).clamp(min=0).sum(),
        AS_IT_WAS: lambda p, q: p,
        RESTS["not divided"]: lambda p, q: (p - q).clamp(min=0),
        RESTS["absolute"]: lambda p, q: (p - q).abs() / (p - q).abs().sum(),
        RESTS["turned"]: lambda p, q: (q - p).clamp(min=0) / (q - p).clamp(min=0).sum(),
        RESTS["the draft's"]: lambda p, q: q,
    }
    for said, way in ways.items():
        if all(_same(turn.drawn[1][0], way(turn.p[0], turn.q)) for turn in refused):
            return said
    return RESTS["other"]


def _same(one: Tensor, other: Tensor) -> bool:
    if not isinstance(one, Tensor) or one.shape != other.shape:
        return False
    return bool(torch.allclose(one.to(other.dtype), other, rtol=1e-4, atol=1e-6))


def _text(ran: Ran) -> list[int]:
    """The text that the turns make: kept drafts, and what was drawn behind them."""
    text = [*ran.prompt, ran.first]
    for turn in ran.turns:
        text += [turn.read[1], turn.drawn[1][1]] if turn.accepted else [turn.drawn[1][1]]
    return text


def _else(ran: Ran) -> str | None:
    """Beyond the three bugs: the hidden states, the bonus, and what is read."""
    last, chosen = ran.prompt_row, ran.first
    for turn in ran.turns:
        if difference(turn.hidden, last):
            return f"a draft is made from the wrong state. Hint: {HIDDEN}"
        if turn.accepted and not _same(turn.drawn[1][0], turn.p[1]):
            return f"a token is drawn from the wrong row. Hint: {BONUS}"
        if turn.read != [chosen, turn.drawn[0][1]] or not _same(turn.drawn[0][0], turn.q):
            return f"what is read is not the last token and its draft. Hint: {TURN}"
        last, chosen = turn.rows[1 if turn.accepted else 0], turn.drawn[1][1]
    return None
