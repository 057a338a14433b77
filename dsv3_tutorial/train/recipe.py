"""How a run trains, as plain values: whoever has the recipe, the text and the seed has the run.

The constants are the DeepSeek-V3 report's, section 4.2, with its 14.8T tokens taken as fractions
of a run: what follows from the step needs no place in a checkpoint.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
CLIP = 1.0
ALL_TOKENS = 14.8  # T; the rest of the report's numbers as fractions of it
HELD_UNTIL = 10.0 / ALL_TOKENS  # the peak learning rate; the MTP weight falls to a third there too
DECAYED_AT = 14.3 / ALL_TOKENS  # the cosine has ended, and the balance bias rests from here on
LOWEST_FROM = (14.3 + 0.333) / ALL_TOKENS
FINAL_OF_PEAK = 0.1  # 2.2e-5 of 2.2e-4
LOWEST_OF_FINAL = 7.3 / 22
MTP_WEIGHT = 0.3
LATE_MTP = 1 / 3  # 0.1 of 0.3
GAMMA = 0.001
ALPHA = 0.0001

BALANCES = ("bias", "sequence", "batch", "none")
SCHEDULES = ("report", "cosine")
PRECISIONS = ("float32", "bf16", "fp8", "fp8-tensor")
MOMENTS = ("float32", "bf16")
TOKENIZERS = ("bytes", "bpe")
LATER = ("moments",)  # fields that runs of earlier versions were written down without


class RecipeError(ValueError):
    """Everything that is wrong with how a run was asked for, at once. `problems` lists it."""

    def __init__(self, problems: list[str]):
        self.problems = list(dict.fromkeys(problems))
        listed = "\n".join(f"  - {problem}" for problem in self.problems)
        count = len(self.problems)
        super().__init__(
            f"This run has {count} problem{'s' if count > 1 else ''}:\n{listed}\n"
            "Nothing was started or written. Mend the options named."
        )


@dataclass(frozen=True)
class Recipe:
    """What decides a run's numbers. Raises RecipeError with every problem at once."""

    steps: int
    seed: int = 0
    batch: int = 16  # sequences in one optimizer step, over all micro-batches and ranks
    micro_batches: int = 1
    seq_len: int = 256
    peak_lr: float = 2e-3
    warmup: int = 50
    schedule: str = "report"
    mtp_weight: float = MTP_WEIGHT
    balance: str = "bias"
    gamma: float = GAMMA
    alpha: float = ALPHA
    freeze_bias: float = 1 - DECAYED_AT  # the last part of the run, in which the bias rests
    precision: str = "float32"
    recompute: bool = False
    tokenizer: str = "bytes"
    vocab_size: int | None = None  # of the BPE; bytes are 256
    evaluate_every: int = 200
    evaluate_windows: int = 64
    save_every: int = 200
    moments: str | None = None  # of the optimizer; None: as the report has them, see `moments_in`

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise RecipeError(problems)

    def learning_rate(self, step: int) -> float:
        """The rate of update `step`, from 0: warm-up, then the report's shape, or half a cosine."""
        if step < self.warmup:
            return self.peak_lr * (step + 1) / self.warmup
        final = self.peak_lr * FINAL_OF_PEAK
        if self.schedule == "cosine":
            done = (step - self.warmup) / max(1, self.steps - self.warmup)
            return _cosine(self.peak_lr, final, done)
        done = step / self.steps
        if done >= LOWEST_FROM:
            return final * LOWEST_OF_FINAL
        return _cosine(self.peak_lr, final, (done - HELD_UNTIL) / (DECAYED_AT - HELD_UNTIL))

    def mtp_weight_at(self, step: int) -> float:
        """Lambda of the multi-token prediction loss: 0.3, and 0.1 from two thirds on."""
        return self.mtp_weight * (1.0 if step < HELD_UNTIL * self.steps else LATE_MTP)

    def gamma_at(self, step: int) -> float:
        """How far the balance bias moves after update `step`; 0 where it does not."""
        moves = self.balance == "bias" and step < (1 - self.freeze_bias) * self.steps
        return self.gamma if moves else 0.0

    @property
    def moments_in(self) -> str:
        """What the optimizer's moments are kept in: BF16 beside FP8 (section 3.3.3), or float32."""
        return self.moments or ("bf16" if self.precision.startswith("fp8") else "float32")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without what came later and was not asked for: older runs still agree."""
        values = asdict(self)
        return {k: v for k, v in values.items() if k not in LATER or v is not None}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Recipe":
        """The recipe that `to_dict` wrote. Raises RecipeError for a field it does not know."""
        unknown = sorted(set(raw) - {f.name for f in fields(cls)})
        if unknown or "steps" not in raw:
            raise RecipeError([f"unknown field {name!r}" for name in unknown] or ["no steps"])
        return cls(**raw)


def _cosine(begin: float, end: float, done: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * min(1.0, max(0.0, done)))) / 2


_AT_LEAST = {"steps": 1, "seed": 0, "batch": 1, "micro_batches": 1, "seq_len": 4, "warmup": 0}
_AT_LEAST |= {"evaluate_every": 1, "evaluate_windows": 1, "save_every": 1}
_ONE_OF = {"schedule": SCHEDULES, "balance": BALANCES, "precision": PRECISIONS}
_ONE_OF |= {"tokenizer": TOKENIZERS, "moments": (None, *MOMENTS)}
_FINITE = {"peak_lr": (0.0, 10.0), "mtp_weight": (0.0, 10.0), "gamma": (0.0, 1.0)}
_FINITE |= {"alpha": (0.0, 10.0), "freeze_bias": (0.0, 1.0)}


def _problems(recipe: Recipe) -> Iterator[str]:
    for name, least in _AT_LEAST.items():
        value = getattr(recipe, name)
        if type(value) is not int or value < least:
            yield f"{name} = {value!r}: it must be a whole number of {least} or more"
    for name, known in _ONE_OF.items():
        if getattr(recipe, name) not in known:
            listed = ", ".join(filter(None, known))
            yield f"{name} = {getattr(recipe, name)!r}: it must be one of {listed}"
    for name, (low, high) in _FINITE.items():
        value = getattr(recipe, name)
        if type(value) not in (int, float) or not low <= value <= high:
            yield f"{name} = {value!r}: it must lie between {low:g} and {high:g}"
    if type(recipe.recompute) is not bool:
        yield f"recompute = {recipe.recompute!r}: it must be true or false"
    yield from _joint_problems(recipe)


def _joint_problems(recipe: Recipe) -> Iterator[str]:
    sizes = recipe.batch, recipe.micro_batches
    if all(type(n) is int and n > 0 for n in sizes) and sizes[0] % sizes[1]:
        yield (
            f"batch = {sizes[0]} cannot be split into micro_batches = {sizes[1]} equal parts: "
            "their mean would not be the batch's mean"
        )
    bpe = recipe.tokenizer == "bpe"
    if bpe and (type(recipe.vocab_size) is not int or recipe.vocab_size < 257):
        yield f"vocab_size = {recipe.vocab_size!r}: a BPE starts from 256 bytes and needs more"
    if recipe.tokenizer == "bytes" and recipe.vocab_size not in (None, 256):
        yield f"vocab_size = {recipe.vocab_size!r} without tokenizer = bpe: bytes are 256 symbols"
