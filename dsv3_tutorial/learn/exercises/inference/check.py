"""Accepting drafts so that what comes out is distributed as without them."""

from torch import Tensor

from dsv3_tutorial.learn.exercises.inference.check_cases import CASES
from dsv3_tutorial.learn.exercises.inference.check_random import (
    IGNORED,
    OWN_RANDOM,
    under_other_seeds,
)
from dsv3_tutorial.learn.registry import Exercise, Mutant


def _prefix(kept: list[bool]) -> int:
    return (*kept, False).index(False)


def _inverse(weights: Tensor, u: Tensor) -> int:
    """The first token at which the running sum of weights / weights.sum() is above u."""
    reached = weights.cumsum(dim=0) / weights.sum()
    return min(int((reached <= u).sum()), len(weights) - 1)


def _open(
    keeps=lambda u, p, q: bool(u * q < p),
    left=lambda p, q: (p - q).clamp(min=0),
    pick=_inverse,
    count=_prefix,
    uniform=lambda uniforms, n: uniforms[-1],
    bonus=lambda target, draft: target[-1],
    row=lambda target, i: target[i],
):
    """`accept` with its parts open to be got wrong."""

    def accept(drafted, draft_probs, target_probs, uniforms):
        kept = [
            keeps(uniforms[i], row(target_probs, i)[token], draft_probs[i, token])
            for i, token in enumerate(drafted.tolist())
        ]
        n = count(kept)
        whole = n == len(kept)
        weights = (
            bonus(target_probs, draft_probs)
            if whole
            else left(row(target_probs, n), draft_probs[n])
        )
        return n, pick(weights, uniform(uniforms, n))

    return accept


def _upside_down(u, p, q) -> bool:
    return bool(u * p < q)


def _beyond(weights: Tensor, u: Tensor) -> int:
    return int((weights.cumsum(dim=0) <= u).sum())


def _unnormalised(weights: Tensor, u: Tensor) -> int:
    return min(_beyond(weights, u), len(weights) - 1)


def _reached(weights: Tensor, u: Tensor) -> int:
    reached = weights.cumsum(dim=0) / weights.sum()
    return min(int((reached < u).sum()), len(weights) - 1)


def _no_bonus(drafted, draft_probs, target_probs, uniforms):
    n, token = _open()(drafted, draft_probs, target_probs, uniforms)
    return (n, int(drafted[-1])) if n == len(drafted) else (n, token)


def _refused_all_the_same(drafted, draft_probs, target_probs, uniforms):
    n, token = _open()(drafted, draft_probs, target_probs, uniforms)
    return (n, token) if n == len(drafted) else (n, int(drafted[n]))


def _counted_too(drafted, draft_probs, target_probs, uniforms):
    n, token = _open()(drafted, draft_probs, target_probs, uniforms)
    return n + 1, token


def _only_if_most_likely(pick):
    def accept(drafted, draft_probs, target_probs, uniforms):
        n = _prefix((target_probs[:-1].argmax(dim=-1) == drafted).tolist())
        refused = draft_probs[n] if n < len(drafted) else 0
        return n, pick((target_probs[n] - refused).clamp(min=0), uniforms[-1])

    return accept


def _token_first(drafted, draft_probs, target_probs, uniforms):
    return _open()(drafted, draft_probs, target_probs, uniforms)[::-1]


def _no_row(error: BaseException, arguments: tuple) -> str | None:
    """After an index beyond the rows: what there is where."""
    if not isinstance(error, IndexError | StopIteration):
        return None
    return (
        "draft_probs has K rows, target_probs and uniforms K + 1: with all drafts accepted there "
        "is no draft to compare with, and the token comes from target_probs[-1]."
    )


