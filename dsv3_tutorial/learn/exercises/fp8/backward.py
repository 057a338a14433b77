"""A linear layer's gradients in FP8: which axis a tile lies along."""

import torch
from torch import Tensor

from dsv3_tutorial.fp8.quant import (
    dequantize_blocks,
    dequantize_tiles,
    quantize_blocks,
    quantize_tiles,
)
from dsv3_tutorial.learn.draw import randn
from dsv3_tutorial.learn.registry import Case, Exercise, Mutant


def by_tiles(t: Tensor) -> Tensor:
    """t (..., n) through tiles of 1 x 128 and back, float32."""
    return dequantize_tiles(*quantize_tiles(t))


def by_small_tiles(t: Tensor) -> Tensor:
    """t (..., n) through tiles of 1 x 16 and back, float32."""
    return dequantize_tiles(*quantize_tiles(t, tile=16), tile=16)


def by_blocks(t: Tensor) -> Tensor:
    """t (m, n) through blocks of 128 x 128 and back, float32."""
    return dequantize_blocks(*quantize_blocks(t))


def by_small_blocks(t: Tensor) -> Tensor:
    """t (m, n) through blocks of 16 x 16 and back, float32."""
    return dequantize_blocks(*quantize_blocks(t, (16, 16)), block=(16, 16))


def exact(t: Tensor) -> Tensor:
    """t as it is."""
    return t


def _layer(seed: int, m: int, n: int, k: int, tiles=by_tiles, blocks=by_blocks, dtype=None):
    def make() -> tuple:
        dy, x, w, loud = randn(seed, (m, n), (m, k), (n, k), (m, 1))
        dy, x, w = (t.to(dtype or torch.float32) for t in (dy * torch.exp(loud), x, w))
        return dy, x, w, tiles, blocks

    return make


def _nothing(dy, x, w, tiles, blocks):
    return dy.float() @ w.float(), dy.float().T @ x.float()


def _right(dy, x, w, tiles, blocks):
    return tiles(dy) @ blocks(w), tiles(dy.T) @ tiles(x.T).T


def _results_rounded(first: str, second: str, products=_nothing):
    """The products rounded, each by "tiles" or by "blocks"."""

    def gradients(dy, x, w, tiles, blocks):
        by = {"tiles": tiles, "blocks": blocks}
        dx, dw = products(dy, x, w, tiles, blocks)
        return by[first](dx), by[second](dw)

    return gradients


def _twice(*names: str):
    """Those that dw takes already rounded along their channels, and rounds again."""

    def gradients(dy, x, w, tiles, blocks):
        first, second = tiles(dy) if "dy" in names else dy, tiles(x) if "x" in names else x
        return tiles(dy) @ blocks(w), tiles(first.T) @ tiles(second.T).T

    return gradients


def _once(dy, x, w, tiles, blocks):
    return tiles(dy) @ blocks(w), tiles(dy).T @ tiles(x)


def _once_dy(dy, x, w, tiles, blocks):
    return tiles(dy) @ blocks(w), tiles(dy).T @ tiles(x.T).T


def _once_x(dy, x, w, tiles, blocks):
    return tiles(dy) @ blocks(w), tiles(dy.T) @ tiles(x)


def _dy_by_blocks_in_dx(dy, x, w, tiles, blocks):
    return blocks(dy) @ blocks(w), tiles(dy.T) @ tiles(x.T).T


def _dy_by_blocks(dy, x, w, tiles, blocks):
    return blocks(dy) @ blocks(w), blocks(dy.T) @ tiles(x.T).T


_DW_BLOCKS = "In dw's operands there are blocks: tiles for both, blocks are for weights."
_RESULTS = "The results are rounded, not the operands: round the operands, and keep the sum wide."
_TOO = "The results are rounded too: only the operands are, and the sum stays wide."
_ROUNDED_TWICE = (
    "Rounded twice for dw, along the channels and then along the tokens: {}. Each time loses: "
    "tiles(t.T), of t as it comes."
)

