"""In which order a pipeline stage works, and how few micro-batches it can hold at once."""

from dsv3_tutorial.cost.schedule_orders import one_f_one_b_order
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant

# ends of a sentence to which a verdict adds its full stop
_PAIR = (
    "First min(stages - 1 - stage, micro_batches) forwards; then a forward first, then the oldest "
    "backward, in turn"
)
_OLDEST = "Gradients arrive in the order of the forwards, so the oldest micro-batch goes back first"
_LEFT = (
    "Each pair ends with one backward, i - ahead; the `ahead` that are left come last, up to "
    "B(micro_batches - 1)"
)
_FORWARDS = "First `ahead` forwards, then one more in each pair, up to F(micro_batches - 1)"
_NUMBERS = "Micro-batches are numbered from 0 to micro_batches - 1, like F0 and B0"


def _case(stage: int, stages: int, micro_batches: int):
    return lambda: (stage, stages, micro_batches)


def live(order: list[str]) -> int:
    """The most micro-batches that have been forward and not yet backward."""
    kept = most = 0
    for name in order:
        kept += 1 if name[0] == "F" else -1
        most = max(most, kept)
    return most


def _what_differs(got: list, expected: list) -> str | None:
    """Missing or double work, a backward too early, the budget, and then the order itself."""
    if got == expected:
        return None
    if not all(isinstance(name, str) for name in got):
        return 'return a list of text like ["F0", "B0"]'
    if unknown := [name for name in got if name not in expected]:
        return f"{unknown[0][:12]!r} is no operation of this step. Hint: {_NUMBERS}"
    for name in expected:
        if got.count(name) != 1:
            hint = _LEFT if name[0] == "B" else _FORWARDS
            return f"{name} stands {got.count(name)} times, expected once. Hint: {hint}"
        if name[0] == "B" and got.index(name) < got.index("F" + name[1:]):
            return f"{name} stands before F{name[1:]}. Hint: {_PAIR}"
    if live(got) > live(expected):
        return (
            f"{live(got)} micro-batches are live at once, the budget is {live(expected)} "
            f"(stages - stage, and no more than there are). Hint: {_PAIR}"
        )
    at = next(i for i, (one, other) in enumerate(zip(got, expected, strict=True)) if one != other)
    hint = _PAIR if "F" in expected[at] + got[at] else _OLDEST
    return f"place {at} of the order is {got[at]}, where another operation belongs. Hint: {hint}"


def _ahead(ahead):
    """1F1B with ahead(stage, stages) forwards before the first pair."""

    def order(stage, stages, micro_batches):
        first = max(0, min(ahead(stage, stages), micro_batches))
        names = [f"F{i}" for i in range(first)]
        for i in range(first, micro_batches):
            names += [f"F{i}", f"B{i - first}"]
        return names + [f"B{i}" for i in range(micro_batches - first, micro_batches)]

    return order


def _gpipe(stage, stages, micro_batches):
    return [f"{kind}{i}" for kind in "FB" for i in range(micro_batches)]


def _gpipe_turned(stage, stages, micro_batches):
    return [f"F{i}" for i in range(micro_batches)] + [f"B{i}" for i in range(micro_batches)][::-1]


def _not_drained(stage, stages, micro_batches):
    return one_f_one_b_order(stage, stages, micro_batches)[: 2 * micro_batches - stages + 1 + stage]


def _more_than_there_are(stage, stages, micro_batches):
    ahead = stages - 1 - stage
    names = [f"F{i}" for i in range(ahead)]
    for i in range(ahead, micro_batches):
        names += [f"F{i}", f"B{i - ahead}"]
    return names + [f"B{i}" for i in range(max(0, micro_batches - ahead), micro_batches)]


