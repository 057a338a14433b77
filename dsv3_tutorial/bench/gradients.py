"""What E4M3 leaves of a run's gradients, looked at while it trains: values lost, and tokens.

The run is `precision`'s "fp8", bit for bit: each gradient dY that enters a product goes on as it
was, and is stored five more times, with a scale for all that is fixed beforehand or a scale
measured for less and less of it. Letters: dY (M, n), M tokens, n outputs of a layer.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3_tutorial import receipts
from dsv3_tutorial.bench import machine, precision
from dsv3_tutorial.fp8.errors import lost_tokens
from dsv3_tutorial.fp8.scaling import DEEPSEEK, Quantized, Scaling
from dsv3_tutorial.train import corpus
from dsv3_tutorial.train.precision import worker_for

NAME, VARIANT = "gradients", "fp8"
STEPS, LOOKS = 100, (1, 10, 20, 40, 60, 100)
FEW = 16  # tokens: the spread of fewer is mostly chance, and is left out
WAYS = {
    "constant 2^-10": replace(DEEPSEEK, grad_scale=precision.ONE_SCALE),
    "constant 2^-16": replace(DEEPSEEK, grad_scale=2.0**-16),
    "tensor": replace(DEEPSEEK, dy="tensor"),
    "block": replace(DEEPSEEK, dy="block"),
    "tile": replace(DEEPSEEK, dy="tile"),
}


class Found(NamedTuple):
    """What became of one gradient dY (M, n): counts, and `spread`, of its tokens' sizes.

    sizes: the magnitudes of its values that are not zero. zeroed: how many of those each way
    stores as zero. lost: how many tokens it brings back with over 50 % of error, and the largest
    of them over the median token, 0 where none is lost.
    """

    tokens: int
    sizes: Tensor
    zeroed: dict[str, int]
    lost: dict[str, tuple[float, float]]
    spread: tuple[float, float] | None


def examine(dy: Tensor) -> Found:
    """Store dY (M, n) in every way, on a CPU, and count. A row is a token."""
    there, zeroed, lost = dy != 0, {}, {}
    norms = dy.double().norm(dim=-1)  # (M,), squares of 1e-30 need the range
    for way, scaling in WAYS.items():
        back = scaling.gradient(dy).restored  # (M, n)
        zeroed[way] = int((there & (back == 0)).sum())
        lost[way] = lost_tokens(dy, back) * len(dy), _largest_lost(dy, back, norms)
    return Found(len(dy), dy[there].abs(), zeroed, lost, _spread(norms[norms > 0]))


def _largest_lost(dy: Tensor, back: Tensor, norms: Tensor) -> float:
    """Of the tokens lost the largest, over the median of those that are not zero."""
    lost = norms[(back.double() - dy.double()).norm(dim=-1) > 0.5 * norms]
    return (lost.max() / norms[norms > 0].median()).item() if len(lost) else 0.0


def _spread(norms: Tensor) -> tuple[float, float] | None:
    """log10 of the tokens' norms (M,): standard deviation, and half of what the middle 68 % span.

    The two agree for a normal distribution; the second does not see a few tokens far away.
    """
    if len(norms) < FEW:
        return None
    logs = norms.log10()
    low, high = logs.quantile(torch.tensor([0.16, 0.84], dtype=logs.dtype))
    return logs.std().item(), ((high - low) / 2).item()


@dataclass
class Seen:
    """The gradients of one step. A product takes dY for Dgrad and dY^T for Wgrad: one of them."""

    watching: bool = False
    found: list[Found] = field(default_factory=list)
    last: Tensor | None = None

    def note(self, dy: Tensor) -> None:
        """Examine dY unless it is the one before, transposed: the same memory the other way."""
        if not self.watching:
            return
        again = self.last is not None and dy.T.is_set_to(self.last)
        self.last = None if again else dy  # held, so that nothing else gets its memory
        if not again:
            self.found.append(examine(dy))

    def take(self) -> list[Found]:
        taken, self.found, self.last = self.found, [], None
        return taken


@dataclass(frozen=True)
class Observed(Scaling):
    """A Scaling that shows every gradient to `seen` and then does with it what it always does."""

    seen: Seen = field(default_factory=Seen, compare=False, repr=False)

    @classmethod
    def of(cls, scaling: Scaling) -> "Observed":
        return cls(**{each.name: getattr(scaling, each.name) for each in fields(Scaling)})

    def gradient(self, dy: Tensor) -> Quantized:
        self.seen.note(dy)
        return super().gradient(dy)


@dataclass(frozen=True)
class Look:
    """One step, over all its products: shares of 0 to 1, sizes as they are.

    zeroed: {way: (share of all values that are not zero, the least of a product, the largest)};
    lost: {way: (share of all tokens of all products, size of the largest over its median token)};
    decades, middle: a product's two measures of spread, each as mean and largest over the products.
    """

    step: int
    bits: float
    products: int
    tokens: int
    values: int
    median: float
    zeroed: dict[str, tuple[float, float, float]]
    lost: dict[str, tuple[float, float]]
    decades: tuple[float, float]
    middle: tuple[float, float]


def looked_at(steps: int) -> list[int]:
    """The steps looked at in a run of so many: LOOKS as far as it goes, and its last one."""
    return sorted({step for step in LOOKS if step < steps} | {steps})


def run(seed: int, text: corpus.Corpus, steps: int = STEPS) -> Iterator[Look]:
    """Train the first steps of `precision`'s run, and look at the gradients of some."""
    if not 1 <= steps <= precision.STEPS:
        raise ValueError(
            f"{steps} steps cannot be looked at: this run is the beginning of one of "
            f"{precision.STEPS}, whose learning rate ends there. Ask for 1 to {precision.STEPS}."
        )
    state = precision._begin(VARIANT, seed, text, precision.STEPS)
    scaling = Observed.of(DEEPSEEK)
    state.worker = worker_for(state.model, scaling)
    wanted = looked_at(steps)
    for step in range(1, steps + 1):
        scaling.seen.watching = step in wanted
        bits = precision._step(state)
        if scaling.seen.watching:
            yield summed(step, bits, scaling.seen.take())


