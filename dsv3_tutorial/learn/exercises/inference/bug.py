"""A speculative decoding loop with the field's bugs in it."""

from dsv3_tutorial.learn.exercises.inference.bug_trace import (
    BONUS,
    BUGS,
    HIDDEN,
    LENGTH,
    OTHER_TOKEN,
    RESTS,
    TEXT,
    TOO_SHORT,
    compare,
    counted,
)
from dsv3_tutorial.learn.exercises.inference.toy import decode
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _rest(p, q):
    left = (p - q).clamp(min=0)
    return left / left.sum()


def buggy(
    *kept: str,
    token=lambda tokens, draft: tokens[-1],
    trim=lambda tokens: len(tokens),
    rest=_rest,
    cut=lambda hidden: hidden[:1],
    bonus=lambda p: p[1],
    more=lambda draft, token: [draft, token],
    end=lambda tokens, length: tokens[:length],
):
    """`speculated` with some of BUGS left in."""

    def loop(prompt, length, model, mtp, draw, uniform):
        hidden, p = model.read(prompt)
        tokens, draft = [*prompt, draw(p[-1])], 0
        while len(tokens) < length:
            after = tokens[-2] if "token" in kept else token(tokens, draft)
            q = mtp(hidden[-1], after)
            draft = draw(q)
            hidden, p = model.read([tokens[-1], draft])
            if uniform() * q[draft] < p[0, draft]:
                tokens += more(draft, draw(bonus(p)))
            else:
                model.trim(len(tokens) + 1 if "trim" in kept else trim(tokens))
                hidden = cut(hidden)
                tokens.append(draw(p[0] if "rest" in kept else rest(p[0], q)))
        return end(tokens, length)

    return loop


def _case(seed: int, prompt: list[int], length: int, vocab: int = 7, greedy: bool = False):
    return lambda: (seed, list(prompt), length, vocab, greedy)


def _left(kept: tuple[str, ...]) -> Mutant:
    return Mutant(" and ".join(kept), buggy(*kept), counted(kept, {}))


def _half_mended(kept: tuple[str, ...], name: str, part: str, said: str, **how) -> Mutant:
    """One bug mended in part, beside those that are as they were."""
    order = [bug for bug in BUGS if bug in (*kept, part)]
    message = counted(order, {part: said})
    return Mutant(f"{name}, {len(kept)} more", buggy(*kept, **how), message)


_HALF = {
    "not divided": lambda p, q: (p - q).clamp(min=0),
    "absolute": lambda p, q: (p - q).abs() / (p - q).abs().sum(),
    "turned": lambda p, q: _rest(q, p),
    "the draft's": lambda p, q: q,
}

FIND_THE_BUG = Exercise(
    name="inference.find_the_bug",
    reference="dsv3_tutorial.inference.speculative_loop:speculated",
    cases=[
        Case("a short prompt", _case(0, [3, 1, 4], 33)),
        Case("another text", _case(1, [5, 2], 40, 5)),
        Case("greedy", _case(2, [1, 1, 2, 6], 30, greedy=True)),
        Case("a larger vocabulary", _case(3, [9, 8, 7, 6, 5], 60, 12), hidden=True),
        Case("a prompt of two", _case(4, [0, 2], 26, 3), hidden=True),
        Case("greedy, longer", _case(5, [2, 0, 1], 53, 4, True), hidden=True),
        Case("one new token", _case(6, [4, 4, 2], 4), hidden=True),
    ],
    hints=[
        "Go through one pass with a refused draft, and write down after each line what the cache "
        "holds. It must hold all of the text but its last token when the next pass begins.",
        "hidden[-1] has read all tokens but the last. Which token comes after it?",
        "A token that both p and q say often was drafted often, and kept. Drawn from p it would "
        "come too often: what is left for a refusal is (p[0] - q).clamp(min=0), over its sum.",
    ],
    difficulty=4,
    importance=5,
    minutes=10,
    lines=3,
    mutants=[
        _left(("token", "trim", "rest")),
        _left(("token", "trim")),
        _left(("token", "rest")),
        _left(("trim", "rest")),
        *(_left((bug,)) for bug in BUGS),
        *(
            _half_mended(kept, name, "rest", RESTS[name], rest=rest)
            for name, rest in _HALF.items()
            for kept in ((), ("trim",))
        ),
        *(
            _half_mended(kept, "too short", "trim", TOO_SHORT, trim=lambda tokens: len(tokens) - 1)
            for kept in ((), ("rest",), ("token", "rest"))
        ),
        _half_mended((), "the old draft", "token", OTHER_TOKEN, token=lambda tokens, draft: draft),
        Mutant("hidden not cut", buggy(cut=lambda hidden: hidden), HIDDEN),
        Mutant("bonus from the first row", buggy(bonus=lambda p: p[0]), BONUS),
        Mutant("bonus lost", buggy(more=lambda draft, token: [draft]), TEXT),
        Mutant("draft lost", buggy(more=lambda draft, token: [token]), TEXT),
        Mutant("not cut", buggy(end=lambda tokens, length: tokens), LENGTH),
    ],
    compare=compare,
    run=decode,
)