def _backward_in_front(stage, stages, micro_batches):
    ahead = min(stages - 1 - stage, micro_batches)
    names = [f"F{i}" for i in range(ahead)]
    for i in range(ahead, micro_batches):
        names += [f"B{i - ahead}", f"F{i}"]
    return names + [f"B{i}" for i in range(micro_batches - ahead, micro_batches)]


def _newest_first(stage, stages, micro_batches):
    ahead = min(stages - 1 - stage, micro_batches)
    names = [f"F{i}" for i in range(ahead)]
    for i in range(ahead, micro_batches):
        names += [f"F{i}", f"B{i}"]
    return names + [f"B{i}" for i in reversed(range(ahead))]


def _from_one(stage, stages, micro_batches):
    names = one_f_one_b_order(stage, stages, micro_batches)
    return [f"{name[0]}{int(name[1:]) + 1}" for name in names]


ONE_F_ONE_B = Exercise(
    name="parallel.one_f_one_b",
    reference="dsv3_tutorial.cost.schedule_orders:one_f_one_b_order",
    cases=[
        Case("the last of 4 stages", _case(3, 4, 6)),
        Case("the first of 4 stages", _case(0, 4, 6)),
        Case("stage 1 of 3", _case(1, 3, 5)),
        Case("fewer micro-batches than stages", _case(0, 6, 3)),
        Case("long", _case(2, 8, 20), hidden=True),
        Case("one stage", _case(0, 1, 4), hidden=True),
        Case("one micro-batch", _case(1, 4, 1), hidden=True),
        Case("as many as are ahead", _case(1, 5, 3), hidden=True),
    ],
    hints=[
        "The first backward that reaches a stage is micro-batch 0's, after it has been through all "
        "stages behind. How many forwards fit in before that?",
        "ahead = min(stages - 1 - stage, micro_batches) forwards come first; then in turn a "
        "forward and the oldest backward.",
        "for i in range(ahead, micro_batches): order += [f'F{i}', f'B{i - ahead}']; what is left "
        "are the last `ahead` backwards.",
    ],
    difficulty=3,
    importance=5,
    minutes=8,
    lines=5,
    mutants=[
        Mutant(
            "GPipe", _gpipe, "All forwards come first (GPipe): the oldest backward goes in between."
        ),
        Mutant(
            "GPipe, newest first",
            _gpipe_turned,
            "All forwards come first, and the backwards begin with the newest: both are wrong.",
        ),
        Mutant(
            "one too many ahead",
            _ahead(lambda stage, stages: stages - stage),
            "One forward too many runs ahead: a pair begins with a forward of its own.",
        ),
        Mutant(
            "one too few ahead",
            _ahead(lambda stage, stages: stages - 2 - stage),
            "As many forwards run ahead as stages lie behind this one, and each pair begins with a "
            "forward: here it waits for its first backward with nothing to do.",
        ),
        Mutant(
            "counted from the front",
            _ahead(lambda stage, stages: stage),
            "The number ahead is counted from the front: the last stage runs none ahead.",
        ),
        Mutant(
            "no forward ahead",
            _ahead(lambda stage, stages: 0),
            "No forward runs ahead: B0 would wait for all stages behind, with this one idle.",
        ),
        Mutant(
            "always stages - 1",
            _ahead(lambda stage, stages: stages - 1),
            "Every stage runs as many ahead as the first: later stages need fewer.",
        ),
        Mutant(
            "backward in front",
            _backward_in_front,
            "In a pair the backward comes first: a forward first, then the oldest backward.",
        ),
        Mutant("not drained", _not_drained, "The last backwards are missing: the pipeline drains."),
        Mutant(
            "more than there are",
            _more_than_there_are,
            "With few micro-batches there are not as many to run ahead: min(..., micro_batches).",
        ),
        Mutant(
            "newest first",
            _newest_first,
            "The newest micro-batch goes backward first: the oldest one's gradient arrives first.",
        ),
        Mutant("from one", _from_one, "Micro-batches are counted from 0."),
    ],
    compare=_what_differs,
)