def summed(step: int, bits: float, found: list[Found]) -> Look:
    """All products of a step in one: each value counts alike, and each token of each product."""
    sizes = torch.cat([each.sizes for each in found]).float()
    tokens = sum(each.tokens for each in found)
    spreads = [each.spread for each in found if each.spread] or [(0.0, 0.0)]
    decades, middle = ((mean(column), max(column)) for column in zip(*spreads))
    return Look(
        step=step,
        bits=bits,
        products=len(found),
        tokens=tokens,
        values=len(sizes),
        median=sizes.median().item() if len(sizes) else 0.0,
        zeroed={way: _zeroed(way, found) for way in WAYS},
        lost={way: _lost(way, found) for way in WAYS},
        decades=decades,
        middle=middle,
    )


def _zeroed(way: str, found: list[Found]) -> tuple[float, float, float]:
    counts = [(each.zeroed[way], len(each.sizes)) for each in found if len(each.sizes)]
    shares = [zero / values for zero, values in counts] or [0.0]
    every = sum(values for _, values in counts)
    return sum(zero for zero, _ in counts) / max(every, 1), min(shares), max(shares)


def _lost(way: str, found: list[Found]) -> tuple[float, float]:
    counts, largest = zip(*(each.lost[way] for each in found))
    return math.fsum(counts) / sum(each.tokens for each in found), max(largest)


def _receipts(seed: int, look: Look) -> list[receipts.Receipt]:
    """A step's receipts, one a way of storing; what does not depend on the way is in each."""
    same = {
        "variant": VARIANT,
        "seed": seed,
        "step": look.step,
        "tokens_per_step": precision.BATCH * precision.SEQ_LEN,
        "loss": round(look.bits, 5),
        "products": look.products,
        "rows": look.tokens,
        "values": look.values,
        "median": float(f"{look.median:.4g}"),
        "decades": [round(each, 4) for each in look.decades],
        "middle": [round(each, 4) for each in look.middle],
    }
    facts, made = machine.here(), []
    for way, (share, low, high) in look.zeroed.items():
        lost, largest = look.lost[way]
        own = {"way": way, "lost_tokens": round(lost, 6), "largest_lost": float(f"{largest:.4g}")}
        made.append(
            receipts.Receipt(
                what="gradients",
                shapes={**same, **own},
                value=share,
                unit="share of values that become zero",
                spread={"min": low, "max": high},
                repeats=look.products,
                **facts,
            )
        )
    return made


def main(argv: list[str] | None = None) -> int:
    """Train and look, unless all of it is on record; each step looked at is kept at once."""
    parser = argparse.ArgumentParser(prog="python -m dsv3_tutorial bench gradients")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the run ({STEPS})")
    parser.add_argument("--out", type=Path, help="folder of the receipts (default data/measured)")
    options = parser.parse_args(argv)
    known = {r.shapes["step"] for r in _recorded(options.out) if r.shapes["seed"] == options.seed}
    if known.issuperset(looked_at(options.steps)):
        print(f"seed {options.seed} is on record to step {options.steps}")
        return 0
    for look in run(options.seed, corpus.load(), options.steps):
        if look.step not in known:
            receipts.append(NAME, _receipts(options.seed, look), folder=options.out)
        shares = ", ".join(f"{way} {share:.2%}" for way, (share, _, _) in look.zeroed.items())
        print(f"step {look.step}, become zero: {shares}", flush=True)
    return 0


def _recorded(folder: Path | None) -> list[receipts.Receipt]:
    return receipts.read(NAME, folder=folder) if NAME in receipts.names(folder) else []
