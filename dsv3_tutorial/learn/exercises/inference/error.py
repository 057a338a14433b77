"""What rounding weights does to a dot product, before it is computed."""

import math

import torch
from torch import Tensor

from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def _dots(seed: int, rows: int, m: int, k: int, dtype: torch.dtype = torch.float32):
    def make() -> tuple[Tensor, Tensor]:
        x, scale = randn(seed, (rows, k), (m,), dtype=dtype)
        return x * 3 + 0.5, (scale.abs() + 0.1) / 100

    return make


def _error(size=lambda x: x.norm(dim=-1), share: float = 1 / math.sqrt(12)):
    return lambda x, scale: size(x)[:, None] * scale * share


PREDICTED_ERROR = Exercise(
    name="inference.predicted_error",
    reference="dsv3_tutorial.weights.formats:predicted_error",
    cases=[
        Case("three tokens, four outputs", _dots(0, 3, 4, 64)),
        Case("as many tokens as outputs", _dots(1, 5, 5, 32)),
        Case("a single number is not zero", lambda: (torch.eye(2, 6), torch.tensor([0.1, 0.2]))),
        Case("one token", _dots(2, 1, 7, 200), hidden=True),
        Case("one input", _dots(3, 4, 3, 1), hidden=True),
        Case("a token of zeros", lambda: (torch.zeros(2, 5), torch.ones(3)), hidden=True),
    ],
    hints=[
        "A weight's rounding error lies anywhere between -scale / 2 and scale / 2. Such a number's "
        "standard deviation is scale / sqrt(12).",
        "An output adds up k of them, each times an x. Of independent errors the squares add up: "
        "sqrt(sum of x squared), which is x.norm(dim=-1).",
        "x.norm(dim=-1)[:, None] * scale / math.sqrt(12): (M, 1) times (m,).",
    ],
    difficulty=2,
    importance=4,
    minutes=6,
    lines=1,
    mutants=[
        Mutant("12", _error(share=1 / 12), "scale^2 / 12 is the variance: take its root."),
        Mutant("the largest", _error(share=1 / 2), "scale / 2 is the largest error, not typical."),
        Mutant("no 12", _error(share=1.0), "A rounding error is not as large as a whole scale."),
        Mutant("sqrt(3)", _error(share=3**-0.5), "The error is half a scale at most, not a whole."),
        Mutant(
            "sizes added",
            _error(lambda x: x.abs().sum(dim=-1)),
            "The errors' sizes are added as if all had one sign: of independent ones add squares.",
        ),
        Mutant(
            "sum of x",
            _error(lambda x: x.sum(dim=-1)),
            "The errors of different weights differ: they do not share one factor, the sum of x.",
        ),
        Mutant(
            "mean",
            _error(lambda x: x.square().mean(dim=-1).sqrt()),
            "This is one product's error: an output adds up k of them.",
        ),
        Mutant(
            "squares",
            _error(lambda x: x.square().sum(dim=-1)),
            "The sum of squares is a variance: take its root.",
        ),
        Mutant(
            "no x",
            lambda x, scale: (scale * math.sqrt(x.shape[-1] / 12)).expand(len(x), -1),
            "x is not used: each weight's error is multiplied by its x.",
        ),
        Mutant(
            "variance",
            lambda x, scale: _error()(x, scale).square(),
            "This is the variance: return the standard deviation.",
        ),
        Mutant(
            "turned",
            lambda x, scale: _error()(x, scale).T,
            "Outputs come last: (M, m), a row for each token.",
        ),
    ],
)
