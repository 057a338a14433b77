"""What an exercise is, and where the one called `attention.absorbed_scores` is declared.

The part of a name before the first dot is the module under `learn/exercises/` that declares it, in
a list `EXERCISES`. It is loaded on first use, and nothing here imports torch: only a case that
makes tensors does.
"""

import difflib
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from dsv3_tutorial.learn import exercises

SECONDS = 10.0
PATH = ("start", "attention", "moe", "fp8", "parallel", "inference", "codesign")  # recommended


@dataclass(frozen=True)
class Case:
    """One question put to the learner's function. make() -> the same arguments, fresh, each time.

    A hidden case uses another seed or shape, and a verdict never says which.
    """

    name: str
    make: Callable[[], tuple]
    hidden: bool = False


@dataclass(frozen=True)
class Mutant:
    """A wrong answer that people really give, and the sentence that names the mistake."""

    name: str
    function: Callable
    message: str


@dataclass(frozen=True)
class Budget:
    """What a right answer may cost: measure(function, *args) is at most `limit` of `unit`."""

    measure: Callable[..., float]
    limit: float
    unit: str


@dataclass(frozen=True)
class Exercise:
    """An exercise, whose solution is the function of the package that `reference` names.

    difficulty and importance are out of 5; lines is about what a solution takes; needs names the
    globals that the reference uses beside torch, math and torch.nn.functional as F. compare(got,
    expected) says what is wrong, or None, where equality is not the question. run(function, *args)
    puts a case to a function where one call is not the question, but the ranks of a group: its
    result is what is compared, and a case's arguments are then run's. raised(error, arguments) is a
    hint for an error that no mutant raises.
    """

    name: str
    reference: str  # "package.module:function"
    cases: tuple[Case, ...] | list[Case]
    hints: tuple[str, ...] | list[str]
    difficulty: int
    importance: int
    minutes: int
    lines: int
    mutants: tuple[Mutant, ...] | list[Mutant] = ()
    budget: Budget | None = None
    tolerance: float | None = None
    needs: tuple[str, ...] = ()
    seconds: float = SECONDS
    compare: Callable[[Any, Any], str | None] | None = None
    run: Callable[..., Any] | None = None
    raised: Callable[[BaseException, tuple], str | None] | None = None

    @property
    def concept(self) -> str:
        return self.name.partition(".")[0]

    @property
    def function(self) -> Callable:
        """The package's own function: the solution."""
        module, _, name = self.reference.partition(":")
        return getattr(importlib.import_module(module), name)

    @property
    def source(self) -> str:
        """The solution's source, from its first decorator or `def`, without outer indentation."""
        return textwrap.dedent(inspect.getsource(self.function)).rstrip()

    def case_title(self, case: Case) -> str:
        """How a verdict speaks of a case: its number and name, or nothing that gives it away."""
        if case.hidden:
            return "a hidden case"
        return f"case {list(self.cases).index(case) + 1} ({case.name})"


class UnknownExercise(LookupError):
    """No exercise has this name. The message lists the closest ones."""


@cache
def load(concept: str) -> dict[str, Exercise]:
    """The exercises that `learn/exercises/<concept>.py` declares, by name, in its order."""
    module = importlib.import_module(f"{exercises.__name__}.{concept}")
    declared = module.EXERCISES
    listed = declared.values() if isinstance(declared, dict) else declared
    return {exercise.name: exercise for exercise in listed}


def concepts() -> list[str]:
    """The names of the modules under `learn/exercises/`, without loading them."""
    return sorted(module.name for module in pkgutil.iter_modules(exercises.__path__))


def every_exercise() -> list[Exercise]:
    """All exercises of the course, along its path. Loads every module under `learn/exercises/`."""
    path = sorted(concepts(), key=lambda concept: PATH.index(concept) if concept in PATH else 99)
    return [exercise for concept in path for exercise in load(concept).values()]


def find(name: str) -> Exercise:
    """The exercise with this name. Raises UnknownExercise with the closest names."""
    concept = name.partition(".")[0] if isinstance(name, str) else ""
    if concept in concepts() and name in load(concept):
        return load(concept)[name]
    known = [exercise.name for exercise in every_exercise()]
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4) or known[:3]
    raise UnknownExercise(f"there is no exercise {name!r}; the closest: {', '.join(close)}")


def same_signature(stub: Callable, exercise: Exercise) -> bool:
    """Whether a stub takes the solution's parameters: same names, order, kinds and defaults."""

    def shape(function: Callable) -> list[tuple]:
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    return shape(stub) == shape(exercise.function)