ACCEPT = Exercise(
    name="inference.accept",
    reference="dsv3_tutorial.inference.speculate:accept",
    cases=CASES,
    hints=[
        "Go through the drafts: with t = drafted[i], p = target_probs[i, t] and q = "
        "draft_probs[i, t], go on while uniforms[i] < p / q. The first refusal ends it.",
        "At a refusal the next token comes from what the model says more often than the draft: "
        "rest = (target_probs[i] - draft_probs[i]).clamp(min=0), over its sum. With all accepted, "
        "from target_probs[-1].",
        "To draw with u = uniforms[-1]: int((probs.cumsum(0) > u).float().argmax()), the first "
        "place where the running sum is above u.",
    ],
    difficulty=4,
    importance=5,
    minutes=8,
    lines=8,
    mutants=[
        Mutant(
            "from the target",
            _open(left=lambda p, q: p),
            "After a refusal this draws from target_probs: what the draft may say as well has had "
            "its chance, so only max(p - q, 0) is left.",
        ),
        *(
            Mutant(
                f"not normalised, {name}",
                _open(pick=pick),
                "max(p - q, 0) does not sum to 1: divide by its sum before you draw.",
            )
            for name, pick in {"in range": _unnormalised, "or beyond": _beyond}.items()
        ),
        Mutant(
            "absolute",
            _open(left=lambda p, q: (p - q).abs()),
            "Where the draft says more than the model nothing is left: clamp at 0, no abs.",
        ),
        Mutant(
            "q - p",
            _open(left=lambda p, q: (q - p).clamp(min=0)),
            "The difference is the other way round: what the model says more often, p - q.",
        ),
        Mutant(
            "from the draft",
            _open(left=lambda p, q: q),
            "After a refusal this draws from the draft's own probabilities, which were refused.",
        ),
        Mutant(
            "ratio upside down",
            _open(_upside_down),
            "The ratio is upside down: a draft is kept with probability p / q, the model's over "
            "the draft's.",
        ),
        Mutant(
            "p alone",
            _open(lambda u, p, q: bool(u < p)),
            "A draft is kept with probability p here: it came with q already, so p / q.",
        ),
        Mutant(
            "the wrong side",
            _open(lambda u, p, q: not u * q < p),
            "Drafts are kept where they should be refused: keep while u < p / q.",
        ),
        Mutant(
            "reached, not above",
            _open(pick=_reached),
            "With u = 0 this draws the first token of all, chance or none: the running sum must be "
            "above u.",
        ),
        Mutant(
            "or equal",
            _open(lambda u, p, q: bool(u * q <= p)),
            "With u = 0 and p = 0 this keeps a draft that the model never says: u < p / q.",
        ),
        Mutant(
            "p above q",
            _open(lambda u, p, q: bool(p >= q)),
            "The uniforms are not used: a draft with p < q is kept with probability p / q.",
        ),
        *(
            Mutant(
                f"the most likely kept, {name}",
                _only_if_most_likely(pick),
                "This keeps a draft that is the most likely token: right for greedy decoding only.",
            )
            for name, pick in {"drawn": _inverse, "taken": lambda w, u: int(w.argmax())}.items()
        ),
        Mutant(
            "goes on",
            _open(count=sum),
            "Drafts after a refusal are counted: they follow a token that is not in the text.",
        ),
        Mutant(
            "its own uniform",
            _open(uniform=lambda uniforms, n: uniforms[n]),
            "The draw uses a refused draft's own uniform, which is known to be large: take the "
            "last.",
        ),
        Mutant(
            "the first uniform",
            _open(uniform=lambda uniforms, n: uniforms[0]),
            "The draw uses the first uniform, which has judged a draft: take the last.",
        ),
        Mutant(
            "a row late",
            _open(row=lambda target, i: target[i + 1]),
            "Draft i is judged by the row after it: target_probs[i] is what the model says there.",
        ),
        Mutant(
            "no bonus",
            _no_bonus,
            "All accepted gives one token more, from target_probs[-1]: it is lost here.",
        ),
        Mutant(
            "bonus from the last draft's row",
            _open(bonus=lambda target, draft: target[-2]),
            "The token after all drafts comes from the last row of target_probs.",
        ),
        Mutant(
            "bonus without the draft",
            _open(bonus=lambda target, draft: (target[-1] - draft[-1]).clamp(min=0)),
            "With all accepted there is no refused draft to subtract: draw from target_probs[-1].",
        ),
        Mutant(
            "the refused draft",
            _refused_all_the_same,
            "The refused draft is returned as the next token.",
        ),
        Mutant("counted too", _counted_too, "The drawn token is counted: count the drafts only."),
        Mutant(
            "argmax",
            _open(pick=lambda weights, u: int(weights.argmax())),
            "The next token is the most likely one: draw it with the last uniform.",
        ),
        Mutant("token first", _token_first, "The number comes first, then the token."),
        *(
            Mutant(f"draws its own random number, {name}", _open(**parts), IGNORED)
            for name, parts in OWN_RANDOM.items()
        ),
    ],
    run=under_other_seeds,
    raised=_no_row,
)