LINEAR_BACKWARD = Exercise(
    name="fp8.linear_backward",
    reference="dsv3_tutorial.fp8.linear:linear_gradients",
    cases=[
        Case("nothing rounded: the products alone", _layer(0, 4, 6, 5, exact, exact)),
        Case("20 tokens, tiles of 128", _layer(1, 20, 136, 24)),
        Case("tiles of 16", _layer(2, 40, 32, 48, by_small_tiles, by_small_blocks)),
        Case("as many tokens as channels", _layer(3, 32, 32, 32, by_small_tiles), hidden=True),
        Case("one token", _layer(4, 1, 144, 40), hidden=True),
        Case("BF16", _layer(5, 24, 40, 136, dtype=torch.bfloat16), hidden=True),
        Case("more tokens than a tile", _layer(6, 140, 24, 16), hidden=True),
    ],
    hints=[
        "Without rounding, dx = dy @ w sums over n, and dw = dy.T @ x sums over the tokens.",
        "tiles(t) rounds along t's last axis, which must be the axis that is summed: for dx, "
        "tiles(dy) @ blocks(w).",
        "For dw the tokens are summed: turn first, tiles(dy.T) and tiles(x.T), both with the "
        "tokens last; dw = tiles(dy.T) @ tiles(x.T).T.",
    ],
    difficulty=4,
    importance=5,
    minutes=8,
    lines=3,
    mutants=[
        Mutant(
            "rounded once",
            _once,
            "dw sums over the tokens, but its tiles lie along the channels: turn first, then tile.",
        ),
        Mutant(
            "dy rounded once",
            _once_dy,
            "dy's tiles for dw lie along n: dw sums over the tokens, so tiles(dy.T).",
        ),
        Mutant(
            "x rounded once",
            _once_x,
            "x's tiles lie along k: dw sums over the tokens, so tiles(x.T).T.",
        ),
        Mutant(
            "w exact",
            lambda dy, x, w, tiles, blocks: (tiles(dy) @ w.float(), tiles(dy.T) @ tiles(x.T).T),
            "w is not rounded: both operands of a product are in FP8.",
        ),
        Mutant(
            "dy exact",
            lambda dy, x, w, tiles, blocks: (
                dy.float() @ blocks(w),
                dy.float().T @ tiles(x.T).T,
            ),
            "dy is not rounded: both operands of a product are in FP8.",
        ),
        Mutant(
            "x exact",
            lambda dy, x, w, tiles, blocks: (tiles(dy) @ blocks(w), tiles(dy.T) @ x.float()),
            "x is not rounded: both operands of a product are in FP8.",
        ),
        Mutant(
            "w in tiles",
            lambda dy, x, w, tiles, blocks: (tiles(dy) @ tiles(w), tiles(dy.T) @ tiles(x.T).T),
            "w goes through tiles: a weight has blocks, the same both ways round.",
        ),
        Mutant(
            "w in tiles along n",
            lambda dy, x, w, tiles, blocks: (tiles(dy) @ tiles(w.T).T, tiles(dy.T) @ tiles(x.T).T),
            "w goes through tiles: a weight has blocks, the same both ways round.",
        ),
        Mutant(
            "both in blocks",
            lambda dy, x, w, tiles, blocks: (tiles(dy) @ blocks(w), blocks(dy.T) @ blocks(x)),
            _DW_BLOCKS,
        ),
        Mutant(
            "dy in blocks, for dw",
            lambda dy, x, w, tiles, blocks: (tiles(dy) @ blocks(w), blocks(dy.T) @ tiles(x.T).T),
            _DW_BLOCKS,
        ),
        Mutant(
            "x in blocks",
            lambda dy, x, w, tiles, blocks: (tiles(dy) @ blocks(w), tiles(dy.T) @ blocks(x)),
            _DW_BLOCKS,
        ),
        Mutant(
            "all in blocks",
            lambda dy, x, w, tiles, blocks: (blocks(dy) @ blocks(w), blocks(dy.T) @ blocks(x)),
            "All goes through blocks, where tokens share a scale: blocks are for w alone.",
        ),
        Mutant(
            "dx exact",
            lambda dy, x, w, tiles, blocks: (dy.float() @ w.float(), tiles(dy.T) @ tiles(x.T).T),
            "dx's operands are not rounded: tiles(dy) and blocks(w).",
        ),
        Mutant(
            "dw exact",
            lambda dy, x, w, tiles, blocks: (tiles(dy) @ blocks(w), dy.float().T @ x.float()),
            "dw's operands are not rounded: tiles for both, along the tokens.",
        ),
        Mutant(
            "dy turned, for dx",
            lambda dy, x, w, tiles, blocks: (tiles(dy.T).T @ blocks(w), tiles(dy.T) @ tiles(x.T).T),
            "dy's tiles for dx lie along the tokens: dx sums over n, so tiles(dy).",
        ),
        Mutant(
            "dy in blocks",
            _dy_by_blocks,
            "dy goes through blocks, where tokens share a scale: so a run diverged. Use tiles.",
        ),
        Mutant(
            "dy in blocks, for dx",
            _dy_by_blocks_in_dx,
            "In dx, dy goes through blocks, where 128 tokens share a scale: tiles(dy). With blocks "
            "there a run diverged.",
        ),
        Mutant("nothing", _nothing, "Nothing is rounded: all four operands go through FP8."),
        Mutant("results", _results_rounded("tiles", "tiles"), _RESULTS),
        Mutant("results, dw in blocks", _results_rounded("tiles", "blocks"), _RESULTS),
        Mutant("results in blocks", _results_rounded("blocks", "blocks"), _RESULTS),
        Mutant("results too", _results_rounded("tiles", "tiles", _right), _TOO),
        Mutant("results too, dw in blocks", _results_rounded("tiles", "blocks", _right), _TOO),
        Mutant("twice", _twice("dy", "x"), _ROUNDED_TWICE.format("dy and x")),
        Mutant("dy twice", _twice("dy"), _ROUNDED_TWICE.format("dy")),
        Mutant("x twice", _twice("x"), _ROUNDED_TWICE.format("x")),
        Mutant(
            "w transposed",
            lambda dy, x, w, tiles, blocks: (tiles(dy) @ blocks(w).T, tiles(dy.T) @ tiles(x.T).T),
            "dx = dY W: w is (n, k) and stays as it is.",
        ),
        Mutant(
            "dw not transposed",
            lambda dy, x, w, tiles, blocks: (tiles(dy) @ blocks(w), tiles(dy) @ tiles(x)),
            "dW = dY^T X: dY must be turned.",
        ),
        Mutant(
            "dw turned",
            lambda dy, x, w, tiles, blocks: (tiles(dy) @ blocks(w), tiles(x.T) @ tiles(dy.T).T),
            "dw is (k, n) here: a gradient has its weight's shape, (n, k).",
        ),
        Mutant(
            "swapped",
            lambda dy, x, w, tiles, blocks: (tiles(dy.T) @ tiles(x.T).T, tiles(dy) @ blocks(w)),
            "dx comes first, then dw.",
        ),
    ],
)
