"""Running a learner's function as all ranks of a group, in one thread, so that nothing can hang.

A rank runs until it needs a message that does not exist yet, and is then ended; once every rank
has come as far, all are run again from the start with one answer more. A function that does the
same each time cannot tell this from real ranks, and the time limit of a verdict can end it.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv3_tutorial.learn.compare import difference
from dsv3_tutorial.learn.exercises.parallel.products import counted_flops
from dsv3_tutorial.learn.limits import Printed

Meet = Callable[[list[Tensor]], list[Tensor]]  # what all ranks give -> what each one gets
Made = Callable[[int, Callable[[str], Callable]], tuple]  # rank, collectives -> arguments
MOST = 64  # messages of a rank; a loop that never stops sending is cut off here


class _Waits(BaseException):
    """Ends a rank where it would wait. No Exception, so that `except Exception` misses it."""


@dataclass(frozen=True)
class Message:
    """What one rank gave to a collective: its name, and the tensor."""

    kind: str
    tensor: Tensor

    @property
    def bytes(self) -> int:
        return self.tensor.numel() * self.tensor.itemsize

    @property
    def form(self) -> tuple:
        return self.kind, tuple(self.tensor.shape), self.tensor.dtype

    def __str__(self) -> str:
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        return f"{self.kind} of {tuple(self.tensor.shape)} in {dtype}"


@dataclass(frozen=True, eq=False)
class Together:
    """What all ranks did: their results in rank order, or what would have made them hang.

    sent: each rank's messages; flops: the most of any rank; changed: what became of the inputs;
    said: a hint to a wrong result; gradients: what an exercise finds behind the results.
    """

    results: list[Any] = field(default_factory=list)
    sent: list[list[Message]] = field(default_factory=list)
    trouble: str | None = None
    changed: str | None = None
    flops: int = 0
    said: str | None = None
    gradients: Any = None

    def bytes(self, *kinds: str) -> int:
        """Bytes that the busiest rank gave to collectives, of these kinds or of all."""
        own = [[m.bytes for m in sent if not kinds or m.kind in kinds] for sent in self.sent]
        return max(map(sum, own), default=0)


class _Rank:
    """One rank: what it has been answered so far, and what it asks next."""

    def __init__(self, function: Callable, make: Made, rank: int, world: int):
        self.function, self.make, self.rank, self.world = function, make, rank, world
        self.answers: list[Tensor] = []
        self.asked: list[Message] = []
        self.printed, self.done, self.waiting = Printed(), False, False
        self.result: Any = None
        self.changed: str | None = None

    def run(self) -> None:
        """From the start until it waits or returns."""
        try:
            arguments = self.call()
        except _Waits:
            return
        except Exception as error:
            where = f"(rank {self.rank} of {self.world})"
            error.args = (f"{error.args[0]} {where}" if error.args else where,)
            raise
        self.done = True
        self.changed = self._changed(arguments)

    def call(self) -> tuple:
        """The function, with the answers so far; its arguments as it leaves them."""
        self.asked, self.printed, self.waiting = [], Printed(), False
        arguments = self.make(self.rank, self._collective)
        with redirect_stdout(self.printed):
            self.result = self.function(*arguments)
        return arguments

    def _collective(self, kind: str) -> Callable[[Tensor], Tensor]:
        def call(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{kind} takes a tensor, this is a {type(tensor).__name__}")
            if not self.waiting:  # a bare except may have kept it running
                self.asked.append(Message(kind, tensor.detach().clone()))
            if len(self.asked) > len(self.answers) or self.waiting:
                self.waiting = True
                raise _Waits
            return self.answers[len(self.asked) - 1].clone()

        return call

    def _changed(self, arguments: tuple) -> str | None:
        fresh = self.make(self.rank, self._collective)
        for name, now, then in zip(
            inspect.signature(self.function).parameters, arguments, fresh, strict=False
        ):
            if not callable(then) and difference(now, then, 0.0, False):
                return f"the input {name} was changed; work on a copy"
        return None


def together(
    function: Callable, make: Made, world: int, meet: dict[str, Meet], flops: bool = False
) -> Together:
    """The function on `world` ranks. make(rank, collective) -> its arguments, fresh each time.

    collective("exchange") is what a rank calls; meet["exchange"] turns all ranks' tensors into the
    answers. What is printed comes once, in rank order. Raises what a rank raises, naming the rank.
    """
    ranks = [_Rank(function, make, rank, world) for rank in range(world)]
    trouble, rounds = None, 0
    while trouble is None and not all(one.done for one in ranks):
        for one in ranks:
            one.run()
        trouble = _trouble(ranks, rounds)
        if trouble is None and not ranks[0].done:
            messages = [one.asked[-1] for one in ranks]
            answers = meet[messages[0].kind]([message.tensor for message in messages])
            for one, answer in zip(ranks, answers, strict=True):
                one.answers.append(answer)
            rounds += 1
    for one in ranks:
        print(one.printed.text, end="")
    sent = [one.asked for one in ranks]
    if trouble:
        return Together(sent=sent, trouble=trouble)
    changed = next((one.changed for one in ranks if one.changed), None)
    most = max(counted_flops(one.call) for one in ranks) if flops else 0
    return Together([one.result for one in ranks], sent, None, changed, most)


def _trouble(ranks: Sequence[_Rank], rounds: int) -> str | None:
    """Why real ranks would hang here, after `rounds` messages: or None."""
    if any(one.done and one.waiting for one in ranks):
        return "an except without a type hides that a rank has to wait; name what it catches"
    done = [one.rank for one in ranks if one.done]
    waits = [one for one in ranks if not one.done]
    if done and waits:
        kind = waits[0].asked[-1].kind
        return (
            f"rank {done[0]} returns where rank {waits[0].rank} makes call {rounds + 1}, {kind}, "
            "and waits for ever: every rank must make as many calls"
        )
    if rounds >= MOST and waits:
        return f"after {MOST} messages no rank has returned: a loop without an end"
    forms = {one.asked[-1].form: one for one in waits}
    if len(forms) > 1:
        first, other = list(forms.values())[:2]
        return (
            f"call {rounds + 1} differs between ranks: {first.asked[-1]} on rank {first.rank}, "
            f"{other.asked[-1]} on rank {other.rank}"
        )
    return None


def pass_on(tensors: list[Tensor]) -> list[Tensor]:
    """What each rank gets in a ring: what the rank before it gave."""
    return [tensors[rank - 1] for rank in range(len(tensors))]


def add_up(tensors: list[Tensor]) -> list[Tensor]:
    """What each rank gets from an all-reduce: the sum, in rank order."""
    total = torch.stack(tensors).sum(dim=0).to(tensors[0].dtype)
    return [total] * len(tensors)


def compared(
    over: Callable[[Together, Together], str | None],
    tolerance: float | None = None,
    names: Sequence[str] = (),
):
    """compare for an exercise: trouble, each rank's result, inputs, then over(got, expected).

    names: what the items of a result are, for words.
    """

    def compare(got: Together, expected: Together) -> str | None:
        if got.trouble or expected.trouble:
            return None if got.trouble == expected.trouble else got.trouble or "the ranks end"
        for rank, (one, other) in enumerate(zip(got.results, expected.results, strict=True)):
            if wrong := _difference(one, other, tolerance):
                for index, name in enumerate(names):
                    wrong = wrong.replace(f"item {index} of the result", name, 1)
                hint = f". Hint: {got.said.removesuffix('.')}" if got.said else ""
                return f"on rank {rank} of {len(got.results)}: {wrong}{hint}"
        if got.changed != expected.changed:
            return got.changed or "an input should have changed"
        return over(got, expected)

    return compare


def _difference(got: Any, expected: Any, tolerance: float | None) -> str | None:
    try:
        return difference(got, expected, tolerance, False)
    except Exception:  # a result whose own methods fail
        return f"the result, a {type(got).__name__}, cannot be compared with what is expected"
