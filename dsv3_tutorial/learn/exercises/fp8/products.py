"""A product in FP8: its scales enter while the sum runs."""

import torch
from torch import Tensor

from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant

E4M3 = torch.float8_e4m3fn


def _operands(seed: int, m: int, n: int, k: int):
    def make() -> tuple[Tensor, ...]:
        a, b, *scales = randn(seed, (m, k), (n, k), (m, k // 128), (n // 128, k // 128))
        a, b = ((100 * t).clamp(-448, 448).to(E4M3) for t in (a, b))
        a_scale, b_scale = (torch.exp2(2 * s - 6) for s in scales)
        return a, a_scale, b, b_scale

    return make


def in_parts(a, a_scale, b, b_scale, left=None, right=None, keep=None, join=torch.add) -> Tensor:
    """`block_products` with its parts open to be got wrong."""
    left = left or (lambda s, i: s[:, i, None])
    right = right or (lambda s, i: s[:, i].repeat_interleave(128))
    out = torch.zeros(len(a), len(b))
    for i in range(a.shape[1] // 128):
        part = slice(128 * i, 128 * i + 128)
        partial = a[:, part].float() @ b[:, part].float().T
        out = join(out, partial * left(a_scale, i) * right(b_scale, i))
        out = keep(out) if keep else out
    return out


def _at_the_end(a, a_scale, b, b_scale):
    columns = b_scale[:, 0].repeat_interleave(128)
    return (a.float() @ b.float().T) * a_scale[:, :1] * columns


def _mean_at_the_end(a, a_scale, b, b_scale):
    columns = b_scale.mean(dim=1).repeat_interleave(128)
    return (a.float() @ b.float().T) * a_scale.mean(dim=1, keepdim=True) * columns


def _not_transposed(a, a_scale, b, b_scale):
    return a.float() @ b.float()


def _divided(a, a_scale, b, b_scale):
    return in_parts(a, 1 / a_scale, b, 1 / b_scale)


def _turned(a, a_scale, b, b_scale):
    return in_parts(a, a_scale, b, b_scale).T


SCALED_MATMUL = Exercise(
    name="fp8.scaled_matmul",
    reference="dsv3_tutorial.fp8.gemm:block_products",
    cases=[
        Case("3 tokens, k 384, n 256", _operands(0, 3, 256, 384)),
        Case("5 tokens, k 256, n 128", _operands(1, 5, 128, 256)),
        Case("k of one tile", _operands(2, 4, 384, 128), hidden=True),
        Case("one token", _operands(3, 1, 256, 256), hidden=True),
        Case("more tokens", _operands(4, 20, 128, 384), hidden=True),
    ],
    hints=[
        "for i in range(a.shape[1] // 128): a[:, 128 * i : 128 * (i + 1)].float() times the same "
        "columns of b, transposed, is the i-th partial product (m, n).",
        "Multiply the partial product by a_scale[:, i, None], one number a row, and by "
        "b_scale[:, i].repeat_interleave(128), one number for 128 columns. Then add it to the sum.",
        "out = torch.zeros(a.shape[0], b.shape[0]) in float32; out += partial * row * column.",
    ],
    difficulty=3,
    importance=5,
    minutes=7,
    lines=7,
    mutants=[
        Mutant(
            "at the end",
            _at_the_end,
            "The scales are multiplied once, at the end: they change every 128 along k.",
        ),
        Mutant(
            "mean at the end",
            _mean_at_the_end,
            "The scales' mean is multiplied at the end: each partial product has its own two.",
        ),
        Mutant(
            "not spread",
            lambda a, a_scale, b, b_scale: in_parts(
                a, a_scale, b, b_scale, right=lambda s, i: s[:, i]
            ),
            "A block's scale serves 128 columns: b_scale[:, i].repeat_interleave(128).",
        ),
        Mutant(
            "first block",
            lambda a, a_scale, b, b_scale: in_parts(
                a, a_scale, b, b_scale, right=lambda s, i: s[0, i]
            ),
            "Only the scales of b's first 128 rows are used.",
        ),
        Mutant(
            "spread in turn",
            lambda a, a_scale, b, b_scale: in_parts(
                a, a_scale, b, b_scale, right=lambda s, i: s[:, i].repeat(128)
            ),
            "b's scales alternate: neighbours share one, repeat_interleave and not repeat.",
        ),
        Mutant(
            "a only",
            lambda a, a_scale, b, b_scale: in_parts(a, a_scale, b, b_scale, right=lambda s, i: 1.0),
            "b_scale is not used.",
        ),
        Mutant(
            "b only",
            lambda a, a_scale, b, b_scale: in_parts(a, a_scale, b, b_scale, left=lambda s, i: 1.0),
            "a_scale is not used.",
        ),
        Mutant("no scales", lambda a, _a, b, _b: a.float() @ b.float().T, "No scale is used."),
        Mutant("not transposed", _not_transposed, "b is (n, k): multiply by its transpose."),
        Mutant(
            "sum in BF16",
            lambda a, a_scale, b, b_scale: in_parts(
                a, a_scale, b, b_scale, keep=lambda out: out.bfloat16().float()
            ),
            "The sum is kept in BF16: float32, or every step rounds it.",
        ),
        Mutant(
            "overwritten",
            lambda a, a_scale, b, b_scale: in_parts(
                a, a_scale, b, b_scale, join=lambda old, new: new
            ),
            "Only the last partial product is left: add them up.",
        ),
        Mutant("divided", _divided, "Divided by the scales: x is x_fp8 * scale."),
        Mutant("turned", _turned, "This is the transpose: a's rows come first, (m, n)."),
    ],
)
