"""What is trained, and the error of a plan that cannot be carried out."""

from dataclasses import dataclass

from dsv3_tutorial.cost.tiers import whole

_MOST = 1e24  # tokens; nobody wrote as many


class PlanError(ValueError):
    """A plan that cannot be carried out; the message names every number to change."""


@dataclass(frozen=True)
class Job:
    """What is trained: tokens in all, and steps of `sequences` sequences of seq_len tokens."""

    tokens: float = 14.8e12
    seq_len: int = 4096
    sequences: int = 15360

    def __post_init__(self) -> None:
        wrong = [
            f"{name} = {getattr(self, name)!r} is no whole number of 1 or more"
            for name in ("seq_len", "sequences")
            if not whole(getattr(self, name), 1)
        ]
        number = isinstance(self.tokens, int | float) and not isinstance(self.tokens, bool)
        if not (number and 0 < self.tokens < _MOST):
            wrong.append(f"tokens = {self.tokens!r} is no number above 0 and below {_MOST:g}")
        if wrong:
            raise PlanError(
                f"This job cannot be: {'; '.join(wrong)}. Nothing would be trained. Change them."
            )
