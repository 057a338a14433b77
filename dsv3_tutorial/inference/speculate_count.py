"""What speculation cost and gave: passes, drafts kept by how far ahead they guessed, seconds."""

from dataclasses import dataclass, field


@dataclass
class Speculation:
    """What speculation cost and gave, over all texts of a batch.

    A turn is one text in one pass; each gives a token and those of its drafts that were kept.
    `drafted_at[i]` and `accepted_at[i]` count the draft i + 1 places ahead. Seconds of the wall
    clock; a GPU works on after the drafts were launched, and `verify_s` is where it is waited for.
    """

    drafts: int
    passes: int = 0
    turns: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0
    drafted_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.drafted_at, self.accepted_at = [0] * self.drafts, [0] * self.drafts

    @property
    def drafted(self) -> int:
        """Tokens that were drafted and checked."""
        return sum(self.drafted_at)

    @property
    def accepted(self) -> int:
        """Drafts that were kept."""
        return sum(self.accepted_at)

    @property
    def acceptance(self) -> float:
        """The share of first drafts kept: what the laws of speed-up call a. 0 if none was made."""
        return self.accepted_at[0] / self.drafted_at[0] if self.drafted else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a text gets of one pass, 1 without speculation."""
        return 1 + self.accepted / max(self.turns, 1)

    def count(self, wanted: list[int], read: list[int], draft_s: float, verify_s: float) -> None:
        """One pass: drafts of each text, and positions kept, 0 for a text that had ended."""
        self.passes += 1
        self.draft_s += draft_s
        self.verify_s += verify_s
        for drafted, kept in zip(wanted, read, strict=True):
            self.turns += kept > 0
            for place in range(drafted if kept else 0):
                self.drafted_at[place] += 1
                self.accepted_at[place] += place < kept - 1
